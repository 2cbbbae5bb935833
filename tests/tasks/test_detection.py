"""Detection: the loss, what evaluation makes of detections, classes in another order, and whole runs."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, save_tiny, tiny_variables

from benchmarks.kill_resume import assert_same_end, record
from fcvit_jax.configs import digit_scenes_detection
from fcvit_jax.data import coco_eval, loader, scenes, segments
from fcvit_jax.devices.sharding import global_batch
from fcvit_jax.errors import UserError
from fcvit_jax.evaluate import evaluate_checkpoint
from fcvit_jax.networks.masks import crop_masks
from fcvit_jax.networks.normalize import MEAN, STD
from fcvit_jax.run import opening
from fcvit_jax.run.results import best_metric
from fcvit_jax.run.saved import load, load_metadata, load_variables
from fcvit_jax.run.state import create_state, init_variables
from fcvit_jax.tasks import classification, detection
from fcvit_jax.train import train_and_evaluate

SMALL = {"depths": (0, 0, 0, 0), "dims": (8, 8, 8, 8), "neck_channels": 8, "box_channels": 8}
PARTS = ("rpn_class_loss", "rpn_box_loss", "class_loss", "box_loss", "mask_loss")


def tiny():
    """A run of seconds with everything on: padding around the images, flips, groups, averages."""
    config = digit_scenes_detection.get_config()
    config.data.update(batch_size=8, long=48, short=48, flip=0.5)
    config.optim.update(lr=0.01, decay_epochs=(1,), warmup_steps=2)
    config.train.update(steps=6, eval_every=1, log_every=1, ema_decay=0.9)  # an epoch has 3 steps
    config.checkpoint.save_every = 2
    config.mesh.data = 1
    config.compilation_cache = False  # the tests share one
    with config.unlocked():
        config.model.update(SMALL, depths=(1, 0, 0, 0), kernel_sizes=(3,), context_heads=8, mask_padding=True)
        config.model.update(train_nms_pre=20, train_proposals=20, nms_pre=20, proposals=20, max_detections=5)
        config.model.update(rpn_samples=32, roi_samples=16, score_threshold=0.01)
    config.model.bn_group_size = 4
    return config


@pytest.fixture(scope="module")
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "NUM_SCENES", {"train": 24, "validation": 20})
        yield


@pytest.fixture(scope="module")
def run(shared_programs, few_scenes, tmp_path_factory):
    """A small run of which nothing was disturbed, and what it returned."""
    workdir, config = tmp_path_factory.mktemp("run"), tiny()
    config.data.results = str(workdir / "found.json")
    return workdir, train_and_evaluate(config, workdir)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
class TestRun:
    def test_it_leaves_the_parts_of_the_loss_and_cocos_numbers(self, run):
        workdir, result = run
        lines = record(workdir)
        assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
        names = ("loss", *PARTS, "class_accuracy", "grad_norm", "lr")
        assert set(lines[0]) == {"step", "epoch", *(f"train/{name}" for name in names)}
        for line in lines:
            if "train/loss" in line:
                assert line["train/loss"] == pytest.approx(sum(line[f"train/{name}"] for name in PARTS), rel=1e-5)
        numbers = {f"{kind}_{name}" for kind in ("box", "mask") for name in coco_eval.NAMES} | {"count"}
        assert result.keys() == numbers | {"classes"} and result["count"] == 20
        assert result["box_ap_large"] is None  # there are no such objects
        evaluated = {f"eval/{name}": result[name] for name in numbers if result[name] is not None}
        assert lines[-1] == {"step": 6, "epoch": 2.0, **evaluated}
        assert json.loads((workdir / "evaluation.json").read_text()) == {"step": 6, **result}
        rows = result["classes"]
        assert [row["class"] for row in rows] == list("0123456789")
        assert sum(row["objects"] for row in rows) == sum(
            len(scenes.make_scene("validation", i).boxes) for i in range(20)
        )
        metadata = load_metadata(workdir)
        assert metadata["evaluated"] == {"step": 6, **result}
        assert metadata["class_names"] == list("0123456789") and metadata["category_ids"] == list(range(10))

    def test_stopped_and_resumed_it_is_bitwise_the_same(self, run, tmp_path):
        workdir, _ = run
        resumed = shutil.copytree(workdir, tmp_path / "resumed")
        for step in (4, 6):
            shutil.rmtree(resumed / "checkpoints" / str(step), ignore_errors=True)
        train_and_evaluate(tiny(), resumed)
        assert_same_end(workdir, resumed)

    def test_devices_change_nothing(self, run, tmp_path):
        workdir, _ = run
        config = tiny()
        config.mesh.data = 4
        four = opening.open_run(config, tmp_path)
        variables = init_variables(four.task.init_variables, four.model, four.mesh, config.seed)
        state, compiled = create_state(variables, four.tx, four.abstract), opening.compile_in_background(four).result()
        for line, batch in zip(record(workdir), loader.train_batches(four.data, config.seed, 0, 3), strict=False):
            state, metrics = compiled(state, global_batch(batch, four.mesh))
            for name in ("loss", *PARTS, "grad_norm"):
                assert float(metrics[name]) == pytest.approx(line[f"train/{name}"], rel=1e-4), (line["step"], name)

    @pytest.mark.parametrize("devices, batch_size", [(1, 8), (8, 8), (1, 3)])
    def test_evaluating_it_gives_the_same(self, run, tmp_path, devices, batch_size):
        workdir, result = run
        config = tiny()
        config.mesh.data, config.data.batch_size = devices, batch_size
        config.data.results = str(tmp_path / "found.json")
        other = evaluate_checkpoint(config, workdir)
        for name, value in result.items():
            if name != "classes":
                assert other[name] == pytest.approx(value, abs=1e-4)
        assert other == result or (devices, batch_size) != (1, 8)
        found = json.loads((tmp_path / "found.json").read_text())
        assert found and {x["image_id"] for x in found} <= set(range(20))
        assert all(x.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"} for x in found)

    def test_an_image_alone_has_the_detections_of_the_evaluation(self, run):
        workdir, _ = run
        task, model, variables, metadata = load(workdir)
        assert task is detection and (metadata["long"], metadata["short"]) == (48, 48)
        data = detection.open_dataset(False, **tiny().data)
        evaluated = from_results(workdir / "found.json", 20)
        images = [detection.read_pair(data, index)[0] for index in range(3)]
        for alone, expected in zip(detection.predict(model, variables, images, metadata), evaluated, strict=False):
            assert len(alone.boxes) > 0 and alone.classes.tolist() == expected.classes.tolist()
            np.testing.assert_allclose(alone.boxes, expected.boxes, atol=1e-3)
            np.testing.assert_allclose(alone.scores, expected.scores, rtol=1e-4)
            masks, same = (segments.decode(x.rles, 96, 96) for x in (alone, expected))
            assert (masks != same).mean() < 1e-3  # rounding may decide a pixel

    def test_another_run_starts_from_it_and_other_tasks_refuse_it(self, run, tmp_path):
        workdir, _ = run
        config = tiny()
        data, model = detection.open_dataset(**config.data), detection.create_model(**config.model)
        started = detection.load_pretrained(workdir, model, data)
        jax.tree.map(np.testing.assert_array_equal, started, load_variables(workdir))
        renamed = dataclasses.replace(data, class_names=tuple("9876543210"))
        order = list(range(9, -1, -1))
        expected = detection.reorder_classes(started, order)
        jax.tree.map(np.testing.assert_array_equal, detection.load_pretrained(workdir, model, renamed), expected)
        with pytest.raises(UserError, match="holds a detector"):
            classification.load_pretrained(workdir, classification.create_model("fcvit_tiny"), None)


def test_a_classifiers_checkpoint_is_a_start_but_no_detector(few_scenes, tmp_path):
    save_tiny(tmp_path / "checkpoints")
    fields = {name: TINY[name] for name in ("depths", "dims", "mlp_ratios", "kernel_sizes")}
    config = tiny()
    with config.unlocked():
        config.model.update(fields)
    model = detection.create_model(**config.model)
    variables = detection.load_pretrained(tmp_path / "checkpoints", model, detection.open_dataset(**config.data))
    np.testing.assert_array_equal(
        variables["params"]["backbone"]["stem"]["conv"]["kernel"], tiny_variables()["params"]["stem"]["conv"]["kernel"]
    )
    with pytest.raises(UserError, match="is of the task classification, the config of detection"):
        evaluate_checkpoint(config, tmp_path)


@pytest.fixture(scope="module")
def plain():
    """A detector without blocks, and its variables, all of which count."""
    model = detection.create_model("fcvit_tiny", 3, **SMALL, roi_samples=16, rpn_samples=32, bn_group_size=2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    return model, structure.unflatten([x + rng.uniform(0.1, 0.4, x.shape).astype(np.float32) for x in leaves])


def test_classes_in_another_order(plain):
    model, variables = plain
    order = [2, 0, 1]
    moved = detection.reorder_classes(variables, order)
    features = np.random.default_rng(1).normal(0, 1, (5, 7, 7, 8)).astype(np.float32)
    logits, deltas = model.apply(variables, features, method="box_head")
    new_logits, new_deltas = model.apply(moved, features, method="box_head")
    np.testing.assert_array_equal(new_logits, logits[:, np.array([2, 0, 1, 3])])
    np.testing.assert_array_equal(new_deltas.reshape(5, 3, 4), deltas.reshape(5, 3, 4)[:, np.array(order)])
    masks, new_masks = (model.apply(x, features, method="mask_head") for x in (variables, moved))
    np.testing.assert_array_equal(new_masks, masks[..., np.array(order)])
    without = {name: x for name, x in variables["params"].items() if name != "mask_head"}
    assert "mask_head" not in detection.reorder_classes({"params": without}, order)["params"]


@pytest.fixture(scope="module")
def batch():
    """Two images on a canvas of 64 x 64, as the loader stacks them: with two objects and with one."""
    rng = np.random.default_rng(2)
    boxes = np.array([[(2, 3, 40, 30), (10, 20, 50, 60)], [(5, 5, 30, 33), (0, 0, 0, 0)]], np.float32)
    masks = np.packbits(rng.integers(0, 2, (2, 2, 64, 64)) > 0, axis=-1)
    shown = np.where(np.arange(64) < 50, np.arange(64), -1).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (2, 64, 64, 3), np.uint8),
        "size": np.array([[64, 64], [50, 40]], np.int32),
        "boxes": boxes,
        "labels": np.array([[2, 0], [1, 0]], np.int32),
        "valid": np.array([[True, True], [True, False]]),
        "masks": masks,
        "rows": np.stack([np.arange(64, dtype=np.int32), shown]),
        "columns": np.stack([np.arange(64, dtype=np.int32), np.where(np.arange(64) < 40, shown, -1)]),
    }


def test_padding_is_zero_after_normalising(plain, batch):
    prepared = detection.make_prepare(plain[0])(jax.random.key(0), batch)
    expected = ((batch["image"] / 255 - MEAN) / STD).astype(np.float32)
    expected[1, 50:] = expected[1, :, 40:] = 0
    np.testing.assert_allclose(prepared.pop("image"), expected, rtol=1e-5, atol=1e-6)
    assert prepared == {name: x for name, x in batch.items() if name != "image"}


def test_masks_that_are_missing_are_missed_before_anything_compiles(plain, batch):
    alone = {name: x for name, x in batch.items() if name not in ("masks", "rows", "columns")}
    with pytest.raises(UserError, match="set --config.model.masks=False"):
        jax.eval_shape(detection.make_prepare(plain[0]), jax.random.key(0), alone)
    assert detection.make_prepare(plain[0].clone(masks=False))(jax.random.key(0), alone)["image"].dtype == np.float32


@pytest.fixture(scope="module")
def gradients(plain):
    model, variables = plain

    @jax.jit
    def function(batch, key):
        prepared = detection.make_prepare(model)(key, batch)

        def of_params(params):
            return detection.loss(model, variables | {"params": params}, prepared, key)

        return jax.value_and_grad(of_params, has_aux=True)(variables["params"])

    return function


def test_without_objects_nothing_is_nan(gradients, batch):
    for valid in (batch["valid"], batch["valid"] & [[False], [True]], batch["valid"] & False):
        (value, (updates, parts)), grads = gradients({**batch, "valid": valid}, jax.random.key(1))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, updates, parts, grads)))
        assert updates["batch_stats"] and parts["class_loss"] > 0
        assert (parts["mask_loss"] > 0) == (parts["box_loss"] > 0) == valid.any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads["mask_head"]))


def test_every_mask_counts_for_its_own_object(gradients, batch):
    """Bits are unpacked, and shown where rows and columns say."""
    (_, (_, parts)), _ = gradients(batch, jax.random.key(1))
    flipped = {**batch, "masks": ~batch["masks"]}
    (_, (_, other)), _ = gradients(flipped, jax.random.key(1))
    assert abs(parts["mask_loss"] - other["mask_loss"]) > 1e-4
    assert all(parts[name] == other[name] for name in PARTS if name != "mask_loss")
    hidden = batch["masks"].copy()
    hidden[1, 1] = 255  # of a place that is not used
    (_, (_, same)), _ = gradients({**batch, "masks": hidden}, jax.random.key(1))
    assert same == parts


def test_every_parameter_decays_at_the_rate_of_the_step():
    options = {"lr": 0.1, "decay_epochs": (1,), "warmup_steps": 2, "warmup_factor": 0.5, "weight_decay": 0.5}
    tx, schedule = detection.make_optimizer(2, 2, 32, 4, **options)
    params = {"norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}, "kernel": jnp.ones((3, 3))}
    state, expected = tx.init(params), 1.0
    for step, rate in enumerate((0.05, 0.075, 0.01)):  # without gradients, an update is decay alone
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        assert schedule(step) == pytest.approx(rate, rel=1e-6)
        expected *= 1 - 0.5 * rate
        for x in jax.tree.leaves(params):
            np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def validation(few_scenes):
    return detection.open_dataset(False, **tiny().data)


def as_found(data, size=3, seed=0):
    """Outputs of `eval_step` that found the truth, with the images in any order and rows that count nothing."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(data.num_eval)
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        output = {
            "boxes": np.zeros((size + 1, 6, 4), np.float32),
            "scores": np.zeros((size + 1, 6), np.float32),
            "labels": np.zeros((size + 1, 6), np.int32),
            "valid": np.zeros((size + 1, 6), bool),
            "masks": np.ones((size + 1, 6, 28, 28), np.float32),
            "index": np.full(size + 1, indices[0], np.int32),
            "mask": np.arange(size + 1) < len(indices),
        }
        output["valid"][len(indices) :] = True  # of the rows that only fill up
        for row, index in enumerate(indices):
            truth = data.eval.truth(index)
            number = len(truth.boxes)
            boxes = np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]], 1).astype(np.float32)
            output["index"][row], output["valid"][row, :number] = index, True
            output["boxes"][row, :number], output["labels"][row, :number] = boxes, truth.classes
            output["scores"][row, :number] = rng.uniform(0.5, 1, number)
            masks = segments.decode(truth.rles, 96, 96)
            output["masks"][row, :number] = crop_masks(masks, boxes, np.arange(number))
        yield output


