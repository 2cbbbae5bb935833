"""Checkpoints: any damage is noticed, earlier ones survive, and every mesh reads what another has written."""

import gc
import json
import resource
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from helpers import abstract, contents, make_state, restore, save_states
from jax.experimental import multihost_utils

from fcvit_jax.devices.sharding import make_mesh, state_shardings
from fcvit_jax.errors import UserError
from fcvit_jax.run import checkpoint, disk
from fcvit_jax.run.checkpoint import Checkpointer, save_variables
from fcvit_jax.run.saved import find_step, load_metadata, load_variables

# Orbax leaves the further exceptions of a failed read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def garbage():
    yield
    gc.collect()  # while those exceptions are ignored


METADATA = {"best": {"step": 2, "top1": 0.1}}


def assert_same(a, b):
    chex.assert_trees_all_equal(a, b, strict=True)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1)


@pytest.fixture(scope="module")
def states(mesh):
    return {step: make_state(mesh, step, seed=step) for step in (2, 4)}


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """A run's folder with checkpoints of two steps; not to be changed."""
    return save_states(tmp_path_factory.mktemp("saved"), states.values(), METADATA)


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def damage(path, how):
    old = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(old[: len(old) // 2])
    else:
        middle = len(old) // 2
        path.write_bytes(old[:middle] + bytes([old[middle] ^ 16]) + old[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped bit"])
def test_a_damaged_file_is_noticed_or_harmless(saved, states, mesh, tmp_path, capsys, how):
    noticed = set()
    files = [path.relative_to(saved) for path in (saved / "checkpoints/4").rglob("*") if path.is_file()]
    for number, file in enumerate(files):
        workdir = shutil.copytree(saved, tmp_path / str(number))
        damage(workdir / file, how)
        state, metadata = restore(workdir, states[4], mesh)
        assert metadata == METADATA
        step = int(state.step)
        assert_same(state, states[step])
        out = capsys.readouterr().out
        if step == 2:
            aside = workdir / "set_aside/checkpoints-4"
            why, end = out.split("; moved to ")
            assert f"{workdir / 'checkpoints/4'} cannot be read: " in why and end == f"{aside}\n"
            assert "\n" not in why and len(why) < 450 and "TensorStore" not in why
            assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
            assert sorted(path.name for path in aside.parent.iterdir()) == [aside.name, f"{aside.name}.txt"]
            assert aside.with_suffix(".txt").read_text() == f"{why}\nThe run went on from step 2.\n"
            noticed.add(file.parts[2])
        else:
            assert out == ""
    # Orbax keeps some files twice, or never reads them: that not all are noticed is well.
    assert {"variables", "optimizer", "ema", "metadata", "checksums"} <= noticed


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped bit", "a list"])
def test_that_it_is_unknown_what_devices_a_checkpoint_was_on_hurts_nobody(workdir, states, mesh, how):
    for part in ("variables", "ema", "optimizer"):
        path = workdir / f"checkpoints/4/{part}/_sharding"
        path.write_text("[1, 2]") if how == "a list" else damage(path, how)
    assert_same(restore(workdir, states[4], mesh)[0], states[4])
    assert_same(load_variables(workdir, ema=False), states[4].variables)
    assert_same(load_variables(workdir), states[4].ema)


@pytest.mark.parametrize("file", ["metadata/metadata", "checksums/metadata", "variables/_METADATA"])
@pytest.mark.parametrize("text", ["[1, 2]", "3", "", "{"])
def test_json_that_holds_something_else_is_damage(workdir, states, mesh, file, text):
    (workdir / "checkpoints/4" / file).write_text(text)
    with pytest.raises(UserError, match="(?s)checkpoints/4: .*try an earlier step"):
        load_variables(workdir, ema=False)
    assert int(restore(workdir, states[4], mesh)[0].step) == 2


def test_zeros_in_place_of_data_are_noticed(workdir, states, mesh):
    """As a file system may leave them after a power cut."""
    largest = max((workdir / "checkpoints/4/variables").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-4096] + bytes(4096))
    state, _ = restore(workdir, states[4], mesh)
    assert_same(state, states[2])


def test_leftovers_of_killed_saves_are_passed_over(workdir, states, mesh, capsys):
    (workdir / "checkpoints/6").mkdir()
    shutil.copytree(workdir / "checkpoints/4", workdir / "checkpoints/8.orbax-checkpoint-tmp-123")
    shutil.copytree(workdir / "checkpoints/4", workdir / "best/4.orbax-checkpoint-tmp")
    state, _ = restore(workdir, states[4], mesh)
    assert_same(state, states[4])
    out = capsys.readouterr().out
    assert f"{workdir / 'checkpoints/6'} cannot be read" in out
    assert out.count("a save that was not finished") == 2
    assert sorted(path.name for path in workdir.glob("*/*")) == ["2", "4", "checkpoints-6", "checkpoints-6.txt"]


def test_a_step_can_be_damaged_twice(workdir, states, mesh):
    for _ in range(3):
        damage(workdir / "checkpoints/4/metadata/metadata", "truncated")
        checkpointer = Checkpointer(workdir)
        state, _ = checkpointer.restore(abstract(states[4], mesh))
        assert int(state.step) == 2
        checkpointer.save(states[4], METADATA)
        checkpointer.wait()
        checkpointer.close()
    aside = [path.name for path in (workdir / "set_aside").iterdir() if path.is_dir()]
    assert sorted(aside) == ["checkpoints-4", "checkpoints-4-2", "checkpoints-4-3"]
    assert_same(restore(workdir, states[4], mesh)[0], states[4])


def test_with_no_good_checkpoint_nothing_is_touched(workdir, states, mesh):
    damage(workdir / "checkpoints/2/optimizer/manifest.ocdbt", "missing")
    damage(workdir / "checkpoints/4/metadata/metadata", "truncated")
    (workdir / "checkpoints/8.orbax-checkpoint-tmp").mkdir()
    before = contents(workdir)
    with pytest.raises(UserError, match="(?s)checkpoints/4 cannot.*checkpoints/2 cannot.*None of .* choose another"):
        restore(workdir, states[4], mesh)
    assert contents(workdir) == before


def test_a_full_disk_leaves_earlier_checkpoints_intact(workdir, mesh, states):
    """The size of files is limited in place of the disk's, which takes no rights: the write fails likewise."""
    checkpointer = Checkpointer(workdir)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="(?s)Could not save a checkpoint under.*Earlier checkpoints are intact"):
            checkpointer.save(make_state(mesh, 6), METADATA)
            checkpointer.wait()
        assert checkpointer.describe_newest() == f"the newest checkpoint is {workdir / 'checkpoints/4'}"
        checkpointer.close()

        checkpointer = Checkpointer(workdir)
        with pytest.raises(UserError, match="Could not save"):
            checkpointer.save(make_state(mesh, 6), METADATA)
        checkpointer.close()  # which must not hide the error that ends a run
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(restore(workdir, states[4], mesh)[0], states[4])


MESHES = {"one": (1, 1), "data": (8, 1), "fsdp": (1, 8), "both": (2, 4)}


@pytest.mark.parametrize("written, read", [("data", "one"), ("one", "data"), ("data", "fsdp"), ("both", "one")])
def test_any_mesh_reads_what_another_has_written(tmp_path, written, read):
    old, new = (make_mesh(data=MESHES[name][0], fsdp=MESHES[name][1]) for name in (written, read))
    state = make_state(old, 3)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, METADATA)
    checkpointer.wait()
    checkpointer.close()
    restored, _ = restore(tmp_path, state, new)
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == state_shardings(state, new)


def test_the_newest_few_and_the_best_are_kept(tmp_path, mesh):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in range(1, 6):
        checkpointer.save(make_state(mesh, step), METADATA)
        if step in (2, 3):
            checkpointer.save(make_state(mesh, step), METADATA, best=True)
    checkpointer.save(make_state(mesh, 5, seed=1), METADATA)  # there already
    checkpointer.wait()
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["3"]
    assert find_step(tmp_path).name == find_step(tmp_path / "checkpoints").name == "5"
    assert find_step(tmp_path / "best").name == find_step(tmp_path / "best/3").name == "3"
    for path in (tmp_path / "none", tmp_path / "best/3/variables"):
        with pytest.raises(UserError, match="No checkpoint"):
            find_step(path)


def test_a_folder_in_which_another_run_is_under_way_is_refused(tmp_path):
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], stdin=-1, stdout=-1, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"Another run is under way in {tmp_path}: stop it"):
            Checkpointer(tmp_path)
        other.kill()
    first = Checkpointer(tmp_path)
    with pytest.raises(UserError, match="Another run is under way"):  # of the same process, in a thread
        Checkpointer(tmp_path)
    first.close()
    Checkpointer(tmp_path).close()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # as root, who runs some of these tests, may write to any file
    with pytest.raises(UserError, match=f"--workdir={tmp_path} cannot be written: Is a directory"):
        Checkpointer(tmp_path)


