"""Stopping a run early: on a signal, or on an error of one of several processes."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcvit_jax.devices.hosts import raise_on_all_processes

_T = TypeVar("_T")


class StopSignal:
    """Turns SIGTERM, SIGHUP and Ctrl-C into a request that the training loop polls. A second Ctrl-C stops at once.

    With several processes JAX passes SIGTERM on to all of them, so that all stop at the same poll.

    Attributes:
      received: whether a poll has returned True.
      number: of the signal that asked for it.
    """

    def __init__(self):
        self.received = False
        self.number = signal.SIGTERM  # which another process may have received
        self._signalled = False
        self._polls = 0

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
                signals.append(signal.SIGHUP)
            if jax.process_count() == 1:  # otherwise JAX handles SIGTERM, and a handler of ours would replace JAX's
                signals.append(signal.SIGTERM)
            self._previous = {number: signal.signal(number, self._on_signal) for number in signals}
            self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, _) -> None:
        again = self._signalled and self.number == number
        self.number, self._signalled = number, True  # first, since a second signal may come in between
        if number == signal.SIGINT:
            if again:
                os._exit(130)  # without waiting for anything: a run may be killed at any moment
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not safe in a handler
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)
        if number != signal.SIGTERM and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def poll(self) -> bool:
        """Whether to stop. All processes get the same answer, so each of them must poll equally often."""
        self._polls += 1
        if jax.process_count() > 1:
            self.received = self.received or multihost_utils.reached_preemption_sync_point(self._polls)
        else:
            self.received = self._signalled
        return self.received

    def watch(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yields the items until a stop is requested; polls before each item."""
        for item in items:
            if self.poll():
                return
            yield item


class ProcessBatches:
    """Iterates over this process's batches.

    With several processes, an error while reading is held back: from then on the batches are zeros, until all processes
    have reached the same stopping point and `check` raises the error on every one. So no process waits for another.

    Args:
      batches: a closable iterator of dicts of arrays.
      num_batches: how many it yields, on every process.
      shapes: shapes(i) gives the shapes and dtypes of this process's batch i.
    """

    def __init__(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        num_batches: int,
        shapes: Callable[[int], Mapping[str, jax.ShapeDtypeStruct]],
    ):
        self._batches = batches
        self._num_batches = num_batches
        self._shapes = shapes
        self._next = 0
        self._error = None

    def __iter__(self) -> "ProcessBatches":
        return self

    def __len__(self) -> int:
        return self._num_batches

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next == self._num_batches:
            raise StopIteration
        self._next += 1
        if self._error is None:
            try:
                return next(self._batches)
            except Exception as error:
                if jax.process_count() == 1:
                    raise
                self._error = error
                os.kill(os.getpid(), signal.SIGTERM)  # for `StopSignal`: all stop at the same poll
        return {name: np.zeros(x.shape, x.dtype) for name, x in self._shapes(self._next - 1).items()}

    def check(self) -> None:
        """Raises an error of any process on all of them; call it before keeping what was computed from the batches."""
        raise_on_all_processes(self._error)

    def close(self) -> None:
        """Ends the loader's workers."""
        self._batches.close()
