"""Damage sets a checkpoint aside; a fault that may pass is waited for; a bug keeps its traceback."""

import errno
import json
import shutil
import zlib
from types import SimpleNamespace

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import contents, make_state, restore, save_states

from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import UserError
from fcvit_jax.run import disk
from fcvit_jax.run.checkpoint import Checkpointer
from fcvit_jax.run.saved import load_metadata, load_variables

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
METADATA = {"best": {"step": 2, "top1": 0.1}}
# As TensorStore 0.1.84 writes them: read(2) on the open file failed with this number.
FAILED_READ = (
    '{}: Error opening "zarr" driver: Error reading "params.a.bias/.zarray" in OCDBT database at local file "/run/4/": '
    "Error reading from open file /run/4/d/39f35: Failed to read 403 bytes from file at offset 0: {} "
    "[tensorstore_spec='{{\"driver\":\"zarr\"}}'] [os_error_code='{}']"
)
PASSING = {
    "EIO": OSError(errno.EIO, "Input/output error"),
    "ESTALE": OSError(errno.ESTALE, "Stale file handle"),
    "time-out": TimeoutError("the server did not answer"),
    "TensorStore's EIO": ValueError(FAILED_READ.format("UNKNOWN", "Input/output error", 5)),
    "TensorStore's ESTALE": ValueError(FAILED_READ.format("ABORTED", "Stale file handle", 116)),
    "TensorStore's ETIMEDOUT": ValueError(FAILED_READ.format("DEADLINE_EXCEEDED", "Connection timed out", 110)),
    "TensorStore's EMFILE": ValueError(FAILED_READ.format("RESOURCE_EXHAUSTED", "Too many open files", 24)),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    states = [make_state(mesh, step, seed=step) for step in (2, 4)]
    return save_states(tmp_path_factory.mktemp("saved"), states, METADATA)


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited, all at once."""
    pauses = []
    monkeypatch.setattr(disk, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


def fail(monkeypatch, error, times, steps=(2, 4)):
    """Lets that many restores of these steps fail."""
    left = [times]

    def restore(self, step, *args, _original=ocp.CheckpointManager.restore, **kwargs):
        if step in steps and left[0]:
            left[0] -= 1
            raise error
        return _original(self, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_is_waited_for(workdir, mesh, monkeypatch, pauses, capsys, error, times):
    expected = make_state(mesh, 4, seed=4)
    fail(monkeypatch, error, times)
    state, metadata = restore(workdir, expected, mesh)
    chex.assert_trees_all_equal(state, expected)
    assert metadata == METADATA
    assert pauses == [1, 5][:times]
    assert capsys.readouterr().err.count(f"warning: {workdir / 'checkpoints/4'} ") == times
    assert not (workdir / "set_aside").exists()


@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING)
def test_a_fault_that_stays_ends_the_run_with_everything_in_place(workdir, mesh, monkeypatch, pauses, error):
    fail(monkeypatch, error, -1)
    before = contents(workdir)
    with pytest.raises(UserError, match="checkpoints/4: .*(error|handle|timed out|files|answer)\n") as info:
        restore(workdir, make_state(mesh, 4), mesh)
    assert "tensorstore_spec" not in str(info.value)
    assert pauses == [1, 5, 25]
    assert contents(workdir) == before


def test_a_file_that_the_system_cannot_read_is_no_damage(workdir, mesh, pauses):
    """Linux answers EIO where this file is read."""
    for step in (2, 4):
        path = workdir / f"checkpoints/{step}/metadata/metadata"
        path.unlink()
        path.symlink_to("/proc/self/mem")
    for read in (load_metadata, load_variables, lambda path: restore(path, make_state(mesh, 4), mesh)):
        pauses.clear()
        with pytest.raises(UserError, match="checkpoints/4: .*Input/output error"):
            read(workdir)
        assert pauses == [1, 5, 25]
    assert not (workdir / "set_aside").exists()


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError, MemoryError])
def test_a_bug_keeps_its_traceback_and_moves_nothing(workdir, mesh, monkeypatch, pauses, error):
    bug = error("a bug")
    fail(monkeypatch, bug, -1)
    with pytest.raises(error) as info:
        restore(workdir, make_state(mesh, 4), mesh)
    assert info.value is bug and info.traceback[-1].name == "restore"
    assert pauses == [] and not (workdir / "set_aside").exists()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_what_may_be_no_damage_is_not_passed_over(workdir, mesh, monkeypatch, error):
    fail(monkeypatch, error("out of memory"), -1, steps=(4,))
    with pytest.raises(error):
        restore(workdir, make_state(mesh, 4), mesh)
    assert not (workdir / "set_aside").exists()


def test_damage_that_confuses_orbax_is_damage(workdir, mesh, capsys):
    """A key of Orbax's own file differs in a bit; Orbax then raises an AttributeError."""
    path = workdir / "checkpoints/4/variables/array_metadatas/process_0"
    text = path.read_text()
    assert '"array_metadata"' in text
    path.write_text(text.replace('"array_metadata"', '"arrai_metadata"', 1))
    state, _ = restore(workdir, make_state(mesh, 4), mesh)
    assert int(state.step) == 2
    assert "checkpoints/4 cannot be read: AttributeError: " in capsys.readouterr().out
    assert (workdir / "set_aside/checkpoints-4/metadata").is_dir()


@pytest.mark.parametrize("folder", ["Connection timeouts", "UNKNOWN", "Connections"])
def test_damage_is_damage_whatever_the_folder_is_called(workdir, mesh, tmp_path, pauses, folder):
    workdir = workdir.rename(tmp_path / folder)
    (workdir / "checkpoints/4/optimizer/manifest.ocdbt").unlink()
    assert int(restore(workdir, make_state(mesh, 4), mesh)[0].step) == 2
    assert pauses == []


def test_a_save_that_fails_by_a_bug_is_not_explained_by_the_disk(workdir, mesh):
    checkpointer = Checkpointer(workdir)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(make_state(mesh, 6), {"best": object()})
        checkpointer.wait()
    checkpointer.close()
    assert int(restore(workdir, make_state(mesh, 4), mesh)[0].step) == 4


@pytest.mark.parametrize("lost", [(), ("optimizer", "checksums")])
def test_a_newer_format_is_refused_and_stays_where_it_is(workdir, mesh, monkeypatch, lost):
    """Whatever else it holds."""
    monkeypatch.setattr(disk, "FORMAT", 2)
    checkpointer = Checkpointer(workdir)
    checkpointer.save(make_state(mesh, 6), METADATA)
    checkpointer.wait()
    checkpointer.close()
    assert int(restore(workdir, make_state(mesh, 6), mesh)[0].step) == 6
    monkeypatch.undo()
    for item in lost:
        shutil.rmtree(workdir / "checkpoints/6" / item)
    before = contents(workdir)
    for read in (load_metadata, load_variables, lambda path: restore(path, make_state(mesh, 6), mesh)):
        with pytest.raises(UserError, match="checkpoints/6 has the format 2, "):
            read(workdir)
    assert contents(workdir) == before


def test_checkpoints_without_a_format_are_read(workdir, mesh):
    """As versions before 0.2 wrote them."""
    for step in (2, 4):
        folder = workdir / f"checkpoints/{step}"
        assert json.loads((folder / "metadata/metadata").read_text()) == METADATA | {"format": 1}
        (folder / "metadata/metadata").write_text(json.dumps(METADATA))
        checksums = json.loads((folder / "checksums/metadata").read_text())
        checksums["metadata"] = zlib.crc32(json.dumps(METADATA, sort_keys=True).encode())
        (folder / "checksums/metadata").write_text(json.dumps(checksums))
    state, metadata = restore(workdir, make_state(mesh, 4), mesh)
    assert metadata == load_metadata(workdir) == METADATA
    chex.assert_trees_all_equal(state, make_state(mesh, 4, seed=4))
    chex.assert_trees_all_equal(load_variables(workdir, ema=False), state.variables)
    assert np.all(load_variables(workdir)["params"]["a"]["bias"] == state.ema["params"]["a"]["bias"])
