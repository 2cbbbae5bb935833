"""COCO's instances files: images, categories and annotations, checked and put into arrays.

Files of people's own differ from COCO's in many small ways. What can be understood is; what cannot be used is left out
and counted, in notes for the user; what would be wrong without a sign is refused in one line.
"""

import array
import collections
import dataclasses
import json
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fcvit_jax.augment.images import IMAGE_SUFFIXES
from fcvit_jax.data import image_files, segments
from fcvit_jax.data.image_files import Header, count, first
from fcvit_jax.errors import UserError

UNUSED_NAMES = ("none", "background", "_background_", "__background__")
Id = int | str


@dataclasses.dataclass(frozen=True)
class Images:
    """The images that a file lists, in the order of their ids.

    Attributes:
      folder, names: the files are `folder/name`.
      ids: as the file has them.
      headers: of the files.
      declared: int64 (n, 2), width and height in the JSON file, 0 where it has none.
    """

    folder: str
    names: list[str]
    ids: list[Id]
    headers: list[Header]
    declared: np.ndarray


@dataclasses.dataclass(frozen=True)
class Objects:
    """The annotated objects, those of an image side by side, in the order of the file.

    Attributes:
      starts: int64 (images + 1,), where the objects of each image begin; and the end.
      boxes: float64 (m, 4): x, y, width, height in pixels of the image.
      classes: int32 (m,).
      areas: float64 (m,), of the masks, in pixels.
      crowd: bool (m,): many objects in one outline.
      train: bool (m,): whether training takes the object.
      segments: the outlines; None if they are not asked for.
    """

    starts: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    train: np.ndarray
    segments: segments.Segments | None


def load(file: str) -> dict[str, Any]:
    """Reads a file and checks that it lists images, annotations and categories.

    The ids by which annotations name images and categories are made equal to those, where they are text on one side and
    numbers on the other; what is no id becomes None.

    Raises:
      UserError: it cannot be read, is no JSON, or lacks one of these lists.
    """
    try:
        content = json.loads(image_files.read_file(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no JSON, or only a part of it: {error}") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(
                f"{file} must be as COCO's instances files: an object with the lists images, annotations and"
                f" categories, but {key} is missing or no list of objects"
            )
    for key, name in (("images", "image_id"), ("categories", "category_id")):
        _match_ids(content[key], content["annotations"], name)
    return content


def _match_ids(entries: list[dict[str, Any]], annotations: list[dict[str, Any]], name: str) -> None:
    """Replaces ids in what a file lists, and of it in the annotations, by equal ones; see `load`."""
    for entry in entries:
        entry["id"] = _id(entry.get("id"))
    ids = {entry["id"] for entry in entries}
    by_text = {str(key): key for key in ids}
    for annotation in annotations:
        key = _id(annotation.get(name))
        annotation[name] = key if key in ids else by_text.get(str(key), key)


def _id(value: Any) -> Id | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, Id) else None


def read_categories(content: Mapping[str, Any], file: str) -> dict[Id, str]:
    """Names of the categories by their ids, in the order of the file.

    Raises:
      UserError: an id or a name is missing or stands twice.
    """
    names = {}
    for category in content["categories"]:
        if not isinstance(category.get("id"), Id) or not isinstance(category.get("name"), str):
            raise UserError(f"{file}: every category needs an id and a name, unlike {category}")
        if category["id"] in names:
            raise UserError(f"{file}: two categories have the id {category['id']!r}. Give each its own.")
        names[category["id"]] = category["name"]
    twice = [name for name, times in collections.Counter(names.values()).items() if times > 1]
    if twice:
        raise UserError(f"{file}: names of categories must differ, but two are called {first(twice)}")
    return names


