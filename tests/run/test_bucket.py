"""Whole runs in a bucket: killed, damaged, of two processes, read by all tools; they end as on a disk, bit for bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import chex
import emulator
import jax
import numpy as np
import pytest
import tiny_config
from conftest import free_port
from helpers import make_state, save_images

from benchmarks.kill_resume import assert_same_end, record
from fcvit_jax import export, predict, summary, visualize
from fcvit_jax.convert import convert, load_pretrained
from fcvit_jax.data import classification
from fcvit_jax.devices import storage
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import UserError
from fcvit_jax.evaluate import evaluate_checkpoint
from fcvit_jax.networks import create_model
from fcvit_jax.run.checkpoint import Checkpointer
from fcvit_jax.run.saved import find_step, load_variables
from fcvit_jax.train import train_and_evaluate

ROOT = Path(__file__).parents[2]
# main.py with a lock that is renewed often, so that what a killed run leaves is waited out in a moment.
QUICK = """
import sys
from fcvit_jax.devices import gcs_run
gcs_run.RENEWAL, gcs_run.STALE = 0.5, 3.0
from fcvit_jax.__main__ import start
start()
"""

pytestmark = [
    pytest.mark.usefixtures("shared_programs"),
    # Orbax leaves the further exceptions of a failed read to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def config(digits_dir):
    config = tiny_config.get_config()
    config.data.data_dir = digits_dir
    return config


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, config, shared_programs):
    """The run that was never disturbed."""
    workdir = tmp_path_factory.mktemp("disk")
    train_and_evaluate(config, workdir)
    return workdir


def start(workdir, log, digits_dir, *flags):
    command = [sys.executable, "-c", QUICK, "--config=tests/tiny_config.py", f"--workdir={workdir}"]
    command += [f"--config.data.data_dir={digits_dir}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open("a"), stderr=subprocess.STDOUT)


def finish(processes, log, seconds=240):
    try:
        codes = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert set(codes) == {0}, log.read_text()


def kill_during_the_save(process, url, workdir, step, log):
    """Kills a run as soon as there are objects of a step's checkpoint, but not yet the last one."""
    prefix, deadline = f"{workdir.removeprefix(f'gs://{emulator.BUCKET}/')}/checkpoints/{step}/", time.monotonic() + 240
    while not (names := emulator.objects(url, prefix)):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.kill()
    assert process.wait(timeout=60) < 0
    assert f"{prefix}commit_success.txt" not in names
    assert storage.is_file(storage.run_path(workdir) / ".lock")  # which the next start waits out


def test_a_run_killed_during_three_saves_ends_as_one_on_a_disk(bucket, emulator_url, on_disk, config, tmp_path):
    log = tmp_path / "log"
    for step in (4, 8, 12):
        process = start(bucket, log, config.data.data_dir)
        try:
            kill_during_the_save(process, emulator_url, bucket, step, log)
        finally:
            process.kill()
    finish([start(bucket, log, config.data.data_dir)], log)
    text, workdir = log.read_text(), storage.run_path(bucket)
    assert "resuming at step 4 of 20" in text and "resuming at step 10 of 20" in text
    assert text.count("a save that was not finished") == 3
    assert_same_end(on_disk, workdir)
    assert sorted(storage.names(workdir)) == ["best", "checkpoints", "config.json", "metrics.jsonl", "tensorboard"]
    assert [step.name for step in storage.finished_saves(workdir / "best")] == [find_step(on_disk / "best").name]
    assert storage.unfinished_saves(workdir / "checkpoints") == []
    assert len(storage.names(workdir / "tensorboard")) >= 1

    _set_aside_and_resume(bucket, workdir, on_disk, config)
    _read_by_all_tools(bucket, on_disk, config, tmp_path)


def _set_aside_and_resume(bucket, workdir, on_disk, config):
    """The newest checkpoint has lost an object, and another run has left a half-written one."""
    newest = find_step(bucket)
    assert newest.name == "20"
    for name in storage.names(newest / "optimizer/d"):
        storage.remove(newest / "optimizer/d" / name)
    storage.replace_text(workdir / "checkpoints/18/variables/x", "")
    with pytest.raises(UserError, match="holds a run of another config"):
        changed = config.copy_and_resolve_references()
        changed.optim.lr *= 2
        train_and_evaluate(changed, bucket)
    train_and_evaluate(config, bucket)
    assert "checkpoints-20" in storage.names(workdir / "set_aside")
    assert "went on from step 16" in storage.read_text(workdir / "set_aside/checkpoints-20.txt")
    assert sorted(storage.names(workdir / "checkpoints")) == ["12", "16", "20"]
    assert_same_end(on_disk, workdir)
    assert not storage.is_file(workdir / ".lock")


