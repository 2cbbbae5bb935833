"""Boxes and masks of an image's objects, resized and flipped with it as the original's detection does.

The image itself is resized by `paired.rescaled_size` and `paired.resize`.
Boxes are float32 (n, 4): x1, y1, x2, y2 in pixels; masks are bool (n, height, width).
"""

import numpy as np


def resize_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Moves boxes with their image from one size (width, height) to another, and clips them to it."""
    factor = np.array([new[0] / old[0], new[1] / old[1]] * 2, np.float32)
    return np.clip(boxes * factor, np.float32(0), np.array([*new, *new], np.float32))


def resize_masks(masks: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """Resizes masks to a size (width, height): each pixel is that whose top left corner is nearest before it."""
    rows, columns = (source_indices(old, side) for old, side in zip(masks.shape[1:], reversed(new), strict=True))
    return masks[:, rows[:, None], columns]


def source_indices(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels each of `new` takes: floor(index * old / new), int64 (new,), as OpenCV rounds it."""
    return np.minimum(np.arange(new) * (1 / (new / old)), old - 1).astype(np.int64)


def flip(image: np.ndarray, boxes: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flips an image (height, width, 3), boxes and masks left to right."""
    x1, y1, x2, y2 = boxes.T
    width = np.float32(image.shape[1])
    return image[:, ::-1], np.stack([width - x2, y1, width - x1, y2], axis=1), masks[:, :, ::-1]
