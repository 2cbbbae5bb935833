"""What killed runs leave in shared memory."""

import fcntl
import subprocess
import sys
from multiprocessing import shared_memory as python_shared_memory
from pathlib import Path

import pytest

from fcvit_jax.devices import shared_memory

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    shared_memory.claim.cache_clear()
    yield tmp_path
    shared_memory.claim.cache_clear()


def test_what_dead_runs_left_is_removed_and_nothing_else(folder, capsys):
    for name in (
        "fcvit-owner-dead",
        "fcvit-dead-1",
        "sem.fcvit-dead-2",
        "psm_other",
        "fcvit-owner-live",
        "fcvit-live-1",
    ):
        (folder / name).write_bytes(bytes(2**20))
    with (folder / "fcvit-owner-live").open() as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        prefix = shared_memory.claim()
        there = {path.name for path in folder.iterdir()}
        assert there == {"psm_other", "fcvit-owner-live", "fcvit-live-1", f"fcvit-owner-{prefix.split('-')[1]}"}
        assert "removed 2.0 MiB of shared memory" in capsys.readouterr().out
        assert shared_memory.claim() == prefix
        shared_memory._remove_left_overs()  # as another run would
        assert {path.name for path in folder.iterdir()} == there


def test_a_worker_names_its_memory_by_its_run(monkeypatch):
    for name in ("_SHM_NAME_PREFIX", "_SHM_SAFE_NAME_LENGTH"):
        monkeypatch.setattr(python_shared_memory, name, getattr(python_shared_memory, name))
    shared_memory.name_with("fcvit-abc-")
    memory = python_shared_memory.SharedMemory(create=True, size=8)
    memory.close()
    memory.unlink()
    assert memory.name.startswith("fcvit-abc-")


LEAK = """
import os, signal
from multiprocessing import resource_tracker
from multiprocessing import shared_memory as memory
from fcvit_jax.devices import shared_memory
shared_memory.start_tracker()
os.kill(resource_tracker._resource_tracker._pid, signal.SIGHUP)
print(memory.SharedMemory(create=True, size=8).name)
"""


def test_what_is_left_at_the_end_is_removed_without_a_warning():
    done = subprocess.run([sys.executable, "-c", LEAK], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stderr == "" and not (Path("/dev/shm") / done.stdout.strip()).exists()