def test_the_truth_has_an_ap_of_one(validation, tmp_path):
    file = tmp_path / "found.json"
    data = dataclasses.replace(validation, options=dict(validation.options, results=str(file)))
    result = detection.finish(as_found(data), data)
    present = {row["class"] for row in result["classes"] if row["objects"]}
    assert result["box_ap"] == result["box_ap50"] == result["box_ar100"] == 1 and result["count"] == 20
    assert {row["class"] for row in result["classes"] if row["box_ap"] == 1} == present
    # Masks of 28 x 28 cells lose the finest corners of a digit of 40 pixels.
    assert result["mask_ap50"] == 1 and result["mask_ap75"] == 1 and result["mask_ap"] > 0.97
    truths = [data.eval.truth(i) for i in range(20)]
    exact = [
        coco_eval.Detections(found.boxes, found.scores, found.classes, truth.rles)
        for found, truth in zip(from_results(file, 20), truths, strict=True)
    ]
    assert detection.score(truths, exact, data.class_names)["mask_ap"] == 1


def from_results(file, count):
    """Detections of every image from a file in COCO's format."""
    entries = [[x for x in json.loads(file.read_text()) if x["image_id"] == i] for i in range(count)]
    boxes = [np.array([x["bbox"] for x in image], np.float64).reshape(-1, 4) for image in entries]
    return [
        coco_eval.Detections(
            np.concatenate([x[:, :2], x[:, :2] + x[:, 2:]], 1),
            np.array([entry["score"] for entry in image]),
            np.array([entry["category_id"] for entry in image], int),
            [{**entry["segmentation"], "counts": entry["segmentation"]["counts"].encode()} for entry in image],
        )
        for x, image in zip(boxes, entries, strict=True)
    ]


