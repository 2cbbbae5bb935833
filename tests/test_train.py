"""The loop: the same run on any layout, and the same run whatever stops it."""

import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from processes import finish, start_two

from benchmarks.kill_resume import arrays, assert_same_end, kill_and_resume, record
from fcvit_jax import networks, optim, train
from fcvit_jax.augment import mixing
from fcvit_jax.convert import convert
from fcvit_jax.data import loader
from fcvit_jax.data.loader import train_batches
from fcvit_jax.devices.sharding import bytes_per_device, make_mesh
from fcvit_jax.errors import UserError
from fcvit_jax.evaluate import evaluate_checkpoint
from fcvit_jax.networks.fcvit import create_model
from fcvit_jax.run import record as run_record
from fcvit_jax.run.checkpoint import Checkpointer, save_variables
from fcvit_jax.run.saved import load_metadata, load_variables
from fcvit_jax.run.state import abstract_state, create_state, init_variables
from fcvit_jax.run.step import CompiledStep, train_step
from fcvit_jax.tasks import classification
from fcvit_jax.tasks.classification import open_dataset
from fcvit_jax.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
CONFIG = "--config=tests/tiny_config.py"
pytestmark = [
    pytest.mark.usefixtures("shared_programs"),
    # Orbax leaves the further exceptions of a failed write to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:Sharding info not provided"),
]


@pytest.fixture
def config(digits_dir):
    config = tiny_config.get_config()
    config.data.data_dir = digits_dir
    return config


def losses(workdir):
    return [line["train/loss"] for line in record(workdir) if "train/loss" in line]


def evaluations(workdir):
    return [line for line in record(workdir) if "eval/loss" in line]


