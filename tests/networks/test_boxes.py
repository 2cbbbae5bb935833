"""Boxes against MMDetection's numbers, and against plain loops over what the boxes of a few pixels can be."""

from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WELL
from hypothesis import given, settings

from fcvit_jax.networks import boxes

DATA = Path(__file__).parents[1] / "data" / "detection"
CODER, NMS, ASSIGN = (np.load(DATA / f"{name}.npz") for name in ("boxes_anchors", "nms", "assign"))
STDS = {"rpn": (1, 1, 1, 1), "rcnn": (0.1, 0.1, 0.2, 0.2)}
THRESHOLDS = {"rpn": (0.7, 0.3, 0.3), "rcnn": (0.5, 0.5, 0.5)}

often = settings(max_examples=200, deadline=None, derandomize=True, database=None)
# On a coarse grid, boxes coincide, touch, lie within each other, and have no width or no height.
box = st.tuples(*[st.integers(0, 6)] * 4).map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3]))
twelve = st.lists(box, min_size=12, max_size=12).map(lambda rows: np.array(rows, np.float32))
flags = st.lists(st.booleans(), min_size=12, max_size=12).map(np.array)


def cases(file):
    return sorted({name.split("/")[0] for name in file})


@pytest.mark.parametrize("canvas", ["128x160", "64x96"])
def test_anchors_and_which_are_inside(canvas):
    height, width = map(int, canvas.split("x"))
    ours = jax.jit(boxes.anchors, static_argnums=(0, 1))(height, width)
    np.testing.assert_array_equal(ours, CODER[f"anchors_{canvas}"])
    inside = boxes.inside(height, width, CODER[f"anchors_{canvas}/pad_shape"][:2])
    np.testing.assert_array_equal(np.packbits(inside), CODER[f"anchors_{canvas}/valid"])


def test_anchors_of_the_real_canvas():
    ours = np.asarray(boxes.anchors(800, 1344))
    assert len(ours) == CODER["anchors_big_800x1344/count"]
    np.testing.assert_array_equal(ours[CODER["anchors_big_800x1344/rows"]], CODER["anchors_big_800x1344/values"])
    np.testing.assert_array_equal(ours.sum(0, dtype=np.float64), CODER["anchors_big_800x1344/sum64"])


@pytest.mark.parametrize("stage", STDS)
def test_encode_and_decode(stage):
    source, targets, deltas, stds = CODER["src"], CODER["gt"], CODER["deltas"], STDS[stage]

    def check(ours, expected):
        np.testing.assert_allclose(ours, expected, rtol=4e-7, atol=4e-7 * np.abs(expected).max())

    check(boxes.encode(source, targets, stds), CODER[f"{stage}/encode"])
    check(boxes.decode(source, deltas, stds), CODER[f"{stage}/decode"])
    check(boxes.decode(source, deltas, stds, (187, 291)), CODER[f"{stage}/decode_clipped"])


def test_boxes_of_several_classes_are_decoded_by_broadcasting():
    deltas = CODER["rcnn/class_deltas"].reshape(40, 3, 4)
    ours = boxes.decode(CODER["src"][:, None], deltas, STDS["rcnn"], (187, 291)).reshape(40, 12)
    np.testing.assert_allclose(ours, CODER["rcnn/class_decode"], atol=1e-4)


def test_what_is_encoded_is_decoded():
    source, targets = CODER["src"][None], CODER["gt"][None]
    deltas = boxes.encode(source, targets, STDS["rcnn"])
    fits = (jnp.abs(deltas[..., 2:] * 0.2) < boxes.MAX_LOG_RATIO).all(-1)
    assert fits.sum() > 30
    ours = boxes.decode(source, deltas, STDS["rcnn"])
    np.testing.assert_allclose(ours[fits], targets[fits], atol=1e-3)


def test_overlaps_have_the_same_bits_however_they_are_compiled():
    """XLA for CPUs makes one operation of a product and a sum, which rounds otherwise and moves ties of anchors."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 200, (2, 500, 2))
    a, b = np.concatenate([corners, corners + rng.uniform(5, 100, (2, 500, 2))], -1).astype(np.float32)
    sides = np.maximum(np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2]), 0)
    common = sides[..., 0] * sides[..., 1]
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b)]
    expected = common / np.maximum(areas[0][:, None] + areas[1] - common, np.float32(1e-6))
    for options in (None, WELL):
        ours = jax.jit(boxes.iou).lower(a, b).compile(options)(a, b)
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("case", [case for case in cases(NMS) if not case.startswith("multiclass")])
def test_nms(case):
    corners, scores, threshold = (NMS[f"{case}/{name}"] for name in ("boxes", "scores", "thr"))
    groups = NMS[f"{case}/ids"] if f"{case}/ids" in NMS else None
    kept = np.flatnonzero(boxes.nms(corners, scores, float(threshold), groups=groups))
    np.testing.assert_array_equal(kept[np.argsort(-scores[kept], kind="stable")], NMS[f"{case}/keep"])


def greedy(corners, scores, threshold, valid, groups):
    """The algorithm as it is described everywhere."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):

        def overlap(j, i=i):
            sides = np.minimum(corners[i, 2:], corners[j, 2:]) - np.maximum(corners[i, :2], corners[j, :2])
            common = np.float32(np.prod(np.maximum(sides, 0)))
            area = [np.prod(corners[k, 2:] - corners[k, :2]) for k in (i, j)]
            return common / (area[0] + area[1] - common) if sum(area) > 0 else np.float32(0)

        if valid[i] and not any(groups[i] == groups[j] and overlap(j) > np.float32(threshold) for j in kept):
            kept.append(i)
    return np.isin(np.arange(len(scores)), kept)