def choose_classes(content: Mapping[str, Any], file: str, notes: list[str]) -> tuple[str, ...]:
    """The classes that a file defines: its categories in their order, without a background that no object has.

    Raises:
      UserError: there is none, or see `read_categories`.
    """
    names = read_categories(content, file)
    used = {annotation["category_id"] for annotation in content["annotations"]}
    ground = [name for key, name in names.items() if name.lower() in UNUSED_NAMES and key not in used]
    if ground:
        notes.append(f"{file}: no object has the category {first(ground)}, which is left out of the classes")
    classes = tuple(name for name in names.values() if name not in ground)
    if not classes:
        raise UserError(f"{file} has no category")
    unused = [name for key, name in names.items() if name in classes and key not in used]
    if unused:
        notes.append(f"{file}: no object has the {count(len(unused), 'category', 'categories')} {first(unused)}")
    return classes


def match_classes(content: Mapping[str, Any], file: str, class_names: Sequence[str], notes: list[str]) -> dict[Id, int]:
    """Class indices by the category ids of a file. Names decide, whatever the ids and the order.

    Raises:
      UserError: objects have a category that is no class, or see `read_categories`.
    """
    names = read_categories(content, file)
    used = {annotation["category_id"] for annotation in content["annotations"]}
    unknown = [name for key, name in names.items() if name not in class_names]
    if any(key in used and name in unknown for key, name in names.items()):
        raise UserError(
            f"{file} has objects of categories that are no class of the training data: {first(unknown)}."
            f" Its classes are {first(class_names)}. Names must be equal in both files."
        )
    missing = [name for name in class_names if name not in names.values()]
    if missing:
        notes.append(
            f"{file} does not list {count(len(missing), 'class', 'classes')} of the training data: {first(missing)}"
        )
    return {key: class_names.index(name) for key, name in names.items() if name not in unknown}