@pytest.fixture(scope="module")
def undisturbed(shared_programs, digits_dir, tmp_path_factory):
    """A run on one device that nothing stops; with what it did, in order, and at which steps XLA compiled."""
    config = tiny_config.get_config()
    config.data.data_dir = digits_dir
    workdir = tmp_path_factory.mktemp("undisturbed")
    events, compiled = [], set()

    def step(*args, _original=CompiledStep.__call__):
        events.append("step")
        return _original(*args)

    def report(loop, step, *args, _original=train._report):
        events.append(f"report {step}")
        return _original(loop, step, *args)

    def listen(name, duration, **_):
        if name.endswith("backend_compile_duration"):
            compiled.add(events.count("step"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledStep, "__call__", step)
        patch.setattr(train, "_report", report)
        result = train_and_evaluate(config, workdir)
    jax.monitoring.unregister_event_duration_listener(listen)
    return {"workdir": workdir, "result": result, "events": events, "compiled": compiled}


@pytest.fixture
def at_16(undisturbed, tmp_path):
    """The folder of the run as it was after step 16, but for the record, which says more."""
    workdir = shutil.copytree(undisturbed["workdir"], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/20")
    return workdir


def test_a_run_leaves_what_the_readme_says(undisturbed):
    workdir, result = undisturbed["workdir"], undisturbed["result"]
    lines = record(workdir)
    assert [line["step"] for line in lines] == [*range(1, 11), 10, *range(11, 21), 20]
    assert lines[6]["epoch"] == 1.4
    assert set(lines[6]) == {"step", "epoch", *(f"train/{name}" for name in ("loss", "grad_norm", "lr"))}
    assert evaluations(workdir)[-1] == {"step": 20, "epoch": 4.0, **{f"eval/{k}": v for k, v in result.items()}}
    assert result["count"] == 40
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "16", "20"]
    best = max(evaluations(workdir), key=lambda line: line["eval/top1"])
    assert [path.name for path in (workdir / "best").iterdir()] == [str(best["step"])]
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 3
    cosine = [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    rates = [line["train/lr"] for line in lines if "train/lr" in line]
    np.testing.assert_allclose(rates, np.repeat([*cosine, 1e-6], 5), rtol=1e-5)


def test_every_step_and_every_part_of_it_draws_anew():
    """The loss and the norm of the gradients are those of what JAX draws with the keys of a step and of its parts."""
    sizes = {"depths": (1, 0, 0, 0), "dims": (8,) * 4, "kernel_sizes": (3,), "bn_group_size": 2}
    random = {"dropout_rate": 0.5, "share_blocks": True}  # as the step draws its masks
    model = create_model("fcvit_tiny", 3, layer_scale_init=1.0, **sizes, **random)
    tx, mesh, key = optax.identity(), make_mesh(data=1), jax.random.key(5)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8), "label": np.arange(4) % 3}

    def prepare(key, batch):
        return {"image": mixing.normalize(batch["image"]), "target": jax.random.uniform(key, (4, 3))}

    @functools.partial(jax.jit, static_argnums=2)
    def expected(variables, step, parts):
        prepare_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
        images, targets = prepare(prepare_key, batch).values()
        keys = [dropout_key] if parts == 1 else jax.random.split(dropout_key, parts)

        def loss(params):
            total = 0
            for part in range(parts):
                rows, rngs = slice(part * 4 // parts, (part + 1) * 4 // parts), {"dropout": keys[part]}
                inputs = variables | {"params": params}
                logits, _ = model.apply(inputs, images[rows], train=True, mutable=["batch_stats"], rngs=rngs)
                total += optax.softmax_cross_entropy(logits, targets[rows]).mean() / parts
            return total

        value, grads = jax.value_and_grad(loss)(variables["params"])
        return value, optax.tree.norm(grads)

    fixed = dict(model=model, tx=tx, schedule=lambda step: 10.0 * step, prepare=prepare, loss=classification.loss)
    fixed |= dict(mesh=mesh, group_size=2)
    for accumulate, step in itertools.product((1, 2), (0, 7)):
        variables = init_variables(networks.init_variables, model, mesh, seed=0)
        value, norm = expected(variables, step, accumulate)
        state = create_state(
            variables, tx, abstract_state(networks.init_variables, model, tx, mesh, ema=False)
        ).replace(step=jnp.int32(step))
        new, said = train_step(state, batch, key, **fixed, accumulate=accumulate)
        np.testing.assert_allclose((said["loss"], said["grad_norm"]), (value, norm), rtol=1e-3)
        assert (new.step, said["lr"]) == (step + 1, 10.0 * step)


def test_the_first_step_is_that_of_the_seed(config, tmp_path):
    """Weights, data and draws are the seed's, and the averages move by the decay."""
    config.seed, config.train.steps = 7, 1
    train_and_evaluate(config, tmp_path)
    dataset, model, mesh = open_dataset(**config.data), create_model(**config.model), make_mesh(data=1)
    tx, schedule = optim.make_optimizer(dataset.steps_per_epoch, 3, 16, **config.optim)
    first = init_variables(networks.init_variables, model, mesh, seed=7)
    new, averages = (load_variables(tmp_path, ema=ema) for ema in (False, True))
    moved = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, jax.device_get(first), new)
    chex.assert_trees_all_close(averages, moved, rtol=1e-5, atol=1e-7)
    prepare = classification.make_prepare(model, **config.mixing)
    fixed = dict(model=model, tx=tx, schedule=schedule, prepare=prepare, loss=classification.loss, mesh=mesh)
    state = create_state(first, tx, abstract_state(networks.init_variables, model, tx, mesh, ema=True))
    (batch,) = train_batches(dataset, 7, 0, 1)
    _, said = train_step(state, batch, jax.random.key(7), **fixed, ema_decay=0.9)
    np.testing.assert_allclose(losses(tmp_path), said["loss"], rtol=1e-5)


def test_the_step_is_compiled_once_and_ahead_and_nothing_after_the_first_evaluation_and_save(undisturbed):
    assert {0} <= undisturbed["compiled"] <= {0, 4, 10}


def test_the_host_is_one_step_ahead_and_no_more(undisturbed):
    events = undisturbed["events"]
    # After four steps there is a checkpoint to write, for which their numbers are read.
    assert events[:8] == ["step", "step", "report 1", "step", "report 2", "step", "report 3", "report 4"]
    assert [event for event in events if event != "step"] == [f"report {i}" for i in range(1, 21)]


def assert_equal_to_rounding(workdir, undisturbed):
    np.testing.assert_allclose(losses(workdir), losses(undisturbed["workdir"]), rtol=1e-5)
    ours, theirs = (evaluations(w)[-1] for w in (workdir, undisturbed["workdir"]))
    for name in ("step", "eval/count", "eval/top1", "eval/top5"):
        assert ours[name] == theirs[name]
    np.testing.assert_allclose(ours["eval/loss"], theirs["eval/loss"], rtol=1e-4)  # of the averages


