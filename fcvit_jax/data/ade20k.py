"""Images with masks of class indices, in folders as ADE20K's: images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png.

The class names stand in `objectInfo*.txt`, as in ADE20K, or in `classes.txt`, one a line. By ADE20K's rule 0 in a mask
is "other" and ignored, and class c is c + 1. Where 0 is a class of its own, `zero_is_class` says so. 255 is always
ignored.
"""

import dataclasses
import glob
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from fcvit_jax.augment import images
from fcvit_jax.data import image_files, palettes
from fcvit_jax.data.image_files import Header, count, first
from fcvit_jax.data.pairing import match
from fcvit_jax.errors import Unreadable, UserError

IGNORED = 255
LOOKED_AT = 16  # masks of a split that are decoded when it is opened


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One split as a source of examples: (encoded image, labels uint8 (height, width)).

    Attributes:
      images, masks: paths of files; mask i belongs to image i.
      sizes: int32 (n, 2), width and height of the images, turned by EXIF where that is asked for.
      num_classes: the labels are 0 to num_classes - 1, and 255 where ignored.
      zero_is_class: see the module.
    """

    images: list[str]
    masks: list[str]
    sizes: np.ndarray
    num_classes: int
    zero_is_class: bool

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[bytes, np.ndarray]]:
        for index in indices:
            yield image_files.read_file(self.images[index]), self.labels(index)

    def labels(self, index: int) -> np.ndarray:
        """The mask of one example as labels, uint8 (height, width).

        Raises:
          Unreadable: the mask is broken or gone.
          UserError: it holds a value that is no class.
        """
        values = self._values(index)
        beyond = np.unique(values)
        low, high = (0, self.num_classes - 1) if self.zero_is_class else (1, self.num_classes)
        beyond = beyond[(beyond > high) & (beyond != IGNORED)].tolist()
        if beyond:
            hint = " If 0 is no class, set data.zero_is_class=False." if self.zero_is_class else ""
            raise UserError(
                f"{self.masks[index]} holds {first(list(map(str, beyond)))}, but the {self.num_classes} classes are"
                f" {low} to {high} (255 is ignored): give each class a name, or write 255 there.{hint}"
            )
        return values if self.zero_is_class else np.where(values == IGNORED, values, values - 1)  # 0 - 1 is 255

    def describe(self, index: int) -> str:
        return self.images[index]

    def _values(self, index: int) -> np.ndarray:
        try:
            return decode_mask(image_files.read_file(self.masks[index]))
        except UserError as error:
            raise type(error)(f"{self.masks[index]}: {error}") from error


class Opened(NamedTuple):
    """What `open_folder` returns.

    Attributes:
      train, eval: the two splits; train is None where it was not asked for.
      class_names: in the order of the labels.
      palette: uint8 (classes, 3), RGB.
      notes: lines that the user should see once.
    """

    train: Pairs | None
    eval: Pairs
    class_names: tuple[str, ...]
    palette: np.ndarray
    notes: list[str]


def open_folder(
    path: str,
    training: bool = True,
    *,
    train_split: str = "training",
    eval_split: str = "validation",
    zero_is_class: bool = False,
    exif: bool = False,
    skip_broken: bool = False,
) -> Opened:
    """Opens a folder of images and masks.

    The headers of all files are read, and the pixels of a few masks.

    Example::

        train, evaluation, class_names, palette, notes = open_folder("ADEChallengeData2016")
        encoded, labels = next(train.read([0]))

    Args:
      path: has images/ and annotations/, and in each a folder for every split.
      training: False: the training split is not opened, and need not be there.
      train_split, eval_split: names of folders.
      zero_is_class: see the module.
      exif: the masks belong to the images as their EXIF orientation turns them, and the images are to be decoded so.
      skip_broken: in the training split, leave out images with whose header, or whose mask's, something is wrong.

    Raises:
      UserError: names, images or masks are not as they must be; the message says what to do.
    """
    class_names = _read_names(path, zero_is_class)
    most = 255 if zero_is_class else 254
    if len(class_names) > most:
        raise UserError(f"{path} names {len(class_names)} classes; masks of 8 bits have room for {most}")
    notes = []

    def open_split(key: str, split: str) -> Pairs:
        if not all(os.path.isdir(os.path.join(path, kind, split)) for kind in ("images", "annotations")):
            there = _subfolders(path, "images") & _subfolders(path, "annotations")
            raise UserError(
                f"data.{key}={split}: {path} must have the folders images/{split} and annotations/{split}"
                f" (both images and annotations have: {first(sorted(there)) or 'no folder'})"
            )
        skip = skip_broken and key == "train_split"
        pairs = _pair(path, split, len(class_names), zero_is_class, exif, skip, notes)
        _look_at_values(os.path.join(path, "annotations", split), pairs, skip, notes)
        return pairs

    train = open_split("train_split", train_split) if training else None
    evaluation = open_split("eval_split", eval_split)
    return Opened(train, evaluation, class_names, _read_palette(path, len(class_names), zero_is_class), notes)


def decode_mask(encoded: bytes) -> np.ndarray:
    """Decodes a mask to the indices in it: grey values, or the indices of a palette; of 1, 2, 4 or 8 bits.

    Returns:
      uint8 (height, width).

    Raises:
      UserError: no image, or not one of indices.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            problem = _mask_problem(image.mode, image.format)
            if problem:
                raise UserError(f"is {problem}")
            values = np.array(image, np.uint8)
    except images.BROKEN as error:
        raise error if isinstance(error, UserError) else Unreadable(f"cannot be read: {error}") from error
    bits, colour_type = encoded[24:26] if encoded.startswith(b"\x89PNG") else (8, 0)
    if colour_type == 0 and bits in (2, 4):
        values //= 255 // (2**bits - 1)  # Pillow spreads grey of few bits over 0 to 255
    return values


