"""An image with the boxes and masks of its objects, resized and flipped as the original's detection does.

Boxes are float32 (n, 4): x1, y1, x2, y2 in pixels. Of masks, `source_indices` says which pixels a resize takes.
"""

from collections.abc import Iterable

import numpy as np

from fcvit_jax.augment import paired


def fit_image(image: np.ndarray, long: int = 1333, short: int = 800) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image, keeping its ratio, to the largest size that `long` and `short` allow.

    Example::

        pixels, scale = fit_image(np.asarray(decode(jpeg)))             # 640 x 480 pixels become 1067 x 800

    Args:
      image: (H, W, 3) uint8, RGB.
      long, short: the longer and the shorter side, in pixels, that the result must not exceed.

    Returns:
      (h, w, 3) uint8; and (4,) float32, pixels of the result for a pixel of the image along x, y, x and y.
    """
    height, width = image.shape[:2]
    size = paired.rescaled_size(width, height, long, short)
    return paired.resize(image, size), np.array([size[0] / width, size[1] / height] * 2, np.float32)


def canvas_size(sizes: Iterable[tuple[int, int]], long: int = 1333, short: int = 800) -> tuple[int, int]:
    """The smallest canvas (height, width), in multiples of 32 pixels, for images of any of these sizes.

    Args:
      sizes: (width, height) of the images before `fit_image`.
      long, short: as in `fit_image`.
    """
    fitted = [paired.rescaled_size(width, height, long, short) for width, height in sizes]
    widths, heights = zip(*fitted, strict=True)
    return paired.aligned(max(heights), max(widths))


def on_canvas(image: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """The image at the top left of a canvas (height, width), which is black elsewhere: (height, width, 3) uint8."""
    padded = np.zeros((*canvas, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def resize_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Moves boxes with their image from one size (width, height) to another, and clips them to it."""
    factor = np.array([new[0] / old[0], new[1] / old[1]] * 2, np.float32)
    return np.clip(boxes * factor, np.float32(0), np.array([*new, *new], np.float32))


def source_indices(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels each of `new` takes: floor(index * old / new), int64 (new,), as OpenCV rounds it."""
    return np.minimum(np.arange(new) * (1 / (new / old)), old - 1).astype(np.int64)


def flip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes after their image, `width` pixels wide, was flipped left to right."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([np.float32(width) - x2, y1, np.float32(width) - x1, y2], axis=1)
