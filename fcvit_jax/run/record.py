"""A run's record: `metrics.jsonl`, TensorBoard files and traces, and on screen the progress and the results."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from fcvit_jax.data.loader import Data
from fcvit_jax.devices.sharding import bytes_per_device
from fcvit_jax.errors import UserError, log
from fcvit_jax.run.config import group_size
from fcvit_jax.run.state import TrainState


class _TensorBoard:
    """Writes TensorBoard's event files."""

    def __init__(self, folder: Path, first_step: int):
        # Where PyTorch is installed, tensorboardX would import it for an annotation: slow, and with CUDA libraries of
        # its own.
        had_torch = "torch" in sys.modules
        sys.modules.setdefault("torch", None)
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        finally:
            if not had_torch:
                del sys.modules["torch"]
        folder.mkdir(exist_ok=True)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        # Not the usual SummaryWriter: it writes in a thread, and a full disk would stop that and then hang the run.
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        # TensorBoard then forgets what it has seen of later steps.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Appends metrics to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`; only the first process writes.

    Args:
      workdir: the run's folder.
      step: the step that the run continues from; lines beyond it are dropped, since they will be written again.
      evaluated: the step of its last evaluation; evaluations of later steps are dropped likewise.
      steps_per_epoch: updates in an epoch.
      on_metrics: on_metrics(step, metrics) is called with what is written.

    Raises:
      UserError: the files cannot be written.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        evaluated: int,
        steps_per_epoch: int,
        on_metrics: Callable[[int, dict[str, float]], None] | None = None,
    ):
        self._steps_per_epoch = steps_per_epoch
        self._on_metrics = on_metrics
        self._file = None
        if jax.process_index() != 0:
            return
        self._path = workdir / "metrics.jsonl"
        with self._writing():
            if self._path.exists():
                kept = workdir / "metrics.jsonl.tmp"
                lines = self._path.read_text(errors="replace").splitlines(True)
                # A kill may have cut the last one off just before its end.
                kept.write_text("".join(line.rstrip("\n") + "\n" for line in lines if _is_kept(line, step, evaluated)))
                kept.replace(self._path)
            self._file = self._path.open("a")
            self._tensorboard = _TensorBoard(workdir / "tensorboard", step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one line: the step (updates done), the epoch, and the metrics by name, such as "train/loss".

        Raises:
          UserError: the disk is full, or the like.
        """
        if self._file is None:
            return
        epoch = round(step / self._steps_per_epoch, 4)
        with self._writing():
            self._file.write(json.dumps({"step": step, "epoch": epoch, **metrics}) + "\n")
            self._file.flush()
            self._tensorboard.write(step, metrics)
        if self._on_metrics is not None:
            self._on_metrics(step, dict(metrics))

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            for file in (self._file, self._tensorboard):
                with contextlib.suppress(OSError):  # `write` has told of it
                    file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}. Fix this, then run the same command again."
            ) from error


def _is_kept(line: str, step: int, evaluated: int) -> bool:
    try:
        metrics = json.loads(line)
        is_evaluation = any(name.startswith("eval/") for name in metrics)
        return metrics["step"] <= (evaluated if is_evaluation else step)
    except (ValueError, KeyError, TypeError):  # cut off when the run was killed
        return False


class Progress:
    """A bar with the time left on a terminal, a line every `log_every` steps elsewhere; and the rates behind them.

    Args:
      writer: where the metrics go.
      step: updates done so far.
      total: updates of the whole run.
      batch_size: images in an update, over all devices.
      log_every: updates between two lines of the record.
    """

    def __init__(self, writer: MetricsWriter, step: int, total: int, batch_size: int, log_every: int):
        self._writer, self._total, self._batch_size, self._log_every = writer, total, batch_size, log_every
        # disable=None: only where stderr is a terminal.
        first = jax.process_index() == 0
        self._bar = tqdm(
            total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05, disable=None if first else True
        )
        self._start = None
        self._wait = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def update(self, step: int, metrics: dict[str, float], done: float | None = None) -> None:
        """Records a finished step; every `log_every` steps writes its metrics and the rates since the last time.

        Args:
          step: updates done by then.
          metrics: of that step.
          done: when it was finished, by `time.perf_counter`; None: just now.
        """
        self._bar.update()
        now = time.perf_counter() if done is None else done
        if self._start is None:  # the first step of a leg refills the loader
            self._start, self._since, self._wait = now, step, 0.0
        if step % self._log_every and step != self._total:
            return
        shown, rates = {"loss": f"{metrics['train/loss']:.3f}"}, ""
        # No rate for a last interval that is shorter: its last step does not include a wait for data and would look too
        # fast.
        if step > self._since and step % self._log_every == 0:
            rate = (step - self._since) / (now - self._start)
            metrics["train/images_per_second"] = rate * self._batch_size
            metrics["train/data_wait"] = min(self._wait / (now - self._start), 1.0)
            shown["img/s"] = f"{rate * self._batch_size:.0f}"
            rates = f"  {shown['img/s']} img/s  {tqdm.format_interval((self._total - step) / rate)} left"
            self._start, self._since, self._wait = now, step, 0.0
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            log.info("step %d/%d  loss %s%s", step, self._total, shown["loss"], rates)
        self._writer.write(step, metrics)

    def resume(self) -> None:
        """Starts the clock anew, after an evaluation or a checkpoint."""
        self._start = None

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


class Profiler:
    """Traces some steps by JAX's profiler into a folder, for TensorBoard or xprof.

    Args:
      folder: of the trace.
      steps: (first, last): the updates from first to last are traced; (): none.
    """

    def __init__(self, folder: Path, steps: Sequence[int]):
        self._folder = folder
        self._first, self._last = steps or (0, 0)
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Goes around an update; its number counts from 1."""
        if number == self._first:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, metrics: Mapping[str, jax.Array]) -> None:
        """Ends the trace after its last update, whose metrics say when it is done."""
        if self._tracing and number >= self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            log.info("the trace of steps %d to %d is in %s", self._first, self._last, self._folder)


