"""A run on several hosts: how they find each other, and how an error or a signal on one of them reaches all.

A host here is one process of JAX; a machine may run several, such as one for each GPU.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fcvit_jax.errors import UserError

# One of these above 1 says that a launcher started this process as one of several. SLURM_NTASKS would not do: the shell
# of sbatch has it as well, where there is one process.
_LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_MESSAGE_BYTES = 2048
_T = TypeVar("_T")


def start_distributed(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the others of the run, if flags or the environment say that there are others.

    TPU pods, SLURM and Open MPI are recognised, with one process for each host or for each GPU; call before anything
    touches a device.

    Args:
      coordinator: "host:port" of process 0; None: from the environment.
      num_processes: how many there are; None: from the environment.
      process_id: which of them this one is; None: from the environment.

    Raises:
      UserError: the flags are incomplete, or the others cannot be reached.
    """
    if len({flag is None for flag in (coordinator, num_processes, process_id)}) > 1:
        raise UserError("Give all of --coordinator=HOST:PORT, --num_processes=N and --process_id=I, or none.")
    launched = any(int(os.environ.get(name, 1)) > 1 for name in _LAUNCHER_COUNTS)
    told = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or launched
    # The environment of a TPU VM need not tell that it is one of a pod: JAX then asks the metadata server.
    if not told and importlib.util.find_spec("libtpu") is None:
        return
    # Where SLURM or Open MPI start one process on each host, it takes all GPUs; JAX by itself would give it one.
    one_on_each_host = (
        os.environ.get("SLURM_STEP_NUM_NODES") == os.environ.get("SLURM_STEP_NUM_TASKS", "")
        or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )
    devices = [] if one_on_each_host else None
    if told:
        print("connecting to the other processes of this run, waiting up to 5 minutes for them", file=sys.stderr)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=devices)
    except (ValueError, RuntimeError, OSError) as error:
        if not told and isinstance(error, ValueError):
            return  # no TPU here, or no metadata server: a machine of its own
        raise UserError(
            f"Could not connect to the other processes of this run: {error}\n"
            "Tell every process by --coordinator=HOST:PORT, --num_processes=N and --process_id=I where they are."
        ) from error


def say(text: str) -> None:
    """Prints a line on the first host, above a progress bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(text)
        sys.stdout.flush()  # into a file too, where nobody would see it for hours, and a killed run would lose it


def raise_together(error: Exception | None) -> None:
    """Raises on every host the errors that any of them has met; every host must call it.

    Without that, one host would end while the others wait for it in a collective.

    Raises:
      UserError: with the causes, naming the processes; on a single host the error itself.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    cause = "" if error is None else str(error) if isinstance(error, UserError) else repr(error)
    message = cause.encode(errors="backslashreplace")[:_MESSAGE_BYTES]  # names of files may be no UTF-8
    messages = multihost_utils.process_allgather(np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8))
    causes = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in messages]
    if len(set(causes)) > 1:
        raise UserError("\n".join(f"Process {i}: {cause}" for i, cause in enumerate(causes) if cause)) from error
    if cause:
        raise error


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Passes what is raised inside to `raise_together`; every host must get here."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error)


def exit_within(seconds: float) -> None:
    """Has this process end with status 1 after so long, if it is one of several.

    At exit JAX waits for the others, which may wait for this one.
    """
    if not jax.distributed.is_initialized():
        return
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def check_same(what: str, value: Any) -> None:
    """Compares a value that JSON can hold with that of the other hosts; every host must call it.

    Raises:
      UserError: on every host, if the values differ; the message names `what`.
    """
    if jax.process_count() > 1:
        checksum = zlib.crc32(json.dumps(value, sort_keys=True).encode())
        if len(set(multihost_utils.process_allgather(np.uint32(checksum)).tolist())) > 1:
            raise UserError(f"The processes have different {what}: start all with the same.")


def check_shared(folder: Path) -> None:
    """Checks whether all hosts see the folder that the first has made; every host must call it.

    Otherwise Orbax would wait 20 minutes for what the other hosts cannot see.

    Raises:
      UserError: on every host, if one does not see it; names that one.
    """
    if jax.process_count() == 1:
        return
    number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    mark = folder / f"shared-{int(number):08x}"
    try:
        with failing_together():  # the others wait for the first
            if jax.process_index() == 0:
                mark.touch()
        with failing_together():
            if not mark.exists():
                raise UserError(f"{folder} is not the folder of process 0: give all a --workdir that they share.")
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop polls; a second Ctrl-C stops at once.

    On several hosts JAX's coordination passes SIGTERM on, so that all stop at the same poll.

    Attributes:
      received: whether a poll has answered yes.
    """

    def __init__(self):
        self.received = False
        self._signalled = self._interrupted = False
        self._polls = 0

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            # On several hosts SIGTERM belongs to JAX, whose handler ours would replace.
            signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._previous = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, _) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)  # nothing is waited for: a run may be killed at any moment
            self._interrupted = True
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not safe in a handler
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self._signalled = True

    def poll(self) -> bool:
        """Whether to stop; on several hosts the same answer for all, so each must poll equally often."""
        self._polls += 1
        if jax.process_count() > 1:
            self.received = self.received or multihost_utils.reached_preemption_sync_point(self._polls)
        else:
            self.received = self._signalled
        return self.received

    def watch(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yields the items until a stop is requested; it polls before each."""
        for item in items:
            if self.poll():
                return
            yield item


class Feed:
    """This host's batches; an error on one of several hosts has all stop, and waits until `check` raises it on all.

    Until then the last batch is repeated, so that no host is left waiting for this one.

    Args:
      batches: a closable iterator of dicts of arrays, all of the same shapes.
      num_batches: how many it yields, on every host.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], num_batches: int):
        self._batches = batches
        self._left = num_batches
        self._last = None
        self._error = None

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._left == 0:
            raise StopIteration
        self._left -= 1
        first = self._last is None
        if self._error is None:
            try:
                self._last = next(self._batches)
            except Exception as error:
                if jax.process_count() == 1:
                    raise
                self._error = error
                os.kill(os.getpid(), signal.SIGTERM)  # as for `StopSignal`: all stop at the same poll, in a few steps
        if first:  # there is nothing to go on with yet
            self.check()
        return self._last

    def check(self) -> None:
        """As `raise_together`, with what this host has met; to be called before anything from the feed is kept."""
        raise_together(self._error)

    def close(self) -> None:
        """Ends the loader's workers."""
        self._last = None
        self._batches.close()
