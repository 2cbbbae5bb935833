"""Scenes of digits: what they are a function of, which digits they show, and that their annotations agree."""

import pickle
import types

import numpy as np
import pytest
import sklearn.datasets

from fcvit_jax.data import scenes, segments
from fcvit_jax.data.coco_eval import Detections, evaluate
from fcvit_jax.data.scenes import Scenes, make_scene

# Digits and first box of the first two scenes of validation.
EXPECTED = [([5, 6, 8, 5], [7, 21, 25, 50]), ([4, 8], [27, 59, 49, 89])]


@pytest.fixture(scope="module")
def some():
    return [make_scene("train", 0, np.random.default_rng([5, i])) for i in range(80)] + [
        make_scene("validation", i) for i in range(80)
    ]


def same(a, b):
    return all(np.array_equal(value, getattr(b, name)) for name, value in vars(a).items())


def test_a_scene_is_a_function_of_split_index_and_generator():
    drawn = [make_scene("train", 3, np.random.default_rng([1, 2, 3])) for _ in range(2)]
    assert same(*drawn)
    assert same(make_scene("train", 4, np.random.default_rng([1, 2, 3])), drawn[0])
    assert not same(make_scene("train", 3, np.random.default_rng([1, 3, 3])), drawn[0])
    fixed = make_scene("validation", 3)
    np.random.seed(1)
    assert same(make_scene("validation", 3), fixed)
    assert not same(make_scene("validation", 4), fixed) and not same(make_scene("train", 3), fixed)


def test_fixed_scenes_stay_the_same_from_version_to_version():
    """Results on the 400 scenes of validation can be compared over time."""
    first = [make_scene("validation", index) for index in range(2)]
    assert [(scene.classes.tolist(), scene.boxes[0].tolist()) for scene in first] == EXPECTED


def test_splits_share_no_digit(monkeypatch):
    target = (np.arange(60) % 6 == 5) * 7  # the digits of validation are sevens, the others zeros
    digits = types.SimpleNamespace(images=np.full((60, 8, 8), 16.0), target=target)
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    scenes._digits.cache_clear()
    for split, digit in (("train", 0), ("validation", 7)):
        for index in range(10):
            assert set(make_scene(split, index).classes) == {digit}
    scenes._digits.cache_clear()


def test_labels_boxes_and_masks_agree(some):
    for scene in some:
        n = len(scene.classes)
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert scene.labels.dtype == np.uint8 and scene.boxes.dtype == np.float32 and scene.masks.dtype == bool
        assert scene.boxes.shape == (n, 4) and scene.masks.shape == (n, 96, 96) and scene.classes.dtype == np.int32
        assert scene.masks.sum(0).max() == 1  # visible pixels belong to one object
        np.testing.assert_array_equal(scene.labels, np.tensordot(scene.classes + 1, scene.masks, 1))
        for (x1, y1, x2, y2), mask in zip(scene.boxes, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert (x1, y1, x2, y2) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_digits_are_bright_and_the_ground_is_dark(some):
    for scene in some:
        inside = scene.image[scene.labels > 0].mean()
        assert 0 < scene.image[scene.labels == 0].mean() < 0.4 * 255 < inside


def test_objects_are_2_to_4_of_all_classes_and_overlap_little(some):
    counts = [len(scene.classes) for scene in some]
    assert set(counts) == {2, 3, 4} and set(np.concatenate([scene.classes for scene in some])) == set(range(10))
    most = 0
    for scene in some:
        for i in range(len(scene.boxes)):
            for j in range(i):
                a, b = np.zeros((2, 96, 96), bool)
                for canvas, (x1, y1, x2, y2) in ((a, scene.boxes[i].astype(int)), (b, scene.boxes[j].astype(int))):
                    canvas[y1:y2, x1:x2] = True
                most = max(most, (a & b).sum() / (a | b).sum())
    assert 0.05 < most <= 0.15


def test_at_most_a_quarter_of_a_digit_is_hidden(monkeypatch):
    seen = []
    is_good = scenes._is_good

    def watch(visible, whole):
        good = is_good(visible, whole)
        if good:
            seen.append((visible.sum((1, 2)) / whole).min())
        return good

    monkeypatch.setattr(scenes, "_is_good", watch)
    for index in range(60):
        make_scene("train", index)
    assert 0.75 <= min(seen) < 0.95


def test_scale_spans_its_range(some):
    heights = np.concatenate([scene.boxes[:, 3] - scene.boxes[:, 1] for scene in some])
    assert 20 <= heights.min() < 26 and 44 < heights.max() <= 60


def test_source():
    source = pickle.loads(pickle.dumps(Scenes("validation")))
    assert len(source) == 400 and len(Scenes("train")) == 2000
    records = list(source.read([3, 9]))
    assert same(make_scene(*records[1]), make_scene("validation", 9))
    assert "9" in source.describe(9) and "validation" in source.describe(9)


def test_the_truth_is_that_of_the_fixed_scenes():
    source = Scenes("validation")
    truths = [source.truth(index) for index in range(20)]
    fixed = [make_scene("validation", index) for index in range(20)]
    found = [Detections(s.boxes, np.ones(len(s.boxes)), s.classes, segments.encode(s.masks)) for s in fixed]
    for masks in (False, True):
        assert evaluate(truths, found, 10, masks=masks).summary["ap"] == pytest.approx(1)
    assert truths[3].areas.tolist() == fixed[3].masks.sum((1, 2)).tolist()