@pytest.mark.parametrize("data, fsdp", [(2, 1), (4, 2)])
def test_same_losses_on_any_mesh(undisturbed, config, tmp_path, monkeypatch, capsys, data, fsdp):
    """With the one device of `undisturbed` 1, 2 and 8, and 4 on two processes; the state takes as much as was said."""
    config.mesh.update(data=data, fsdp=fsdp)
    config.checkpoint.save_every = 1000
    config.train.eval_every = 4
    said, held, whole = [], set(), set()

    def step(*args, _original=CompiledStep.__call__):
        state, metrics = _original(*args)
        held.add(sum(x.addressable_shards[-1].data.nbytes for x in jax.tree.leaves(state)))
        whole.add(sum(x.nbytes for x in jax.tree.leaves(state)))
        return state, metrics

    monkeypatch.setattr(CompiledStep, "__call__", step)
    monkeypatch.setattr(run_record, "bytes_per_device", lambda state: said.append(bytes_per_device(state)) or 7 * 2**20)
    train_and_evaluate(config, tmp_path)
    assert_equal_to_rounding(tmp_path, undisturbed)
    assert held == set(said) and "7.0 MiB of state per device" in capsys.readouterr().out
    assert (held == whole) is (fsdp == 1)


def test_two_processes_are_one_run_and_stop_as_one(undisturbed, digits_dir, tmp_path):
    data = f"--config.data.data_dir={digits_dir}"
    layout = "--config.mesh.fsdp=2"
    processes = start_two(tmp_path, CONFIG, data, layout)
    deadline = time.monotonic() + 250
    while not ((tmp_path / "metrics.jsonl").exists() and losses(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # one of them
    texts = finish(processes, code=143)
    step = int(re.search(r"stopped at step (\d+) of 20; the same command goes on from here", texts[0])[1])
    assert step < 20
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == step

    texts = finish(start_two(tmp_path, CONFIG, data, layout, slurm=True), code=0)
    assert f"resuming at step {step} of 20" in texts[0]
    assert "4 of 4 cpu devices in 2 processes, mesh data 2 x fsdp 2" in texts[0]
    assert [line["step"] for line in record(tmp_path)] == [line["step"] for line in record(undisturbed["workdir"])]
    assert_equal_to_rounding(tmp_path, undisturbed)


def test_a_broken_image_ends_both_processes_with_its_cause(tmp_path):
    """With as many images and the same layout as in the test before, whose programs are kept."""
    rng = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), range(10), range(8)):
        path = tmp_path / "images" / split / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    far_from_a_checkpoint = [f"--config.{key}=1000" for key in ("checkpoint.save_every", "train.eval_every")]
    far_from_a_checkpoint.append("--config.train.steps=200")
    broken = tmp_path / "images/train/7/2.png"
    broken.write_bytes(broken.read_bytes()[:-1000])
    data = [f"--config.data.dataset=folder:{tmp_path / 'images'}", "--config.data.workers=1"]
    for text in finish(
        start_two(tmp_path / "run", CONFIG, *data, "--config.mesh.fsdp=2", *far_from_a_checkpoint), code=1
    ):
        assert re.search(rf"error: Process [01]: {broken}: ", text), text
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert record(tmp_path / "run")[-1]["step"] < 50


def before_batch(monkeypatch, name, batch, act):
    """Calls a function while the run waits for a batch of train_batches or eval_batches."""
    original = getattr(loader, name)

    def batches(*args):
        first = args[2] if name == "train_batches" else 0
        with closing(original(*args)) as items:
            for i, item in enumerate(items, first):
                if i == batch:
                    monkeypatch.setattr(loader, name, original)
                    act()
                yield item

    monkeypatch.setattr(loader, name, batches)


