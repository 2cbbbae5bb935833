"""An image together with the boxes and masks of its objects: resized and flipped as the original's detection does.

Boxes are float32 (n, 4): x1, y1, x2, y2 in pixels; masks are bool (n, height, width).
"""

import numpy as np


def rescaled_size(width: int, height: int, long: int = 1333, short: int = 800) -> tuple[int, int]:
    """Computes the largest size with the same ratio whose longer side is at most `long` and shorter at most `short`.

    Example::

        rescaled_size(640, 480)     # (1067, 800)

    Args:
      width, height: of the image in pixels.
      long, short: limits in pixels.

    Returns:
      (width, height), each rounded.
    """
    factor = min(long / max(width, height), short / min(width, height))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image by OpenCV, bilinear and without antialiasing.

    Args:
      image: uint8 (height, width, 3).
      size: (width, height) of the result.

    Returns:
      uint8 (size[1], size[0], 3).
    """
    import cv2

    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


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
