"""The disk format: Orbax checkpoints of a run, how damaged ones are survived, and how weights are read from them."""

import contextlib
import fcntl
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fcvit_jax.devices.hosts import check_shared, failing_together, say
from fcvit_jax.errors import UserError, check_range
from fcvit_jax.run.state import TrainState


def quieten() -> None:
    """Stops Orbax, asyncio and TensorStore from printing, at length and per thread, the errors that they also raise."""
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.msg)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda it: None if str(it.exc_value) == "Event loop is closed" else hook(it)


class _Manager(ocp.CheckpointManager):
    def __init__(self, directory: Path, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Two managers may save at once: hosts must not take a barrier of one for a barrier of the other.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
        )
        super().__init__(directory, options=options)

    def reached_preemption(self, step: int) -> bool:
        """No: Orbax would ask JAX by the step's number, `StopSignal` asks by another, and SIGTERM could be lost."""
        return False


def _lock(workdir: Path) -> TextIO:
    """Opens a file that one run at a time can hold; the system releases it however that run's process ends.

    Raises:
      UserError: another one holds it, or the folder cannot be written.
    """
    try:
        file = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"Another run is under way in {workdir}: stop it, or choose another --workdir.") from error
    except OSError:  # a file system without locks
        pass
    return file


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are saved apart, so that weights can be read without the optimiser's state."""
    items = {
        "variables": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema is None else items | {"ema": state.ema}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A checksum of every bit of an array, which is the same on any mesh, since integers add up exactly."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    # Odd weights: a change of any one element shows, and so do moved ones.
    weights = 2 * jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) + 1
    return (bits * weights).sum(dtype=jnp.uint32)


def _checksums(items: dict[str, Any], metadata: dict[str, Any]) -> dict[str, int]:
    """Checksums of what is saved; without them a flipped bit in a tensor would be read as a good one."""
    # An array at a time: as one program, thousands of them take a minute to compile.
    sums = {name: [] for name in items}
    for name, item in items.items():
        for x in jax.tree.leaves(item):
            sums[name].append(_checksum(x))
            # One at a time: several reductions across processes under way can deadlock on CPUs.
            if not getattr(x, "is_fully_replicated", True):
                jax.block_until_ready(sums[name][-1])
    checksums = {name: zlib.crc32(np.array(jax.device_get(values), np.uint32)) for name, values in sums.items()}
    return checksums | {"metadata": zlib.crc32(json.dumps(metadata, sort_keys=True).encode())}


def _check(items: dict[str, Any], metadata: dict[str, Any], expected: dict[str, int]) -> None:
    found = _checksums(items, metadata)
    wrong = [name for name in found if found[name] != expected.get(name)]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} differ from what was saved (checksum)")