def read_images(
    content: Mapping[str, Any], file: str, folder: str, notes: list[str], skip_broken: bool = False
) -> Images:
    """Finds the listed images in a folder and reads their headers.

    A name may have folders before it, or backslashes: the longest end of it that is a file in the folder is taken.

    Args:
      content, file: from `load`.
      folder: of the images.
      notes: lines for the user, to which some are added.
      skip_broken: leave out images whose header cannot be read.

    Raises:
      UserError: an id or a name is missing, an id stands twice, files are missing or cannot be read.
    """
    entries = content["images"]
    for entry in entries:
        if not isinstance(entry.get("id"), Id) or not isinstance(entry.get("file_name"), str):
            raise UserError(f"{file}: every image needs an id and a file_name, unlike {str(entry)[:200]}")
    twice = [str(key) for key, times in collections.Counter(entry["id"] for entry in entries).items() if times > 1]
    if twice:
        raise UserError(f"{file}: ids of images must differ, but {count(len(twice), 'id')} stand twice: {first(twice)}")
    if not entries:
        raise UserError(f"{file} lists no image")
    entries = sorted(entries, key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
    there = set(image_files.list_images(folder, ("",)))
    names = [_find(entry["file_name"], there) for entry in entries]
    missing = [entry["file_name"] for entry, name in zip(entries, names, strict=True) if name is None]
    if missing:
        raise UserError(f"{folder} lacks {count(len(missing), 'image')} that {file} lists: {first(missing)}")
    unlisted = {name for name in there - set(names) if name.lower().endswith(IMAGE_SUFFIXES)}
    if unlisted:
        notes.append(
            f"{folder}: {file} does not list {count(len(unlisted), 'image')}, not used: {first(sorted(unlisted))}"
        )
    broken = {} if skip_broken else None
    rows = zip(entries, names, image_files.read_headers(folder, names, broken), strict=True)
    rows = [row for row in rows if row[2] is not None]
    if broken:
        some = first([f"{name} ({reason})" for name, reason in broken.items()])
        notes.append(f"{folder}: left out, since they cannot be read, {count(len(broken), 'image')}: {some}")
    if not rows:
        raise UserError(f"{folder}: no image of {len(entries)} can be read")
    entries, names, headers = (list(column) for column in zip(*rows, strict=True))
    declared = [[_side(entry.get(key)) for key in ("width", "height")] for entry in entries]
    return Images(
        folder=folder,
        names=names,
        ids=[entry["id"] for entry in entries],
        headers=headers,
        declared=np.array(declared, np.int64),
    )


def _find(name: str, there: set[str]) -> str | None:
    for text in (name, urllib.parse.unquote(name)):  # some tools write names as in addresses, with %20 for a space
        parts = text.replace("\\", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        if found := next((end for end in ends if end in there), None):
            return found
    return None


def _side(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 < value < 2**31 else 0


def read_objects(
    content: Mapping[str, Any], file: str, images: Images, classes: Mapping[Id, int], notes: list[str]
) -> tuple[list[dict[str, Any]], Objects]:
    """Reads the annotations of listed images and categories, without their outlines.

    Returns:
      The annotations, and the arrays of the same objects: areas are NaN where the file has none, all objects but
      those that the file says to ignore are for training, and `segments` is None.

    Raises:
      UserError: an annotation is not as COCO's.
    """
    index_of = {key: index for index, key in enumerate(images.ids)}
    left_out = collections.Counter()
    annotations = []
    indices, labels, numbers = array.array("q"), array.array("i"), array.array("d")
    for annotation in content["annotations"]:
        index, label = index_of.get(annotation["image_id"]), classes.get(annotation["category_id"])
        if index is None or label is None:
            left_out[f"whose {'image' if index is None else 'category'} is not listed"] += 1
            continue
        try:
            row = _numbers(annotation)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(_describe(file, annotation, error)) from error
        if row is None:
            left_out["with neither a box nor an outline"] += 1
            continue
        if row[2] <= 0 or row[3] <= 0:
            left_out["of zero width or height"] += 1
        annotations.append(annotation)
        indices.append(index)
        labels.append(label)
        numbers.extend(row)
    reasons = ", ".join(f"{count(number, 'annotation')} {why}" for why, number in left_out.items())
    if not annotations:
        raise UserError(
            f"{file} has no annotation of an image and a category that it lists ({reasons or 'none at all'})"
        )
    if reasons:
        notes.append(f"{file}: left out {reasons}")
    order = np.argsort(indices, kind="stable")  # the order of the file within an image
    numbers = np.array(numbers).reshape(-1, 7)[order]
    return [annotations[which] for which in order], Objects(
        starts=np.searchsorted(np.array(indices)[order], np.arange(len(images.ids) + 1)),
        boxes=numbers[:, :4].copy(),
        classes=np.array(labels, np.int32)[order],
        areas=numbers[:, 4].copy(),
        crowd=numbers[:, 5] != 0,
        train=numbers[:, 6] == 0,
        segments=None,
    )


def _numbers(annotation: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Box (four numbers), area (NaN: not given), crowd and ignore of an annotation; None if it has no box."""
    box = annotation.get("bbox") or segments.bounds(annotation.get("segmentation"))
    if box is None:
        return None
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise ValueError(f"its bbox must be [x, y, width, height] in pixels, unlike {box!r}")
    x, y, width, height = map(float, box)
    if not math.isfinite(x + y + width + height):
        raise ValueError(f"its bbox is {box}")
    area = annotation.get("area")
    area = math.nan if area is None else float(area)
    return x, y, width, height, area, int(annotation.get("iscrowd") or 0), int(annotation.get("ignore") or 0)


def read_segments(
    annotations: Sequence[Mapping[str, Any]], file: str, objects: Objects, sizes: np.ndarray
) -> segments.Segments:
    """Reads the outlines of the objects from `read_objects`.

    Raises:
      UserError: no object has one, or one is not as COCO's.
    """
    builder = segments.Builder()
    owners = np.repeat(np.arange(len(sizes)), np.diff(objects.starts)).tolist()
    found = False
    for owner, annotation in zip(owners, annotations, strict=True):
        width, height = sizes[owner].tolist()
        try:
            found |= builder.add(annotation.get("segmentation"), height, width)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(_describe(file, annotation, error)) from error
    if not found:
        raise UserError(f"{file} has no segmentation: set data.masks=False to train and evaluate boxes alone")
    return builder.build()


def _describe(file: str, annotation: Mapping[str, Any], error: Exception) -> str:
    where = f"annotation {annotation.get('id')!r} of image {annotation.get('image_id')!r}"
    return f"{file}: {where} is not as COCO's: {error}"