def test_a_run_that_is_stopped_again_and_again_is_the_same_run(undisturbed, config, tmp_path, monkeypatch, capsys):
    stops = [
        (signal.SIGTERM, "train_batches", 6, 7),
        (signal.SIGINT, "train_batches", 9, 10),  # an evaluation would follow
        (signal.SIGTERM, "eval_batches", 1, 10),  # in the middle of it
        (signal.SIGHUP, "train_batches", 10, 11),
        (signal.SIGINT, "eval_batches", 2, 20),  # in the last evaluation
    ]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    traced = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda name, _, fun_name="", **__: traced.append(fun_name) if "trace_duration" in name else None
    )
    for number, name, batch, step in stops:
        before_batch(monkeypatch, name, batch, functools.partial(os.kill, os.getpid(), number))
        stopped = []
        train_and_evaluate(config, tmp_path, on_stop=stopped.append)
        assert stopped == [number]
        assert f"stopped at step {step} of 20; the same command goes on from here" in capsys.readouterr().out
        assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert train_and_evaluate(config, tmp_path) == undisturbed["result"]
    out = capsys.readouterr().out
    assert "resuming at step 20 of 20" in out and "done: final top-1" in out
    assert_same_end(tmp_path, undisturbed["workdir"])
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    jax.monitoring.unregister_event_duration_listener(listener)
    assert traced.count("train_step") <= 1  # by the first run of the process


def test_a_broken_validation_image_costs_no_training(undisturbed, config, at_16, monkeypatch):
    def fail():
        raise UserError("broken")

    before_batch(monkeypatch, "eval_batches", 1, fail)
    with pytest.raises(UserError, match="broken"):
        train_and_evaluate(config, at_16)
    assert (at_16 / "checkpoints/20").is_dir()
    assert train_and_evaluate(config, at_16) == undisturbed["result"]
    assert_same_end(at_16, undisturbed["workdir"])