def _mask_problem(mode: str, format: str) -> str | None:
    """Why an image cannot be a mask, and what to do; None if it can."""
    if format in ("JPEG", "MPO"):
        return "a JPEG, which changes the values: save masks as PNG, from the source they were drawn in"
    if mode.startswith("I") or mode == "F":
        return "of 16 bits or more: save it with 8, as by Image.fromarray(np.asarray(mask).astype(np.uint8)).save(...)"
    if mode not in ("L", "P", "1"):
        return (
            f"a colour image ({mode}), where one channel of class indices is expected: if all channels hold the index,"
            " save the first, mask.getchannel(0).save(...); otherwise replace each colour by its index"
        )
    return None


def _subfolders(path: str, kind: str) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(os.path.join(path, kind)) if entry.is_dir()}
    except OSError:
        return set()


def _read_names(path: str, zero_is_class: bool) -> tuple[str, ...]:
    infos = sorted(glob.glob(os.path.join(glob.escape(path), "objectInfo*.txt")))
    if len(infos) > 1:
        raise UserError(f"{path} must have one objectInfo*.txt, not {len(infos)}: {first(infos)}")
    if not infos:
        names = tuple(line.strip() for line in _lines(os.path.join(path, "classes.txt")))
        if not names:
            raise UserError(f"{path}/classes.txt has no class name")
        return names
    rows = [line.split("\t") for line in _lines(infos[0])][1:]
    expected = [str(index) for index in range(len(rows))] if zero_is_class else [str(i + 1) for i in range(len(rows))]
    if not rows or [row[0].strip() for row in rows] != expected:
        raise UserError(
            f"{infos[0]} must have a line of headings and then, separated by tabs, a line a class whose first column"
            f" counts from {0 if zero_is_class else 1} (data.zero_is_class={zero_is_class}) and whose last is the name"
        )
    return tuple(row[-1].split(",")[0].strip() for row in rows)  # ADE20K gives synonyms


