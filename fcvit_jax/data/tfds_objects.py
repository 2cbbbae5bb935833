"""TFDS's `coco/2017` as a source of images with boxes. It has no masks, and its boxes and areas are rounded."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fcvit_jax.augment import images
from fcvit_jax.data import coco, coco_json, coco_names, sources
from fcvit_jax.errors import Unreadable, UserError, log

AT_ONCE = 64  # records that are read together


@dataclasses.dataclass(frozen=True)
class RecordedInstances(coco.Instances):
    """As `coco.Instances`, with the images in the records of a split instead of files.

    Attributes:
      records: of the split, in the order of the other attributes.
    """

    records: Sequence[dict[str, Any]]

    def encoded(self, index: int) -> bytes:
        try:
            return self.records[int(self.chosen[index])]["image"]
        except Exception as error:  # it may be of any type
            raise Unreadable(f"{self.describe(index)} cannot be read: {error}") from error

    def describe(self, index: int) -> str:
        return f"{self.names[self.chosen[index]]} of {self.folder}"


def open_coco(
    name: str, data_dir: str, training: bool, *, train_split: str, eval_split: str, empty_images: bool = False
) -> coco.Opened:
    """Opens TFDS's `coco/2017`, or what has its features, for boxes alone.

    It reads all records once, for the sizes of the images and the objects: some minutes for COCO's 118,287.

    Args:
      name: of the dataset, its version included if wanted.
      data_dir: where TFDS keeps its data.
      training: False: the training split is not opened.
      train_split, eval_split: TFDS splits, such as "train" and "validation", or slices of them.
      empty_images: train on images without objects too.

    Raises:
      UserError: the dataset is not prepared, not stored as array_record, or has other features; or a split is missing,
        or has no object.
    """
    builder = sources.open_builder(name, data_dir, "coco:PATH, coco/2017 of TFDS, digit_scenes or synthetic")
    features = builder.info.features
    wanted = {"image", "image/id", "objects"}
    if not wanted <= set(features) or not {"area", "bbox", "is_crowd", "label"} <= set(features["objects"].feature):
        raise UserError(f"{name} lacks the features of coco/2017, objects with bbox and label: it has {list(features)}")
    class_names, notes = tuple(features["objects"].feature["label"].names), []
    ids = coco_names.IDS if class_names == tuple(coco_names.NAMES) else range(1, len(class_names) + 1)

    def open_split(key: str, split: str) -> RecordedInstances:
        records = sources.open_records(builder, name, key, split)
        return _read(records, f"{name} {split}", tuple(ids))

    train = None
    if training:
        train = coco.for_training(open_split("train_split", train_split), False, empty_images, notes)
    return coco.Opened(train, open_split("eval_split", eval_split), class_names, notes)


def _read(records: Sequence, folder: str, category_ids: tuple[int, ...]) -> RecordedInstances:
    log.info("%s: reading the boxes and the sizes of %d images", folder, len(records))
    starts = range(0, len(records), AT_ONCE)
    rows, sizes, ids = [], [], []
    for start in tqdm(starts, folder, leave=False, disable=None):
        for record in records.__getitems__(range(start, min(start + AT_ONCE, len(records)))):
            rows.append(record["objects"])
            ids.append(int(record["image/id"]))
            try:
                with Image.open(io.BytesIO(record["image"])) as image:
                    sizes.append(image.size)
            except images.BROKEN as error:
                raise UserError(f"{folder}: image {ids[-1]} cannot be read: {error}") from error
    sizes, counts = np.array(sizes, np.int32), [len(row["label"]) for row in rows]
    columns = {key: np.concatenate([row[key] for row in rows]) for key in ("area", "is_crowd", "label")}
    corners = np.concatenate([np.asarray(row["bbox"], np.float64).reshape(-1, 4) for row in rows])[:, [1, 0, 3, 2]]
    corners *= np.tile(np.repeat(sizes, counts, axis=0), 2)
    if not len(corners):
        raise UserError(f"{folder} has no object")
    objects = coco_json.Objects(
        starts=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        classes=columns["label"].astype(np.int32),
        areas=columns["area"].astype(float),
        crowd=columns["is_crowd"].astype(bool),
        train=np.ones(len(corners), bool),
        segments=None,
    )
    names = [f"image {number}" for number in ids]
    return RecordedInstances(folder, names, ids, category_ids, sizes, objects, np.arange(len(ids)), records)
