"""Segmentation: the loss, what evaluation counts of which pixels, the metrics, and whole runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_segmentation
from processes import finish, start_two

from benchmarks.kill_resume import assert_same_end, kill_and_resume, record
from fcvit_jax.augment import paired
from fcvit_jax.data import scenes
from fcvit_jax.data.confusion import count_confusions
from fcvit_jax.devices.sharding import global_batch, make_mesh
from fcvit_jax.evaluate import evaluate_checkpoint
from fcvit_jax.networks.normalize import MEAN, STD
from fcvit_jax.run.saved import load, load_metadata
from fcvit_jax.tasks import segmentation
from fcvit_jax.tasks.segmentation_prediction import full_logits
from fcvit_jax.train import train_and_evaluate

DATA = Path(__file__).parent.parent / "data"
CONFIG = "--config=tests/tiny_segmentation.py:few"


@pytest.fixture(scope="module")
def images():
    """Labels and predictions of three images, and the stored metrics."""
    with np.load(DATA / "segmentation_miou.npz") as file:
        arrays = dict(file)
    pairs = [
        (paired.ignore_zero(arrays[f"image{i}/raw_labels"]), arrays[f"image{i}/prediction"])
        for i in range(int(arrays["count"]))
    ]
    return pairs, arrays, int(arrays["num_classes"])


def test_metrics_equal_the_originals(images):
    pairs, arrays, classes = images
    total = np.zeros((classes, classes), np.int64)
    for i, (labels, predictions) in enumerate(pairs):
        confusion = np.asarray(count_confusions(predictions[None], labels[None], classes))
        assert confusion.dtype == np.int32
        np.testing.assert_array_equal(np.diag(confusion), arrays[f"image{i}/intersect"])
        np.testing.assert_array_equal(confusion.sum(1), arrays[f"image{i}/label"])
        np.testing.assert_array_equal(confusion.sum(0), arrays[f"image{i}/pred"])
        total += confusion
    result = segmentation.metrics(total)
    for ours, theirs in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc")):
        assert result[ours] == pytest.approx(float(arrays[theirs]), rel=1e-12)
    iou = [np.nan if x is None else x for x in result["iou"]]
    np.testing.assert_allclose(iou, arrays["IoU"], rtol=1e-12)
    assert result["iou"][4] is None and result["iou"][2] == 0  # absent; predicted but never labelled


def test_masked_images_and_ignored_pixels_count_nothing(images):
    pairs, _, classes = images
    labels, predictions = (np.stack([x[:20, :17] for x in part]) for part in zip(*pairs, strict=True))
    count = jax.jit(count_confusions, static_argnums=2)
    alone = sum(np.asarray(count(predictions[i : i + 1], labels[i : i + 1], classes)) for i in (0, 2))
    masked = count(predictions, labels, classes, jnp.array([True, False, True]))
    np.testing.assert_array_equal(masked, alone)
    assert masked.sum() == (labels[[0, 2]] != 255).sum() < labels[[0, 2]].size
    assert not count(predictions, np.full_like(labels, 255), classes).any()


def test_counts_are_by_label_and_prediction():
    confusion = count_confusions(jnp.array([[[1, 1, 0]]]), jnp.array([[[0, 0, 255]]]), 2)
    np.testing.assert_array_equal(confusion, [[0, 2], [0, 0]])
    assert segmentation.metrics(np.array([[3, 1], [0, 4]])) == {
        "miou": pytest.approx((3 / 4 + 4 / 5) / 2),
        "macc": (3 / 4 + 1) / 2,
        "aacc": 7 / 8,
        "iou": [3 / 4, 4 / 5],
    }


def test_counts_of_many_images_do_not_overflow():
    result = segmentation.metrics(np.array([[2**31 - 1, 0], [2**31 - 1, 0]], np.int32))
    assert result["aacc"] == 0.5 and result["iou"] == [0.5, 0]


def test_metrics_of_nothing_are_zero():
    assert segmentation.metrics(np.zeros((2, 2), int)) == {"miou": 0, "macc": 0, "aacc": 0, "iou": [None, None]}


def test_images_of_evaluation_equal_the_originals():
    with np.load(DATA / "segmentation_pipeline.npz") as file:
        long, short = file["test_img_scale"].tolist()
        image = segmentation.eval_image(file["test0/jpeg"].tobytes(), long, short)
        np.testing.assert_array_equal(image, file["test0/aligned"])


def test_logits_of_half_precision_are_resized_in_float32():
    logits = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    resized = segmentation.resize_logits(logits, (9, 10))
    assert (resized.shape, resized.dtype) == ((1, 9, 10, 2), jnp.float32)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def test_loss_and_accuracy_equal_the_originals():
    """One of the images is ignored as a whole; ignored pixels count in both means."""
    with np.load(DATA / "segmentation_loss_and_resize.npz") as file:
        arrays = dict(file)
    logits, labels = nhwc(arrays["logits4"]), arrays["labels"]
    (value, accuracy), grad = jax.value_and_grad(segmentation.pixel_loss, has_aux=True)(logits, labels)
    assert value == pytest.approx(float(arrays["loss"]), rel=1e-6)
    assert accuracy == pytest.approx(float(arrays["acc_seg"]) / 100, rel=1e-6)
    expected = nhwc(arrays["grad_logits4"])
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    value, accuracy = segmentation.pixel_loss(logits, np.full_like(labels, 255))
    assert (value, accuracy) == (0, 0)


def test_padding_is_zero_after_normalising():
    model = segmentation.create_model("fcvit_tiny")
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    batch = {"image": images, "label": np.zeros((2, 6, 8), np.uint8), "size": np.array([[6, 8], [4, 5]], np.int32)}
    prepared = segmentation.make_prepare(model)(jax.random.key(0), batch)
    expected = ((images / 255 - MEAN) / STD).astype(np.float32)
    expected[1, 4:] = expected[1, :, 5:] = 0
    np.testing.assert_allclose(prepared["image"], expected, rtol=1e-5, atol=1e-6)
    assert prepared["label"] is batch["label"]


def test_every_parameter_decays_at_the_rate_of_the_step():
    tx, schedule = segmentation.make_optimizer(5, 2, 32, 8, lr=0.1, power=0.9, weight_decay=0.5)
    params = {
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "kernel": jnp.ones((3, 3)),
        "scale": jnp.ones(3),
    }
    state, expected = tx.init(params), 1.0
    for step in range(3):  # without gradients, an update is decay alone
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.1 * (1 - step / 8) ** 0.9
        assert schedule(step) == pytest.approx(rate, rel=1e-6)
        expected *= 1 - 0.5 * rate
        for x in jax.tree.leaves(params):
            np.testing.assert_allclose(x, expected, rtol=1e-6)
    assert schedule(8) == 0


@dataclasses.dataclass(frozen=True)
class Patches:
    """A network whose logits at stride 4 are a linear function of the first pixel of every patch."""

    def clone(self, **_):
        return self

    mean, std = MEAN, STD

    def apply(self, kernel, images):
        return images[:, ::4, ::4] @ kernel


SIZES = [(57, 90), (40, 130), (64, 96), (33, 48), (120, 77), (64, 96), (64, 95)]  # height and width as they were


@pytest.fixture(scope="module")
def batch():
    """Images of one aligned shape with labels of the sizes that they had, padded as the loader pads them."""
    rng = np.random.default_rng(1)
    label = np.full((8, max(h * w for h, w in SIZES) + 5), 255, np.uint8)
    for row, (height, width) in zip(label, SIZES, strict=False):
        row[: height * width] = rng.choice([0, 1, 2, 3, 4, 255], height * width)
    label[7] = 2  # of a row that only fills up
    size = np.array([*SIZES, (70, 70)], np.int32)
    image = rng.integers(0, 256, (8, 64, 96, 3), np.uint8)
    return {"image": image, "label": label, "size": size, "mask": np.arange(8) < 7}


@pytest.fixture(scope="module")
def kernel():
    return np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(batch, kernel):
    """The sums over whole images, resized twice one by one."""
    confusion, loss = np.zeros((5, 5), np.int64), 0.0
    for image, label, size in zip(batch["image"], batch["label"], SIZES, strict=False):
        logits = Patches().apply(kernel, (image[None] / 255 - MEAN) / STD)
        logits = segmentation.resize_logits(segmentation.resize_logits(jnp.float32(logits), (64, 96)), size)[0]
        label = label[: size[0] * size[1]].reshape(size)
        found, counts = np.asarray(logits.argmax(-1)), label != 255
        np.add.at(confusion, (label[counts], found[counts]), 1)
        loss -= np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.where(counts, label, 0)[..., None], -1)[
            counts
        ].sum()
    return confusion, loss


def step(batch, kernel, mesh=None):
    """`eval_step` as evaluation runs it."""
    compiled = jax.jit(segmentation.eval_step, static_argnums=0)
    if mesh is None:
        return jax.device_get(compiled(Patches(), kernel, batch))
    with jax.set_mesh(mesh):
        return jax.device_get(compiled(Patches(), kernel, global_batch(batch, mesh)))


def assert_sums(sums, expected):
    confusion, loss = expected
    # The second resize is computed in another order: single pixels at near ties may differ.
    assert sums["confusion"].sum() == confusion.sum() and np.abs(sums["confusion"] - confusion).sum() <= 4
    assert sums["loss"] == pytest.approx(loss, rel=1e-4)
    assert sums["pixels"] == sum(h * w for h, w in SIZES) and sums["count"] == 7


@pytest.mark.parametrize("at_once", [65_536, 1000])
def test_pixels_are_counted_once_at_the_size_that_images_had(batch, kernel, expected, monkeypatch, at_once):
    monkeypatch.setattr(segmentation, "PIXELS", at_once)
    assert_sums(step(batch, kernel), expected)


@pytest.mark.parametrize("devices", [4, 8])
def test_devices_change_no_count(batch, kernel, expected, devices):
    sums, alone = step(batch, kernel, make_mesh(data=devices)), step(batch, kernel)
    assert_sums(sums, expected)
    np.testing.assert_array_equal(sums["confusion"], alone["confusion"])


def test_the_batch_changes_no_count(batch, kernel):
    whole = step(batch, kernel)
    parts = [step({name: x[part] for name, x in batch.items()}, kernel) for part in (np.s_[:4], np.s_[4:])]
    padded = batch | {"label": np.pad(batch["label"], ((0, 0), (0, 999)), constant_values=255)}
    for other in (jax.tree.map(np.add, *parts), step(padded, kernel)):
        np.testing.assert_array_equal(other["confusion"], whole["confusion"])
        assert other["pixels"] == whole["pixels"] and other["count"] == whole["count"]


@pytest.fixture(scope="module")
def run(shared_programs, tmp_path_factory):
    """A small run of which nothing was disturbed, and what it returned."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "NUM_SCENES", tiny_segmentation.FEW)
        yield workdir, train_and_evaluate(tiny_segmentation.get_config(), workdir)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