nms_of_images = jax.jit(jax.vmap(boxes.nms, (0, 0, None, 0, 0)))


@often
@given(twelve, st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=12, max_size=12), flags, flags, st.data())
def test_nms_is_the_greedy_algorithm(corners, scores, valid, groups, data):
    threshold = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.7]))
    scores, groups = np.array(scores, np.float32), groups.astype(np.int32)
    # The second image holds the same boxes backwards: images have nothing to do with each other.
    args = [np.stack([x, x[::-1]]) for x in (corners, scores, valid, groups)]
    ours = nms_of_images(args[0], args[1], threshold, args[2], args[3])
    for i in range(2):
        expected = greedy(args[0][i], args[1][i], threshold, args[2][i], args[3][i])
        np.testing.assert_array_equal(ours[i], expected)


@pytest.mark.parametrize("stage", THRESHOLDS)
@pytest.mark.parametrize("case", cases(ASSIGN))
def test_assign(case, stage):
    overlaps = boxes.iou(ASSIGN[f"{case}/gts"], ASSIGN[f"{case}/boxes"])
    if len(overlaps):
        np.testing.assert_array_equal(overlaps.max(0), ASSIGN[f"{case}/{stage}/max_overlaps"])
    ours = boxes.assign(overlaps, *THRESHOLDS[stage])
    np.testing.assert_array_equal(ours, ASSIGN[f"{case}/{stage}/gt_inds"])
    # Padding, whatever it overlaps, changes nothing.
    padded = jnp.pad(overlaps, ((0, 2), (0, 3)), constant_values=0.99)
    valid = [jnp.arange(n + more) < n for n, more in zip(overlaps.shape, (2, 3), strict=True)]
    ours = boxes.assign(padded, *THRESHOLDS[stage], *valid)
    np.testing.assert_array_equal(ours, np.pad(ASSIGN[f"{case}/{stage}/gt_inds"], (0, 3), constant_values=-1))


assign_five = jax.jit(boxes.assign)


@often
@given(twelve, st.lists(box, min_size=5, max_size=5), flags, flags, st.sampled_from(sorted(THRESHOLDS.values())))
def test_assign_is_the_rule_object_after_object(corners, objects, valid_boxes, valid_objects, thresholds):
    overlaps = np.asarray(boxes.iou(np.array(objects, np.float32), corners))
    valid_objects = valid_objects[:5]
    ours = assign_five(overlaps, *thresholds, valid_objects, valid_boxes)
    positive, negative, minimum = (np.float32(x) for x in thresholds)
    expected = np.full(12, -1)
    for j in np.flatnonzero(valid_boxes):
        column = [overlaps[i, j] if valid_objects[i] else -1 for i in range(5)]
        if max(column) < negative:
            expected[j] = 0
        if max(column) >= positive:
            expected[j] = int(np.argmax(column)) + 1
    for i in np.flatnonzero(valid_objects):
        best = max(overlaps[i, valid_boxes], default=-1)
        if best >= minimum:
            expected[valid_boxes & (overlaps[i] == best)] = i + 1
    np.testing.assert_array_equal(ours, expected)


draw = jax.jit(jax.vmap(boxes.sample, (0, None, None, None)), static_argnums=(2, 3))
KEYS = jax.random.split(jax.random.key(0), 4000)


@pytest.mark.parametrize(
    "positives, negatives, neither", [(9, 30, 3), (2, 30, 10), (2, 4, 36), (0, 42, 0), (42, 0, 0), (0, 0, 42)]
)
def test_samples_are_uniform_and_complete(positives, negatives, neither):
    """10 of 42 boxes, at most 4 of them positive: as many as there are, each as often as the others of its kind."""
    assigned = np.repeat([3, 0, -1], [positives, negatives, neither])
    index, found, positive, valid = (np.asarray(x) for x in draw(KEYS, assigned, 10, 4))
    num_positives = min(positives, 4)
    num_negatives = min(negatives, 10 - num_positives)
    places = np.arange(10)
    assert (positive == (places < num_positives)).all()
    assert (valid == (places < num_positives + num_negatives)).all()
    assert (assigned[index][positive] > 0).all() and (found == np.where(positive, 2, 0)).all()
    assert (assigned[index][~positive & valid] == 0).all()
    drawn = np.array([np.bincount(i[v], minlength=42) for i, v in zip(index, valid, strict=True)])
    assert drawn.max() <= 1
    for kind, number, of in ((assigned > 0, num_positives, positives), (assigned == 0, num_negatives, negatives)):
        if of:
            # Five standard deviations of a mean over the keys.
            share = number / of
            np.testing.assert_allclose(drawn.mean(0)[kind], share, atol=5 * (share * (1 - share) / len(KEYS)) ** 0.5)


def test_fewer_boxes_than_samples():
    index, _, positive, valid = (np.asarray(x) for x in boxes.sample(KEYS[0], jnp.array([0, 1, -1, 0]), 7, 3))
    assert sorted(index[valid]) == [0, 1, 3] and index[positive].tolist() == [1]
