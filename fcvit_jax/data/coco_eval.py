"""COCO's average precision of boxes and masks, by pycocotools, and its format for results."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.data import segments
from fcvit_jax.data.segments import RLE

MAX_DETECTIONS = [100, 300, 1000]  # of an image, in AP and the first AR, the second and the third
NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar100", "ar300", "ar1000", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


class Truth(NamedTuple):
    """What is to be found in one image; n objects.

    Attributes:
      boxes: (n, 4): x, y, width, height in pixels of the original image.
      classes: (n,) integers.
      areas: (n,), of the masks in pixels; they decide what is small, medium and large.
      crowd: bool (n,): detections inside count neither as right nor as wrong.
      rles: n masks of runs, of the size of the image, None where an object has none; None: no masks at all.
    """

    boxes: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    rles: Sequence[RLE | None] | None


class Detections(NamedTuple):
    """What was found in one image; n objects in any order.

    Attributes:
      boxes: (n, 4): x1, y1, x2, y2 in pixels of the original image.
      scores: (n,).
      classes: (n,) integers.
      rles: n masks of runs, of the size of the image; None: no masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    rles: Sequence[RLE] | None


class Precision(NamedTuple):
    """What `evaluate` returns.

    Attributes:
      summary: COCO's twelve numbers by the names `NAMES`, in 0 to 1; None where no object counts.
      class_ap: the AP of every class; None where no object has it.
    """

    summary: dict[str, float | None]
    class_ap: list[float | None]


def evaluate(truths: Sequence[Truth], detections: Sequence[Detections], num_classes: int, *, masks: bool) -> Precision:
    """Computes COCO's average precision and recall: IoU 0.50 to 0.95, 101 recalls, the best 100 detections an image.

    Example::

        result = evaluate(truths, detections, num_classes=80, masks=False)
        result.summary["ap50"], result.class_ap[0]

    Args:
      truths, detections: one of each for every image, in the same order. Equal scores of several images count in this
        order, which is that of the ids in COCO's own results.
      num_classes: the classes are 0 to num_classes - 1.
      masks: compare the masks rather than the boxes. Objects without a mask are then left out, and small, medium and
        large are the masks of the detections.
    """
    from pycocotools.cocoeval import COCOeval

    # Numbers of our own, from 1: an object of the id 0 would never count as found.
    images = [{"id": number + 1, "height": 0, "width": 0} for number in range(len(truths))]  # sizes: read, never used
    categories = [{"id": label} for label in range(num_classes)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        run = COCOeval(
            _coco(images, categories, _truth_entries(truths, masks)),
            _coco(images, categories, _detection_entries(detections, masks)),
            "segm" if masks else "bbox",
        )
        run.params.maxDets = MAX_DETECTIONS
        run.evaluate()
        run.accumulate()
        run.summarize()
    summary = {name: _number(value) for name, value in zip(NAMES, run.stats, strict=True)}
    precision = run.eval["precision"][:, :, :, 0, 0]  # of every IoU, recall and class, for all sizes and 100 detections
    class_ap = [_number(values[values > -1].mean()) if (values > -1).any() else None for values in precision.T]
    return Precision(summary, class_ap)


def _number(value: float) -> float | None:
    return None if value == -1 else float(value)


def _coco(images: list[dict], categories: list[dict], entries: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    for number, entry in enumerate(entries):
        entry["id"] = number + 1
    coco.dataset = {"images": images, "categories": categories, "annotations": entries}
    coco.createIndex()
    return coco


def _truth_entries(truths: Sequence[Truth], masks: bool) -> list[dict[str, Any]]:
    entries = []
    for number, truth in enumerate(truths):
        rles = truth.rles if masks else [None] * len(truth.boxes)
        columns = (truth.boxes.tolist(), truth.classes.tolist(), truth.areas.tolist(), truth.crowd.tolist())
        for box, label, area, crowd, rle in zip(*columns, rles, strict=True):
            if rle is not None or not masks:
                entry = {"image_id": number + 1, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
                entries.append(entry | ({"segmentation": rle} if masks else {}))
    return entries


def _detection_entries(detections: Sequence[Detections], masks: bool) -> list[dict[str, Any]]:
    from pycocotools import mask

    entries = []
    for number, found in enumerate(detections):
        boxes = _x_y_width_height(found.boxes)
        if masks:
            areas = [float(mask.area(rle)) for rle in found.rles]
        else:
            areas = (boxes[:, 2] * boxes[:, 3]).tolist()
        columns = (boxes.tolist(), found.classes.tolist(), found.scores.tolist(), areas)
        for box, label, score, area, rle in zip(*columns, found.rles if masks else [None] * len(boxes), strict=True):
            entry = {"image_id": number + 1, "category_id": label, "score": score, "area": area, "iscrowd": 0}
            entries.append(entry | ({"segmentation": rle} if masks else {"bbox": box}))
    return entries


def _x_y_width_height(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def to_results(
    detections: Sequence[Detections], image_ids: Sequence[int | str], category_ids: Sequence[int | str | None]
) -> list[dict[str, Any]]:
    """Writes detections as COCO's results, ready for `json.dump`.

    Args:
      detections: one for every image.
      image_ids: of the images, as their file has them.
      category_ids: of the classes, as the same file has them; None where it lacks one, whose detections are left out.

    Returns:
      A dict for every detection: image_id, category_id, bbox [x, y, width, height], score and, where there are masks,
      segmentation.
    """
    results = []
    for image_id, found in zip(image_ids, detections, strict=True):
        boxes = _x_y_width_height(found.boxes).tolist()
        rles = [None] * len(boxes) if found.rles is None else found.rles
        columns = (boxes, found.scores.tolist(), found.classes.tolist(), rles)
        for box, score, label, rle in zip(*columns, strict=True):
            if category_ids[label] is None:
                continue
            entry = {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            if rle is not None:
                entry["segmentation"] = segments.as_text(rle)
            results.append(entry)
    return results
