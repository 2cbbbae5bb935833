"""An image with the objects in it: boxes, masks, names and scores, drawn on its pixels."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

from fcvit_jax.data import palettes, segments
from fcvit_jax.data.segments import RLE
from fcvit_jax.errors import printable
from fcvit_jax.figures import COLOURS

LEAST_SIDE = 480  # pixels of the longer side of a picture; smaller images are enlarged, so that names can be read


def colours(num_classes: int) -> np.ndarray:
    """A colour for each class that people with any colour vision can tell apart: uint8 (num_classes, 3), RGB."""
    first = np.array([to_rgb(colour) for colour in COLOURS[:6]]) * 255  # all but black
    few = palettes.distinct(min(num_classes, 500), first.round())  # there are no more of them
    return few[np.arange(num_classes) % len(few)]


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    rles: Sequence[RLE | None] | None = None,
) -> np.ndarray:
    """Draws objects on an image, each in the colour of its class, the first on top.

    Example::

        picture = draw_objects(image, found.boxes, found.classes, class_names, found.scores, found.rles)

    Args:
      image: (H, W, 3) uint8.
      boxes: (n, 4): x1, y1, x2, y2 in pixels of the image.
      classes: (n,) integers.
      class_names: of all classes.
      scores: (n,), from 0 to 1; None: names alone are written.
      rles: n masks of runs, of the size of the image, None where an object has none; None: no masks.

    Returns:
      (k H, k W, 3) uint8, where k is 1, or more for a small image.
    """
    height, width = image.shape[:2]
    factor = -(-LEAST_SIDE // max(height, width))
    palette, order = colours(len(class_names)), range(len(boxes))[::-1]
    image = np.asarray(Image.fromarray(image).resize((factor * width, factor * height), Image.BICUBIC))
    pixels = image.copy()
    for i in order if rles is not None else ():
        if rles[i] is not None:
            inside = segments.decode([rles[i]], height, width)[0].repeat(factor, 0).repeat(factor, 1)
            pixels[inside] = (image[inside].astype(np.uint16) + palette[classes[i]] + 1) // 2
    picture = Image.fromarray(pixels)
    side = max(picture.size)
    draw, line = ImageDraw.Draw(picture), max(side // 350, 2)
    font = _font(max(side // 55, 11))
    corners = (factor * np.asarray(boxes, float).reshape(-1, 4)).round().astype(int).tolist()
    for i in order:
        x1, y1, x2, y2 = corners[i]
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=_rgb(palette[classes[i]]), width=line)
    for i in order:  # over all boxes
        name = printable(class_names[classes[i]])
        text = name if scores is None else f"{name} {scores[i]:.0%}"
        _write(draw, text, corners[i][:2], _rgb(palette[classes[i]]), font)
    return np.asarray(picture)


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    corner: Sequence[int],
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Writes text on a ground of a colour, above the corner of a box, or below it where there is no room."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font, anchor="la")
    margin = max(font.size // 6, 1)
    width, height = right + 2 * margin, bottom + 2 * margin
    x = max(min(corner[0], draw.im.size[0] - width), 0)
    y = corner[1] - height if corner[1] >= height else max(corner[1], 0)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    draw.text((x + margin, y + margin), text, (0, 0, 0) if bright else (255, 255, 255), font, anchor="la")


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's, which has more letters than Pillow's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    return tuple(colour.tolist())
