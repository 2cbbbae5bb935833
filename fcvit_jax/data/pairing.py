"""Which mask belongs to which image, by their names."""

import os

from fcvit_jax.data.image_files import count, first
from fcvit_jax.errors import UserError


def match(
    image_names: list[str], mask_names: list[str], image_folder: str, mask_folder: str
) -> tuple[list[tuple[str, str]], str, str]:
    """Pairs images with masks whose names are equal, but for an ending that all images, or all masks, have.

    Args:
      image_names, mask_names: file names with their suffixes.
      image_folder, mask_folder: where they are, for messages.

    Returns:
      (image name, mask name) of every pair, in the order of the images; and the two endings, "" where there is none.

    Raises:
      UserError: an image has no mask, or a mask no image, or two files have one name; names up to five.
    """
    attempts = []
    for image_ending in dict.fromkeys(("", _common_ending(image_names))):
        for mask_ending in dict.fromkeys(("", _common_ending(mask_names))):
            by_image = _by_stem(image_names, image_ending, image_folder)
            by_mask = _by_stem(mask_names, mask_ending, mask_folder)
            attempts.append((by_image, by_mask, image_ending, mask_ending))
    by_image, by_mask, image_ending, mask_ending = max(attempts, key=lambda a: len(a[0].keys() & a[1].keys()))
    without_mask = [name for stem, name in by_image.items() if stem not in by_mask]
    without_image = [name for stem, name in by_mask.items() if stem not in by_image]
    problems = []
    if without_mask:
        problems.append(f"{count(len(without_mask), 'image')} of {image_folder} without a mask: {first(without_mask)}")
    if without_image:
        problems.append(
            f"{count(len(without_image), 'mask')} of {mask_folder} without an image: {first(without_image)}"
        )
    if problems:
        raise UserError(
            f"{'; '.join(problems)}. A mask is named as its image, or has one ending more that all masks have."
        )
    return [(name, by_mask[stem]) for stem, name in by_image.items()], image_ending, mask_ending


def _common_ending(names: list[str]) -> str:
    """What all names end in before the suffix, from the first "_", "-" or "." in it: "_mask" of a1_mask, b1_mask."""
    backwards = os.path.commonprefix([os.path.splitext(name)[0][::-1] for name in names])
    ending = backwards[::-1].rpartition("/")[2]
    starts = [ending.index(sign) for sign in "_-." if sign in ending]
    return ending[min(starts) :] if starts else ""


def _by_stem(names: list[str], ending: str, folder: str) -> dict[str, str]:
    found = {}
    for name in names:
        stem = os.path.splitext(name)[0].removesuffix(ending)
        if stem in found:
            raise UserError(f"{folder} has two files of one name: {found[stem]} and {name}. Remove one.")
        found[stem] = name
    return found
