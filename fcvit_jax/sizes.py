"""Sizes of images: one number for a square, or (height, width)."""

from collections.abc import Sequence

from fcvit_jax.errors import MAX_IMAGE_SIZE, UserError, check_range

ImageSize = int | Sequence[int]


def height_width(size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels.

    Example::

        height_width(224), height_width((192, 256))                             # (224, 224), (192, 256)
    """
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_size(section: str, low: int = 1, **sizes: ImageSize) -> None:
    """Checks sizes of images.

    Args:
      section: the part of the config that they are from.
      low: the least number of pixels.
      **sizes: by their keys.

    Raises:
      UserError: naming the first that is neither one whole number nor two, or out of reach.
    """
    for key, size in sizes.items():
        sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
        if not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise UserError(f"{section}.{key}={size!r} must be a whole number of pixels, or (height, width).")
        for side in sides:
            check_range(section, low, below=MAX_IMAGE_SIZE + 1, **{key: side})


def as_saved(size: ImageSize) -> int | list[int]:
    """A size as JSON holds it: one number for a square, otherwise [height, width]."""
    height, width = height_width(size)
    return height if height == width else [height, width]


def describe_size(size: ImageSize) -> str:
    """A size for people, such as "192 x 256"."""
    return " x ".join(map(str, height_width(size)))