def test_workers_sit_out_a_signal_to_all_and_when_one_dies_the_run_ends(undisturbed, config, tmp_path, monkeypatch):
    """SLURM sends SIGTERM to all processes of a job; here its worker has it long before the run, and when it starts."""

    def tell(number):
        deadline = time.monotonic() + 100
        while not (workers := multiprocessing.active_children()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(workers[0].pid, number)

    config.data.workers = 1
    threading.Thread(target=tell, args=(signal.SIGTERM,)).start()  # before it has imported anything
    before_batch(monkeypatch, "train_batches", 1, lambda: tell(signal.SIGTERM))
    before_batch(monkeypatch, "train_batches", 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train_and_evaluate(config, tmp_path)
    assert (tmp_path / "checkpoints/9").is_dir() and not multiprocessing.active_children()

    before_batch(monkeypatch, "train_batches", 9, lambda: tell(signal.SIGKILL))
    with pytest.raises(UserError, match="A process that decodes images died: .*exit code -9"):
        train_and_evaluate(config, tmp_path)
    assert not multiprocessing.active_children()

    config.data.workers = 0
    train_and_evaluate(config, tmp_path)
    assert_same_end(tmp_path, undisturbed["workdir"])


def test_a_run_that_is_killed_is_the_same_run(undisturbed, digits_dir, tmp_path):
    """For more kills see benchmarks/kill_resume.py."""
    flags = ["--config=tests/tiny_config.py", f"--config.data.data_dir={digits_dir}"]
    assert len(kill_and_resume(tmp_path / "killed", flags, steps=20, kills=1)) == 1
    assert_same_end(tmp_path / "killed", undisturbed["workdir"])


def test_a_run_goes_on_on_another_mesh(undisturbed, config, at_16):
    config.mesh.update(data=4, fsdp=2)
    train_and_evaluate(config, at_16)
    assert losses(at_16)[:16] == losses(undisturbed["workdir"])[:16]
    assert_equal_to_rounding(at_16, undisturbed)


def test_a_run_goes_on_from_before_the_damage(undisturbed, config, tmp_path, capsys):
    workdir = shutil.copytree(undisturbed["workdir"], tmp_path / "run")
    (workdir / "checkpoints/20/optimizer/manifest.ocdbt").unlink()
    (workdir / "checkpoints/24").mkdir()
    train_and_evaluate(config, workdir)
    out = capsys.readouterr().out
    assert "checkpoints/24 cannot be read" in out and "checkpoints/20 cannot be read" in out
    assert "resuming at step 16 of 20" in out
    assert_same_end(workdir, undisturbed["workdir"])


def test_with_no_good_checkpoint_the_run_stops_and_touches_nothing(undisturbed, config, tmp_path):
    workdir = shutil.copytree(undisturbed["workdir"], tmp_path / "run")
    for path in workdir.glob("checkpoints/*/metadata/metadata"):
        path.write_bytes(path.read_bytes()[:-9])
    before = {path: path.read_bytes() if path.is_file() else None for path in workdir.rglob("*")}
    config.optim.lr = 0.5
    config.resume_with_changes = True
    with pytest.raises(UserError, match="None of this run's checkpoints can be read. Nothing was changed"):
        train_and_evaluate(config, workdir)
    assert before == {path: path.read_bytes() if path.is_file() else None for path in workdir.rglob("*")}


def test_a_bad_step_stops_the_run_and_is_never_saved(undisturbed, config, at_16, monkeypatch):
    """Poison just before a checkpoint is due."""
    original = CompiledStep.__call__

    def poisoned(*args):
        result = original(*args)
        bad = int(result[0].step) == 20
        return jax.tree.map(lambda x: x * jnp.nan if bad and x.dtype == jnp.float32 else x, result)

    monkeypatch.setattr(CompiledStep, "__call__", poisoned)
    newest = f"the newest checkpoint is {at_16 / 'checkpoints/16'}"
    with pytest.raises(UserError, match=f"(?s)Step 20: grad_norm nan, loss nan.*{newest}.*lower --config.optim.lr"):
        train_and_evaluate(config, at_16)
    assert not (at_16 / "checkpoints/20").exists()
    assert max(line["step"] for line in record(at_16)) == 19

    monkeypatch.undo()
    train_and_evaluate(config, at_16)
    assert_same_end(at_16, undisturbed["workdir"])


def test_a_run_that_has_diverged_keeps_its_last_good_state(config, at_16, monkeypatch):
    """Whether its weights are finite, but no longer what they compute, or not even these."""
    newest = re.escape(f"the newest checkpoint is {at_16 / 'checkpoints/16'}")
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *args: {"loss": math.nan, "top1": 0.0, "count": 40})
        with pytest.raises(UserError, match=f"(?s)Step 20: evaluation: loss nan, top1 0.0.*not saved; {newest}"):
            train_and_evaluate(config, at_16)
    step = CompiledStep.__call__

    def overflow(self, state, batch):
        state, metrics = step(self, state, batch)
        return state.replace(ema=jax.tree.map(lambda x: x * jnp.inf, state.ema)), metrics

    monkeypatch.setattr(CompiledStep, "__call__", overflow)
    monkeypatch.setattr(train, "evaluate", lambda *args: {"loss": 1.0, "top1": 0.0, "top5": 0.0, "count": 40})
    with pytest.raises(UserError, match=f"(?s)Step 20: weights that are not finite.*not saved; {newest}"):
        train_and_evaluate(config, at_16)
    assert not (at_16 / "checkpoints/20").exists()
    assert [line["step"] for line in evaluations(at_16)] == [10, 20]  # the latter has gone well


def test_a_best_that_is_lost_on_the_way_is_said(config, at_16, capsys):
    shutil.rmtree(at_16 / "best")
    train_and_evaluate(config, at_16)
    assert "the best checkpoint, of step 10, is gone" in capsys.readouterr().out
    assert [path.name for path in (at_16 / "best").iterdir()] == ["20"]


def test_a_gradient_that_overflows_is_noticed_before_the_next_loss():
    class Nowhere:
        def describe_newest(self):
            return "there is no checkpoint yet"

    metrics = {"loss": jnp.float32(1), "grad_norm": jnp.float32(jnp.inf)}
    with pytest.raises(UserError, match="Step 3: grad_norm inf, loss 1.0. This state was not saved"):
        train._report(SimpleNamespace(checkpointer=Nowhere()), 3, metrics, None)


def test_a_disk_that_is_full_at_the_very_end(undisturbed, config, at_16, digits_dir):
    """The size of files is limited in place of the disk's."""
    command = [sys.executable, "main.py", "--config=tests/tiny_config.py", f"--workdir={at_16}"]
    command.append(f"--config.data.data_dir={digits_dir}")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16384, 16384))
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    error, advice = stderr.splitlines()
    assert error.startswith(f"error: Could not save a checkpoint under {at_16}: ") and "File too large" in error
    assert advice.startswith("Earlier checkpoints are intact.")
    assert evaluations(at_16)[-1]["step"] == 20
    train_and_evaluate(config, at_16)
    assert_same_end(at_16, undisturbed["workdir"])


