"""Images with annotated objects, in folders as COCO's: SPLIT/*.jpg and annotations/instances_SPLIT.json.

What training takes and leaves out is what the original's framework, MMDetection 2.19, takes and leaves out.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fcvit_jax.data import coco_json, image_files
from fcvit_jax.data.coco_eval import Truth
from fcvit_jax.data.image_files import count, first
from fcvit_jax.data.segments import RLE
from fcvit_jax.errors import UserError

SMALLEST_SIDE = 32  # of an image for training, in pixels
OUTSIDE = 1.0  # pixels that a box may reach over the edge of its image and still fit


class Record(NamedTuple):
    """One image and the objects that training takes; m of them, which may be none.

    Attributes:
      index: of the example.
      encoded: the image file.
      size: width and height of the image, turned by EXIF where that is asked for.
      boxes: float32 (m, 4): x1, y1, x2, y2 in pixels of the image.
      classes: int32 (m,).
      rles: m masks of runs, for `segments.decode`; None where masks are not asked for.
    """

    index: int
    encoded: bytes
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    rles: list[RLE] | None


@dataclasses.dataclass(frozen=True)
class Instances:
    """One split as a source of examples, whose records are `Record`.

    Attributes:
      folder, names: the image files are `folder/name`.
      image_ids: as in the JSON file.
      category_ids: of the classes in the JSON file, None where it lacks one.
      sizes: int32 (images, 2), width and height, turned by EXIF where that is asked for.
      objects: of all images.
      chosen: int64 (n,), the images of the source, as indices into the attributes above.
    """

    folder: str
    names: list[str]
    image_ids: list[int | str]
    category_ids: tuple[int | str | None, ...]
    sizes: np.ndarray
    objects: coco_json.Objects
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def example_sizes(self) -> np.ndarray:
        """Width and height of the image of each example, int32 (n, 2)."""
        return self.sizes[self.chosen]

    @property
    def example_counts(self) -> np.ndarray:
        """How many objects of each example training takes, int64 (n,)."""
        before = np.concatenate([[0], self.objects.train.cumsum()])[self.objects.starts]
        return np.diff(before)[self.chosen]

    def read(self, indices: Sequence[int]) -> Iterator[Record]:
        objects = self.objects
        for index in indices:
            kept = self._objects(index)[objects.train[self._objects(index)]]
            boxes = objects.boxes[kept]
            boxes[:, 2:] += boxes[:, :2]
            yield Record(
                index=index,
                encoded=self.encoded(index),
                size=tuple(self.sizes[self.chosen[index]].tolist()),
                boxes=boxes.astype(np.float32),
                classes=objects.classes[kept],
                rles=None if objects.segments is None else [self._rle(index, which) for which in kept.tolist()],
            )

    def encoded(self, index: int) -> bytes:
        """The image file of an example."""
        return image_files.read_file(self.describe(index))

    def describe(self, index: int) -> str:
        return os.path.join(self.folder, self.names[self.chosen[index]])

    def truth(self, index: int) -> Truth:
        """All objects of an example for the evaluation: crowds too, but none without width or height."""
        objects = self.objects
        kept = self._objects(index)
        kept = kept[(objects.boxes[kept, 2:] > 0).all(1)]
        if objects.segments is None:
            rles = None
        else:
            rles = [self._rle(index, which) if which in objects.segments else None for which in kept.tolist()]
        return Truth(objects.boxes[kept], objects.classes[kept], objects.areas[kept], objects.crowd[kept], rles)

    def image_id(self, index: int) -> int | str:
        """The id of an example's image in the JSON file."""
        return self.image_ids[self.chosen[index]]

    def _objects(self, index: int) -> np.ndarray:
        return np.arange(*self.objects.starts[self.chosen[index] :][:2])

    def _rle(self, index: int, which: int) -> RLE:
        width, height = self.sizes[self.chosen[index]].tolist()
        return self.objects.segments.rle(which, height, width)


class Opened(NamedTuple):
    """What `open_folder` returns.

    Attributes:
      train, eval: the two splits; train is None where it was not asked for.
      class_names: in the order of the classes.
      notes: lines that the user should see once.
    """

    train: Instances | None
    eval: Instances
    class_names: tuple[str, ...]
    notes: list[str]


