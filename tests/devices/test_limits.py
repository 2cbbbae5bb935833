"""Limits of a shell that leave no room for a run are told in a line, and so are an exhausted memory and odd names."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fcvit_jax.devices import limits, storage
from fcvit_jax.devices.limits import check_limits
from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.run import disk
from fcvit_jax.run.checkpoint import Checkpointer, save_variables
from fcvit_jax.run.saved import find_step


@contextmanager
def limited(which: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def test_without_limits_nothing_is_said(caplog):
    before = threading.active_count()
    check_limits()
    assert not caplog.records and threading.active_count() == before


def test_few_open_files_are_refused():
    with limited(resource.RLIMIT_NOFILE, 100), pytest.raises(UserError, match="may open 100 files .*ulimit -n 4096"):
        check_limits()


def test_little_memory_is_refused_and_a_limit_is_told(monkeypatch, caplog):
    def limit(gib):
        monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (gib * 2**30, gib * 2**30))

    limit(3)
    with pytest.raises(UserError, match="may reserve 3.0 GiB .*ulimit -v unlimited"):
        check_limits()
    limit(24)
    check_limits()
    assert "24.0 GiB" in caplog.text


def test_few_threads_are_refused(monkeypatch):
    started = []

    def start(self, _original=threading.Thread.start):
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(self)
        _original(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(UserError, match="can start 5 threads.*ulimit -u"):
        check_limits()
    assert len(started) == 5 and not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9.00 TiB for an array"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.00 TiB"),
    ],
)
def test_an_exhausted_memory_is_told_in_a_line(error):
    with pytest.raises(SystemExit, match="error: memory ran out: .*9.00 TiB.*\n.*data.batch_size"), exit_on_error():
        raise error


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_on_error():
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "cause, advice", [("Too many open files", "ulimit -n"), ("File name too long", "shorter path"), ("EIO", "repair")]
)
def test_the_advice_fits_the_fault(cause, advice):
    with pytest.raises(UserError, match=f"(?s)Could not save: .*{cause}.*{advice}"), disk.explained("save", "repair"):
        raise OSError(f"INTERNAL: Error writing: {cause}")


@pytest.mark.parametrize("name, said", [("caf\udce9", "no name in UTF-8"), ("/".join(["x" * 199] * 20), "too long")])
def test_a_name_that_checkpoints_cannot_have_is_refused_before_anything_is_made(tmp_path, name, said):
    path = tmp_path / name[: 4090 - len(str(tmp_path))]
    storage.run_path(path)  # the file system takes the name itself
    for use in (Checkpointer, find_step, lambda path: save_variables(path, {}, {})):
        with pytest.raises(UserError, match=said):
            use(path)
    assert not list(tmp_path.iterdir())
