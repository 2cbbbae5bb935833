"""An image together with the labels of its pixels: the transforms of segmentation, one example at a time, on the CPU.

What is drawn is drawn apart from the pixels (`draw_scale`, `crop_offsets`, `draw_distortion`), and all randomness comes
from the generator that is passed in. The pixels are OpenCV's, which the original used; its arithmetic is integer, and
equals that of no other library.
"""

import functools
import io
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from fcvit_jax.augment.images import BROKEN
from fcvit_jax.errors import UserError

IGNORED = 255  # the label of pixels that count for nothing
ALIGNMENT = 32  # evaluation stretches the sides of an image to multiples of the network's largest stride


@functools.cache
def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "Segmentation and detection need OpenCV for their pixels: pip install opencv-python-headless"
        ) from error
    cv2.setNumThreads(1)  # images are read by many processes, whose threads would get in each other's way
    return cv2


def train_transform(
    image: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    crop_size: int = 512,
    long: int = 2048,
    short: int = 512,
    scale: Sequence[float] = (0.5, 2.0),
    max_share: float = 0.75,
    flip: float = 0.5,
    distortion: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resizes an image and its labels at random, crops them, flips them, changes the colours and pads.

    A pure function of the arguments and the state of `rng`, from which it draws, in this order: the size
    (`draw_scale`), the crop (`crop_offsets`), the flip and the colours (`draw_distortion`). The source is section 4 of
    the original's pipeline: ResizeMultiScale, RandomCrop, RandomFlip, PhotoMetricDistortion, Pad.

    Example::

        pixels, labels, size = train_transform(np.asarray(decode(jpeg)), decode_labels(png), np.random.default_rng(0))

    Args:
      image: (H, W, 3) uint8, RGB.
      labels: (H, W) uint8; 255: ignored.
      rng: the source of randomness.
      crop_size: side of the result in pixels.
      long, short: the longer and the shorter side, in pixels, that an image at scale 1 must not exceed.
      scale: the smallest and the largest scale.
      max_share: a crop is refused where one class has this share of the pixels that are not ignored, or more.
      flip: probability of a horizontal flip.
      distortion: change brightness, contrast, saturation and hue.

    Returns:
      The image, (crop_size, crop_size, 3) uint8; its labels, (crop_size, crop_size) uint8; and (height, width), (2,)
      int32, of the part at the top left that is image: the rest is black and ignored.

    Raises:
      UserError: image and labels are no such arrays or differ in size, or OpenCV is missing.
    """
    _check_pair(image, labels)
    size = rescaled_size(image.shape[1], image.shape[0], *draw_scale(rng, long, short, scale))
    image, labels = resize(image, size), resize_labels(labels, size)
    top, left = crop_offsets(rng, labels, crop_size, crop_size, max_share)
    window = slice(top, top + crop_size), slice(left, left + crop_size)
    image, labels = image[window], labels[window]
    if rng.random() < flip:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if distortion:
        image = distort(image, **draw_distortion(rng))
    height, width = labels.shape
    padded = np.zeros((crop_size, crop_size, 3), np.uint8)
    padded_labels = np.full((crop_size, crop_size), IGNORED, np.uint8)
    padded[:height, :width], padded_labels[:height, :width] = image, labels
    return padded, padded_labels, np.array([height, width], np.int32)


def eval_transform(image: np.ndarray, long: int = 2048, short: int = 512) -> np.ndarray:
    """Resizes an image to fit, keeping its ratio, and then stretches its sides to multiples of 32: two resizes.

    Example::

        pixels = eval_transform(np.asarray(decode(jpeg)))               # 683 x 512 pixels become 704 x 512

    Args:
      image: (H, W, 3) uint8, RGB.
      long, short: the longer and the shorter side, in pixels, that the image must not exceed after the first resize.

    Returns:
      (h, w, 3) uint8.
    """
    height, width = image.shape[:2]
    fitting = resize(image, rescaled_size(width, height, long, short))
    return resize(fitting, aligned_size(width, height, long, short))


def decode_labels(encoded: bytes) -> np.ndarray:
    """Reads a file of labels: one channel of 8 bits, or a palette, whose indices are the labels.

    Args:
      encoded: an image file, such as a PNG.

    Returns:
      (H, W) uint8, the values as they are in the file.

    Raises:
      UserError: no image, a broken one, or one with several channels or more bits.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except BROKEN as error:
        raise UserError(f"no image or a broken one: {len(encoded)} bytes beginning with {encoded[:16]!r}") from error
    if image.mode not in ("L", "P"):
        raise UserError(f"labels must have one channel of 8 bits, not Pillow's mode {image.mode}")
    return np.asarray(image)


def ignore_zero(labels: np.ndarray) -> np.ndarray:
    """Labels as ADE20K's files have them -> as training takes them: 0 becomes 255 (ignored), c becomes c - 1.

    Args:
      labels: (H, W) uint8; a 255 stays.

    Returns:
      (H, W) uint8.
    """
    return np.where(labels == IGNORED, IGNORED, labels - np.uint8(1))  # 0 - 1 is 255


def draw_scale(
    rng: np.random.Generator, long: int = 2048, short: int = 512, scale: Sequence[float] = (0.5, 2.0)
) -> tuple[int, int]:
    """Draws the sides that an image must not exceed.

    Args:
      rng: the source of randomness; anything with a generator's `random()`.
      long, short: the sides at scale 1, in pixels.
      scale: the smallest and the largest scale; it is uniform between them.

    Returns:
      (long, short) in pixels.
    """
    factor = scale[0] + (scale[1] - scale[0]) * rng.random()
    return int(long * factor), int(short * factor)


def rescaled_size(width: int, height: int, long: int, short: int) -> tuple[int, int]:
    """The largest size of the same ratio whose longer side does not exceed `long`, nor its shorter side `short`.

    Example::

        rescaled_size(640, 480, long=2048, short=512)                   # (683, 512)

    Args:
      width, height: of the image in pixels.
      long, short: in pixels.

    Returns:
      (width, height) in pixels, each rounded, and at least 1.
    """
    factor = min(long / max(width, height), short / min(width, height))
    return max(int(width * factor + 0.5), 1), max(int(height * factor + 0.5), 1)


def aligned_size(width: int, height: int, long: int, short: int) -> tuple[int, int]:
    """The size that evaluation gives to an image: as `rescaled_size`, with sides rounded up to multiples of 32.

    Example::

        aligned_size(640, 480, long=2048, short=512)                    # (704, 512)
    """
    return aligned(*rescaled_size(width, height, long, short))


def aligned(*sides: int) -> tuple[int, ...]:
    """Sides in pixels, each rounded up to a multiple of 32."""
    return tuple(-(-side // ALIGNMENT) * ALIGNMENT for side in sides)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image bilinearly, without antialiasing, in integers.

    Args:
      image: (H, W, 3) uint8.
      size: (width, height) in pixels.

    Returns:
      (height, width, 3) uint8.
    """
    cv2 = _opencv()
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes labels: every position takes the label of the nearest one, as OpenCV defines it.

    Args:
      labels: (H, W) uint8.
      size: (width, height) in pixels.

    Returns:
      (height, width) uint8.
    """
    cv2 = _opencv()
    return cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)


def crop_offsets(
    rng: np.random.Generator, labels: np.ndarray, height: int, width: int, max_share: float = 0.75
) -> tuple[int, int]:
    """Draws where to crop, again where a crop has fewer than two classes or one class has too large a share of it.

    Ten draws may be refused; the eleventh is taken as it is.

    Args:
      rng: the source of randomness; anything with a generator's `integers(low, high, endpoint=True)`.
      labels: (H, W) uint8; 255 does not count as a class.
      height, width: of the crop in pixels; where the image is smaller, the crop is as large as the image.
      max_share: the share of one class in the pixels that are not ignored must be below this.

    Returns:
      (top, left) in pixels.
    """
    for _ in range(10):
        top, left = _draw_offsets(rng, labels, height, width)
        counts = np.bincount(labels[top : top + height, left : left + width].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_share:
            return top, left
    return _draw_offsets(rng, labels, height, width)


def _draw_offsets(rng: np.random.Generator, labels: np.ndarray, height: int, width: int) -> tuple[int, int]:
    top = int(rng.integers(0, max(labels.shape[0] - height, 0), endpoint=True))
    return top, int(rng.integers(0, max(labels.shape[1] - width, 0), endpoint=True))


def draw_distortion(rng: np.random.Generator) -> dict[str, Any]:
    """Draws the changes of colour, each with probability 1/2 and independently of the others.

    Args:
      rng: the source of randomness; anything with a generator's `random()`, `uniform(low, high)` and
        `integers(low, high)`.

    Returns:
      The keyword arguments of `distort`.
    """

    def perhaps(draw, *limits):
        return draw(*limits) if rng.random() < 0.5 else None

    return {
        "brightness": perhaps(rng.uniform, -32, 32),
        "contrast_last": rng.random() < 0.5,
        "contrast": perhaps(rng.uniform, 0.5, 1.5),
        "saturation": perhaps(rng.uniform, 0.5, 1.5),
        "hue": perhaps(rng.integers, -18, 18),
    }


def distort(
    image: np.ndarray,
    brightness: float | None = None,
    contrast: float | None = None,
    saturation: float | None = None,
    hue: int | None = None,
    contrast_last: bool = False,
) -> np.ndarray:
    """Changes colours, in the order brightness, contrast, saturation, hue; None: not applied.

    Results are cut off at 0 and 255, and truncated rather than rounded. Saturation and hue go to HSV and back each on
    its own, which alone changes pixels.

    Example::

        distort(image, brightness=10.0, hue=-5)

    Args:
      image: (H, W, 3) uint8, RGB.
      brightness: is added, in [-32, 32).
      contrast: factor, in [0.5, 1.5).
      saturation: factor, in [0.5, 1.5).
      hue: is added, in steps of 2 degrees, in [-18, 18).
      contrast_last: apply the contrast after hue instead.

    Returns:
      (H, W, 3) uint8.
    """
    values = np.arange(256, dtype=np.float32)

    def truncated(x: np.ndarray) -> np.ndarray:
        return x.clip(0, 255).astype(np.uint8)

    if brightness is not None:
        image = truncated(values + np.float32(brightness))[image]
    if contrast is not None and not contrast_last:
        image = truncated(values * np.float32(contrast))[image]
    if saturation is not None:
        image = _map_hsv(image, 1, truncated(values * np.float32(saturation)))
    if hue is not None:
        image = _map_hsv(image, 0, ((np.arange(256) + hue) % 180).astype(np.uint8))
    if contrast is not None and contrast_last:
        image = truncated(values * np.float32(contrast))[image]
    return image


def _map_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """Replaces the values of one channel of hue (0 to 179), saturation and value by those in a table."""
    cv2 = _opencv()
    # OpenCV truncates on the way back, but rounds in what is left of a row behind the last whole vector: one row of
    # whole vectors leaves nothing.
    pixels = np.zeros((1, -(-image.shape[0] * image.shape[1] // 256) * 256, 3), np.uint8)
    pixels[0, : image.shape[0] * image.shape[1]] = image.reshape(-1, 3)
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = table[hsv[..., channel]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, : image.shape[0] * image.shape[1]].reshape(image.shape)


def _check_pair(image: np.ndarray, labels: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or labels.dtype != np.uint8:
        raise UserError(
            f"an image must be (H, W, 3) and its labels (H, W) uint8, not {image.shape} {image.dtype} and "
            f"{labels.shape} {labels.dtype}"
        )
    if image.shape[:2] != labels.shape:
        raise UserError(f"an image of {image.shape[:2]} pixels has labels of {labels.shape}: they must be equal")