class TestRun:
    def test_it_leaves_numbers_and_a_table_of_classes(self, run, capsys):
        workdir, result = run
        lines = record(workdir)
        assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
        assert set(lines[0]) == {"step", "epoch", *(f"train/{x}" for x in ("loss", "accuracy", "grad_norm", "lr"))}
        numbers = {name: value for name, value in result.items() if name != "classes"}
        assert lines[-1] == {"step": 6, "epoch": 2.0, **{f"eval/{name}": value for name, value in numbers.items()}}
        assert numbers.keys() == {"miou", "macc", "aacc", "loss", "count"} and numbers["count"] == 20
        assert json.loads((workdir / "evaluation.json").read_text()) == {"step": 6, **result}
        rows = result["classes"]
        assert [row["class"] for row in rows] == ["background", *"0123456789"]
        assert sum(row["pixels"] for row in rows) == 20 * 96 * 96
        assert result["miou"] == pytest.approx(np.mean([row["iou"] for row in rows if row["iou"] is not None]))
        assert load_metadata(workdir)["evaluated"] == {"step": 6, **result}

    def test_stopped_and_resumed_it_is_bitwise_the_same(self, run, tmp_path):
        workdir, _ = run
        resumed = shutil.copytree(workdir, tmp_path / "resumed")
        for step_ in (4, 6):
            shutil.rmtree(resumed / "checkpoints" / str(step_), ignore_errors=True)
        train_and_evaluate(tiny_segmentation.get_config(), resumed)
        assert_same_end(workdir, resumed)

    def test_killed_and_resumed_it_is_bitwise_the_same(self, run, tmp_path):
        """By SIGKILL, in a process of its own. For more kills see benchmarks/kill_resume.py."""
        workdir, _ = run
        kill_and_resume(tmp_path / "killed", [CONFIG], steps=6, kills=1)
        assert_same_end(workdir, tmp_path / "killed")

    def test_two_processes_change_nothing(self, run, tmp_path):
        workdir, result = run
        finish(start_two(tmp_path, CONFIG), code=0)
        losses = [[x["train/loss"] for x in record(folder) if "train/loss" in x] for folder in (workdir, tmp_path)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
        other = json.loads((tmp_path / "evaluation.json").read_text())
        assert other["count"] == 20 and other["loss"] == pytest.approx(result["loss"], rel=1e-3)
        for ours, alone in zip(other["classes"], result["classes"], strict=True):
            assert (ours["class"], ours["pixels"]) == (alone["class"], alone["pixels"])
            assert ours["iou"] == pytest.approx(alone["iou"], abs=2e-3)  # of pixels near a tie

    def test_devices_change_nothing(self, run, tmp_path):
        workdir, result = run
        config = tiny_segmentation.get_config()
        config.mesh.data = 4
        other = train_and_evaluate(config, tmp_path)
        losses = [[x["train/loss"] for x in record(folder) if "train/loss" in x] for folder in (workdir, tmp_path)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
        assert other["loss"] == pytest.approx(result["loss"], rel=1e-3)

    @pytest.mark.parametrize("devices", [1, 8])
    def test_evaluating_it_gives_the_same(self, run, devices):
        workdir, result = run
        config = tiny_segmentation.get_config()
        config.mesh.data = devices
        other = evaluate_checkpoint(config, workdir)
        assert [row["pixels"] for row in other["classes"]] == [row["pixels"] for row in result["classes"]]
        for name in ("miou", "macc", "aacc", "loss"):
            assert other[name] == pytest.approx(result[name], rel=1e-4)
        assert other == result or devices > 1

    def test_the_tools_load_it(self, run):
        workdir, _ = run
        task, model, variables, metadata = load(workdir)
        assert task is segmentation and (metadata["long"], metadata["short"], metadata["image_size"]) == (64, 64, 64)
        image = scenes.make_scene("validation", 0).image[:70]
        (mask,) = segmentation.predict(model, variables, [image], metadata)
        logits = full_logits(model, variables, paired.eval_transform(image, 64, 64)[None], (70, 96))
        np.testing.assert_array_equal(mask, np.asarray(logits[0].argmax(-1)))
