"""Predicted masks as files: PNGs with a palette, and pictures of an image under the colours of its classes."""

from pathlib import Path

import numpy as np
from PIL import Image

from fcvit_jax.errors import UserError


def check_new(path: Path, folder: Path, written: set[str]) -> None:
    """Adds the name of an image, without its ending, to those whose masks were written to a folder.

    Raises:
      UserError: it is there already.
    """
    if path.stem in written:
        raise UserError(f"{path}: {folder / path.stem}.png is already the mask of another image of that name.")
    written.add(path.stem)


def write_mask(path: Path, mask: np.ndarray, palette: np.ndarray) -> Path:
    """Writes a PNG of one channel whose values are classes, and which viewers show in the colours of the palette.

    Args:
      path: of the file; its folder is made.
      mask: (H, W) uint8.
      palette: (classes, 3) uint8, RGB.

    Returns:
      The path.

    Raises:
      UserError: it cannot be written.
    """
    image = Image.fromarray(mask)
    image.putpalette(palette.tobytes())
    return _save(path, image)


def lay_over(image: np.ndarray, mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Mixes an image (H, W, 3) uint8 half and half with the colours of its classes: (H, W, 3) uint8."""
    return ((image.astype(np.uint16) + palette[mask] + 1) // 2).astype(np.uint8)


def write_image(path: Path, image: np.ndarray) -> Path:
    """Writes an image (H, W, 3) uint8 as a PNG; as `write_mask`."""
    return _save(path, Image.fromarray(image))


def _save(path: Path, image: Image.Image) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path