def _lines(file: str) -> list[str]:
    """The lines of a text file that are not blank."""
    if not os.path.isfile(file):
        raise UserError(f"{os.path.dirname(file)} must name its classes: in objectInfo*.txt, or one a line in {file}")
    text = image_files.read_file(file).decode("utf-8-sig", errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _read_palette(path: str, num_classes: int, zero_is_class: bool) -> np.ndarray:
    file = os.path.join(path, "palette.txt")
    if not os.path.exists(file):
        return palettes.ade20k() if num_classes == 150 and not zero_is_class else palettes.distinct(num_classes)
    try:
        rows = [[int(word) for word in line.split()[:4]] for line in _lines(file)]
        colours = {index: rgb for index, *rgb in rows}
        lowest = 0 if zero_is_class else 1
        return np.array([colours[lowest + label] for label in range(num_classes)], np.uint8).reshape(num_classes, 3)
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(
            f"{file} must have a line for each value in a mask that is a class: the value, then red, green and blue"
            " (0 to 255), separated by blanks"
        ) from error


def _pair(
    path: str, split: str, num_classes: int, zero_is_class: bool, exif: bool, skip_broken: bool, notes: list[str]
) -> Pairs:
    """Matches the images of a split with its masks and checks what the headers say."""
    image_folder, mask_folder = (os.path.join(path, kind, split) for kind in ("images", "annotations"))
    image_names = image_files.list_images(image_folder)
    mask_names = image_files.list_images(mask_folder)
    pairs, image_ending, mask_ending = match(image_names, mask_names, image_folder, mask_folder)
    if image_ending or mask_ending:
        notes.append(f"{path}, {split}: image NAME{image_ending} belongs to mask NAME{mask_ending}")
    broken = {} if skip_broken else None
    headers = image_files.read_headers(image_folder, [image for image, _ in pairs], broken)
    mask_headers = image_files.read_headers(mask_folder, [mask for _, mask in pairs], broken)
    rows = [row for row in zip(pairs, headers, mask_headers, strict=True) if None not in row]
    if broken:
        some = first([f"{file} ({reason})" for file, reason in broken.items()])
        notes.append(
            f"{path}, {split}: left out, since a file cannot be read, {count(len(pairs) - len(rows), 'image')}: {some}"
        )
    if not rows:
        raise UserError(f"{path}, {split}: no image of {len(pairs)} can be read with its mask")
    pairs, headers, mask_headers = zip(*rows, strict=True)
    image_names, mask_names = zip(*pairs, strict=True)
    _check_headers(mask_folder, mask_names, mask_headers, headers, exif)
    turned = [name for name, header in zip(image_names, headers, strict=True) if header.orientation != 1]
    if turned and not exif:
        notes.append(
            f"{image_folder}: the EXIF orientation of {count(len(turned), 'image')} is not applied, since"
            f" the masks have the size of the images as they are stored (data.exif=True would): {first(turned)}"
        )
    return Pairs(
        images=[os.path.join(image_folder, name) for name in image_names],
        masks=[os.path.join(mask_folder, name) for name in mask_names],
        sizes=np.array([_size(header, exif) for header in headers], np.int32),
        num_classes=num_classes,
        zero_is_class=zero_is_class,
    )


def _check_headers(
    folder: str, names: Sequence[str], masks: list[Header], image_headers: list[Header], exif: bool
) -> None:
    problems = {name: _mask_problem(mask.mode, mask.format) for name, mask in zip(names, masks, strict=True)}
    problems = {name: problem for name, problem in problems.items() if problem}
    if problems:
        problem = next(iter(problems.values()))
        alike = [name for name, other in problems.items() if other == problem]
        raise UserError(f"{folder}: {count(len(alike), 'mask')} cannot be used: {first(alike)}. Each is {problem}.")

    def differ(size: Callable[[Header], tuple[int, int]]) -> list[str]:
        pairs = zip(names, masks, image_headers, strict=True)
        return [
            f"{name} ({mask.width}x{mask.height} for {'x'.join(map(str, size(image)))})"
            for name, mask, image in pairs
            if (mask.width, mask.height) != size(image)
        ]

    wrong = differ(lambda header: _size(header, exif))
    if wrong:
        other = not differ(lambda header: _size(header, not exif))
        hint = f" They would fit with data.exif={not exif}: images turned by EXIF, or not." if other else ""
        raise UserError(f"{folder}: {count(len(wrong), 'mask')} of another size than the image: {first(wrong)}.{hint}")


def _size(header: Header, exif: bool) -> tuple[int, int]:
    return header.turned if exif else (header.width, header.height)


def _look_at_values(folder: str, pairs: Pairs, skip_broken: bool, notes: list[str]) -> None:
    """Refuses masks whose values are surely not meant as they would be understood, from a few of them."""
    chosen, values = [], set()
    for index in np.unique(np.linspace(0, len(pairs) - 1, LOOKED_AT).astype(int)).tolist():
        try:
            values |= set(np.unique(pairs._values(index)).tolist())
            chosen.append(index)
        except Unreadable:
            if not skip_broken:
                raise
    looked = f"{folder}: the {len(chosen)} masks looked at hold"
    if IGNORED in values and values <= {0, IGNORED}:
        raise UserError(
            f"{looked} no value but 0 and 255, and 255 is ignored. For two classes write 1 instead of 255 and set"
            " data.zero_is_class=True; for one class beside an ignored ground write 1 instead of 255."
        )
    if values == {0} and not pairs.zero_is_class:
        raise UserError(f"{looked} only 0, which is ignored. If 0 is a class, set data.zero_is_class=True.")
    for index in chosen:
        pairs.labels(index)  # refuses values beyond the classes
    if pairs.num_classes == 2 and values - {IGNORED} == {0, 1} and not pairs.zero_is_class:
        notes.append(f"{looked} 0, which is ignored, and 1. If 0 is the first class, set data.zero_is_class=True.")