def open_folder(
    path: str,
    training: bool = True,
    *,
    class_names: Sequence[str] | None = None,
    train_split: str = "train2017",
    eval_split: str = "val2017",
    masks: bool = True,
    empty_images: bool = False,
    exif: bool = False,
    skip_broken: bool = False,
) -> Opened:
    """Opens a folder of images and COCO's instances files, and reads the headers of all images.

    Example::

        train, evaluation, class_names, notes = open_folder("coco")
        record = next(train.read([0]))

    Args:
      path: has SPLIT/ and annotations/instances_SPLIT.json for both splits.
      training: False: the training split is not opened, and need not be there.
      class_names: the classes in their order, for example those of a checkpoint. None: the categories of the training
        file in its order; of the other file where training is False.
      train_split, eval_split: names of folders.
      masks: read the outlines too.
      empty_images: train on images without objects too.
      exif: the annotations belong to the images as their EXIF orientation turns them, and the images are to be decoded
        so.
      skip_broken: leave out training images whose header cannot be read.

    Raises:
      UserError: files, names or annotations are not as they must be; the message says what to do.
    """
    notes = []
    train = None
    if training:
        train, class_names = _open_split(path, "train_split", train_split, class_names, masks, exif, skip_broken, notes)
        train = for_training(train, masks, empty_images, notes)
    evaluation, class_names = _open_split(path, "eval_split", eval_split, class_names, masks, exif, False, notes)
    return Opened(train, evaluation, tuple(class_names), notes)


def _open_split(
    path: str,
    key: str,
    split: str,
    class_names: Sequence[str] | None,
    masks: bool,
    exif: bool,
    skip_broken: bool,
    notes: list[str],
) -> tuple[Instances, Sequence[str]]:
    folder, file = os.path.join(path, split), os.path.join(path, "annotations", f"instances_{split}.json")
    if not os.path.isdir(folder) or not os.path.isfile(file):
        there = sorted(os.listdir(path)) if os.path.isdir(path) else []
        raise UserError(
            f"data.{key}={split}: {path} must have the folder {split} and the file annotations/instances_{split}.json"
            f" (it has {first(there) or 'nothing'})"
        )
    content = coco_json.load(file)
    if class_names is None:
        class_names = coco_json.choose_classes(content, file, notes)
    classes = coco_json.match_classes(content, file, class_names, notes)
    images = coco_json.read_images(content, file, folder, notes, skip_broken)
    annotations, objects = coco_json.read_objects(content, file, images, classes, notes)
    sizes = _sizes(images, file, annotations, objects, exif, notes)
    outlines = coco_json.read_segments(annotations, file, objects, sizes) if masks else None
    instances = Instances(
        folder=folder,
        names=images.names,
        image_ids=images.ids,
        category_ids=tuple({label: key for key, label in classes.items()}.get(i) for i in range(len(class_names))),
        sizes=sizes,
        objects=dataclasses.replace(objects, segments=outlines),
        chosen=np.arange(len(images.ids)),
    )
    return _with_areas(instances), class_names


def _sizes(
    images: coco_json.Images,
    file: str,
    annotations: Sequence[dict],
    objects: coco_json.Objects,
    exif: bool,
    notes: list[str],
) -> np.ndarray:
    """Width and height of every image: the file's own, if the annotations agree with them."""
    stored = np.array([(header.width, header.height) for header in images.headers], np.int32)
    turned = np.array([header.turned for header in images.headers], np.int32)
    sizes = turned if exif else stored
    missing = (images.declared == 0).any(1)
    wrong = ~missing & (images.declared != sizes).any(1)
    swapped = wrong & (images.declared == sizes[:, ::-1]).all(1)
    if (wrong & ~swapped).any():
        sample = [
            f"{images.names[i]} ({'x'.join(map(str, images.declared[i]))}, the file {'x'.join(map(str, sizes[i]))})"
            for i in np.flatnonzero(wrong & ~swapped)
        ]
        raise UserError(
            f"{file}: {count(len(sample), 'image')} of another size than annotated: {first(sample)}. Take the"
            " images that were annotated, or scale the annotations, width and height with them."
        )

    by_exif = (turned != stored).any(1)
    misfit = np.zeros(len(sizes), bool)
    for index in np.flatnonzero(swapped | by_exif):
        own = slice(*objects.starts[index : index + 2])
        fit = [_fits(objects.boxes[own], annotations[own], size) for size in (sizes[index], sizes[index, ::-1])]
        misfit[index] = fit == [False, True]

    def named(chosen: np.ndarray) -> str:
        names = [images.names[index] for index in np.flatnonzero(chosen)]
        return f"{count(len(names), 'image')}: {first(names)}"

    for chosen, advice in (
        (misfit & by_exif, f"Their EXIF orientation is {'' if exif else 'not '}applied: set data.exif={not exif}"),
        (misfit, "Turn the files as they were when they were annotated"),
    ):
        if chosen.any():
            raise UserError(f"{file}: boxes or masks fit only images turned by 90 degrees, {named(chosen)}. {advice}.")
    for chosen, what in ((missing, "has no width or height of"), (swapped, "exchanges width and height of")):
        if chosen.any():
            notes.append(f"{file} {what} {named(chosen)}. Those of the files are taken.")
    oriented = np.array([header.orientation != 1 for header in images.headers])
    if oriented.any() and not exif:
        notes.append(
            f"{images.folder}: the EXIF orientation is not applied (data.exif=True would), since the annotations fit"
            f" the images as they are stored, of {named(oriented)}"
        )
    return sizes


