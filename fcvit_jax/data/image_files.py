"""Image files of a data set: which there are, what their headers say, and their pixels, turned by EXIF or not."""

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from fcvit_jax.augment import images
from fcvit_jax.errors import Unreadable, UserError, log

THREADS = 16  # for headers, whose reading waits for the disk or the network


class Header(NamedTuple):
    """What an image file says of itself.

    Attributes:
      width, height: in pixels, as stored.
      orientation: of EXIF, 1 to 8.
      mode, format: Pillow's, such as "RGB" and "JPEG".
    """

    width: int
    height: int
    orientation: int
    mode: str
    format: str

    @property
    def turned(self) -> tuple[int, int]:
        """Width and height once the EXIF orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def list_images(folder: str, suffixes: tuple[str, ...] = images.IMAGE_SUFFIXES) -> list[str]:
    """Lists the image files in a folder and its subfolders, by name, with "/" between folders; not hidden ones.

    A warning says what else there is. Links are followed, but no folder is read twice.

    Args:
      folder: where to look.
      suffixes: endings of image files, in small letters.

    Raises:
      UserError: the folder or one in it cannot be read, or there is no image.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not there, or no folder")
    found, others, seen = [], [], {os.path.realpath(folder)}
    below = [""]
    while below:
        inside = below.pop()
        try:
            entries = sorted(os.scandir(os.path.join(folder, inside)), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{os.path.join(folder, inside)} cannot be read: {error.strerror}") from error
        for entry in entries:
            name, is_image = inside + entry.name, entry.name.lower().endswith(suffixes)
            if entry.name.startswith("."):
                others += [name] if is_image or entry.is_dir() else []  # not what a system leaves anywhere
            elif entry.is_dir():
                real = os.path.realpath(entry.path)
                if real in seen:
                    others.append(f"{name}/ (again)")
                else:
                    seen.add(real)
                    below.append(f"{name}/")
            else:
                (found if is_image and entry.is_file() else others).append(name)
    if others:
        kinds = ", ".join(suffixes)
        what = count(len(others), "other entry", "other entries")
        log.warning("%s: only images (%s) are read, not the %s: %s", folder, kinds, what, first(sorted(others)))
    if not found:
        raise UserError(f"{folder} has no image ({', '.join(suffixes)})")
    return sorted(found)


def read_headers(folder: str, names: Sequence[str], broken: dict[str, str] | None = None) -> list[Header | None]:
    """Reads the headers of image files, some 10,000 a second from a local disk.

    Args:
      folder, names: the files are `folder/name`.
      broken: where the files go that cannot be read or are no images: reasons by path, with None in place of a header.
        None: they are an error.

    Raises:
      UserError: such files; names up to five, with the reason for the first.
    """

    def read(name: str) -> Header | str:
        try:
            with open(os.path.join(folder, name), "rb") as file, Image.open(file) as image:
                return Header(*image.size, images.orientation(image), image.mode, image.format)
        except images.BROKEN as error:
            return getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        headers = list(pool.map(read, names))
    faults = {name: header for name, header in zip(names, headers, strict=True) if isinstance(header, str)}
    if faults and broken is None:
        reason = next(iter(faults.values()))
        raise UserError(f"{folder}: {count(len(faults), 'file')} cannot be read as images: {first(faults)} ({reason})")
    for name, reason in faults.items():
        broken[os.path.join(folder, name)] = reason
    return [None if isinstance(header, str) else header for header in headers]


def read_file(path: str) -> bytes:
    """Reads a whole file.

    Raises:
      Unreadable: it is not there, or must not be read.
      UserError: it cannot be read for another reason, which may pass, such as a fault of the network.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def decode(encoded: bytes, exif: bool = False) -> np.ndarray:
    """Decodes an image file to RGB pixels.

    Args:
      encoded: an image file in any format Pillow reads.
      exif: whether to turn and flip the image as its EXIF orientation says.

    Returns:
      uint8 (height, width, 3), read-only.

    Raises:
      UserError: as `fcvit_jax.augment.images.decode`.
    """
    return np.asarray(images.decode(encoded, exif))


def first(names: Collection[str]) -> str:
    """Up to five names for a message, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun: "1 file", "3 files"; nouns: where more than one is not just an s more."""
    return f"{number} {noun if number == 1 else nouns or f'{noun}s'}"
