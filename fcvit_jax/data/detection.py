"""The datasets of detection: folders as COCO's, scenes of digits and noise, opened for the loader."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fcvit_jax.augment import objects
from fcvit_jax.data import coco, image_files, scenes
from fcvit_jax.data.coco_eval import Truth
from fcvit_jax.data.detection_examples import load_example, load_noise, load_scene, mask_shape
from fcvit_jax.data.loader import Data, Source, check_loading, check_one_batch
from fcvit_jax.devices import storage
from fcvit_jax.errors import MAX_IMAGE_SIZE, UserError, check_range, log


class ObjectSource(Source, Protocol):
    """One split of a dataset of objects.

    Attributes:
      example_sizes: int32 (n, 2), width and height of every image in pixels.
      category_ids: of the classes, as COCO's results have them; None where the split lacks one.
    """

    example_sizes: np.ndarray
    category_ids: tuple[int | str | None, ...]

    def truth(self, index: int) -> Truth:
        """What evaluation is to find in an image."""

    def image_id(self, index: int) -> int | str:
        """The image's id in COCO's results."""


def open_dataset(
    training: bool = True,  # positional, since the keywords are the keys of a config
    *,
    dataset: str,
    batch_size: int,
    data_dir: str = ".",
    workers: int = 0,
    prefetch: int = 1,
    on_broken: str = "error",
    train_split: str = "train2017",
    eval_split: str = "val2017",
    masks: bool = True,
    empty_images: bool = False,
    exif: bool = False,
    long: int = 1333,
    short: int = 800,
    flip: float = 0.5,
    max_objects: int = 100,
    results: str | None = None,
) -> Data:
    """Opens a dataset for training and evaluation; reads annotations and the headers of images, and decodes no image.

    Example::

        data = open_dataset(dataset="coco:coco", batch_size=32)
        for batch in loader.train_batches(data, seed=0, start_step=0, num_steps=data.steps_per_epoch):
            batch["image"], batch["boxes"]          # uint8 (32, 800, 1344, 3) or (32, 1344, 800, 3); (32, 100, 4)

    Args:
      training: False: open the split for evaluation alone; the other need not be there.
      dataset: "coco:PATH", a folder as `data.coco` describes it; "coco/2017", TFDS's, for boxes alone; "digit_scenes":
        scenes of scikit-learn's digits; or "synthetic", one batch of noise, for measuring the training step alone: as
        many images and classes as COCO, one batch to evaluate.
      batch_size: images per step over all processes; a batch has wide images, or others.
      data_dir: the folder from which a relative PATH starts, or where TFDS keeps its data.
      workers, prefetch, on_broken: as in `classification.open_dataset`.
      train_split, eval_split, empty_images, exif: of a folder; see `coco.open_folder`. TFDS has other splits.
      masks: train and evaluate masks too.
      long, short: the longer and the shorter side, in pixels, to which images are resized; see `objects.fit_image`.
      flip: probability of a horizontal flip in training.
      max_objects: of an image in training; more are left out.
      results: a file to which every evaluation writes its detections in COCO's format; None: it writes none.

    Raises:
      UserError: a value is out of its range, or the dataset is unknown or not as it must be; the message says what to
        do.
    """
    workers = check_loading(batch_size, workers, prefetch, on_broken)
    _check(dataset, long, short, flip, max_objects, results)
    kinds = {"masks": masks, "empty_images": empty_images, "exif": exif}
    splits = {"train_split": train_split, "eval_split": eval_split}
    if dataset.startswith(("coco:", "coco/")):
        opened = _open_coco(dataset, data_dir, training, on_broken == "skip", kinds, splits)
        if training:
            _say_what_is_cut_off(opened.train, max_objects)
    else:
        opened = _open_made(dataset, training, batch_size, long, short)
    if training:
        check_one_batch(dataset, opened.train, batch_size)
    sizes, ids = {"long": long, "short": short, "exif": exif}, (opened.train or opened.eval).category_ids
    options = sizes | {"flip": flip, "masks": masks, "max_objects": max_objects, "results": results}
    if training:
        options["train_canvases"] = _canvases(opened.train.example_sizes, long, short)
        options["mask_shapes"] = _mask_shapes(opened.train.example_sizes, long, short)
    return Data(
        load_example=opened.load_example,
        train=opened.train,
        eval=opened.eval,
        class_names=opened.class_names,
        batch_size=batch_size,
        workers=workers,
        prefetch=prefetch,
        on_broken=on_broken,
        options=options | {"eval_canvases": _canvases(opened.eval.example_sizes, long, short)},
        about=sizes | {"class_names": list(opened.class_names), "category_ids": list(ids)},
        train_buckets=_buckets(opened.train.example_sizes) if training else None,
        eval_buckets=_buckets(opened.eval.example_sizes),
        constant=dataset == "synthetic",
    )


def _check(dataset: str, long: int, short: int, flip: float, max_objects: int, results: str | None) -> None:
    check_range("data", 32, below=MAX_IMAGE_SIZE + 1, short=short)
    check_range("data", short, below=4 * MAX_IMAGE_SIZE, long=long)
    check_range("data", 0, flip=flip)
    least = scenes.OBJECTS[1] if dataset == "digit_scenes" else 1
    check_range("data", least, below=10_000, max_objects=max_objects)
    if results is not None and not storage.is_folder(storage.as_path(results).absolute().parent):
        raise UserError(f"data.results={results}: there is no such folder.")


class _Opened(NamedTuple):
    """A dataset as it is: its splits (`train` is None where it is not opened), its classes, and `Data`'s function."""

    train: ObjectSource | None
    eval: ObjectSource
    class_names: tuple[str, ...]
    load_example: Callable


