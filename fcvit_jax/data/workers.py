"""The processes that decode images: how they are fed, what they do with signals and shared memory, and how they end."""

import contextlib
import errno
import functools
import gc
import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags

from fcvit_jax.devices import shared_memory
from fcvit_jax.devices.cpu import keep_memory
from fcvit_jax.errors import UserError

_SHARED = "the shared memory (/dev/shm)"
_REFUSALS = (errno.EAGAIN, errno.EMFILE, errno.ENOMEM, errno.ENOSPC)  # how a system refuses memory or processes


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


def available_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def start_worker(prefix: str | None, index: int, count: int) -> None:
    del index, count
    keep_memory()
    shared_memory.name_with(prefix)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns even if it was killed; Grain's workers would not end alone
    os._exit(1)


def _about_worker(error: OSError | RuntimeError) -> str | None:
    """What to say of an error of starting or running a worker; None if it is another error."""
    fewer = f"Set a lower --config.data.workers, or make {_SHARED} larger (docker run --shm-size=8g)"
    died = re.match(r"Worker process was terminated .* exit code (-?\d+)", str(error))
    if isinstance(error, OSError) and error.filename is None and error.errno in _REFUSALS:
        return f"The processes that decode images cannot be started: {error.strerror}. {fewer}."
    if died and -int(died[1]) == signal.SIGBUS:
        return f"A process that decodes images found no room in {_SHARED} for a batch. {fewer}."
    if died:
        return (
            f"A process that decodes images died: {died[0]}. What it printed, if anything, is above. "
            "If memory ran out, set a lower --config.data.workers: each worker needs some. A script that trains needs "
            'a file of its own and `if __name__ == "__main__":`, since the workers import it.'
        )
    return None


def stream(
    load: Callable[[int], Any], start: int, stop: int, received: Callable[[Any], Any], workers: int, prefetch: int
) -> Iterator[Any]:
    """Yields received(load(i)) for i from start to stop - 1.

    Args:
      load: what a worker process runs, or a thread where there are none; it is pickled.
      start, stop: the numbers.
      received: what this process does with what `load` returns.
      workers: processes; 0: a thread.
      prefetch: results in each of a worker's two buffers.

    Raises:
      UserError: a worker cannot be started, or died.
    """
    if workers and not flags.FLAGS.is_parsed():
        # Grain reads absl flags of its own, which absl refuses where a program has not parsed any.
        flags.FLAGS.mark_as_parsed()
    init = functools.partial(start_worker, shared_memory.claim() if workers else None)
    threads = 0 if workers else 1
    batches = (
        grain.MapDataset.range(start, stop)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * prefetch))
        .mp_prefetch(grain.MultiprocessingOptions(workers, prefetch), worker_init_fn=init)
    )
    iterator = iter(batches)
    try:
        if workers:
            with without_signals():
                first = list(itertools.islice(iterator, 1))
            while first:
                yield received(first.pop())  # keep no reference: the batch is in memory shared with a worker
        yield from map(received, iterator)
    except (OSError, RuntimeError) as error:
        if text := _about_worker(error):
            raise UserError(text) from error
        raise
    finally:
        with contextlib.suppress(AssertionError):  # of a worker that the system did not start
            iterator.close()
        if workers:
            gc.collect()  # a reference cycle in Grain would keep the last batch in shared memory, and warn at exit
