"""The loop knows its task and its network only by the functions that tasks/__init__.py lists."""

import functools
import json
import logging
import os
import signal

import chex
import jax
import numpy as np
import pytest

from benchmarks.kill_resume import assert_same_end, kill_and_resume, record
from fcvit_jax.configs import digits
from fcvit_jax.data import loader
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import UserError, log
from fcvit_jax.evaluate import evaluate, evaluate_checkpoint
from fcvit_jax.run.saved import load_variables
from fcvit_jax.train import train_and_evaluate
from tests import fake_config, fake_task

pytestmark = pytest.mark.usefixtures("shared_programs")
STEPS = 24  # 27 and 13 examples in batches of 8 are 4 and 2 steps an epoch, of which there are 4


def fake(**data):
    config = fake_config.get_config()
    config.data.update(data)
    return config


def train_to(steps, config, workdir):
    """Trains up to a step at which the system sends SIGTERM."""
    train_and_evaluate(
        config, workdir, on_metrics=lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if step == steps else None
    )
    assert record(workdir)[-1]["step"] in (steps, steps + 1)


@pytest.fixture(scope="module")
def undisturbed(shared_programs, tmp_path_factory):
    """The folder and the result of a run on one device that nothing stops, and what it called on_metrics with."""
    workdir, heard = tmp_path_factory.mktemp("undisturbed"), []
    result = train_and_evaluate(fake(), workdir, on_metrics=lambda *args: heard.append(args))
    return workdir, result, heard


def test_a_task_of_twenty_lines_trains_and_is_evaluated(undisturbed):
    workdir, result, heard = undisturbed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "epoch": round(step / 6, 4), **metrics} for step, metrics in heard]
    assert {"train/loss", "train/largest_error", "train/grad_norm", "train/lr"} <= lines[0].keys()
    first, last = lines[0], lines[-1]
    assert last == {"step": STEPS, "epoch": 4.0, "eval/r2": result["r2"], "eval/count": 29}
    assert lines[-2]["train/loss"] < first["train/loss"] / 2 and result["r2"] > 0.5
    (best,) = (workdir / "best").iterdir()
    assert max(lines, key=lambda line: line.get("eval/r2", -np.inf))["step"] == int(best.name)
    assert load_variables(workdir).keys() == {"params"}


def test_a_checkpoint_of_any_task_is_evaluated(undisturbed):
    workdir, result, _ = undisturbed
    assert evaluate_checkpoint(fake(), workdir) == result
    config = fake()
    with config.unlocked():
        config.model.width = 9
    with pytest.raises(UserError, match="checkpoints/24 is of the network"):
        evaluate_checkpoint(config, workdir)
    with pytest.raises(UserError, match="of the task tests.fake_task, the config of classification"):
        evaluate_checkpoint(digits.get_config(), workdir)


def test_four_devices_do_what_one_does(undisturbed, tmp_path):
    workdir, result, _ = undisturbed
    config = fake()
    config.mesh.update(data=2, fsdp=2)
    np.testing.assert_allclose(train_and_evaluate(config, tmp_path)["r2"], result["r2"], rtol=1e-5)
    for ours, theirs in zip(record(tmp_path), record(workdir), strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=1e-4)


def test_a_run_of_any_task_resumes_and_is_killed(undisturbed, tmp_path):
    for steps in (3, 8, 17):
        train_to(steps, fake(), tmp_path / "stopped")
    train_and_evaluate(fake(), tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", undisturbed[0])
    flags = ["--config=tests/fake_config.py", "--config.data.workers=1"]
    assert len(kill_and_resume(tmp_path / "killed", flags, steps=STEPS, kills=1)) == 1
    assert_same_end(tmp_path / "killed", undisturbed[0])


def test_buckets_are_a_function_of_the_seed_and_the_step():
    data = fake_task.open_dataset(batch_size=8)
    steps = range(2 * data.steps_per_epoch)
    batches = list(loader.train_batches(data, 5, 0, len(steps)))
    shapes = loader.batch_shapes(data)
    assert [x["x"].shape for x in shapes] == [(8, 4), (8, 6)]
    for step, batch in zip(steps, batches, strict=True):
        expected = shapes[loader.train_bucket(data, 5, step)]
        assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in expected.items()}
        (alone,) = loader.train_batches(data, 5, step, 1)
        halves = [next(loader.train_batches(data, 5, step, 1, process, 2)) for process in (0, 1)]
        chex.assert_trees_all_equal(batch, alone, jax.tree.map(lambda a, b: np.concatenate([a, b]), *halves))

    lengths = {seed: [b["x"].shape[1] for b in loader.train_batches(data, seed, 0, 12)] for seed in range(3)}
    orders = {tuple(epoch) for x in lengths.values() for epoch in (x[:6], x[6:])}
    assert len(orders) > 3 and {tuple(sorted(order)) for order in orders} == {(4, 4, 4, 4, 6, 6)}
    everything = {float(fake_task.load_example(data, i, None)["y"]) for i in range(40)}
    for epoch in (batches[:6], batches[6:]):
        assert {float(y) for batch in epoch for y in batch["y"]} == everything