def _open_coco(
    dataset: str, data_dir: str, training: bool, skip_broken: bool, kinds: dict[str, bool], splits: dict[str, str]
) -> _Opened:
    """COCO, or what is like it, as a folder or in TFDS."""
    if dataset.startswith("coco:"):
        path = str(storage.local_path(data_dir) / storage.local_path(dataset.removeprefix("coco:")))
        opened = coco.open_folder(path, training, skip_broken=skip_broken, **kinds, **splits)
    else:
        if kinds["masks"]:
            raise UserError(f"{dataset} of TFDS has no masks: set --config.model.masks=False, or use coco:PATH.")
        if kinds["exif"]:
            raise UserError(f"data.exif=True: the boxes of {dataset} belong to the images as they are stored.")
        from fcvit_jax.data import tfds_objects  # TFDS is slow to import

        opened = tfds_objects.open_coco(
            dataset, str(storage.as_path(data_dir)), training, empty_images=kinds["empty_images"], **splits
        )
    for note in opened.notes:
        log.info("%s", note)
    return _Opened(opened.train, opened.eval, opened.class_names, load_example)


def _open_made(dataset: str, training: bool, batch_size: int, long: int, short: int) -> _Opened:
    """Scenes of digits or noise."""
    if dataset == "digit_scenes":
        train = scenes.Scenes("train") if training else None
        return _Opened(train, scenes.Scenes("validation"), scenes.CLASS_NAMES, load_scene)
    if dataset == "synthetic":
        names = tuple(f"class {i}" for i in range(80))
        train = _Noise(117_266, long, short) if training else None
        return _Opened(train, _Noise(batch_size, long, short), names, load_noise)
    raise UserError(f"data.dataset={dataset!r} is unknown: choose coco:PATH, coco/2017, digit_scenes or synthetic.")


def _say_what_is_cut_off(train: coco.Instances, max_objects: int) -> None:
    counts = train.example_counts
    if (over := counts > max_objects).any():
        log.warning(
            "%s: %s with more than data.max_objects=%d objects, of which the first are taken: %d of all %d objects are "
            "left out of training. The most in one image are %d.",
            *(train.folder, image_files.count(over.sum(), "image"), max_objects),
            *((counts - max_objects)[over].sum(), counts.sum(), counts.max()),
        )


def _is_wide(sizes: np.ndarray) -> np.ndarray:
    """Which of the images of sizes (n, 2) are wider than high: the two groups of which batches are made."""
    return sizes[:, 0] > sizes[:, 1]


def _buckets(sizes: np.ndarray) -> np.ndarray | None:
    groups, buckets = np.unique(_is_wide(sizes), return_inverse=True)
    return buckets if len(groups) > 1 else None


def _canvases(sizes: np.ndarray, long: int, short: int) -> dict[bool, tuple[int, int]]:
    """(height, width) of the canvas of the images that are wide (True) and of the others, where there are any."""
    sizes = np.unique(sizes, axis=0)
    groups = {wide: sizes[_is_wide(sizes) == wide].tolist() for wide in (False, True)}
    return {wide: objects.canvas_size(group, long, short) for wide, group in groups.items() if group}


def _mask_shapes(sizes: np.ndarray, long: int, short: int) -> dict[bool, tuple[int, int]]:
    """(height, width) in which the masks of all images fit as examples store them, in groups as above."""
    shapes = {}
    for width, height in np.unique(sizes, axis=0).tolist():
        shape, other = mask_shape(width, height, long, short), shapes.get(width > height, (0, 0))
        shapes[width > height] = max(shape[0], other[0]), max(shape[1], other[1])
    return shapes


def read_pair(data: Data, index: int) -> tuple[np.ndarray, Truth]:
    """An example of evaluation as it is: the image (H, W, 3) uint8, and what is to be found in it.

    Raises:
      UserError: it cannot be read.
    """
    (record,) = data.eval.read([index])
    if isinstance(data.eval, scenes.Scenes):
        image = scenes.make_scene(*record).image
    else:
        image = image_files.decode(record.encoded, data.options["exif"])
    return image, data.eval.truth(index)


class _Noise:
    """An `ObjectSource` of so many synthetic images of a size, in which evaluation is to find nothing."""

    def __init__(self, count: int, width: int, height: int):
        self.example_sizes = np.full((count, 2), (width, height))
        self.category_ids = tuple(range(1, 81))

    def __len__(self) -> int:
        return len(self.example_sizes)

    def read(self, indices: Sequence[int]) -> Sequence[int]:
        return indices

    def describe(self, index: int) -> str:
        return f"synthetic example {index}"

    def image_id(self, index: int) -> int:
        return index

    def truth(self, index: int) -> Truth:
        del index
        return Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros(0, bool), [])
