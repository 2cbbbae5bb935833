"""The transforms of classification on the CPU: from the bytes of one image to its uint8 pixels.

Training draws a crop, a resize filter, a flip and the ops of RandAugment. Evaluation resizes and crops the centre. The
functions that decide (`crop_box`, `draw_ops`, `eval_geometry`) are separate from those that compute pixels. All
randomness comes from the generator that is passed in. Pillow computes the pixels, as in the original: they are equal
bit for bit. The bicubic resize of other libraries differs by up to tens of grey levels.
"""

import functools
import io
import math
import numbers
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fcvit_jax.augment.randaugment import RESAMPLE, apply_op, draw_ops, draw_resample
from fcvit_jax.errors import UserError, log
from fcvit_jax.sizes import ImageSize, height_width

# Pillow shows it with a line of its source, and does not say what to do; `_open` does.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# A file in a folder is an image if its name ends in one of these.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# What undoes each EXIF orientation; 1, or none, is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXCHANGING = [TURNS[orientation] for orientation in (5, 6, 7, 8)]  # width and height

# What Pillow raises for broken or refused files.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)


def train_transform(
    encoded: bytes,
    rng: np.random.Generator,
    image_size: ImageSize = 224,
    *,
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    rand_augment: Sequence[float] | None = (2, 9.0, 0.5),
    exif: bool = False,
) -> np.ndarray:
    """Decodes one training image, crops and resizes it at random, flips it and applies RandAugment.

    The result depends only on the bytes, the arguments and the state of `rng`. It draws in this order: the crop
    (`crop_box`), the filter of the resize (bilinear or bicubic, 1/2 each), the flip and the ops (`draw_ops`).

    Example::

        pixels = train_transform(open("cat.jpg", "rb").read(), np.random.default_rng(0))

    Args:
      encoded: an image file in any format Pillow reads.
      rng: the source of randomness.
      image_size: of the output in pixels: its side, or (height, width).
      crop_scale: smallest and largest share of the image's area in the crop.
      crop_ratio: smallest and largest width / height of the crop.
      flip: probability of a horizontal flip; 0 turns it off.
      rand_augment: (ops per image, magnitude, standard deviation of the magnitude); empty or None: off.
      exif: see `decode`.

    Returns:
      uint8 (height, width, 3), RGB, read-only.

    Raises:
      UserError: see `decode`.
    """
    header = _open(encoded)
    turn = TURNS.get(orientation(header)) if exif else None
    size = header.size[::-1] if turn in EXCHANGING else header.size
    box = crop_box(rng, *size, crop_scale, crop_ratio)
    resample = draw_resample(rng)
    image = decode(_keep_rows(encoded, box[3])) if turn is None else decode(encoded, exif)
    # Crop first: resize(box=...) would also read pixels outside the box.
    image = image.crop(box).resize(height_width(image_size)[::-1], RESAMPLE[resample])
    if rng.random() < flip:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if rand_augment:
        for op in draw_ops(rng, *rand_augment):
            image = apply_op(image, *op)
    return np.asarray(image)


def check_augmentation(
    *, crop_scale: Sequence[float], crop_ratio: Sequence[float], flip: float, rand_augment: Sequence[float] | None
) -> None:
    """Checks arguments of `train_transform` before any image is read.

    Raises:
      UserError: an argument is out of its range; the message names it.
    """

    def is_range(pair: Sequence[float], most: float) -> bool:
        return len(pair) == 2 and 0 < pair[0] <= pair[1] <= most

    ops = rand_augment or (1, 0, 0)
    are_ops = len(ops) == 3 and isinstance(ops[0], int) and ops[0] >= 1 and min(ops) >= 0
    for name, value, good, wanted in (
        ("crop_scale", crop_scale, is_range(crop_scale, 1), "the smallest and the largest share of the area"),
        ("crop_ratio", crop_ratio, is_range(crop_ratio, math.inf), "the smallest and the largest ratio"),
        ("flip", flip, 0 <= flip <= 1, "a probability"),
        ("rand_augment", rand_augment, are_ops, "a number of operations, their magnitude and its deviation, or ()"),
    ):
        if not good:
            raise UserError(f"data.{name}={value} must be {wanted}")


def eval_transform(
    encoded: bytes, image_size: ImageSize = 224, crop_pct: float = 0.9, exif: bool = False
) -> np.ndarray:
    """Decodes one image, resizes its shorter side to image_size / crop_pct (bicubic) and crops the centre.

    `eval_geometry` says what this means for an output that is not square.

    Example::

        pixels = eval_transform(open("cat.jpg", "rb").read(), crop_pct=0.95)

    Args:
      encoded: an image file in any format Pillow reads.
      image_size: of the output in pixels: its side, or (height, width).
      crop_pct: share of the resized shorter side that the crop keeps, in (0, 1].
      exif: see `decode`.

    Returns:
      uint8 (height, width, 3), RGB, read-only.

    Raises:
      UserError: see `decode` and `eval_geometry`.
    """
    image = decode(encoded, exif)
    size, box = eval_geometry(*image.size, image_size, crop_pct)
    return np.asarray(image.resize(size, Image.BICUBIC).crop(box))


def crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop.

    Draws area and aspect up to ten times, until the box fits, and then top and left. If no box fits, takes the centre.

    Args:
      rng: the source of randomness; any object with the methods `uniform(low, high)` and
        `integers(low, high, endpoint=True)` of a NumPy generator.
      width, height: of the image in pixels, at least 1.
      scale: smallest and largest share of the image's area.
      ratio: smallest and largest width / height.

    Returns:
      (left, top, right, bottom) in pixels, right and bottom exclusive; never empty.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:  # w or h can be 0 in an image of one or two pixels; the original fails
            top = int(rng.integers(0, height - h, endpoint=True))
            left = int(rng.integers(0, width - w, endpoint=True))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def eval_geometry(
    width: int, height: int, image_size: ImageSize, crop_pct: float
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Computes the sizes and offsets of the evaluation transform.

    The shorter side becomes floor(image_size / crop_pct). The longer side is truncated to whole pixels, and the offsets
    of the crop are rounded half to even.

    Where the crop is not square, the image keeps its ratio and becomes just as large as needed to cover both
    floor(height / crop_pct) and floor(width / crop_pct); its sides are rounded. timm 1.0 has the same sizes; but there
    it resizes bilinearly for these crops, where this stays bicubic.

    Args:
      width, height: of the image in pixels.
      image_size, crop_pct: see `eval_transform`.

    Returns:
      (width, height) after the resize, and the crop's (left, top, right, bottom) in it.

    Raises:
      UserError: crop_pct not in [0.1, 1]; the share would be too small to resize an image for.
    """
    if not isinstance(crop_pct, numbers.Real) or not 0.1 <= crop_pct <= 1:
        raise UserError(f"crop_pct={crop_pct!r} must be at least 0.1 and at most 1")
    crop = height_width(image_size)[::-1]
    covered = [math.floor(side / crop_pct) for side in crop]
    if crop[0] != crop[1]:
        ratio = min(width / covered[0], height / covered[1])
        size = round(width / ratio), round(height / ratio)
    elif width <= height:
        size = covered[0], int(covered[0] * height / width)
    else:
        size = int(covered[0] * width / height), covered[0]
    left, top = (round((side - kept) / 2) for side, kept in zip(size, crop, strict=True))
    return size, (left, top, left + crop[0], top + crop[1])


def is_image_file(file: os.DirEntry | Path) -> bool:
    """Whether an entry of a folder is a file whose name ends as an image's does."""
    return file.name.lower().endswith(IMAGE_SUFFIXES) and file.is_file()


def decode(encoded: bytes, exif: bool = False) -> Image.Image:
    """Decodes an image file to RGB.

    Grey, palette, CMYK and transparent images become RGB as in Pillow's `convert("RGB")`, which ignores alpha. 16-bit
    grey keeps its upper byte, as 16-bit colour does in Pillow.

    Args:
      encoded: an image file in any format Pillow reads.
      exif: whether to turn and flip the image as its EXIF orientation says. (Pillow always does with TIFF files.)

    Returns:
      An RGB image; the first frame, if there are several.

    Raises:
      UserError: the bytes are no image, the image is truncated or broken, or it has more pixels than Pillow accepts (a
        decompression bomb). The message says which; the caller should add the name of the file.
    """
    image = _open(encoded)
    turn = TURNS.get(orientation(image)) if exif else None
    try:
        image.load()
    except BROKEN as error:
        raise UserError(f"broken {image.format} of {len(encoded)} bytes: {error}") from error
    image.info.pop("transparency", None)  # it is ignored like any alpha, but Pillow would warn
    if image.mode.startswith("I"):  # 16-bit grey ("I;16", or "I" in older Pillow), which convert would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image whose header is read: 1 to 8, of which 1 is upright."""
    if "exif" not in image.info:  # getexif would decode the whole of a PNG to look for it
        return 1
    found = image.getexif().get(0x0112, 1)
    return found if found in TURNS else 1


def _open(encoded: bytes) -> Image.Image:
    """Reads an image's header, and not its pixels yet."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        found = f"{len(encoded)} bytes beginning with {encoded[:16]!r}" if encoded else "no bytes at all"
        raise UserError(f"unknown or broken image format: {found}") from error
    except BROKEN as error:
        raise UserError(str(error)) from error
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        _say_that_one_is_large(Image.MAX_IMAGE_PIXELS)
    return image


@functools.cache
def _say_that_one_is_large(pixels: int) -> None:
    log.warning("There are images of more than %s pixels. They are read, but slowly: make them smaller.", f"{pixels:,}")


# Markers of the JPEG segments before the frame header (Huffman and quantisation tables, restart interval, comment,
# application data), and of the frame headers of baseline and extended files. Progressive JPEGs are decoded in full: if
# scans are missing, libjpeg's block smoothing looks two block rows ahead, so a truncated decode would differ.
JPEG_TABLES = {bytes((0xFF, marker)) for marker in (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))}
JPEG_FRAMES = {b"\xff\xc0", b"\xff\xc1"}


def _keep_rows(encoded: bytes, rows: int) -> bytes:
    """Lowers the height in a JPEG's header, so that decoding ends soon after the first `rows`, which stay exact.

    Other files are returned as they are. So is a JPEG without its end marker, so that the decoder reports its damage.
    """
    if not (encoded.startswith(b"\xff\xd8") and encoded.endswith(b"\xff\xd9")):
        return encoded
    at = 2
    while encoded[at : at + 2] in JPEG_TABLES:
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    height_at = slice(at + 5, at + 7)
    height = rows + 8  # smooth upsampling of the chroma looks a little further
    if encoded[at : at + 2] not in JPEG_FRAMES or height >= int.from_bytes(encoded[height_at], "big"):
        return encoded
    return encoded[: height_at.start] + height.to_bytes(2, "big") + encoded[height_at.stop :]