def describe_run(
    config: ConfigDict,
    data: Data,
    mesh: Mesh,
    model: nn.Module,
    abstract: TrainState,
    schedule: optax.Schedule,
    total: int,
) -> str:
    """The first line of a run: what runs where, for how many steps, and at which learning rate."""
    processes, parameters = jax.process_count(), sum(x.size for x in jax.tree.leaves(abstract.variables["params"]))
    group = group_size(model) or data.batch_size // config.train.accumulate
    scaled = ""
    if "lr_batch_size" in config.optim and config.optim.lr_batch_size:
        scaled = f" (optim.lr {config.optim.lr:.3g} x batch {data.batch_size} / {config.optim.lr_batch_size})"
    highest = float(schedule(np.append(np.arange(0, total, data.steps_per_epoch), total - 1)).max())
    return ", ".join(
        [
            f"{mesh.size} of {jax.device_count()} {mesh.devices.flat[0].device_kind} devices in {processes} "
            f"process{'es' * (processes > 1)}",
            f"mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}",
            f"{parameters:,} parameters, computing in {jnp.dtype(model.dtype)}",
            f"{bytes_per_device(abstract) / 2**20:.1f} MiB of state per device",
            f"batch {data.batch_size}, BatchNorm groups of {group}",
            f"{data.num_train:,} training and {data.num_eval:,} validation images",
            f"{total:,} steps, {data.steps_per_epoch:,} an epoch",
            f"learning rate{scaled} at most {highest:.3g} in this run",
        ]
    )


def describe_evaluation(task: ModuleType, evaluated: Mapping[str, Any], best: Mapping[str, Any], epoch: float) -> str:
    """The line after an evaluation; `evaluated` and `best` hold its metrics and those of the best, and their steps."""
    return (
        f"epoch {epoch:.4g}, step {evaluated['step']}: {task.describe(evaluated)}, over {evaluated['count']} examples "
        f"(best {task.BEST} {best[task.BEST]:.2%} at step {best['step']})"
    )


def describe_end(task: ModuleType, evaluated: Mapping[str, Any], best: Mapping[str, Any], workdir: Path) -> str:
    """The last line of a run that has reached its end; arguments as in `describe_evaluation`."""
    return (
        f"done: final {task.describe(evaluated)}; best {task.describe(best)} at step {best['step']}; "
        f"over {evaluated['count']} examples. Checkpoints: {workdir / 'checkpoints' / str(evaluated['step'])} and "
        f"{workdir / 'best' / str(best['step'])}"
    )


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """What of an evaluation's result are numbers, not rows."""
    return {name: value for name, value in result.items() if not isinstance(value, list)}


def describe_rows(result: Mapping[str, Any]) -> str:
    """The rows of an evaluation's result as tables, or "": fractions in percent, "-" where there is no value."""
    tables = []
    for rows in (value for value in result.values() if isinstance(value, list) and value):
        cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
        for name, *values in cells:
            texts = (f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
            tables.append(f"{name:{first}}{''.join(texts)}")
    return "\n".join(tables)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write_evaluation(workdir: Path, result: Mapping[str, Any]) -> None:
    """Writes `<workdir>/evaluation.json`, if the result has rows; only the first process writes.

    Args:
      workdir: an existing folder.
      result: "step", and what the task's `finish` returned.

    Raises:
      UserError: the file cannot be written.
    """
    if jax.process_index() != 0 or numbers(result) == dict(result):
        return
    path, unfinished = workdir / "evaluation.json", workdir / "evaluation.json.tmp"
    try:
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Fix this, then run the same command again."
        ) from error
