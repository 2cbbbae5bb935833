"""Signals, and runs of two real processes that share their fate."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.errors import UserError
from fcvit_jax.hosts import Feed, StopSignal, start_distributed

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def start(workdir, number, port, *args):
    """Starts process `number` of two, with two devices each."""
    command = [sys.executable, "main.py", "--config=tests/tiny_config.py", f"--workdir={workdir}", *args]
    command += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)


def start_two(workdir, *args):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(workdir, number, port, "--config.mesh.data=-1", *args) for number in (0, 1)]


def finish(processes):
    """Waits for both; returns what each wrote."""
    try:
        return [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def test_two_processes_are_one_run_and_stop_as_one(digits_dir, tmp_path):
    data = f"--config.data.data_dir={digits_dir}"
    one = subprocess.Popen(
        [sys.executable, "main.py", "--config=tests/tiny_config.py", f"--workdir={tmp_path / 'one'}", data],
        cwd=ROOT,
        stdout=-1,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (text,) = finish([one])
    assert one.returncode == 0, text

    two = tmp_path / "two"
    processes = start_two(two, data)
    deadline = time.monotonic() + 250
    while not ((two / "metrics.jsonl").exists() and losses(two)) and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    texts = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    step = int(re.search(r"stopped at step (\d+) of 20; the same command goes on", texts[0])[1])
    assert step < 20
    assert f"checkpoints/{step}" in str(sorted((two / "checkpoints").iterdir())[-1])

    processes = start_two(two, data)
    texts = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    assert f"resuming at step {step} of 20" in texts[0]
    assert "4 of 4 cpu devices on 2 hosts, mesh data 4 x fsdp 1" in texts[0]
    steps, values = zip(*losses(two), strict=True)
    assert steps == tuple(range(1, 21))
    np.testing.assert_allclose(values, [loss for _, loss in losses(tmp_path / "one")], rtol=1e-5)
    ends = [json.loads((w / "metrics.jsonl").read_text().splitlines()[-1]) for w in (tmp_path / "one", two)]
    for name in ("step", "eval/count", "eval/top1", "eval/top5"):
        assert ends[0][name] == ends[1][name]


def test_a_broken_image_ends_both_processes_with_its_cause(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            for number in range(4):
                path = tmp_path / "images" / split / str(label) / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    broken = tmp_path / "images/train/7/2.png"
    broken.write_bytes(broken.read_bytes()[:-1000])
    workers = ["--config.data.workers=1", "--config.data.prefetch=1"]
    processes = start_two(tmp_path / "run", f"--config.data.dataset=folder:{tmp_path / 'images'}", *workers)
    texts = finish(processes)
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 1, text
        assert re.search(rf"error: Host [01]: {broken} ", text), text
        assert "Traceback" not in text
    assert not list((tmp_path / "run/checkpoints").glob("*/"))