@pytest.mark.parametrize("batch_size", [1, 8, 29, 64])
def test_evaluation_counts_every_example_of_every_bucket_once(monkeypatch, batch_size):
    data = fake_task.open_dataset(batch_size=batch_size)
    everything = sorted(float(fake_task.load_example(data, i, None)["y"]) for i in range(29))
    seen = []

    def finish(outputs, data):
        seen.extend(y for output in outputs for y in output["y"][output["mask"]].tolist())
        return {"count": len(seen)}

    monkeypatch.setattr(fake_task, "finish", finish)
    model, mesh = fake_task.create_model("fake"), make_mesh(data=1)
    evaluate(fake_task, model, fake_task.init_variables(model, jax.random.key(0)), data, mesh)
    assert sorted(seen) == everything
    if batch_size % 4 == 0:
        shares = [list(loader.eval_batches(data, process, 4)) for process in range(4)]
        assert {len(share) for share in shares} == {data.num_eval_batches}
        found = [float(y) for share in shares for b in share for y in b["y"][b["mask"]]]
        assert sorted(found) == everything
        for together in zip(*shares, strict=True):
            chex.assert_trees_all_equal_shapes(*together)


def test_evaluation_is_traced_once_for_every_shape(monkeypatch):
    monkeypatch.setattr(fake_task, "eval_step", chex.assert_max_traces(fake_task.eval_step, n=2))
    model, mesh = fake_task.create_model("fake"), make_mesh(data=1)
    for seed in (0, 1):
        variables = fake_task.init_variables(model, jax.random.key(seed))
        evaluate(fake_task, model, variables, fake_task.open_dataset(batch_size=8), mesh)


def test_the_profiler_has_the_steps_asked_for(tmp_path):
    config = fake()
    config.train.update(steps=6, profile_steps=(2, 4), eval_every=4)
    train_and_evaluate(config, tmp_path)
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    events = (e for p in jax.profiler.ProfileData.from_file(str(path)).planes for x in p.lines for e in x.events)
    assert sorted(dict(e.stats)["step_num"] for e in events if e.name == "train") == [2, 3, 4]
    for steps in [(3,), (0, 1), (3, 2)]:
        config.train.profile_steps = steps
        with pytest.raises(UserError, match="train.profile_steps="):
            train_and_evaluate(config, tmp_path / "other")


def test_a_library_is_quiet_until_it_is_asked_to_speak(tmp_path, monkeypatch, capfd):
    config = fake()
    config.train.steps = 2
    train_and_evaluate(config, tmp_path / "loud")
    assert "step 2/2" in capfd.readouterr().out
    monkeypatch.setattr(log, "handlers", [])
    level = log.level
    log.setLevel(logging.NOTSET)
    try:
        train_and_evaluate(config, tmp_path / "quiet")
    finally:
        log.setLevel(level)
    assert capfd.readouterr() == ("", "")


def test_a_network_without_batch_statistics_is_trained_and_resumed(digits_dir, tmp_path):
    config = digits.get_config()
    config.data.update(data_dir=digits_dir, batch_size=16, train_split="train[:64]", eval_split="validation[:24]")
    config.mixing.group_size = 8
    config.train.update(steps=6, log_every=1, eval_every=1)
    config.checkpoint.save_every = 2
    config.mesh.data = 1
    config.compilation_cache = False
    with config.unlocked():
        config.model = {"name": "deit_tiny_patch16_224", "num_classes": 10, "dtype": "float32", "drop_path_rate": 0.2}
        config.model.update(dim=16, depth=1, heads=2, patch_size=8, image_size=32)
    train = functools.partial(train_and_evaluate, config)
    result = train(tmp_path / "undisturbed")
    assert load_variables(tmp_path / "undisturbed").keys() == {"params"}
    train_to(3, config, tmp_path / "stopped")
    assert train(tmp_path / "stopped") == result == evaluate_checkpoint(config, tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "undisturbed")
