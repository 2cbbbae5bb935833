"""The datasets of detection, folders as COCO's, scenes of digits and noise, and how examples are made of them."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fcvit_jax.augment import objects, paired
from fcvit_jax.data import coco, image_files, scenes, segments
from fcvit_jax.data.coco_eval import Truth
from fcvit_jax.data.loader import Data, Example, Source, check_loading, check_one_batch
from fcvit_jax.errors import MAX_IMAGE_SIZE, Unreadable, UserError, check_range, log

NOISE_OBJECTS = 7  # in a synthetic image, as in one of COCO on average


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
      dataset: "coco:PATH", a folder as `data.coco` describes it; "digit_scenes": scenes of scikit-learn's digits; or
        "synthetic", one batch of noise, for measuring the training step alone: as many images and classes as COCO, one
        batch to evaluate.
      batch_size: images per step over all processes; a batch has wide images, or others.
      data_dir: the folder from which a relative PATH starts.
      workers, prefetch, on_broken: as in `classification.open_dataset`.
      train_split, eval_split, empty_images, exif: of a folder; see `coco.open_folder`.
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
    check_range("data", 32, below=MAX_IMAGE_SIZE + 1, short=short)
    check_range("data", short, below=4 * MAX_IMAGE_SIZE, long=long)
    check_range("data", 0, flip=flip)
    check_range("data", 1, below=10_000, max_objects=max_objects)
    if results is not None and not os.path.isdir(os.path.dirname(os.path.abspath(results))):
        raise UserError(f"data.results={results}: there is no such folder.")
    if dataset.startswith("coco:"):
        path = os.path.join(os.path.expanduser(data_dir), os.path.expanduser(dataset.removeprefix("coco:")))
        splits = dict(train_split=train_split, eval_split=eval_split)
        kinds = dict(masks=masks, empty_images=empty_images, exif=exif)
        opened = _open_folder(path, training, max_objects, **splits, **kinds)
    elif dataset == "digit_scenes":
        check_range("data", scenes.OBJECTS[1], max_objects=max_objects)
        train = scenes.Scenes("train") if training else None
        opened = _Opened(train, scenes.Scenes("validation"), scenes.CLASS_NAMES, load_scene)
    elif dataset == "synthetic":
        names = tuple(f"class {i}" for i in range(80))
        train = _Noise(117_266, long, short) if training else None
        opened = _Opened(train, _Noise(batch_size, long, short), names, load_noise)
    else:
        raise UserError(f"data.dataset={dataset!r} is unknown: choose coco:PATH, digit_scenes or synthetic.")
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


class _Opened(NamedTuple):
    """A dataset as it is: its splits (`train` is None where it is not opened), its classes, and `Data`'s function."""

    train: ObjectSource | None
    eval: ObjectSource
    class_names: tuple[str, ...]
    load_example: Callable


def _open_folder(path: str, training: bool, max_objects: int, **options: Any) -> _Opened:
    opened = coco.open_folder(path, training, **options)
    for note in opened.notes:
        log.info("%s", note)
    if training:
        _say_what_is_cut_off(opened.train, max_objects)
    return _Opened(opened.train, opened.eval, opened.class_names, load_example)


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
    """(height, width) in which the masks of all images fit as `_stored_masks` stores them, in groups as above."""
    shapes = {}
    for width, height in np.unique(sizes, axis=0).tolist():
        shape, other = _mask_shape(width, height, long, short), shapes.get(width > height, (0, 0))
        shapes[width > height] = max(shape[0], other[0]), max(shape[1], other[1])
    return shapes


def _mask_shape(width: int, height: int, long: int, short: int) -> tuple[int, int]:
    """(height, width) in which a mask is stored: as the image was or as it is resized, whichever is smaller."""
    new = paired.rescaled_size(width, height, long, short)
    return min((width, height), new, key=lambda size: size[0] * size[1])[::-1]


def load_example(data: Data, record: coco.Record, rng: np.random.Generator | None) -> Example:
    """Decodes and transforms an image with its objects.

    Args:
      data: from `open_dataset`.
      record: the encoded image and its objects.
      rng: the source of randomness in training; None: the transforms of evaluation.

    Returns:
      "image" uint8 (H, W, 3), the image at the top left of a canvas, and "size" int32 (2,), its height and width. In
      training further "boxes" float32 (G, 4), "labels" int32 (G,) and "valid" bool (G,), with G = max_objects; and,
      with masks, "masks" uint8 (G, h, w / 8), eight pixels a byte, "rows" int32 (H,) and "columns" int32 (W,): as in
      `networks.objects.Objects`. In evaluation further "scale" float32 (4,), as `objects.fit_image` gives it, and
      "index" int32 (), the example's.

    Raises:
      Unreadable: the image is broken.
      UserError: it has no longer the size that it had when the dataset was opened.
    """
    try:
        image = image_files.decode(record.encoded, data.options["exif"])
    except UserError as error:
        raise Unreadable(f"not a readable image: {error}") from error
    width, height = record.size
    if image.shape[:2] != (height, width):
        raise UserError(f"it has {image.shape[1]} x {image.shape[0]} pixels now, and had {width} x {height}")
    if rng is None:
        return _eval_example(data, record.index, image)
    rles = record.rles if data.options["masks"] else ()
    masks = (segments.decode([rle], height, width)[0] for rle in rles)  # one by one: those of photographs are large
    return _train_example(data, image, record.boxes, record.classes, masks, rng)


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