def test_weights_that_could_not_be_written_may_be_written_again(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("No space left on device")

    variables = {"params": {"a": np.ones(3, np.float32)}, "batch_stats": {}}
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
    with pytest.raises(UserError, match="No space left on device"):
        save_variables(tmp_path / "out", variables, METADATA)
    monkeypatch.undo()
    save_variables(tmp_path / "out", variables, METADATA)


def test_saves_do_not_ask_for_a_preemption(tmp_path, mesh, monkeypatch):
    """With a count of their own, between the polls of the loop, they would make processes miss the one to stop at."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(make_state(mesh, 1), METADATA)
    checkpointer.wait()
    checkpointer.close()
    assert not asked


def test_weights_are_read_without_the_rest(workdir, states, tmp_path):
    variables = states[4].variables
    assert_same(load_variables(workdir, ema=False), variables)
    assert_same(load_variables(workdir, ema=True), states[4].ema)
    assert_same(load_variables(workdir), states[4].ema)
    assert load_metadata(workdir / "checkpoints/2") == METADATA
    save_variables(tmp_path / "copy", variables, {"names": ["a"]})
    assert_same(load_variables(tmp_path / "copy"), variables)
    assert load_metadata(tmp_path / "copy") == {"names": ["a"]}
    with pytest.raises(UserError, match="holds no exponential moving averages"):
        load_variables(tmp_path / "copy", ema=True)
    with pytest.raises(UserError, match="is not empty"):
        save_variables(tmp_path / "copy", variables, {})
    largest = max((workdir / "checkpoints/4/variables").rglob("d/*"), key=lambda path: path.stat().st_size)
    damage(largest, "flipped bit")
    with pytest.raises(UserError, match="(?s)variables differ from what was saved.*try an earlier step"):
        load_variables(workdir, ema=False)


def test_changed_metadata_are_noticed(workdir, states, mesh):
    path = workdir / "checkpoints/4/metadata/metadata"
    path.write_text(json.dumps(METADATA | {"best": {"step": 2, "top1": 0.9}}))
    assert int(restore(workdir, states[4], mesh)[0].step) == 2


@pytest.mark.parametrize("name", ["lr=[1e-3]", "[1]/a*b", "**", "?{a}", "with space", "ä", "100%"])
def test_a_folder_may_have_any_name(tmp_path, states, mesh, name):
    """Of brackets and stars too, which are patterns to those who look for files by them."""
    save_states(tmp_path / name, states.values(), METADATA)
    assert_same(restore(tmp_path / name, states[4], mesh)[0], states[4])
    save_variables(tmp_path / name / "weights", states[2].variables, METADATA)
    assert_same(load_variables(tmp_path / name / "weights"), states[2].variables)


def test_a_save_that_cannot_be_read_ends_the_run(tmp_path, states, monkeypatch):
    def forget_files():
        monkeypatch.setattr(type(epath.Path(tmp_path)), "glob", lambda self, pattern: iter(()))

    checkpointer = Checkpointer(tmp_path / "first")
    forget_files()
    with pytest.raises(UserError, match="checkpoints/2 was written but cannot be read"):
        checkpointer.save(states[2], METADATA)
    checkpointer.close()
    with pytest.raises(UserError, match="Could not read"):
        monkeypatch.setattr(checkpoint, "_glob", lambda self, pattern: iter(()))
        save_variables(tmp_path / "weights", states[2].variables, METADATA)
    assert not (tmp_path / "weights").exists()
    monkeypatch.undo()

    checkpointer = Checkpointer(tmp_path / "later")
    checkpointer.save(states[2], METADATA)
    forget_files()
    checkpointer.save(states[4], METADATA)
    with pytest.raises(UserError, match="checkpoints/4 was written but cannot be read"):
        checkpointer.wait()
    checkpointer.close()


@pytest.mark.parametrize("part", ["variables", "ema"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_never_saved(workdir, states, part, value):
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value), getattr(states[4], part))
    checkpointer = Checkpointer(workdir)
    with pytest.raises(disk.NotFinite):
        checkpointer.save(states[4].replace(step=jnp.int32(6), **{part: broken}), METADATA)
    checkpointer.close()
    assert find_step(workdir).name == "4"


def test_numbers_out_of_range_and_unwritable_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="checkpoint.keep=0 must be at least 1"):
        Checkpointer(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="(?s)Could not write in .*file.*another --workdir"):
        Checkpointer(tmp_path / "file")