def _save_args(items: dict[str, Any], metadata: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(
        **{name: ocp.args.StandardSave(item) for name, item in items.items()},
        metadata=ocp.args.JsonSave(dict(metadata)),  # written while the run goes on to change its own
        checksums=ocp.args.JsonSave(_checksums(items, metadata)),
    )


@contextlib.contextmanager
def _explained(action: str, advice: str) -> Iterator[None]:
    """Turns any error inside into a UserError."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"Could not {action}: {reason}\n{advice}") from error


def _agreed(ok: bool) -> bool:
    """Whether `ok` holds on every host."""
    return bool(np.all(multihost_utils.process_allgather(np.array(ok)))) if jax.process_count() > 1 else ok


class Checkpointer:
    """Writes a run's checkpoints: `<workdir>/checkpoints/<step>/`, the newest few, and `<workdir>/best/<step>/`.

    Saving is asynchronous; every host calls every method.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints stay.
      save_every: updates between two checkpoints.

    Raises:
      UserError: a number is out of its range, or the folder cannot be written, is not one for all hosts, or has another
        run under way in it.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 3, save_every: int = 1000):
        check_range("checkpoint", 1, keep=keep, save_every=save_every)
        workdir = local_path(workdir)
        self.save_every = save_every
        self.directory = workdir / "checkpoints"
        with _explained(f"write in {workdir}", "Choose another --workdir, or repair this one."):
            self._latest = _Manager(self.directory, keep)
            self._best = _Manager(workdir / "best", keep=1)
        check_shared(workdir)
        with failing_together():
            self._lock = _lock(workdir) if jax.process_index() == 0 else None

    def save(self, state: TrainState, metadata: dict[str, Any], *, best: bool = False) -> None:
        """Starts to save a state under its step; does nothing where that step is saved already.

        Args:
          state: the training state; may be donated as soon as this returns.
          metadata: what JSON can hold.
          best: save it as the best instead.

        Raises:
          UserError: this save or the one before it failed; earlier checkpoints are intact.
        """
        manager, step = self._best if best else self._latest, int(state.step)
        with self._saving():
            if not best:
                # The metadata names the best so far, which must be on disk first, since the run may be killed any time.
                self._best.wait_until_finished()
            # A resumed run may meet a step again that it has saved: the same state, but perhaps with the metadata of
            # before its evaluation, which every start then repeats.
            if step not in manager.all_steps():
                manager.save(step, args=_save_args(_items(state), metadata), force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read, and says what was damaged or unfinished.

        Whatever is newer than that one (damaged checkpoints, or a best from steps that are to be repeated) is moved to
        `<workdir>/set_aside/`; what is left of unfinished saves is deleted.

        Args:
          abstract: shapes, dtypes and shardings of the state, as `state.abstract_state` gives them; the mesh need not
            be the one that the checkpoint was written on.

        Returns:
          The state and its metadata; None where there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but none can be read; nothing was touched.
        """
        damaged = {}
        for step in sorted(self._latest.all_steps(), reverse=True):
            restored, reason = None, "another process failed"
            try:
                restored = self._restore_step(step, abstract)
            except Exception as error:  # whatever Orbax, TensorStore or the file system may say of a damaged one
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if _agreed(restored is not None):
                self._tidy(damaged, step)
                return restored
            damaged[step] = f"checkpoint {self.directory / str(step)} cannot be read: {reason}"
        if not damaged:
            self._tidy({}, 0)
            return None
        raise UserError(
            "\n".join(damaged.values()) + "\nNone of this run's checkpoints can be read. Nothing was changed: "
            "restore them from a copy, or choose another --workdir to start afresh.\nIf the config was changed: what a "
            "checkpoint holds depends on model, train.ema_decay and optim.head_lr_multiplier; undo such a change."
        )

    def _restore_step(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        items = {name: ocp.args.StandardRestore(item) for name, item in _items(abstract).items()}
        json_items = {name: ocp.args.JsonRestore() for name in ("metadata", "checksums")}
        restored = self._latest.restore(step, args=ocp.args.Composite(**items, **json_items))
        _check({name: restored[name] for name in items}, restored["metadata"], restored["checksums"])
        state = TrainState(**restored["variables"], **restored["optimizer"], ema=restored.get("ema"))
        return state, restored["metadata"]

    def _tidy(self, damaged: dict[int, str], step: int) -> None:
        """Sets aside what is newer than a step, and deletes what is left of saves that were killed."""
        with failing_together():  # the others wait for the first
            if jax.process_index() == 0:
                self._set_aside(damaged, step)
        self._latest.reload()
        self._best.reload()

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        newer = {self.directory / str(number): reason for number, reason in damaged.items()}
        for number in self._best.all_steps():
            if number > step:
                path = self.directory.parent / "best" / str(number)
                newer[path] = f"{path} is newer than step {step}, from which the run goes on"
        for path, reason in newer.items():
            aside = self.directory.parent / "set_aside"
            aside.mkdir(exist_ok=True)
            # Onto a new empty folder, since the same step may have been set aside before.
            path.rename(tempfile.mkdtemp(prefix=f"{path.name}-", dir=aside))
            say(f"{reason}; moved to {aside}")
        for unfinished in self.directory.parent.glob("*/*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished)
            say(f"deleted {unfinished}, a save that was not finished")

    def has_best(self, step: int) -> bool:
        """Whether the best checkpoint is of this step."""
        return step in self._best.all_steps()

    def describe_newest(self) -> str:
        """Says which checkpoint is the newest, once saves in progress are done."""
        with contextlib.suppress(Exception):  # a failed one does not count
            self._latest.wait_until_finished()
        step = self._latest.latest_step()
        return (
            "there is no checkpoint yet" if step is None else f"the newest checkpoint is {self.directory / str(step)}"
        )

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: a save failed.
        """
        with self._saving():
            self._latest.wait_until_finished()
            self._best.wait_until_finished()

    def _saving(self) -> contextlib.AbstractContextManager:
        advice = "Earlier checkpoints are intact. Free some space or repair the disk, then run the same command again."
        return _explained(f"save a checkpoint under {self.directory.parent}", advice)

    def close(self) -> None:
        """Waits for saves in progress, releases the folder and Orbax's threads; only `wait` reports failures."""
        for manager in (self._latest, self._best):
            with contextlib.suppress(Exception):  # must not hide the error that ends the run
                manager.close()
        if self._lock is not None:
            self._lock.close()


def local_path(path: str | Path) -> Path:
    """The absolute path, with ~ expanded.

    Raises:
      UserError: it is empty, or an address, such as gs://...
    """
    if not str(path):
        raise UserError("The path of the run's folder is empty.")
    if re.match(r"\w\w+:/", str(path)):  # a Path has one slash of the two
        raise UserError(f"{path} must be a path: mount the bucket, for example with gcsfuse, and give its folder.")
    return Path(path).expanduser().absolute()


def step_folders(folder: Path) -> list[Path]:
    """What looks like checkpoints in a `checkpoints` or `best` folder, which need not exist; their names are steps."""
    return [path for path in folder.glob("*") if path.name.isdigit()]


def find_step(path: str | Path) -> Path:
    """Finds the folder of one checkpoint.

    Args:
      path: a run's folder, its `checkpoints` or `best` folder (the newest step is taken), or one step's folder.

    Raises:
      UserError: there is none.
    """
    path = local_path(path)
    if not path.is_dir():
        raise UserError(f"No checkpoint at {path}: there is no such folder.")
    if (path / "variables").is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [step for step in step_folders(folder) if (step / "variables").is_dir()]
    if not steps:
        raise UserError(f"No checkpoint in {folder}: give a run's folder, its checkpoints or best folder, or a step's.")
    return max(steps, key=lambda p: int(p.name))


def load_variables(path: str | Path, *, ema: bool | None = None) -> dict[str, Any]:
    """Reads the weights of a checkpoint, as NumPy arrays.

    Example::

        variables = load_variables("runs/digits")                        # {"params": ..., "batch_stats": ...}

    Args:
      path: as in `find_step`.
      ema: the exponential moving averages instead of the plain weights; None: what evaluation uses, that is, the
        averages if the run kept them.

    Raises:
      UserError: there is no checkpoint, it holds no averages, or it cannot be read.
    """
    step = find_step(path)
    if ema is None:
        ema = (step / "ema").is_dir()
    item = step / ("ema" if ema else "variables")
    if not item.is_dir():
        raise UserError(f"{step} holds no exponential moving averages: the run did not keep them.")
    with _explained(f"read the checkpoint {step}", "It is damaged or not from fcvit_jax; try an earlier step."):
        # Without a Checkpointer around it, which would warn that a part of a checkpoint is not a whole one.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(item).tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            variables = reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        _check({item.name: variables}, load_metadata(step), _load_json(step / "checksums"))
    return variables


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what was saved beside the weights: "model" (arguments of `create_model`), "class_names", ...

    Args:
      path: as in `find_step`.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    step = find_step(path)
    with _explained(f"read the metadata of {step}", "It is damaged or not from fcvit_jax; try an earlier step."):
        return _load_json(step / "metadata")


def _load_json(item: Path) -> dict[str, Any]:
    return json.loads((item / "metadata").read_text())


def save_variables(path: str | Path, variables: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes weights as a checkpoint of their own, step 0 in a new folder.

    Args:
      path: a new or empty folder; removed again where it cannot be written.
      variables: {"params": ..., "batch_stats": ...}.
      metadata: as in `load_metadata`.

    Raises:
      UserError: the folder is not empty, or cannot be written.
    """
    path = local_path(path)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty: choose another folder.")
    with _explained(f"write {path}", "Is the disk full, or the folder not writable?"):
        try:
            with _Manager(path) as manager:
                manager.save(0, args=_save_args({"variables": variables}, metadata), force=True)
                manager.wait_until_finished()
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # else it would be refused the next time
            raise