def test_the_best_is_the_earlier_of_equals_and_survives_a_kill_before_it_is_written(
    config, tmp_path, monkeypatch, capsys
):
    config.train.eval_every = 1
    config.checkpoint.save_every = 1000
    top1 = iter([0.5, 0.5, 0.4, 0.7])
    best = []

    def evaluate(*_):
        return {"loss": 1.0, "top1": next(top1), "top5": 1.0, "count": 40}

    def save(self, state, metadata, *, best_only=best, _original=Checkpointer.save, **kwargs):
        best_only += [int(state.step)] * kwargs.get("best", False)
        _original(self, state, metadata, **kwargs)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(Checkpointer, "save", save)
    train_and_evaluate(config, tmp_path)
    assert best == [5, 20]
    shutil.rmtree(tmp_path / "best/20")
    train_and_evaluate(config, tmp_path)
    assert "is gone" not in capsys.readouterr().out
    chex.assert_trees_all_equal(arrays(tmp_path / "best/20"), arrays(tmp_path / "checkpoints/20"))

    # From step 15 another 20 may follow: the best of before is not this run's.
    shutil.rmtree(tmp_path / "checkpoints/20")
    top1 = iter([0.3])
    train_and_evaluate(config, tmp_path)
    out = capsys.readouterr().out
    assert "best/20 is newer than step 15, from which the run goes on; moved to" in out
    assert "the best checkpoint, of step 5, is gone: the best from step 15 on is kept" in out
    assert (tmp_path / "set_aside/best-20").is_dir()
    assert load_metadata(tmp_path / "best")["best"] == {"step": 15, "loss": 1.0, "top1": 0.4, "top5": 1.0, "count": 40}


