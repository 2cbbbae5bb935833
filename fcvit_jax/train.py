"""The loop, from a config to the last evaluation, for every task."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from fcvit_jax.data import loader
from fcvit_jax.devices.hosts import errors_on_all_processes
from fcvit_jax.devices.sharding import global_batch
from fcvit_jax.devices.stopping import ProcessBatches, StopSignal
from fcvit_jax.errors import UserError, log
from fcvit_jax.evaluate import evaluate
from fcvit_jax.run import config as run_config
from fcvit_jax.run import disk, results
from fcvit_jax.run.checkpoint import Checkpointer
from fcvit_jax.run.opening import Run, compile_in_background, kept_programs, open_run
from fcvit_jax.run.record import (
    MetricsWriter,
    Profiler,
    Progress,
    describe_end,
    describe_evaluation,
    describe_run,
)
from fcvit_jax.run.state import TrainState, create_state, init_variables
from fcvit_jax.run.step import CompiledStep


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a run knows of its evaluations; replaced by another, never changed.

    Attributes:
      evaluated: "step" and the metrics of the last one; step 0: there was none.
      best: likewise of the best one.
    """

    evaluated: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"step": 0})
    best: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"step": 0})


class Loop(NamedTuple):
    """What is open while a run trains.

    Attributes:
      checkpointer, writer, progress, profiler: what writes.
      stop: says when to stop early.
      batches: this process's share of the batches from the first step on.
      step: the compiled training step.
    """

    checkpointer: Checkpointer
    writer: MetricsWriter
    progress: Progress
    profiler: Profiler
    stop: StopSignal
    batches: ProcessBatches
    step: CompiledStep


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    *,
    on_metrics: Callable[[int, dict[str, float]], None] | None = None,
    on_stop: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Trains a network, or resumes its training, and evaluates it every few epochs.

    Example::

        from fcvit_jax.configs import digits

        fcvit_jax.show_log()
        metrics = fcvit_jax.train_and_evaluate(digits.get_config(), "runs/digits")
        metrics["count"]

    Args:
      config: as `configs/imagenet.py` lists it, key by key.
      workdir: the run's folder: config.json, metrics.jsonl, tensorboard/, checkpoints/, best/.
      on_metrics: called on the first process with every line of metrics.jsonl: on_metrics(step, {"train/loss": ...}).
      on_stop: called with the number of the signal that has stopped the run before its end, if one has.

    Returns:
      What the task's `finish` returned for the last evaluation; empty where there was none yet.

    Raises:
      UserError: the config, the data or the folder is not usable, or the run cannot go on; the message says why.
    """
    run = open_run(config, workdir)
    with ExitStack() as stack:
        checkpointer = stack.enter_context(closing(Checkpointer(run.workdir, **run.config.checkpoint)))
        stack.enter_context(kept_programs(run))
        log.info(describe_run(run.config, run.data, run.mesh, run.model, run.abstract, run.schedule, run.total))
        resumed = _resume(run, checkpointer)
        pretrained = None if resumed else _load_pretrained(run)
        compiled = compile_in_background(run)  # while the weights are drawn
        state, notes = resumed or (_start(run, pretrained), Notes())
        loop = _open_loop(run, checkpointer, state, notes, compiled.result(), on_metrics, stack)
        while True:
            step = int(state.step)
            is_due = step == run.total or (step > 0 and step % run.eval_steps == 0)
            if is_due and notes.evaluated["step"] != step and not loop.stop.received:
                notes = _evaluate(run, loop, state, notes)
            if step:
                _save(run, loop, state, notes)
            if step == run.total or loop.stop.received:
                break
            state = _train(run, loop, state)
        checkpointer.wait()

    if notes.evaluated["step"] < run.total:
        log.info("stopped at step %d of %d; the same command goes on from here", step, run.total)
        if on_stop is not None:
            on_stop(loop.stop.number)
    else:
        log.info(describe_end(run.task, notes.evaluated, notes.best, run.workdir))
    return {name: value for name, value in notes.evaluated.items() if name != "step"}


def _resume(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, Notes] | None:
    """The state and the notes of the run's newest checkpoint; None where there is no checkpoint."""
    restored = checkpointer.restore(run.abstract)
    if restored is None:
        return None
    state, metadata = restored
    step, evaluated, best = int(state.step), metadata["evaluated"], metadata["best"]
    if step > run.total:
        raise UserError(f"{run.workdir} is at step {step}, beyond the {run.total} steps of this config.")
    run_config.check_data(run.config, metadata, run.describe())
    # A best of this very step is not lost: the run was killed before it was written, and the loop writes it again.
    if best["step"] != step and not checkpointer.has_best(best["step"]):
        if best["step"] and not checkpointer.has_best(step):
            log.info("the best checkpoint, of step %d, is gone: the best from step %d on is kept", best["step"], step)
        best = evaluated if evaluated["step"] == step else {"step": 0}
    log.info("resuming at step %d of %d", step, run.total)
    return state, Notes(evaluated, best)


def _load_pretrained(run: Run) -> dict[str, Any] | None:
    """The weights that the config names to start from, if any."""
    if not run.config.init_from:
        return None
    with errors_on_all_processes():
        variables = run.task.load_pretrained(run.config.init_from, run.model, run.data)
    log.info("starting from the weights of %s", run.config.init_from)
    return variables