def _read_by_all_tools(bucket, on_disk, config, tmp_path):
    for address in (bucket, f"{bucket}/best", str(find_step(bucket))):
        load_variables(address)
    chex.assert_trees_all_equal(load_variables(bucket), load_variables(on_disk))
    result = evaluate_checkpoint(config, bucket, "best")
    assert result["count"] == 40
    images = save_images(tmp_path / "images", 1)
    with pytest.raises(SystemExit) as status:
        predict.main(["--checkpoint", bucket, "--json", str(images[0])])
    assert status.value.code == 0
    summary.main(["--checkpoint", bucket])
    visualize.main(["curves", bucket, str(on_disk), "--output", str(tmp_path / "curves.png")])
    export.main(["--checkpoint", bucket, str(tmp_path / "exported")])
    convert(bucket, tmp_path / "converted.npz")
    weights = np.load(tmp_path / "converted.npz")
    expected = jax.tree.leaves(load_variables(on_disk))
    assert sum(weights[name].size for name in weights if "/" in name) == sum(x.size for x in expected)

    model = create_model(**config.model)
    chex.assert_trees_all_equal(*(load_pretrained(place, model) for place in (bucket, on_disk)))  # for init_from


def test_a_run_whose_lock_another_has_taken_saves_no_more(bucket):
    mesh, workdir = make_mesh(data=1), storage.run_path(bucket)
    checkpointer = Checkpointer(bucket, keep=1)
    for step in (1, 2):
        checkpointer.save(make_state(mesh, step), {})
    checkpointer.wait()
    assert storage.names(workdir / "checkpoints") == ["2"]  # the first was deleted
    storage.replace_text(workdir / ".lock", "{}")
    checkpointer._lock._lock._renewed -= 100  # as after a long sleep
    with pytest.raises(UserError, match="Another run has taken over .*ends without saving"):
        checkpointer.save(make_state(mesh, 3), {})
    checkpointer.close()
    assert storage.names(workdir / "checkpoints") == ["2"] and storage.read_text(workdir / ".lock") == "{}"


def test_two_processes_write_one_run_and_read_the_data_from_the_bucket(bucket, emulator_url, config, tmp_path):
    _copy(Path(config.data.data_dir), f"{bucket}-data")
    with pytest.raises(UserError, match="mnist is not in gs://.*gcloud storage cp -r FOLDER/mnist"):
        classification.open_dataset(dataset="mnist", batch_size=2, data_dir=f"{bucket}-data")
    with pytest.raises(UserError, match="digits is not in gs://"):
        classification.open_dataset(dataset="digits", batch_size=2, data_dir=f"{bucket}-none")
    here, there = (
        classification.open_dataset(dataset="digits", batch_size=2, image_size=32, data_dir=place, rand_augment=())
        for place in (config.data.data_dir, f"{bucket}-data")
    )
    assert list(here.train.read([0, 7])) == list(there.train.read([0, 7])) and len(here.eval) == len(there.eval)

    coordinator, log = f"localhost:{free_port()}", tmp_path / "log"
    flags = [f"--coordinator={coordinator}", "--num_processes=2", "--config.train.steps=4", "--config.mesh.data=2"]
    environment = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", environment)
        processes = [start(bucket, log, f"{bucket}-data", *flags, f"--process_id={i}") for i in range(2)]
    finish(processes, log)
    workdir = storage.run_path(bucket)
    assert [line["step"] for line in record(workdir) if "train/loss" in line] == [1, 2, 3, 4]
    assert find_step(bucket).name == "4" and load_variables(bucket)
    assert json.loads(storage.read_text(workdir / "config.json"))["train"]["steps"] == 4
    assert not storage.is_file(workdir / ".lock")


def _copy(folder, address):
    for path in folder.rglob("*"):
        if path.is_file():
            target = storage.run_path(f"{address}/{path.relative_to(folder)}")
            target.write_bytes(path.read_bytes())
