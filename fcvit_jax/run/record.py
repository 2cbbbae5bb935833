"""What a run records: metrics.jsonl, TensorBoard files and traces; and what it shows: progress and results."""

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

from fcvit_jax import freezing
from fcvit_jax.data.loader import Data
from fcvit_jax.devices import storage
from fcvit_jax.devices.sharding import bytes_per_device
from fcvit_jax.errors import UserError, log
from fcvit_jax.run.config import group_size
from fcvit_jax.run.results import as_json, best_metric
from fcvit_jax.run.state import TrainState


class _TensorBoard:
    """Writes TensorBoard's event files."""

    def __init__(self, folder: Path, first_step: int):
        # tensorboardX imports PyTorch for an annotation, if it is installed: slow, and it loads CUDA libraries again.
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
        # SummaryWriter writes in a thread. A full disk would stop that thread, and then the run would hang.
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        # This tells TensorBoard to forget this step and later ones, which a resumed run writes again.
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
      step: the step from which the run continues. Lines of later steps are dropped, since they are written again.
      evaluated: the step of the last evaluation. Evaluations of later steps are dropped as well.
      steps_per_epoch: updates in an epoch.
      on_metrics: on_metrics(step, metrics) is called with every line that is written.

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
        self._files = storage.GrowingFiles(workdir)
        with self._writing():
            kept, first = [], step + 1
            if storage.is_file(self._path):
                for line in storage.read_text(self._path, errors="replace").splitlines():
                    metrics = _parsed(line)  # None: cut off by a kill
                    is_evaluation = any(name.startswith("eval/") for name in metrics or ())
                    if metrics is None or metrics["step"] > (evaluated if is_evaluation else step):
                        first = min(first, metrics["step"] if metrics else first)
                    else:
                        kept.append((line, metrics))
                storage.replace_text(self._path, "".join(f"{line}\n" for line, _ in kept))
            self._file = self._files.local("metrics.jsonl").open("a")
            self._tensorboard = _TensorBoard(self._files.local("tensorboard"), first)
            for _, metrics in kept:  # what TensorBoard is told to forget together with what is dropped
                if metrics["step"] >= first:
                    values = {name: x for name, x in metrics.items() if "/" in name and isinstance(x, int | float)}
                    self._tensorboard.write(metrics["step"], values)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one line: the step (updates done), the epoch, and the metrics by name, such as "train/loss".

        Raises:
          UserError: the files cannot be written, for example on a full disk.
        """
        if self._file is None:
            return
        epoch = round(step / self._steps_per_epoch, 4)
        with self._writing():
            self._file.write(as_json({"step": step, "epoch": epoch, **metrics}) + "\n")
            self._file.flush()
            self._tensorboard.write(step, metrics)
        if self._on_metrics is not None:
            self._on_metrics(step, dict(metrics))

    def keep(self) -> None:
        """Makes sure that all lines are in the run's folder; to be called before a checkpoint that comes after them.

        Raises:
          UserError: they could not be written.
        """
        if self._file is not None:
            with self._writing():
                self._files.keep()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            for file in (self._file, self._tensorboard, self._files):
                with contextlib.suppress(OSError, UserError):  # `write` has reported it
                    file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {storage.words(error)}. Fix this, then run the same command again."
            ) from error


def _parsed(line: str) -> dict[str, Any] | None:
    """The metrics of a line of metrics.jsonl; None if it is no such line."""
    try:
        metrics = json.loads(line)
        return metrics if isinstance(metrics["step"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class Progress:
    """Shows the progress and computes the rates: a bar on a terminal, elsewhere a line every `log_every` steps.

    Args:
      writer: where the metrics go.
      step: updates done so far.
      total: updates of the whole run.
      batch_size: images in an update, over all devices.
      log_every: updates between two lines of the record.
    """

    def __init__(self, writer: MetricsWriter, step: int, total: int, batch_size: int, log_every: int):
        self._writer, self._total, self._batch_size, self._log_every = writer, total, batch_size, log_every
        # disable=None: shown only if stderr is a terminal.
        first = jax.process_index() == 0
        self._bar = tqdm(
            total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05, disable=None if first else True
        )
        self._start = None
        self._wait = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def update(self, step: int, metrics: dict[str, float], done: float | None = None) -> None:
        """Records a finished step. Every `log_every` steps it writes the metrics and the rates since the last time.

        Args:
          step: updates done after this step.
          metrics: the step's metrics.
          done: when the step finished, by `time.perf_counter`; None: now.
        """
        self._bar.update()
        now = time.perf_counter() if done is None else done
        if self._start is None:  # the first step after a pause is not timed: it waits for the loader to fill
            self._start, self._since, self._wait = now, step, 0.0
        if step % self._log_every and step != self._total:
            return
        shown, rates = {"loss": f"{metrics['train/loss']:.3f}"}, ""
        # No rate for a shorter interval at the end: its last step does not include a wait for data and would look fast.
        # Steps that an accelerator finishes while the next are under way may be noted out of order.
        if step > self._since and step % self._log_every == 0 and now > self._start:
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
        """Restarts the clock after an evaluation or a checkpoint."""
        self._start = None

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


class Profiler:
    """Writes a trace of some steps by JAX's profiler, for TensorBoard or xprof.

    Args:
      workdir: the run's folder; the trace goes to profile/ in it.
      steps: (first, last): the updates from first to last are traced; (): none.
    """

    def __init__(self, workdir: Path, steps: Sequence[int]):
        self._files = storage.GrowingFiles(workdir)
        self._folder = workdir / "profile"
        self._first, self._last = steps or (0, 0)
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Starts the trace at the first step to trace, and marks the step in it. Steps count from 1."""
        if number == self._first:
            jax.profiler.start_trace(self._files.local("profile"))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, metrics: Mapping[str, jax.Array]) -> None:
        """Ends the trace after its last step; waits for that step's metrics first."""
        if self._tracing and number >= self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends the trace, if one has been started."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._files.keep()
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
    """The first line of a run: devices, network, data, number of steps and learning rate."""
    processes, parameters = jax.process_count(), sum(x.size for x in jax.tree.leaves(abstract.variables["params"]))
    groups = ""
    if hasattr(model, "bn_group_size"):
        groups = f", BatchNorm groups of {group_size(model) or data.batch_size // config.train.accumulate}"
    frozen = ""
    if "freeze" in config.optim and config.optim.freeze:
        params = abstract.variables["params"]
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(freezing.frozen(params, config.optim.freeze)), strict=True)
        frozen = f" ({sum(x.size for x, is_frozen in pairs if is_frozen):,} frozen)"
    scaled = ""
    if "lr_batch_size" in config.optim and config.optim.lr_batch_size:
        scaled = f" (optim.lr {config.optim.lr:.3g} x batch {data.batch_size} / {config.optim.lr_batch_size})"
    # A constant schedule answers with one number.
    highest = float(np.max(schedule(np.append(np.arange(0, total, data.steps_per_epoch), total - 1))))
    return ", ".join(
        [
            f"{mesh.size} of {jax.device_count()} {mesh.devices.flat[0].device_kind} devices in {processes} "
            f"process{'es' * (processes > 1)}",
            f"mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}",
            f"{parameters:,} parameters{frozen}, computing in {jnp.dtype(model.dtype)}",
            f"{bytes_per_device(abstract) / 2**20:.1f} MiB of state per device",
            f"batch {data.batch_size}{groups}",
            f"{data.num_train:,} training and {data.num_eval:,} validation images",
            f"{total:,} steps, {data.steps_per_epoch:,} an epoch",
            f"learning rate{scaled} at most {highest:.3g} in this run",
        ]
    )


def describe_evaluation(task: ModuleType, evaluated: Mapping[str, Any], best: Mapping[str, Any], epoch: float) -> str:
    """The line after an evaluation. `evaluated` and `best` hold metrics and "step", of it and of the best one."""
    metric = best_metric(task, best)
    return (
        f"epoch {epoch:.4g}, step {evaluated['step']}: {task.describe(evaluated)}, over {evaluated['count']} examples "
        f"(best {metric} {best[metric]:.2%} at step {best['step']})"
    )


def describe_end(task: ModuleType, evaluated: Mapping[str, Any], best: Mapping[str, Any], workdir: Path) -> str:
    """The last line of a run that has finished; arguments as in `describe_evaluation`."""
    return (
        f"done: final {task.describe(evaluated)}; best {task.describe(best)} at step {best['step']}; "
        f"over {evaluated['count']} examples. Checkpoints: {workdir / 'checkpoints' / str(evaluated['step'])} and "
        f"{workdir / 'best' / str(best['step'])}"
    )
