"""Limits of this process that leave no room for a run: JAX aborts or hangs there, and does not say which it was."""

import resource
import threading

from fcvit_jax.errors import UserError, log

_ADDRESSES = 4 * 2**30  # bytes; a small run on two cores takes 3 GiB of addresses, most of which it never touches
_FILES = 128  # the small runs that were tried failed at 64, not at 96
_THREADS = 128  # likewise with two cores: JAX, Orbax and TensorStore have 98 of them in the end


def check_limits() -> None:
    """Checks the limits that a shell sets by ulimit; call it before anything touches a device.

    Raises:
      UserError: there is too little memory to reserve, or too few open files or threads.
    """
    addresses, files = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE))
    if 0 <= addresses < _ADDRESSES:  # negative: there is no limit
        raise UserError(
            f"This process may reserve {addresses / 2**30:.1f} GiB of memory; a small run needs 4, a larger one more. "
            "Lift the limit: ulimit -v unlimited."
        )
    if 0 <= addresses < 16 * _ADDRESSES:
        text = "this process may reserve %.1f GiB of memory (ulimit -v); where they run out, JAX ends without a word"
        log.warning(text, addresses / 2**30)
    if 0 <= files < _FILES:
        raise UserError(f"This process may open {files} files at once; a run needs {_FILES}: ulimit -n 4096.")
    started, end = [], threading.Event()
    try:
        for _ in range(_THREADS):
            thread = threading.Thread(target=end.wait)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise UserError(
            f"This process can start {len(started)} threads, a run needs {_THREADS}: raise the limit of processes "
            "(ulimit -u; in a container, its number of pids)."
        ) from error
    finally:
        end.set()
        for thread in started:
            thread.join()
