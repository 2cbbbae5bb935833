"""RandAugment `rand-m9-mstd0.5-inc1`: the draw of an image's ops, and what each op does to the pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)  # 255 * ImageNet mean, rounded
RESAMPLE = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


class Op(NamedTuple):
    """A RandAugment op.

    Attributes:
      argument: computes the op's argument from the level.
      pixels: computes the new image from the image, the argument and the name of the resample filter.
      signed: levels are in [-10, 10]; False: in [0, 10].
    """

    argument: Callable[[float], Any]
    pixels: Callable[[Image.Image, Any, str], Image.Image]
    signed: bool = False


def _up_to(limit: float) -> Callable[[float], float]:
    return lambda level: level / 10 * limit


def _factor(level: float) -> float:
    return max(0.1, 1.0 + level / 10 * 0.9)


def _lookup(function: Callable[[int, int], int]) -> Callable:
    """The `pixels` of an op that maps every value by itself: function(value, argument) is the new value."""
    return lambda image, argument, _: image.point([function(value, argument) for value in range(256)] * 3)


def _enhance(enhancer: Callable) -> Callable:
    return lambda image, factor, _: enhancer(image).enhance(factor)


def _filter(resample: str) -> Image.Resampling:
    if resample not in RESAMPLE:
        raise ValueError(f"no resample {resample!r}; there are {', '.join(RESAMPLE)}")
    return RESAMPLE[resample]


def _affine(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Callable:
    """The `pixels` of an op that moves pixels: matrix(image, argument) maps output to input, from the top left."""
    return lambda image, argument, resample: image.transform(
        image.size, Image.AFFINE, matrix(image, argument), _filter(resample), fillcolor=FILL
    )


def _rotate(image: Image.Image, degrees: float, resample: str) -> Image.Image:
    return image.rotate(degrees, _filter(resample), fillcolor=FILL)


OPS = {
    "AutoContrast": Op(lambda _: None, lambda image, *_: ImageOps.autocontrast(image)),
    "Equalize": Op(lambda _: None, lambda image, *_: ImageOps.equalize(image)),
    "Invert": Op(lambda _: None, lambda image, *_: ImageOps.invert(image)),
    "Rotate": Op(_up_to(30), _rotate, signed=True),
    # The argument is the number of bits that are kept. 0 bits give black; Pillow 13's ImageOps.posterize raises for 0.
    "PosterizeIncreasing": Op(
        lambda level: 4 - int(level / 10 * 4), _lookup(lambda value, bits: value >> (8 - bits) << (8 - bits))
    ),
    "SolarizeIncreasing": Op(
        lambda level: 256 - int(level / 10 * 256),
        _lookup(lambda value, threshold: value if value < threshold else 255 - value),
    ),
    "SolarizeAdd": Op(
        lambda level: int(level / 10 * 110), _lookup(lambda value, add: min(255, value + add) if value < 128 else value)
    ),
    "ColorIncreasing": Op(_factor, _enhance(ImageEnhance.Color), signed=True),
    "ContrastIncreasing": Op(_factor, _enhance(ImageEnhance.Contrast), signed=True),
    "BrightnessIncreasing": Op(_factor, _enhance(ImageEnhance.Brightness), signed=True),
    "SharpnessIncreasing": Op(_factor, _enhance(ImageEnhance.Sharpness), signed=True),
    "ShearX": Op(_up_to(0.3), _affine(lambda image, factor: (1, factor, 0, 0, 1, 0)), signed=True),
    "ShearY": Op(_up_to(0.3), _affine(lambda image, factor: (1, 0, 0, factor, 1, 0)), signed=True),
    "TranslateXRel": Op(_up_to(0.45), _affine(lambda image, share: (1, 0, share * image.width, 0, 1, 0)), signed=True),
    "TranslateYRel": Op(_up_to(0.45), _affine(lambda image, share: (1, 0, 0, 0, 1, share * image.height)), signed=True),
}

# The ops that the recipe draws from, timm's "increasing" set: a higher level changes the image more. The order is part
# of what a seed draws. An op that is added to `OPS` alone changes no recipe.
INCREASING = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)


def draw_ops(
    rng: np.random.Generator, num_ops: int = 2, magnitude: float = 9.0, magnitude_std: float = 0.5
) -> list[tuple[str, float, int, str]]:
    """Draws the RandAugment ops of one image.

    Draws first the names, uniformly from `INCREASING` with replacement. Then draws for each op whether it is executed
    (probability 1/2) and, if so, its level from N(magnitude, magnitude_std) clipped to [0, 10], its sign and its
    resample.

    Args:
      rng: the source of randomness.
      num_ops: how many are drawn.
      magnitude, magnitude_std: mean and standard deviation of the level.

    Returns:
      (name, level, sign, resample), as `apply_op` takes them, in the order of execution; 0 to num_ops of them.
    """
    drawn = []
    for index in rng.integers(len(INCREASING), size=num_ops):
        if rng.random() < 0.5:
            level = min(max(rng.normal(magnitude, magnitude_std), 0.0), 10.0)
            sign = -1 if rng.random() < 0.5 else 1
            drawn.append((INCREASING[index], level, sign, draw_resample(rng)))
    return drawn


def draw_resample(rng: np.random.Generator) -> str:
    """Draws a resample filter: "bilinear" or "bicubic", 1/2 each."""
    return "bilinear" if rng.random() < 0.5 else "bicubic"


def apply_op(image: Image.Image, name: str, level: float, sign: int = 1, resample: str = "bicubic") -> Image.Image:
    """Applies one RandAugment op to an RGB image.

    Example::

        apply_op(Image.new("RGB", (64, 48)), "Rotate", 9.0, sign=-1, resample="bilinear").size      # (64, 48)

    Args:
      image: RGB, of any size.
      name: a key of `OPS`.
      level: in [0, 10]; AutoContrast, Equalize and Invert ignore it.
      sign: -1 negates the level of a signed op; other ops ignore it.
      resample: "bilinear" or "bicubic", for rotation, shear and translation; other ops ignore it.

    Returns:
      A new RGB image of the same size.

    Raises:
      ValueError: no such op or resample.
    """
    if name not in OPS:
        raise ValueError(f"no op {name!r}; there are {', '.join(OPS)}")
    op = OPS[name]
    return op.pixels(image, op.argument(-level if op.signed and sign < 0 else level), resample)
