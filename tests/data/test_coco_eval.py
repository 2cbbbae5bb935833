"""COCO's evaluation: the original's numbers, and the cases on which evaluations break."""

import json
from pathlib import Path

import numpy as np
import pytest

from fcvit_jax.data import segments
from fcvit_jax.data.coco_eval import NAMES, Detections, Truth, evaluate, to_results

GOLDEN = Path(__file__).parent / "detection_data.npz"


def rle(entry):
    return {"size": entry["size"], "counts": entry["counts"].encode()}


@pytest.fixture(scope="module")
def golden():
    """The goldens' annotations and detections per image, with classes in the order of the categories."""
    stored = np.load(GOLDEN)
    content, found = json.loads(str(stored["coco/gt"])), json.loads(str(stored["coco/dets"]))
    labels = {category["id"]: index for index, category in enumerate(content["categories"])}
    truths, detections = [], []
    for image in content["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        truths.append(
            Truth(
                boxes=np.array([entry["bbox"] for entry in own]).reshape(-1, 4),
                classes=np.array([labels[entry["category_id"]] for entry in own], int),
                areas=np.array([entry["area"] for entry in own]),
                crowd=np.array([entry["iscrowd"] for entry in own], bool),
                rles=[rle(entry["segmentation"]) for entry in own],
            )
        )
        own = [entry for entry in found if entry["image_id"] == image["id"]]
        boxes = np.array([entry["bbox"] for entry in own]).reshape(-1, 4)
        detections.append(
            Detections(
                boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
                scores=np.array([entry["score"] for entry in own]),
                classes=np.array([labels[entry["category_id"]] for entry in own], int),
                rles=[rle(entry["segmentation"]) for entry in own],
            )
        )
    return truths, detections, stored


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_goldens(golden, kind, capfd):
    truths, detections, stored = golden
    result = evaluate(truths, detections, 5, masks=kind == "segm")
    expected = stored[f"coco/{kind}_stats"]
    assert list(result.summary) == list(NAMES) and result.summary["ap_large"] is None
    found = [-1 if value is None else value for value in result.summary.values()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    present = [value for value in result.class_ap if value is not None]
    assert len(set(present)) > 2 and np.isclose(np.mean(present), expected[0])
    assert capfd.readouterr() == ("", "")


def one(classes, boxes, scores=None, crowd=None):
    """Truth and equal detections of one 60x80 image with boxes as masks."""
    boxes = np.array(boxes, float).reshape(-1, 4)
    masks = np.zeros((len(boxes), 60, 80), bool)
    for pixels, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        pixels[y1:y2, x1:x2] = True
    classes = np.array(classes, int)
    sizes = boxes[:, 2:] - boxes[:, :2]
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    rles = segments.encode(masks)
    truth = Truth(np.concatenate([boxes[:, :2], sizes], 1), classes, sizes.prod(1), crowd, rles)
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else np.array(scores)
    return truth, Detections(boxes, scores, classes, rles)


NOTHING = one([], [])


@pytest.mark.parametrize("masks", [False, True])
def test_the_truth_as_detections(masks):
    first, second = one([0, 2], [[1, 2, 30, 40], [5, 5, 9, 9]]), one([2], [[10, 10, 50, 60]])
    truths, detections = zip(first, NOTHING, second, strict=True)
    result = evaluate(truths, detections, 4, masks=masks)
    assert result.summary["ap"] == result.summary["ap50"] == result.summary["ar100"] == pytest.approx(1)
    assert result.class_ap == [pytest.approx(1), None, pytest.approx(1), None]  # no object of classes 1 and 3


@pytest.mark.parametrize("masks", [False, True])
def test_no_detection_at_all(masks):
    truth, _ = one([0], [[1, 2, 30, 40]])
    result = evaluate([truth, truth], [NOTHING[1]] * 2, 2, masks=masks)
    assert result.summary["ap"] == result.summary["ar1000"] == 0 and result.class_ap == [0, None]


def test_no_object_at_all():
    _, found = one([0], [[1, 2, 30, 40]])
    result = evaluate([NOTHING[0]], [found], 1, masks=True)
    assert result.summary == dict.fromkeys(NAMES) and result.class_ap == [None]


def test_a_single_object_counts_whatever_its_place():
    """An object of the id 0 would count as missed."""
    truth, found = one([0], [[1, 2, 30, 40]])
    assert evaluate([truth], [found], 1, masks=False).summary["ap"] == pytest.approx(1)
    worse = found._replace(boxes=found.boxes + [0, 0, 10, 0])  # an IoU of 29 / 39 passes 5 of 10 thresholds
    assert evaluate([truth], [worse], 1, masks=False).summary["ap"] == pytest.approx(0.5)
    assert evaluate([truth], [worse], 1, masks=True).summary["ap"] == pytest.approx(1)  # the mask is as good as before


def test_of_an_image_the_best_100_300_and_1000_detections_count():
    grid = [[x, y, x + 3, y + 3] for x in range(0, 80, 4) for y in range(0, 60, 3)]
    truth, found = one([0] * 400, grid)
    summary = evaluate([truth], [found], 1, masks=False).summary
    assert [summary[name] for name in ("ar100", "ar300", "ar1000")] == pytest.approx([0.25, 0.75, 1])
    assert summary["ap"] == pytest.approx(26 / 101)  # recalls 0, 0.01, ..., 0.25


def test_crowds_are_neither_right_nor_wrong():
    boxes = [[1, 2, 30, 40], [40, 10, 80, 60]]
    truth, found = one([0, 0], boxes, crowd=[False, True], scores=[0.5, 0.9])
    assert evaluate([truth], [found], 1, masks=True).summary["ap"] == pytest.approx(1)
    alone = truth._replace(crowd=np.zeros(2, bool))
    missed = found._replace(**{key: getattr(found, key)[:1] for key in ("boxes", "scores", "classes", "rles")})
    assert evaluate([alone], [missed], 1, masks=True).summary["ap"] == pytest.approx(0.504950495)
    assert evaluate([truth], [missed], 1, masks=True).summary["ap"] == pytest.approx(1)


def test_objects_without_a_mask_count_for_boxes_alone():
    truth, found = one([0, 0], [[1, 2, 30, 40], [40, 10, 80, 60]])
    truth = truth._replace(rles=[truth.rles[0], None])
    only = found._replace(**{key: getattr(found, key)[:1] for key in ("boxes", "scores", "classes", "rles")})
    assert evaluate([truth], [only], 1, masks=True).summary["ar100"] == pytest.approx(1)
    assert evaluate([truth], [only], 1, masks=False).summary["ar100"] == pytest.approx(0.5)
    no_masks = truth._replace(rles=None), only._replace(rles=None)
    assert evaluate(no_masks[:1], no_masks[1:], 1, masks=False).summary["ar100"] == pytest.approx(0.5)


def test_results_have_the_ids_of_the_file():
    _, found = one([0, 2, 1], [[1, 2, 30, 40], [40, 10, 80, 60], [0, 0, 5, 5]])
    results = json.loads(json.dumps(to_results([NOTHING[1], found], ["a", "b"], [7, None, 90])))
    assert [(entry["image_id"], entry["category_id"], entry["score"]) for entry in results] == [
        ("b", 7, 0.9), ("b", 90, 0.7)
    ]  # fmt: skip
    assert results[1]["bbox"] == [40, 10, 40, 50]
    pixels = segments.decode([rle(results[1]["segmentation"])], 60, 80)
    assert pixels.sum() == 40 * 50 and pixels[0, 10:60, 40:].all()
    assert "segmentation" not in to_results([found._replace(rles=None)], [1], [1, 2, 3])[0]
