"""A run's record: `metrics.jsonl`, TensorBoard files, and on screen the progress, the evaluations and the result."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from fcvit_jax import optim
from fcvit_jax.data.loader import Data
from fcvit_jax.devices.hosts import say
from fcvit_jax.devices.sharding import bytes_per_device
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import FCViT
from fcvit_jax.run.state import TrainState

# Where PyTorch is installed, tensorboardX would import it for an annotation: slow, and with CUDA libraries of its own.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.summary import scalar  # noqa: E402

if _torch is None:
    del sys.modules["torch"]


class MetricsWriter:
    """Appends metrics to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`; only the first host writes.

    Args:
      workdir: the run's folder.
      step: the step that the run continues from; lines beyond it are dropped, since they will be written again.
      evaluated: the step of its last evaluation; evaluations of later steps are dropped likewise.
      steps_per_epoch: updates in an epoch.

    Raises:
      UserError: the files cannot be written.
    """

    def __init__(self, workdir: Path, step: int, evaluated: int, steps_per_epoch: int):
        self._steps_per_epoch = steps_per_epoch
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
            # Not the usual SummaryWriter: it writes in a thread, and a full disk would stop that and then hang the run.
            (workdir / "tensorboard").mkdir(exist_ok=True)
            self._tensorboard = EventsWriter(str(workdir / "tensorboard" / "events"))
            # TensorBoard then forgets what it has seen of later steps.
            start = SessionLog(status=SessionLog.START)
            self._tensorboard.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

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
            for name, value in metrics.items():
                summary = scalar(name, value)
                self._tensorboard.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._tensorboard.flush()

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
        return json.loads(line)["step"] <= (evaluated if "eval/loss" in line else step)
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
        if self._start is None:  # the first step of a leg compiles, or refills the loader
            self._start, self._since, self._wait = now, step, 0.0
        if step % self._log_every and step != self._total:
            return
        shown, rates = {"loss": f"{metrics['train/loss']:.3f}"}, ""
        # Not of the odd steps at the end of a run: the last is noted without the wait for data that others include.
        if step > self._since and step % self._log_every == 0:
            rate = (step - self._since) / (now - self._start)
            metrics["train/images_per_second"] = rate * self._batch_size
            metrics["train/data_wait"] = min(self._wait / (now - self._start), 1.0)
            shown["img/s"] = f"{rate * self._batch_size:.0f}"
            rates = f"  {shown['img/s']} img/s  {tqdm.format_interval((self._total - step) / rate)} left"
            self._start, self._since, self._wait = now, step, 0.0
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            say(f"step {step}/{self._total}  loss {shown['loss']}{rates}")
        self._writer.write(step, metrics)

    def resume(self) -> None:
        """Starts the clock anew, after an evaluation or a checkpoint."""
        self._start = None

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def describe_run(
    config: ConfigDict,
    data: Data,
    mesh: Mesh,
    model: FCViT,
    abstract: TrainState,
    schedule: optax.Schedule,
    total: int,
) -> str:
    """The first line of a run: what runs where, for how many steps, and at which learning rate."""
    processes, parameters = jax.process_count(), sum(x.size for x in jax.tree.leaves(abstract.params))
    group = model.bn_group_size or data.batch_size // config.train.accumulate
    lr, lr_batch_size = config.optim.lr, config.optim.lr_batch_size
    base = optim.scale_lr(lr, lr_batch_size, data.batch_size)
    scaled = f" (optim.lr {lr:.3g} x batch {data.batch_size} / {lr_batch_size})" if lr_batch_size else ""
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
            f"learning rate {base:.3g}{scaled}, at most {highest:.3g} in this run",
        ]
    )


def describe_accuracy(result: Mapping[str, float]) -> str:
    """Top-1 and top-5, which `result` has as fractions, in percent."""
    return f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}"


def describe_evaluation(metadata: Mapping[str, Any], epoch: float) -> str:
    """The line after an evaluation, from a checkpoint's metadata."""
    result, best = metadata["evaluated"], metadata["best"]
    return (
        f"epoch {epoch:.4g}, step {result['step']}: {describe_accuracy(result)}, loss {result['loss']:.4f}, "
        f"over {result['count']} examples (best top-1 {best['top1']:.2%} at step {best['step']})"
    )


def describe_end(metadata: Mapping[str, Any], workdir: Path) -> str:
    """The last line of a run that has reached its end."""
    result, best = metadata["evaluated"], metadata["best"]
    return (
        f"done: final {describe_accuracy(result)}; best {describe_accuracy(best)} at step {best['step']}; "
        f"over {result['count']} examples. Checkpoints: {workdir / 'checkpoints' / str(result['step'])} and "
        f"{workdir / 'best' / str(best['step'])}"
    )
