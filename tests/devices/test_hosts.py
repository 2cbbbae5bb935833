"""Signals and failing inputs; test_train.py starts several processes."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import free_port

from fcvit_jax.devices.hosts import _LAUNCHER_COUNTS, start_distributed
from fcvit_jax.devices.stopping import ProcessBatches, StopSignal
from fcvit_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def test_a_signal_is_noticed_by_the_next_poll():
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with StopSignal() as stop:
            assert not stop.poll()
            items = stop.watch("abcd")
            assert next(items) == "a"
            os.kill(os.getpid(), number)
            assert not stop.received
            assert list(items) == []
            assert stop.received and stop.poll() and stop.number == number
        assert signal.getsignal(signal.SIGTERM) is before


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.poll()
    finally:
        signal.signal(signal.SIGHUP, before)


LOGS = """
from fcvit_jax.errors import *
with exit_on_error():
    for i in range(3):
        log.info("step %d", i)
    print("going on", file=sys.stderr)
"""


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_a_run_goes_on_where_its_output_cannot_be_written(redirection):
    command = f"\"$0\" -c '{LOGS}' {redirection}"
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "going on\n")


def test_closed_streams_are_no_files_of_a_run(tmp_path):
    """Else what a library prints on stderr would be written into the first file that is opened."""
    code = f"""
from fcvit_jax.errors import *
with exit_on_error():
    with open("{tmp_path}/file", "w") as file:
        file.write("good")
        file.flush()
        print("out")
        os.write(2, b"err")
    from tqdm import tqdm
    list(tqdm(range(3)))
"""
    command = ["bash", "-c", '"$0" -c \'' + code + "' <&- >&- 2>&-", sys.executable]
    assert subprocess.run(command, cwd=ROOT, timeout=100).returncode == 0
    assert (tmp_path / "file").read_text() == "good"


def test_output_of_a_tool_that_cannot_be_written_is_an_error():
    code = "from fcvit_jax.errors import *\nwith exit_on_error():\n    print(1)"
    command = ["bash", "-c", f"\"$0\" -c '{code}' >/dev/full", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device.\n")


def test_what_is_said_is_in_the_log_of_a_run_that_is_killed(tmp_path):
    code = "from fcvit_jax.errors import *; show_log(); log.info('step 50'); os.kill(os.getpid(), 9)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=log, timeout=100)
    assert (tmp_path / "log").read_text() == "step 50\n"


def test_without_the_main_thread_there_are_no_handlers():
    polled = []

    def run():
        with StopSignal() as stop:
            polled.append(stop.poll())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert polled == [False]


HUNG = """
from fcvit_jax.devices.stopping import StopSignal
import time
with StopSignal():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)  # a signal just before one long sleep would be handled after it
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


ALONE = """
import sys
from fcvit_jax.devices.hosts import exit_within, errors_on_all_processes, start_distributed
start_distributed(sys.argv[1], 2, int(sys.argv[2]))
if sys.argv[2] == "1":
    exit_within(1)
    sys.exit("error")
with errors_on_all_processes():
    pass
"""


def test_an_error_of_one_host_alone_does_not_wait_for_those_that_wait_for_it():
    command = [sys.executable, "-c", ALONE, f"localhost:{free_port()}"]
    processes = [subprocess.Popen([*command, number], cwd=ROOT, stderr=-1, text=True) for number in "01"]
    try:
        assert "error" in processes[1].communicate(timeout=60)[1] and processes[1].returncode == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_one_host_raises_at_once_what_its_input_raises():
    def batches():
        yield {"image": np.zeros(1)}
        raise OSError("gone")

    process_batches = ProcessBatches(batches(), 5, None)
    next(process_batches)
    process_batches.check()
    with pytest.raises(OSError, match="gone"):
        next(process_batches)
    assert len(list(ProcessBatches(iter("abc"), 2, None))) == 2


def test_incomplete_flags_are_refused():
    with pytest.raises(UserError, match="Give all of --coordinator"):
        start_distributed("localhost:1", 2, None)


