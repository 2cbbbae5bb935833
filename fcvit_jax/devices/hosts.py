"""A run of several processes: how they find each other, and how an error of one of them reaches all.

A process here is one of JAX; a machine may run several, such as one for each GPU.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcvit_jax.errors import UserError, log

# One of these above 1 says that a launcher started this process as one of several. SLURM_NTASKS would not do: the shell
# of sbatch has it as well, where there is one process.
_LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_MESSAGE_BYTES = 2048


def start_distributed(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the others of the run, if flags or the environment say that there are others.

    TPU pods, SLURM and Open MPI are recognised, with one process for each machine or for each GPU; call before anything
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
    named = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or launched
    # The environment of a TPU VM need not tell that it is one of a pod: JAX then asks the metadata server.
    if not named and importlib.util.find_spec("libtpu") is None:
        return
    # Where SLURM or Open MPI start one process on each machine, it takes all GPUs; JAX by itself would give it one.
    one_on_each_machine = (
        os.environ.get("SLURM_STEP_NUM_NODES") == os.environ.get("SLURM_STEP_NUM_TASKS", "")
        or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )
    devices = [] if one_on_each_machine else None
    if named:
        log.info("connecting to the other processes of this run, waiting up to 5 minutes for them")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=devices)
    except (ValueError, RuntimeError, OSError) as error:
        if not named and isinstance(error, ValueError):
            return  # no TPU here, or no metadata server: a machine of its own
        raise UserError(
            f"Could not connect to the other processes of this run: {error}\n"
            "Tell every process by --coordinator=HOST:PORT, --num_processes=N and --process_id=I where they are."
        ) from error


def raise_on_all_processes(error: Exception | None) -> None:
    """Raises on every process the errors that any of them has met; every process must call it.

    Without that, one process would end while the others wait for it in a collective.

    Raises:
      UserError: with the causes, naming the processes; where there is only one process the error itself.
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
def errors_on_all_processes() -> Iterator[None]:
    """Passes what is raised inside to `raise_on_all_processes`; every process must get here."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_all_processes(error)


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
    """Compares a value that JSON can hold with that of the other processes; every process must call it.

    Raises:
      UserError: on every process, if the values differ; the message names `what`.
    """
    if jax.process_count() > 1:
        checksum = zlib.crc32(json.dumps(value, sort_keys=True).encode())
        if len(set(multihost_utils.process_allgather(np.uint32(checksum)).tolist())) > 1:
            raise UserError(f"The processes have different {what}: start all with the same.")


def check_shared(folder: Path) -> None:
    """Checks whether all processes see the folder that the first has made; every process must call it.

    Otherwise Orbax would wait 20 minutes for what the other processes cannot see.

    Raises:
      UserError: on every process, if one does not see it; names that one.
    """
    if jax.process_count() == 1:
        return
    number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    mark = folder / f"shared-{int(number):08x}"
    try:
        with errors_on_all_processes():  # the others wait for the first
            if jax.process_index() == 0:
                mark.touch()
        with errors_on_all_processes():
            if not mark.exists():
                raise UserError(f"{folder} is not the folder of process 0: give all a --workdir that they share.")
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)