def _start(run: Run, pretrained: dict[str, Any] | None) -> TrainState:
    """The state that the run begins with."""
    variables = pretrained
    if variables is None:
        variables = init_variables(run.task.init_variables, run.model, run.mesh, run.config.seed)
    return create_state(variables, run.tx, run.abstract)


def _open_loop(
    run: Run,
    checkpointer: Checkpointer,
    state: TrainState,
    notes: Notes,
    step: CompiledStep,
    on_metrics: Callable | None,
    stack: ExitStack,
) -> Loop:
    """Opens what the loop needs from the state's step on; the stack closes it."""
    start, data, options = int(state.step), run.data, run.config.train
    with errors_on_all_processes():
        run_config.write_config(run.config, run.workdir)
        writer = MetricsWriter(run.workdir, start, notes.evaluated["step"], data.steps_per_epoch, on_metrics)
    stop = stack.enter_context(StopSignal())
    stack.enter_context(closing(writer))
    share = jax.process_index(), jax.process_count()
    batches = ProcessBatches(
        loader.train_batches(data, run.config.seed, start, run.total - start, *share),
        run.total - start,
        lambda i: loader.process_shapes(run.shapes[loader.train_bucket(data, run.config.seed, start + i)]),
    )
    stack.enter_context(closing(batches))
    progress = stack.enter_context(closing(Progress(writer, start, run.total, data.batch_size, options.log_every)))
    profiler = stack.enter_context(closing(Profiler(run.workdir, options.profile_steps)))
    return Loop(checkpointer, writer, progress, profiler, stop, batches, step)


def _train(run: Run, loop: Loop, state: TrainState) -> TrainState:
    """Trains until the next evaluation or checkpoint is due, or until the run is to stop."""
    step, pending = int(state.step), None
    until = min(run.total, *(step - step % every + every for every in (run.eval_steps, loop.checkpointer.save_every)))
    loop.progress.resume()
    while step < until and not loop.stop.received:
        with loop.progress.waiting():
            batch = next(loop.batches)
        step += 1
        with loop.profiler.step(step):
            state, metrics = loop.step(state, global_batch(batch, run.mesh))
        # On a CPU the step is done by now, on an accelerator it has only begun.
        done = time.perf_counter() if metrics["loss"].is_ready() else None
        del batch  # its memory is shared with a worker, and must not be used after the loader is closed
        if pending:
            _report(loop, *pending)  # while the next step runs, so that the device never waits for the host
        pending = step, metrics, done
        loop.profiler.after(step, metrics)
        loop.stop.poll()
    if pending:
        _report(loop, *pending)
    loop.batches.check()
    return state


def _report(loop: Loop, step: int, metrics: Mapping[str, jax.Array], done: float | None) -> None:
    """Records the metrics of a step, where its numbers are good; `done` as in `Progress.update`."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if numbers := results.not_finite(values):
        raise _diverged(loop.checkpointer, step, numbers)
    loop.progress.update(step, {f"train/{name}": value for name, value in values.items()}, done)


def _diverged(checkpointer: Checkpointer, step: int, numbers: str) -> UserError:
    """The error of a step after which some numbers are not finite."""
    return UserError(
        f"Step {step}: {numbers}. This state was not saved; {checkpointer.describe_newest()}.\n"
        "Try a lower --config.optim.lr, a longer warm-up (optim.warmup_epochs), clipped gradients "
        "(optim.clip_norm=1.0) or model.dtype=float32, with --config.resume_with_changes=True to go on from there."
    )


def _evaluate(run: Run, loop: Loop, state: TrainState, notes: Notes) -> Notes:
    """Evaluates the state; returns the notes with the result, or as they are if the run is to stop."""
    # Evaluate with the batch size of one part of a training batch; the full batch may not fit in memory.
    data = dataclasses.replace(run.data, batch_size=run.data.batch_size // run.config.train.accumulate)
    try:
        result = evaluate(run.task, run.model, state.eval_variables, data, run.mesh, loop.stop.watch)
    except UserError:  # an image is broken; the run continues from here once the user has replaced it
        _save(run, loop, state, notes)
        loop.checkpointer.wait()
        raise
    if loop.stop.received:
        return notes
    step, metric = int(state.step), results.best_metric(run.task, result)
    if numbers := results.not_finite(result):
        raise _diverged(loop.checkpointer, step, f"evaluation: {numbers}")
    evaluated = {"step": step, **result}
    is_best = result[metric] > notes.best.get(metric, -math.inf)
    notes = Notes(evaluated, evaluated if is_best else notes.best)
    loop.writer.write(step, {f"eval/{name}": value for name, value in results.numbers(result).items()})
    results.write_evaluation(run.workdir, evaluated)
    if table := results.describe_rows(result):
        log.info("%s", table)
    log.info(describe_evaluation(run.task, evaluated, notes.best, step / run.data.steps_per_epoch))
    return notes


def _save(run: Run, loop: Loop, state: TrainState, notes: Notes) -> None:
    """Saves the state as the newest checkpoint, and as the best where it is."""
    checkpointer = loop.checkpointer
    with errors_on_all_processes():
        loop.writer.keep()  # a run that resumes from this checkpoint does not write these lines again
    metadata = run.describe() | {"evaluated": dict(notes.evaluated), "best": dict(notes.best)}
    try:
        checkpointer.save(state, metadata)
    except disk.NotFinite as error:
        raise _diverged(checkpointer, int(state.step), str(error)) from error
    if notes.best["step"] == int(state.step):
        checkpointer.save(state, metadata, best=True)