def _fits(boxes: np.ndarray, annotations: Sequence[dict], size: np.ndarray) -> bool:
    """Whether boxes and run-length masks are those of an image of a size (width, height)."""
    inside = (boxes[:, :2] >= -OUTSIDE).all() and (boxes[:, :2] + boxes[:, 2:] <= size + OUTSIDE).all()
    segmentations = [annotation.get("segmentation") for annotation in annotations]
    runs = [segmentation.get("size") for segmentation in segmentations if isinstance(segmentation, dict)]
    return bool(inside) and all(height_width == size[::-1].tolist() for height_width in runs)


def _with_areas(instances: Instances) -> Instances:
    """Fills in areas that the file has not: of the mask, or of the box."""
    objects = instances.objects
    areas = objects.areas.copy()
    owners = np.repeat(np.arange(len(instances.sizes)), np.diff(objects.starts))
    for which in np.flatnonzero(np.isnan(areas)).tolist():
        if objects.segments is not None and which in objects.segments:
            from pycocotools import mask

            areas[which] = mask.area(instances._rle(owners[which], which))
        else:
            areas[which] = objects.boxes[which, 2] * objects.boxes[which, 3]
    return dataclasses.replace(instances, objects=dataclasses.replace(objects, areas=areas))


def for_training(instances: Instances, masks: bool, empty_images: bool, notes: list[str]) -> Instances:
    """Marks the objects that training takes, and chooses images of some size that have objects, crowds included; or,
    with `empty_images`, that may have none."""
    objects = instances.objects
    owners = np.repeat(np.arange(len(instances.sizes)), np.diff(objects.starts))
    low, size = objects.boxes[:, :2], objects.boxes[:, 2:]
    overlap = np.minimum(low + size, instances.sizes[owners]) - np.maximum(low, 0)
    left_out = {
        "outside of their image": ~(overlap > 0).all(1),
        "under one pixel wide or high, or of no area": (size < 1).any(1) | ~(objects.areas > 0),
    }
    if masks:
        left_out["without an outline"] = np.array([which not in objects.segments for which in range(len(owners))])
    train = objects.train & ~objects.crowd
    said = []
    for reason, chosen in left_out.items():
        if (train & chosen).any():
            said.append(f"{count((train & chosen).sum(), 'object')} {reason}")
        train &= ~chosen
    empty = (np.diff(objects.starts) == 0) & (not empty_images)
    small = ~empty & (instances.sizes.min(1) < SMALLEST_SIDE)
    said += [
        f"{count(chosen.sum(), 'image')} {reason}"
        for reason, chosen in (("without objects", empty), (f"with a side under {SMALLEST_SIDE} pixels", small))
        if chosen.any()
    ]
    if said:
        notes.append(f"{instances.folder}: training leaves out {', '.join(said)}")
    chosen = np.flatnonzero(~empty & ~small)
    if not len(chosen) or not train.any():
        lacking, reason = "object" if len(chosen) else "image", ", ".join(said) or "crowds alone"
        raise UserError(f"{instances.folder} has no {lacking} to train on ({reason})")
    return dataclasses.replace(instances, objects=dataclasses.replace(objects, train=train), chosen=chosen)
