"""Images, boxes and masks resized and flipped as in the original's detection, whose numbers the goldens hold."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from whole_masks import resize_masks

from fcvit_jax.augment import objects, paired

GOLDEN = Path(__file__).parent.parent / "data" / "detection_data.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def test_sizes(golden):
    for (width, height, *expected), factor in zip(golden["sizes"].tolist(), golden["scale_factor"], strict=True):
        size = paired.rescaled_size(width, height, 1333, 800)
        assert list(size) == expected[:2]
        far = np.array([[0, 0, width, height], [width, height, width, height]], np.float32)
        moved = objects.resize_boxes(far, (width, height), size)
        np.testing.assert_array_equal(moved, np.minimum(far * factor, [*size, *size]).astype(np.float32))


@pytest.mark.parametrize("case", ["pipe0", "pipe1"])
def test_an_image_with_its_objects(golden, case):
    case = {key.split("/")[1]: value for key, value in golden.items() if key.startswith(case)}
    image, boxes, masks = case["image_rgb"], case["boxes"], case["masks"].astype(bool)
    height, width = image.shape[:2]
    size = paired.rescaled_size(width, height, *sorted(case["scale"].tolist(), reverse=True))
    assert list(size[::-1]) == case["img_shape"].tolist()
    image = paired.resize(image, size)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, case["resized_rgb"])
    boxes = objects.resize_boxes(boxes, (width, height), size)
    masks = resize_masks(masks, size)
    if case["flip"]:
        boxes, masks = objects.flip_boxes(boxes, size[0]), masks[:, :, ::-1]
    assert boxes.dtype == np.float32 and masks.dtype == bool
    np.testing.assert_array_equal(boxes, case["out_boxes"])
    np.testing.assert_array_equal(masks, case["out_masks"][:, : size[1], : size[0]])


def test_goldens_hold_both_flips(golden):
    assert {bool(golden[f"pipe{i}/flip"]) for i in range(2)} == {True, False}


def test_masks_take_the_pixels_that_opencv_takes():
    for old in range(1, 641, 29):
        for new in range(1, 1345, 31):
            expected = cv2.resize(np.arange(old, dtype=np.float32)[None], (new, 1), interpolation=cv2.INTER_NEAREST)
            np.testing.assert_array_equal(objects.source_indices(old, new), expected[0])


def test_no_objects():
    boxes, masks = np.zeros((0, 4), np.float32), np.zeros((0, 6, 8), bool)
    assert objects.resize_boxes(boxes, (8, 6), (16, 12)).shape == (0, 4)
    masks = resize_masks(masks, (16, 12))
    boxes = objects.flip_boxes(boxes, 16)
    assert boxes.shape == (0, 4) and masks.shape == (0, 12, 16)
