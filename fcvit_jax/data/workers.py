"""The processes that decode images: what they do with signals, with shared memory, and when their parent ends."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from fcvit_jax.devices import shared_memory


@contextlib.contextmanager
def without_signals() -> Iterator[None]:
    """Blocks Ctrl-C, SIGTERM and SIGHUP in this thread while inside, and for ever in processes that are started inside.

    The signals reach all processes of a job. This process still needs a batch then, and ends its workers itself.
    """
    shared_memory.start_tracker()  # it unblocks the signals when it starts, so start it first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(prefix: str | None, index: int, count: int) -> None:
    del index, count
    shared_memory.name_with(prefix)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns even if it was killed; Grain's workers would not end alone
    os._exit(1)
