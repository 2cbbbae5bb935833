"""Runs of several processes: connecting them, and raising an error of one process on all.

A process is a JAX process; a machine may run several, such as one for each GPU.
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

from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError, log

# If one of these is above 1, a launcher started this process as one of several. SLURM_NTASKS cannot be used: it is also
# set in the shell of sbatch, where there is one process.
_LAUNCHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_MESSAGE_BYTES = 2048


def start_distributed(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the others of the run, if flags or the environment say that there are others.

    TPU pods, SLURM and Open MPI are recognised, with one process for each machine or for each GPU. Call it before
    anything touches a device.

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
    # The environment of a TPU VM may not say that the VM is part of a pod. JAX then asks the metadata server.
    if not named and importlib.util.find_spec("libtpu") is None:
        return
    # If SLURM or Open MPI starts one process on each machine, the process takes all GPUs. JAX alone would give it one.
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
            return  # there is no TPU or no metadata server: this is a single machine
        raise UserError(
            f"Could not connect to the other processes of this run: {error}\n"
            "Start every process with --coordinator=HOST:PORT, --num_processes=N and --process_id=I."
        ) from error


def raise_on_all_processes(error: Exception | None) -> None:
    """Raises the errors of any process on every process; every process must call it.

    Otherwise one process would end while the others wait for it in a collective.

    Args:
      error: of this process; None: there is none.

    Raises:
      UserError: with the causes and the numbers of their processes. If there is only one process, `error` itself.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    cause = "" if error is None else str(error) if isinstance(error, UserError) else repr(error)
    message = cause.encode(errors="backslashreplace")[:_MESSAGE_BYTES]  # file names may not be UTF-8
    messages = multihost_utils.process_allgather(np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8))
    causes = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in messages]
    if len(set(causes)) > 1:
        raise UserError("\n".join(f"Process {i}: {cause}" for i, cause in enumerate(causes) if cause)) from error
    if cause:
        raise error


@contextlib.contextmanager
def errors_on_all_processes() -> Iterator[None]:
    """Raises an error inside on every process, by `raise_on_all_processes`; every process must enter and leave it."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_all_processes(error)


def exit_within(seconds: float) -> None:
    """Ends this process with status 1 after some seconds, if it is one of several.

    At exit JAX waits for the other processes, and they may wait for this one.
    """
    if not jax.distributed.is_initialized():
        return
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def check_same(what: str, value: Any) -> None:
    """Checks that a value (of JSON types) is the same on every process; every process must call it.

    Raises:
      UserError: on every process, if the values differ; the message names `what`.
    """
    if jax.process_count() > 1:
        checksum = zlib.crc32(json.dumps(value, sort_keys=True).encode())
        if len(set(multihost_utils.process_allgather(np.uint32(checksum)).tolist())) > 1:
            raise UserError(f"The processes have different {what}: start all of them with the same.")


def check_shared(folder: Path) -> None:
    """Checks that all processes see the folder that process 0 has made; every process must call it.

    Without the check Orbax would wait 20 minutes for files that the other processes cannot see.

    Raises:
      UserError: on every process, if one of them does not see the folder; the message names that process.
    """
    if jax.process_count() == 1:
        return
    number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    mark = folder / f"shared-{int(number):08x}"
    try:
        with errors_on_all_processes():  # the others wait here for process 0
            if jax.process_index() == 0:
                storage.replace_text(mark, "")
        with errors_on_all_processes():
            if not storage.is_file(mark):
                raise UserError(f"{folder} is not the folder of process 0: choose a --workdir that all share.")
    finally:
        if jax.process_index() == 0:
            storage.remove(mark)