def test_nothing_found_is_an_ap_of_zero(validation):
    outputs = [{**output, "valid": output["valid"] & False} for output in as_found(validation)]
    result = detection.finish(outputs, validation)
    assert result["box_ap"] == result["mask_ap"] == result["box_ar100"] == 0
    assert "box AP 0.00%" in detection.describe(result)


def test_classes_that_are_nowhere_are_left_out_of_the_mean(validation):
    truths = [validation.eval.truth(i) for i in range(20)]
    found = [coco_eval.Detections(x.boxes[:0], np.zeros(0), np.zeros(0, int), []) for x in truths]
    result = detection.score(truths, found, [*"0123456789", "ten"])
    assert result["classes"][-1] == {"class": "ten", "box_ap": None, "mask_ap": None, "objects": 0}
    assert "without 1 of 11 classes" in detection.describe(result)
    nothing = [
        x._replace(boxes=x.boxes[:0], classes=x.classes[:0], areas=x.areas[:0], crowd=x.crowd[:0], rles=[])
        for x in truths
    ]
    assert detection.score(nothing, found, ["a"])["mask_ap"] == 0


def test_boxes_alone(plain, batch, validation):
    config = tiny()
    config.model.masks = False
    assert not config.data.masks
    model = plain[0].clone(masks=False)
    alone = {name: x for name, x in batch.items() if name not in ("masks", "rows", "columns")}
    prepared = jax.eval_shape(detection.make_prepare(model), jax.random.key(0), alone)
    _, (_, parts) = jax.eval_shape(functools.partial(detection.loss, model), plain[1], prepared, jax.random.key(0))
    assert parts.keys() == {*PARTS, "class_accuracy"} - {"mask_loss"}
    outputs = [{name: x for name, x in output.items() if name != "masks"} for output in as_found(validation)]
    result = detection.finish(outputs, validation)
    assert result["box_ap"] == 1 and not any("mask" in name for name in (*result, *result["classes"][0]))
    assert best_metric(detection, result) == "box_ap" and "mask" not in detection.describe(result)
    assert best_metric(detection, {"box_ap", "mask_ap"}) == "mask_ap"
