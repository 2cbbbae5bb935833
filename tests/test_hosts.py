"""Signals and failing inputs; test_train.py starts several processes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fcvit_jax.errors import UserError
from fcvit_jax.hosts import Feed, StopSignal, start_distributed

ROOT = Path(__file__).parent.parent


def test_a_signal_is_noticed_by_the_next_poll():
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopSignal() as stop:
            assert not stop.poll()
            items = stop.watch("abcd")
            assert next(items) == "a"
            os.kill(os.getpid(), number)
            assert not stop.received
            assert list(items) == []
            assert stop.received and stop.poll()
        assert signal.getsignal(signal.SIGTERM) is before


def test_without_the_main_thread_there_are_no_handlers():
    polled = []

    def run():
        with StopSignal() as stop:
            polled.append(stop.poll())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert polled == [False]


HUNG = """
from fcvit_jax.hosts import StopSignal
import time
with StopSignal():
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_second_ctrl_c_stops_at_once():
    process = subprocess.Popen([sys.executable, "-c", HUNG], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "Ctrl-C again stops at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == ""
    finally:
        process.kill()


def test_one_host_raises_at_once_what_its_input_raises():
    def batches():
        yield {"image": np.zeros(1)}
        raise OSError("gone")

    feed = Feed(batches(), 5)
    next(feed)
    feed.check()
    with pytest.raises(OSError, match="gone"):
        next(feed)
    assert len(list(Feed(iter("abc"), 2))) == 2


def test_incomplete_flags_are_refused():
    with pytest.raises(UserError, match="Give all of --coordinator"):
        start_distributed("localhost:1", 2, None)
    start_distributed(None, None, None)  # nothing says that there are others
