"""Confusion matrices of pixels: how they are counted, and the metrics of segmentation that follow from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.augment.paired import IGNORED


def count_confusions(
    predictions: jax.Array, labels: jax.Array, num_classes: int, mask: jax.Array | None = None
) -> jax.Array:
    """Counts the pixels of every pair of label and prediction, on the device.

    Args:
      predictions: (N, H, W) integers, classes from 0.
      labels: (N, H, W) integers, classes from 0; 255: the pixel does not count.
      num_classes: at most 255.
      mask: (N,) bool; False: the image does not count; None: all do.

    Returns:
      (num_classes, num_classes) int32, by label and prediction: exact up to 2,147,483,647 pixels in a batch.
    """
    counts = labels != IGNORED
    if mask is not None:
        counts &= mask[:, None, None]
    nowhere = num_classes**2  # beyond the last place: such a pixel is dropped
    place = jnp.where(counts, labels.astype(jnp.int32) * num_classes + predictions.astype(jnp.int32), nowhere)
    found = jnp.zeros(num_classes**2, jnp.int32).at[place.ravel()].add(1, mode="drop")
    return found.reshape(num_classes, num_classes)


def metrics(confusion: np.ndarray) -> dict[str, Any]:
    """The metrics of a whole set of images, from the sum of its confusion matrices.

    A class that is neither labelled nor predicted anywhere has no intersection over union, and no part in the mean; one
    that is predicted but nowhere labelled has 0. The mean accuracy is over the classes that are labelled.

    Example::

        metrics(np.array([[3, 1], [0, 4]]))         # {"miou": 0.775, "macc": 0.875, "aacc": 0.875, "iou": [0.75, 0.8]}

    Args:
      confusion: (classes, classes) integers: pixels by label and prediction.

    Returns:
      "miou", the mean intersection over union; "macc", the mean share of the labelled pixels of a class that are right;
      "aacc", the share of all labelled pixels that are right; 0 where there are none; and "iou", a list with a number
      or None for each class. All are fractions.
    """
    confusion = np.asarray(confusion, np.int64)
    right, labelled, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = labelled + predicted - right
    iou = [float(i / u) if u else None for i, u in zip(right, union, strict=True)]
    accuracy = right[labelled > 0] / labelled[labelled > 0]
    return {
        "miou": float(np.mean([x for x in iou if x is not None] or [0])),
        "macc": float(accuracy.mean()) if accuracy.size else 0.0,
        "aacc": float(right.sum() / max(labelled.sum(), 1)),
        "iou": iou,
    }