def load_scene(data: Data, record: tuple[str, int], rng: np.random.Generator | None) -> Example:
    """A scene of digits, as `load_example`: in training a new one, of `rng` alone."""
    scene = scenes.make_scene(*record, rng)
    if rng is None:
        return _eval_example(data, record[1], scene.image)
    return _train_example(data, scene.image, scene.boxes, scene.classes, scene.masks, rng)


def load_noise(data: Data, record: int, rng: np.random.Generator | None) -> Example:
    """A synthetic example, as `load_example`: noise with some rectangles, of the record's number alone."""
    options, noise = data.options, np.random.default_rng(record)
    width, height = options["long"], options["short"]
    image = noise.integers(0, 256, (height, width, 3), np.uint8)
    if rng is None:
        return _eval_example(data, record, image)
    x, y = (np.sort(noise.integers(0, side - 1, (NOISE_OBJECTS, 2)), axis=1) + [0, 1] for side in (width, height))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    masks = np.zeros((NOISE_OBJECTS, height, width), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    classes = noise.integers(data.num_classes, size=NOISE_OBJECTS)
    return _train_example(data, image, boxes.astype(np.float32), classes, masks, rng)


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


def _eval_example(data: Data, index: int, image: np.ndarray) -> Example:
    pixels, scale = objects.fit_image(image, data.options["long"], data.options["short"])
    canvas = data.options["eval_canvases"][image.shape[1] > image.shape[0]]
    size = np.array(pixels.shape[:2], np.int32)
    return {"image": objects.on_canvas(pixels, canvas), "size": size, "scale": scale, "index": np.int32(index)}


def _train_example(
    data: Data,
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    masks: Iterable[np.ndarray],
    rng: np.random.Generator,
) -> Example:
    """An example of training, from boxes (n, 4) and n masks (H, W) in pixels of the image."""
    options, number = data.options, min(len(boxes), data.options["max_objects"])
    pixels, _ = objects.fit_image(image, options["long"], options["short"])
    wide = image.shape[1] > image.shape[0]
    canvas = options["train_canvases"][wide]
    boxes = objects.resize_boxes(boxes[:number], image.shape[1::-1], pixels.shape[1::-1])
    flipped = rng.random() < options["flip"]
    if flipped:
        pixels, boxes = pixels[:, ::-1], objects.flip_boxes(boxes, pixels.shape[1])
    example = {
        "image": objects.on_canvas(pixels, canvas),
        "size": np.array(pixels.shape[:2], np.int32),
        "boxes": np.zeros((options["max_objects"], 4), np.float32),
        "labels": np.zeros(options["max_objects"], np.int32),
        "valid": np.arange(options["max_objects"]) < number,
    }
    example["boxes"][:number], example["labels"][:number] = boxes, classes[:number]
    if options["masks"]:
        sizes = options["mask_shapes"][wide], image.shape[:2], pixels.shape[:2], canvas
        example |= _stored_masks(masks, options["max_objects"], *sizes, flipped)
    return example


def _stored_masks(
    masks: Iterable[np.ndarray],
    number: int,
    shape: tuple[int, int],
    old: tuple[int, int],
    new: tuple[int, int],
    canvas: tuple[int, int],
    flipped: bool,
) -> Example:
    """Masks in few bytes, and which of their pixels the image on the canvas shows.

    Args:
      masks: as the image was, bool (height, width) each; those beyond `number` are left out.
      number: of masks in the result.
      shape: (height, width) of the masks in the result.
      old, new: (height, width) of the image before and after it was resized.
      canvas: (height, width).
      flipped: whether it was flipped as well.
    """
    rows, columns = (objects.source_indices(*sides) for sides in zip(old, new, strict=True))
    shrunk = np.prod(new) < np.prod(old)
    bits = np.zeros((number, shape[0], -(-shape[1] // 8)), np.uint8)
    for place, mask in zip(bits, masks, strict=False):
        packed = np.packbits(mask[rows[:, None], columns] if shrunk else mask, axis=1)
        place[: packed.shape[0], : packed.shape[1]] = packed
    if shrunk:
        rows, columns = np.arange(new[0]), np.arange(new[1])
    shown = {"rows": rows, "columns": columns[::-1] if flipped else columns}
    for name, side in zip(("rows", "columns"), canvas, strict=True):
        shown[name] = np.pad(shown[name], (0, side - len(shown[name])), constant_values=-1).astype(np.int32)
    return {"masks": bits, **shown}
