from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.augment import paired
from fcvit_jax.tasks import segmentation

DATA = Path(__file__).parent.parent / "data"


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
        confusion = np.asarray(segmentation.count_confusions(predictions[None], labels[None], classes))
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
    count = jax.jit(segmentation.count_confusions, static_argnums=2)
    alone = sum(np.asarray(count(predictions[i : i + 1], labels[i : i + 1], classes)) for i in (0, 2))
    masked = count(predictions, labels, classes, jnp.array([True, False, True]))
    np.testing.assert_array_equal(masked, alone)
    assert masked.sum() == (labels[[0, 2]] != 255).sum() < labels[[0, 2]].size
    assert not count(predictions, np.full_like(labels, 255), classes).any()


def test_counts_are_by_label_and_prediction():
    confusion = segmentation.count_confusions(jnp.array([[[1, 1, 0]]]), jnp.array([[[0, 0, 255]]]), 2)
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