TEN_FOR_0 = ("ten", *"123456789")


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A source of so many examples, of which there are fewer."""

    source: loader.Source
    count: int

    def __len__(self):
        return self.count

    def read(self, indices):
        return self.source.read([index % len(self.source) for index in indices])


def replace_data(monkeypatch, class_names, num_train=None, num_eval=None):
    """Has the run open datasets that differ so from what they are."""

    @functools.wraps(open_dataset)
    def opened(*args, **options):
        data = open_dataset(*args, **options)
        counts = {"train": num_train, "eval": num_eval}
        sources = {name: Repeated(getattr(data, name), count) for name, count in counts.items() if count}
        about = {**data.about, "class_names": list(class_names)}
        return dataclasses.replace(data, class_names=class_names, about=about, **sources)

    monkeypatch.setattr(classification, "open_dataset", opened)


def test_other_data_under_the_same_config_are_refused(undisturbed, config, at_16, monkeypatch, capsys):
    replace_data(monkeypatch, num_train=96, num_eval=39, class_names=TEN_FOR_0)
    with pytest.raises(
        UserError,
        match="(?s)not those .*class 0: 0 -> ten\n  training images: 80 -> 96\n  .*: 40 -> 39; .*resume_with",
    ):
        train_and_evaluate(config, at_16)
    config.resume_with_changes = True
    config.train.steps = 16
    train_and_evaluate(config, at_16)
    assert "going on with other data:\n  class 0: 0 -> ten" in capsys.readouterr().out


def test_a_run_keeps_its_programs_and_leaves_the_process_as_it_was(config, tmp_path):
    config.compilation_cache = True
    config.train.steps = 1
    train_and_evaluate(config, tmp_path / "kept elsewhere")
    assert not (tmp_path / "kept elsewhere/compilation_cache").exists()
    config.optim.eps = 1e-7  # a step that no other test has compiled
    elsewhere = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        train_and_evaluate(config, tmp_path)
        assert any(path.name.startswith("jit_train_step") for path in (tmp_path / "compilation_cache").iterdir())
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", elsewhere)
        compilation_cache.reset_cache()


@pytest.mark.parametrize("init_from", ["{run}", "{folder}/weights.npz"])
def test_a_head_that_is_kept_for_other_classes_is_said(undisturbed, config, tmp_path, monkeypatch, capsys, init_from):
    replace_data(monkeypatch, class_names=TEN_FOR_0)
    convert(undisturbed["workdir"], tmp_path / "weights.npz")
    config.init_from = init_from.format(run=undisturbed["workdir"], folder=tmp_path)
    config.train.steps = 1
    train_and_evaluate(config, tmp_path)
    assert "although the class names differ:\n  class 0: 0 -> ten\n" in capsys.readouterr().out


def test_evaluating_a_checkpoint_gives_the_numbers_of_the_run(undisturbed, config, monkeypatch, capsys):
    workdir = undisturbed["workdir"]
    config.train.ema_decay = None  # the checkpoint has averages, and the run evaluated those
    config.data.train_split = "none"
    with config.unlocked():
        config.model.param_dtype = "bfloat16"  # which the averages are not rounded to
    assert evaluate_checkpoint(config, workdir) == undisturbed["result"]
    best = load_metadata(workdir / "best")["evaluated"]
    assert evaluate_checkpoint(config, workdir, "best") == {k: v for k, v in best.items() if k != "step"}
    with pytest.raises(UserError, match="No checkpoint at .*/checkpoints/3"):
        evaluate_checkpoint(config, workdir, "checkpoints/3")

    assert "->" not in capsys.readouterr().out
    replace_data(monkeypatch, class_names=TEN_FOR_0)
    assert evaluate_checkpoint(config, workdir) == undisturbed["result"]
    out = capsys.readouterr().out
    assert f"the classes of {workdir / 'checkpoints/20'} -> those of the data, which are matched by place:\n" in out
    assert "\n  class 0: 0 -> ten\n" in out
    config.data.crop_pct = 0.8
    evaluate_checkpoint(config, workdir)
    assert "is of a run with data.crop_pct=1.0; this evaluation is with 0.8" in capsys.readouterr().out
    replace_data(monkeypatch, class_names=("a", "b", "c"))
    config.model.num_classes = 3
    with pytest.raises(UserError, match="checkpoints/20 has 10 classes, the dataset 3: evaluate on"):
        evaluate_checkpoint(config, workdir)


def test_classes_in_another_order_are_matched_by_name(undisturbed, config, tmp_path, capsys):
    """A network whose outputs and class names are in another order is the same network, evaluated and started from."""
    order = [3, 1, 0, 2, 9, 5, 6, 8, 7, 4]
    variables = load_variables(undisturbed["workdir"])
    other = classification.reorder_classes(variables, order)
    assert not np.array_equal(other["params"]["head"]["kernel"], variables["params"]["head"]["kernel"])
    metadata = load_metadata(undisturbed["workdir"]) | {"class_names": [str(i) for i in order]}
    save_variables(tmp_path / "checkpoints", other, metadata)
    assert evaluate_checkpoint(config, tmp_path) == undisturbed["result"]
    assert "in another order: they are matched by name" in capsys.readouterr().out
    model, data = create_model(**config.model), open_dataset(**config.data)
    jax.tree.map(np.testing.assert_array_equal, classification.load_pretrained(tmp_path, model, data), dict(variables))
    assert "its head is matched by name" in capsys.readouterr().out


def test_evaluation_takes_batches_of_the_size_that_training_computes_at_once(undisturbed, config, monkeypatch):
    sizes = []

    def batches(data, *args, _original=loader.eval_batches):
        sizes.append(data.batch_size)
        return _original(data, *args)

    monkeypatch.setattr(loader, "eval_batches", batches)
    config.train.accumulate = 4
    result = evaluate_checkpoint(config, undisturbed["workdir"])
    np.testing.assert_allclose(result.pop("loss"), undisturbed["result"]["loss"], rtol=1e-6)
    assert result.items() < undisturbed["result"].items()
    assert sizes == [4]


def test_a_finished_run_whose_best_is_lost_keeps_its_end_as_the_best(undisturbed, config, tmp_path, capsys):
    workdir = shutil.copytree(undisturbed["workdir"], tmp_path / "run")
    shutil.rmtree(workdir / "best")
    assert train_and_evaluate(config, workdir) == undisturbed["result"]
    assert f"at step 20; over 40 examples. Checkpoints: {workdir / 'checkpoints/20'} and" in capsys.readouterr().out
    chex.assert_trees_all_equal(arrays(workdir / "best/20"), arrays(workdir / "checkpoints/20"))


def test_a_run_that_is_beyond_its_last_step_is_refused(undisturbed, config, tmp_path):
    workdir = shutil.copytree(undisturbed["workdir"], tmp_path / "run")
    config.train.steps = 10
    config.resume_with_changes = True
    with pytest.raises(UserError, match="is at step 20, beyond the 10 steps") as info:
        train_and_evaluate(config, workdir)
    assert info.traceback  # keeps alive what the run has left open
    take = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", take, workdir / ".lock"], check=True, timeout=100)  # the folder is released
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] is None
