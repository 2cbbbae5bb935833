"""Checkpoints of a run: how they are written, and how damaged ones are survived."""

import contextlib
import glob
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from fcvit_jax.devices import storage
from fcvit_jax.devices.hosts import check_shared, errors_on_all_processes
from fcvit_jax.errors import UserError, check_range, log
from fcvit_jax.run import disk
from fcvit_jax.run.saved import load_variables
from fcvit_jax.run.state import TrainState


def silence_orbax() -> None:
    """Stops Orbax and what it uses, and Grain, from printing, at length and per thread, errors that they also raise."""
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    follows_another = re.compile(
        "Event loop is closed|Encountered error while reading array index|can only join a started process"
        "|'_UnixSelectorEventLoop' object has no attribute '_ssock'"
    )
    hook = sys.unraisablehook
    sys.unraisablehook = lambda it: None if follows_another.match(str(it.exc_value)) else hook(it)


def _glob(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """As `epath.Path.glob`, which however takes the folder's own name for a pattern too, such as "lr=[1e-3]".

    Orbax looks so for the files that it has written, and leaves out of a checkpoint what it does not find.
    """
    return map(type(self), glob.iglob(f"{glob.escape(str(self))}/{pattern}"))


class _Manager(ocp.CheckpointManager):
    def __init__(self, directory: Path, keep: int | None = None):
        if glob.escape(str(directory)) != str(directory):  # only such names need it, and it changes a library's class
            type(epath.Path(directory)).glob = _glob
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Two managers may save at once: processes must not take a barrier of one for a barrier of the other.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
        )
        super().__init__(directory, options=options)

    def reached_preemption(self, step: int) -> bool:
        """Always False: `StopSignal` polls JAX with a counter of its own, and a second poll could miss the signal."""
        return False


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _agreed(ok: bool) -> bool:
    """Whether `ok` holds on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(ok)))) if jax.process_count() > 1 else ok


class Checkpointer:
    """Writes a run's checkpoints: `<workdir>/checkpoints/<step>/`, the newest few, and `<workdir>/best/<step>/`.

    Saving is asynchronous, but the first checkpoint is read back before the run goes on; every process calls every
    method.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints stay.
      save_every: updates between two checkpoints.

    Raises:
      UserError: a number is out of its range, or the folder cannot be written, is not one for all processes, or has
        another run under way in it.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 3, save_every: int = 1000):
        check_range("checkpoint", 1, keep=keep, save_every=save_every)
        workdir = storage.run_path(workdir)
        storage.check_name(workdir)
        self.save_every = save_every
        self.directory = workdir / "checkpoints"
        self._lock, self._managers = None, []
        self._unchecked, self._read_back = [], False
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            with errors_on_all_processes():
                storage.check_access(workdir)
            with disk.explained(f"write in {workdir}", "Choose another --workdir, or repair this one."):
                self._managers.append(_Manager(self.directory, keep))
                self._managers.append(_Manager(workdir / "best", keep=1))
            self._latest, self._best = self._managers
            check_shared(workdir)
            with errors_on_all_processes():
                self._lock = storage.Lock(workdir) if jax.process_index() == 0 else None
            undo.pop_all()  # all went well

    def save(self, state: TrainState, metadata: dict[str, Any], *, best: bool = False) -> None:
        """Starts to save a state under its step; does nothing where that step is saved already.

        Args:
          state: the training state; may be donated as soon as this returns.
          metadata: what JSON can hold.
          best: save it as the best instead.

        Raises:
          UserError: this save or the one before it failed, or another run has taken the folder over; earlier
            checkpoints are intact.
          disk.NotFinite: the weights are not finite; nothing was saved.
        """
        manager, step = self._best if best else self._latest, int(state.step)
        with errors_on_all_processes():
            if self._lock is not None:  # of the first process
                self._lock.check()
        with self._saving():
            # The metadata names the best so far, which must be on disk first, since the run may be killed any time.
            self._finish([self._best] if best else self._managers)
            # After a resume this step may already be on disk. The state is identical, so skip it. Its metadata may
            # predate the evaluation; in that case each start repeats the evaluation.
            if step in manager.all_steps():
                return
            manager.save(step, args=disk.save_args(disk.items(state), metadata), force=True)
            self._unchecked.append((manager, step, disk.items(jax.tree.map(_abstract, state))))
            if not self._read_back:
                self._finish([manager])

    def _finish(self, managers: Sequence[ocp.CheckpointManager]) -> None:
        """Waits for saves under way; reads the first of this start back, of later ones only what they hold.

        Raises:
          UserError: a save cannot be read.
        """
        for manager in managers:
            manager.wait_until_finished()
        done = [saved for saved in self._unchecked if saved[0] in managers]
        self._unchecked = [saved for saved in self._unchecked if saved[0] not in managers]
        for manager, step, parts in done:
            path = manager.directory / str(step)
            with errors_on_all_processes():
                try:
                    if self._read_back:
                        disk.read(str(path), lambda path=path, parts=parts: disk.check_shapes(path, parts))
                    else:
                        for name, part in parts.items():  # one at a time, to save memory
                            self._restore_parts(manager, step, {name: part})
                except disk.Damaged as error:
                    raise UserError(
                        f"The checkpoint {path} was written but cannot be read: {error}\nThe run ends here, since it "
                        "would keep nothing. Try another --workdir, or another disk."
                    ) from error
            self._read_back = True

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that is not damaged, and says what was damaged or unfinished.

        Whatever is newer than that one (damaged checkpoints, or a best from steps that are to be repeated) is moved to
        `<workdir>/set_aside/`, with a text beside it that says why; what is left of unfinished saves is deleted.

        Args:
          abstract: shapes, dtypes and shardings of the state, as `state.abstract_state` gives them; the mesh need not
            be the one that the checkpoint was written on.

        Returns:
          The state and its metadata; None where there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but all are damaged, or of a newer format, or the storage does not work;
            nothing was touched.
        """
        damaged, bug = {}, None
        for step in sorted(self._latest.all_steps(), reverse=True):
            restored, reason = None, "another process failed"
            with errors_on_all_processes():
                try:
                    restored = self._restore_step(step, abstract)
                except disk.Damaged as error:
                    reason = str(error)
                except disk.UNCLEAR as error:
                    bug, reason = error, f"{type(error).__name__}: {disk.reason(error)}"
            if _agreed(restored is not None):
                self._tidy(damaged, step)
                return restored
            damaged[step] = f"checkpoint {self.directory / str(step)} cannot be read: {reason}"
        if not damaged:
            self._tidy({}, 0)
            return None
        if bug is not None:
            raise bug
        raise UserError(
            "\n".join(damaged.values()) + "\nNone of this run's checkpoints can be read. Nothing was changed: "
            "restore them from a copy, or choose another --workdir to start afresh.\nIf the config was changed: what a "
            "checkpoint holds depends on model, train.ema_decay, optim.head_lr_multiplier and optim.freeze; undo such "
            "a change."
        )

    def _restore_step(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        parts, metadata = self._restore_parts(self._latest, step, disk.items(abstract))
        return TrainState(variables=parts["variables"], **parts["optimizer"], ema=parts.get("ema")), metadata

    def _restore_parts(
        self, manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Some parts of a checkpoint and its metadata, whose checksums are right."""
        items = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        json_items = {name: ocp.args.JsonRestore() for name in ("metadata", "checksums")}
        args = ocp.args.Composite(**items, **json_items)
        path = manager.directory / str(step)
        disk.load_metadata(path)  # before all else, since a newer format may have other items
        restored = disk.read(str(path), lambda: manager.restore(step, args=args))
        parts = {name: restored[name] for name in items}
        return parts, disk.check(parts, restored["metadata"], restored["checksums"])

    def _tidy(self, damaged: dict[int, str], step: int) -> None:
        """Sets aside what is newer than a step, and deletes what is left of saves that were killed."""
        with errors_on_all_processes():  # the others wait for the first
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
        aside = self.directory.parent / "set_aside"
        for path, reason in newer.items():
            with disk.explained(f"move {path} to {aside}", "Repair the disk, then run the same command again."):
                name = f"{path.parent.name}-{path.name}"  # and a number, where the same step was set aside before
                names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
                target = next(aside / name for name in names if not storage.is_folder(aside / name))
                storage.make_folder(aside)
                storage.replace_text(target.with_suffix(".txt"), f"{reason}\nThe run went on from step {step}.\n")
                storage.move(path, target)
            log.info("%s; moved to %s", reason, target)
        for folder in (self.directory, self.directory.parent / "best"):
            for unfinished in storage.unfinished_saves(folder):
                storage.remove(unfinished)
                log.info("deleted %s, a save that was not finished", unfinished)

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
            self._finish(self._managers)

    def _saving(self) -> contextlib.AbstractContextManager:
        advice = "Earlier checkpoints are intact. Free some space or repair the disk, then run the same command again."
        return disk.explained(f"save a checkpoint under {self.directory.parent}", advice)

    def close(self) -> None:
        """Waits for saves in progress, releases the folder and Orbax's threads; only `wait` reports failures."""
        for manager in self._managers:
            with contextlib.suppress(Exception):  # must not hide the error that ends the run
                manager.close()
        if self._lock is not None:
            self._lock.close()


def save_variables(path: str | Path, variables: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes weights as a checkpoint of their own, step 0 in a new folder.

    Args:
      path: a new or empty folder; removed again where it cannot be written.
      variables: {"params": ..., ...}.
      metadata: as in `saved.load_metadata`.

    Raises:
      UserError: the folder is not empty, or cannot be written.
    """
    path = storage.run_path(path)
    storage.check_name(path)
    if storage.names(path):
        raise UserError(f"{path} is not empty: choose another folder.")
    with disk.explained(f"write {path}", "Is the disk full, or the folder not writable?"):
        try:
            with _Manager(path) as manager:
                manager.save(0, args=disk.save_args({"variables": variables}, metadata), force=True)
                manager.wait_until_finished()
            load_variables(path)  # what cannot be read back is not kept
        except BaseException:
            with contextlib.suppress(OSError):
                storage.remove(path)  # else it would be refused the next time
            raise
