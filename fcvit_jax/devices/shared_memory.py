"""Shared memory of the loader's workers: named by the run, so that the next run removes what a killed one has left."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import secrets
import signal
import sys
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

from fcvit_jax.errors import log

_FOLDER = Path("/dev/shm")  # where Linux has shared memory as files
_OWNER = "fcvit-owner-"  # a file that a run holds a lock of, for as long as it lives


@functools.cache
def claim() -> str | None:
    """Removes what dead runs have left, and returns this process's prefix of names; None where there are no files."""
    if not os.access(_FOLDER, os.W_OK):
        return None
    import fcntl  # not on Windows

    _remove_left_overs()
    token = secrets.token_hex(4)
    owner = _FOLDER / f"{_OWNER}{token}"
    file = owner.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    multiprocessing.current_process()._config["semprefix"] = f"/fcvit-{token}"  # of locks, which lie there too
    atexit.register(lambda: (owner.unlink(missing_ok=True), file.close()))  # which also keeps the file open till then
    return f"fcvit-{token}-"


def start_tracker() -> None:
    """Starts the process in which Python removes what is left at the end, if it is not running yet.

    It outlives a terminal that hangs up, and does not warn that there was something.
    """
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    sys.warnoptions.append(quiet)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it ignores SIGINT and SIGTERM by itself
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sys.warnoptions.remove(quiet)


def name_with(prefix: str | None) -> None:
    """Has this process, a worker, give its shared memory names that begin with a prefix from `claim`."""
    if prefix is not None:
        shared_memory._SHM_NAME_PREFIX = f"/{prefix}"
        shared_memory._SHM_SAFE_NAME_LENGTH = len(prefix) + 17


def _remove_left_overs() -> None:
    import fcntl

    removed = 0
    for owner in _FOLDER.glob(f"{_OWNER}*"):
        with contextlib.suppress(OSError), owner.open() as file:  # of another user, or held: its run is alive
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in _FOLDER.glob(f"*fcvit-{owner.name.removeprefix(_OWNER)}-*"):
                removed += path.stat().st_size
                path.unlink()
            owner.unlink()
    if removed:
        log.info("removed %.1f MiB of shared memory that a killed run had left in %s", removed / 2**20, _FOLDER)
