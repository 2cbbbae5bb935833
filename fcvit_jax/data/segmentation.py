"""The datasets of segmentation, folders as ADE20K's, scenes of digits and noise, and how examples are made of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.augment import paired
from fcvit_jax.augment.paired import IGNORED
from fcvit_jax.data import ade20k, image_files, palettes, scenes
from fcvit_jax.data.loader import Data, Example, Numbers, Source, check_loading, check_one_batch
from fcvit_jax.devices.storage import local_path
from fcvit_jax.errors import MAX_IMAGE_SIZE, Unreadable, UserError, check_range, log


def open_dataset(
    training: bool = True,  # positional, since the keywords are the keys of a config
    *,
    dataset: str,
    batch_size: int,
    data_dir: str = ".",
    workers: int = 0,
    prefetch: int = 1,
    on_broken: str = "error",
    train_split: str = "training",
    eval_split: str = "validation",
    zero_is_class: bool = False,
    exif: bool = False,
    crop_size: int = 512,
    long: int = 2048,
    short: int = 512,
    scale: Sequence[float] = (0.5, 2.0),
    max_share: float = 0.75,
    flip: float = 0.5,
    distortion: bool = True,
) -> Data:
    """Opens a dataset for training and evaluation; decodes no image yet, and of the masks a few.

    Example::

        data = open_dataset(dataset="ade:ADEChallengeData2016", batch_size=32)
        for batch in loader.train_batches(data, seed=0, start_step=0, num_steps=data.steps_per_epoch):
            batch["image"], batch["label"]          # uint8 (32, 512, 512, 3), uint8 (32, 512, 512); 255: ignored

    Args:
      training: False: open the split for evaluation alone; the other need not be there.
      dataset: "ade:PATH", a folder as `data.ade20k` describes it; "digit_scenes": scenes of scikit-learn's digits, with
        the classes background and 0 to 9; or "synthetic", one batch of noise, for measuring the training step alone: as
        many images and classes as ADE20K, one batch to evaluate.
      batch_size: images per step over all processes.
      data_dir: the folder from which a relative PATH starts.
      workers, prefetch, on_broken: as in `classification.open_dataset`.
      train_split, eval_split, zero_is_class, exif: of a folder; see `ade20k.open_folder`.
      crop_size, scale, max_share, flip, distortion: of training; see `paired.train_transform`.
      long, short: of training and evaluation; see `paired.train_transform` and `paired.eval_transform`.

    Raises:
      UserError: a value is out of its range, or the dataset is unknown or not as it must be; the message says what to
        do.
    """
    workers = check_loading(batch_size, workers, prefetch, on_broken)
    _check_transforms(crop_size, long, short, scale, max_share, flip)
    if dataset.startswith("ade:"):
        path = str(local_path(data_dir) / local_path(dataset.removeprefix("ade:")))
        splits = dict(train_split=train_split, eval_split=eval_split)
        options = dict(zero_is_class=zero_is_class, exif=exif, skip_broken=on_broken == "skip")
        opened = _open_folder(path, training, **splits, **options)
    elif dataset == "digit_scenes":
        opened = _open_scenes()
    elif dataset == "synthetic":
        opened = _open_noise(batch_size, crop_size)
    else:
        raise UserError(_unknown(dataset))
    if training:
        _check_training(opened, dataset, batch_size, crop_size, int(long * scale[1]), int(short * scale[1]))
    shapes, buckets, pixels = _shapes(opened.eval_sizes, long, short)
    if len(shapes) > 1:
        log.info("evaluation: %d images of %d shapes, each with a program of its own", len(buckets), len(shapes))
    augmentation = dict(crop_size=crop_size, scale=tuple(scale), max_share=max_share, flip=flip, distortion=distortion)
    sizes = {"long": long, "short": short, "exif": exif}
    return Data(
        load_example=opened.load_example,
        train=opened.train if training else None,
        eval=opened.eval,
        class_names=opened.class_names,
        batch_size=batch_size,
        workers=workers,
        prefetch=prefetch,
        on_broken=on_broken,
        options=sizes | {"augmentation": augmentation, "pixels": dict(zip(shapes, pixels, strict=True))},
        about=sizes | {"class_names": list(opened.class_names), "palette": opened.palette},
        eval_buckets=buckets if len(shapes) > 1 else None,
        constant=dataset == "synthetic",
    )


def _check_transforms(
    crop_size: int, long: int, short: int, scale: Sequence[float], max_share: float, flip: float
) -> None:
    check_range("data", 32, below=MAX_IMAGE_SIZE + 1, crop_size=crop_size, short=short)
    check_range("data", short, below=4 * MAX_IMAGE_SIZE, long=long)
    check_range("data", 0, flip=flip, max_share=max_share)
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise UserError(f"data.scale={scale} must be the smallest and the largest scale, such as (0.5, 2.0).")


class _Opened(NamedTuple):
    """A dataset as it is, before any choice of how it is trained on.

    Attributes:
      train, eval: its splits.
      class_names: in the order of the labels.
      palette: a colour for each class, [red, green, blue].
      load_example: of `Data`.
      train_sizes, eval_sizes: (n, 2), width and height of the images, or (1, 2), if all have one size.
    """

    train: Source | None
    eval: Source
    class_names: tuple[str, ...]
    palette: list[list[int]]
    load_example: Callable
    train_sizes: np.ndarray | None
    eval_sizes: np.ndarray


def _open_folder(path: str, training: bool, **options: Any) -> _Opened:
    opened = ade20k.open_folder(path, training, **options)
    for note in opened.notes:
        log.info("%s", note)
    sizes = opened.train.sizes if training else None, opened.eval.sizes
    return _Opened(opened.train, opened.eval, opened.class_names, opened.palette.tolist(), load_example, *sizes)


def _open_scenes() -> _Opened:
    names = ("background", *scenes.CLASS_NAMES)
    palette = [[0, 0, 0], *palettes.distinct(len(scenes.CLASS_NAMES)).tolist()]
    sizes = np.full((1, 2), scenes.SIZE)
    return _Opened(scenes.Scenes("train"), scenes.Scenes("validation"), names, palette, load_scene, sizes, sizes)


def _open_noise(batch_size: int, size: int) -> _Opened:
    names = tuple(f"class {i}" for i in range(150))
    sizes = np.full((1, 2), size)
    return _Opened(Numbers(20_210), Numbers(batch_size), names, palettes.ade20k().tolist(), load_noise, sizes, sizes)


def _unknown(dataset: str) -> str:
    if dataset.startswith("scene_parse150"):
        return (
            "TFDS's scene_parse150 has other labels than ADE20K's 150 classes: 100 kinds of objects with the numbers of"
            " their instances, without walls, sky and floor. Unpack ADEChallengeData2016.zip instead, and set"
            " data.dataset=ade:PATH."
        )
    return f"data.dataset={dataset!r} is unknown: choose ade:PATH, digit_scenes or synthetic."


def _check_training(opened: _Opened, dataset: str, batch_size: int, crop_size: int, long: int, short: int) -> None:
    """Refuses what cannot be trained on; long and short are those of the largest scale."""
    check_one_batch(dataset, opened.train, batch_size)
    sizes = np.unique(opened.train_sizes, axis=0).tolist()
    largest = max((paired.rescaled_size(*size, long, short) for size in sizes), key=max)
    if max(largest) < crop_size:
        raise UserError(
            f"data.crop_size={crop_size} is larger than every image: at the largest scale, the largest has"
            f" {largest[0]} x {largest[1]} pixels. Lower it, or raise data.short and data.long."
        )


def _shapes(sizes: np.ndarray, long: int, short: int) -> tuple[list[tuple[int, int]], np.ndarray, list[int]]:
    """The shapes (height, width) that evaluation gives to images of these sizes, which of them each image has, and for
    each shape the most pixels that an image of it has before it is resized."""
    unique, which = np.unique(sizes, axis=0, return_inverse=True)
    aligned = [paired.aligned_size(*size, long, short)[::-1] for size in unique.tolist()]
    shapes = sorted(set(aligned))
    buckets = np.array([shapes.index(shape) for shape in aligned])[which.reshape(-1)]
    pixels = sizes.prod(axis=1)
    return shapes, buckets, [int(pixels[buckets == i].max()) for i in range(len(shapes))]


def load_example(data: Data, record: tuple[bytes, np.ndarray], rng: np.random.Generator | None) -> Example:
    """Decodes and transforms an image with its labels.

    Args:
      data: from `open_dataset`.
      record: the encoded image and its labels, (H, W) uint8; 255: ignored.
      rng: the source of randomness in training; None: the transforms of evaluation.

    Returns:
      In training "image" uint8 (S, S, 3) with S = crop_size, "label" uint8 (S, S), and "size" int32 (2,), height and
      width of what is image and not padding. In evaluation "image" uint8 (h, w, 3), whose sides are multiples of 32;
      "label" uint8 (P,), the labels of the image as it was, row by row, and then 255 up to as many as the largest image
      of this shape has; "size", height and width of the image as it was.

    Raises:
      Unreadable: the image is broken.
      UserError: it has another size than its labels.
    """
    encoded, labels = record
    try:
        image = image_files.decode(encoded, data.options["exif"])
    except UserError as error:
        raise Unreadable(f"not a readable image: {error}") from error
    return _transform(data, image, labels, rng)


def read_pair(data: Data, index: int) -> tuple[np.ndarray, np.ndarray]:
    """An example of evaluation as it is: the image (H, W, 3) and its labels (H, W), uint8.

    Raises:
      UserError: it cannot be read.
    """
    (record,) = data.eval.read([index])
    if isinstance(data.eval, scenes.Scenes):
        scene = scenes.make_scene(*record)
        return scene.image, scene.labels
    encoded, labels = record
    return image_files.decode(encoded, data.options["exif"]), labels


def load_scene(data: Data, record: tuple[str, int], rng: np.random.Generator | None) -> Example:
    """A scene of digits, as `load_example`: in training a new one, of `rng` alone."""
    scene = scenes.make_scene(*record, rng)
    return _transform(data, scene.image, scene.labels, rng)


def load_noise(data: Data, record: int, rng: np.random.Generator | None) -> Example:
    """A synthetic example, as `load_example`: noise with random labels, both of the record's number alone."""
    noise, size = np.random.default_rng(record), data.options["augmentation"]["crop_size"]
    image = noise.integers(0, 256, (size, size, 3), np.uint8)
    return _transform(data, image, noise.integers(0, data.num_classes, (size, size), np.uint8), rng)


def _transform(data: Data, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator | None) -> Example:
    long, short = data.options["long"], data.options["short"]
    if rng is not None:
        names = "image", "label", "size"
        arrays = paired.train_transform(image, labels, rng, long=long, short=short, **data.options["augmentation"])
        return dict(zip(names, arrays, strict=True))
    pixels = paired.eval_transform(image, long, short)
    padded = np.full(data.options["pixels"][pixels.shape[:2]], IGNORED, np.uint8)
    padded[: labels.size] = labels.ravel()
    return {"image": pixels, "label": padded, "size": np.array(labels.shape, np.int32)}