def initialized(monkeypatch, environment=(), flags=(None, None, None), libtpu=False, error=None):
    """Starts where only this environment tells of others; returns what JAX is initialised with, call by call."""
    calls = []

    def initialize(*args, **kwargs):
        calls.append((*args, kwargs["local_device_ids"]))
        if error is not None:
            raise error

    for name in (*_LAUNCHER_COUNTS, "JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu or None)
    start_distributed(*flags)
    return calls


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, []),  # empty: all that the machine has
        ({"SLURM_STEP_NUM_TASKS": "32", "SLURM_STEP_NUM_NODES": "4"}, None),  # None: one, by JAX's own rule
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "32", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, None),
    ],
)
def test_a_launcher_is_recognised(monkeypatch, environment, devices):
    assert initialized(monkeypatch, environment) == [(None, None, None, devices)]


def test_one_process_alone_is_left_alone(monkeypatch):
    assert initialized(monkeypatch) == []
    assert initialized(monkeypatch, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}) == []
    assert initialized(monkeypatch, {"SLURM_NTASKS": "4"}) == []  # in the shell of sbatch


def test_jax_is_asked_whether_a_tpu_is_one_of_a_pod(monkeypatch):
    assert initialized(monkeypatch, libtpu=True) == [(None, None, None, None)]
    nothing = ValueError("coordinator_address should be defined.")
    assert len(initialized(monkeypatch, libtpu=True, error=nothing)) == 1  # and goes on alone
    with pytest.raises(UserError, match="Could not connect.*deadline"):
        initialized(monkeypatch, libtpu=True, error=RuntimeError("deadline exceeded"))
    with pytest.raises(UserError, match="(?s)coordinator_address should be defined.*--coordinator=HOST:PORT"):
        initialized(monkeypatch, {"PMI_SIZE": "2"}, error=nothing)  # MPICH, which JAX does not know


def test_flags_say_where_the_others_are(monkeypatch):
    flags = ("host:1", 2, 0)
    assert initialized(monkeypatch, flags=flags) == [(*flags, None)]


TWO_PROCESSES = """
import os, signal, sys, time
from pathlib import Path
import jax
from fcvit_jax.errors import UserError
from fcvit_jax.devices.hosts import check_same, check_shared, errors_on_all_processes, start_distributed
from fcvit_jax.devices.stopping import StopSignal
start_distributed(sys.argv[1], 2, int(sys.argv[2]))
folder = Path(sys.argv[3])
sys.stdout = (folder / f"{sys.argv[2]}.txt").open("w")  # the connecting of processes prints too

def do(what):
    if what == sys.argv[2]:
        raise UserError("no such folder: caf\\udce9")  # as Python names a folder that is no UTF-8

for attempt in ("0", "1", "2"):
    try:
        with errors_on_all_processes():
            do(attempt)
    except UserError as error:
        print(error)
for words in ("same", f"other {sys.argv[2]}"):
    try:
        check_same("words", [words])
    except UserError as error:
        print(error)
for name in ("both", f"only {sys.argv[2]}"):
    try:
        (folder / name).mkdir(exist_ok=True)
        check_shared(folder / name)
    except UserError as error:
        print(error)
seen = 0
with StopSignal() as stop:
    for seen in stop.watch(range(10_000)):
        if seen == 20 and sys.argv[2] == "1":
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001 * (1 + int(sys.argv[2])))
print(seen, stop.received)
"""


def test_processes_fail_together_and_stop_at_the_same_item_of_an_evaluation(tmp_path):
    """Ctrl-C reaches one of two, of which one is slower."""
    command = [sys.executable, "-c", TWO_PROCESSES, f"localhost:{free_port()}"]
    commands = [[*command, number, str(tmp_path)] for number in "01"]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=-1, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    first, second = ((tmp_path / f"{number}.txt").read_text().splitlines() for number in "01")
    assert first == second, errors
    *failures, last = first
    assert failures[:2] == [r"Process 0: no such folder: caf\udce9", r"Process 1: no such folder: caf\udce9"]
    different, unshared = failures[2:]
    assert "different words" in different
    assert unshared.startswith("Process 1: ") and f"{tmp_path}/only 1" in unshared and "--workdir" in unshared
    assert not list(tmp_path.glob("*/*"))
    seen, received = last.split()
    assert received == "True" and 20 <= int(seen) < 9_999


def test_a_platform_that_is_not_there_is_one_line():
    code = "import jax\nfrom fcvit_jax.errors import *\nwith exit_on_error():\n    jax.devices()"
    env = os.environ | {"JAX_PLATFORMS": "tpu5"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("error: JAX cannot use its devices: ")
    assert "JAX_PLATFORMS=tpu5" in done.stderr and "Traceback" not in done.stderr
