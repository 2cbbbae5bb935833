"""Datasets of labelled images: TFDS, folders, scikit-learn's digits or noise, opened for the loader."""

from collections.abc import Sequence

import numpy as np

from fcvit_jax import augment
from fcvit_jax.data import sources
from fcvit_jax.data.loader import Data, Example, Numbers, Source, check_loading, check_one_batch
from fcvit_jax.devices import storage
from fcvit_jax.errors import Unreadable, UserError, log
from fcvit_jax.sizes import ImageSize, as_saved, check_size, height_width


def open_dataset(
    training: bool = True,  # positional, since the keywords are the keys of a config
    *,
    dataset: str,
    batch_size: int,
    data_dir: str = "~/tensorflow_datasets",
    image_size: ImageSize = 224,
    workers: int = 0,
    prefetch: int = 1,
    on_broken: str = "error",
    train_split: str = "train",
    eval_split: str = "validation",
    exif: bool = False,
    crop_pct: float = 0.9,
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    rand_augment: Sequence[float] = (2, 9.0, 0.5),
) -> Data:
    """Opens a dataset for training and evaluation; decodes no image yet.

    Example::

        data = open_dataset(dataset="digits", batch_size=128, image_size=32, rand_augment=())
        for batch in loader.train_batches(data, seed=0, start_step=0, num_steps=data.steps_per_epoch):
            batch["image"], batch["label"]                  # uint8 (128, 32, 32, 3), int32 (128,)

    Args:
      training: False: open the split for evaluation alone; the other need not be there.
      dataset: "digits"; a TFDS name such as "imagenet2012", with the features image and label; "folder:PATH", a folder
        with train/CLASS/*.jpg and val/CLASS/*.jpg (or validation/; also .png, .webp, .bmp, .tif, .gif and kin, of which
        the first frame counts); or "synthetic", one batch of noise, for measuring the training step alone: as many
        images and classes as ImageNet, one batch to evaluate.
      batch_size: images per step over all processes.
      data_dir: where TFDS keeps its data.
      image_size: of the images in pixels: one number for height and width, or (height, width).
      workers: decoding processes of this process; 0 decodes in a thread of it; -1 uses one fewer than the cores that
        this process may use, to leave one for training, but at least one.
      prefetch: batches in each of a worker's two buffers; it holds up to 2 * prefetch + 2 in shared memory. In an
        evaluation during training there are two such sets of workers.
      on_broken: what an image that cannot be read does to training, see `loader.Data`; in evaluation it is an error.
      train_split, eval_split: TFDS splits, slices such as "train[:1%]" included.
      exif: turn images as their EXIF orientation says, in training and in evaluation.
      crop_pct: share of the resized image that evaluation crops.
      crop_scale, crop_ratio, flip, rand_augment: see `augment.train_transform`.

    Raises:
      UserError: a value is out of its range; or the dataset is unknown, not prepared, or not made of images and labels;
        the message says what to do.
    """
    check_size("data", image_size=image_size)
    workers = check_loading(batch_size, workers, prefetch, on_broken)
    augment.eval_geometry(1, 1, 1, crop_pct)  # refuses a crop_pct out of range
    augmentation = dict(crop_scale=crop_scale, crop_ratio=crop_ratio, flip=flip, rand_augment=rand_augment)
    augment.check_augmentation(**augmentation)

    train, evaluation, class_names = _open_splits(
        dataset, batch_size, data_dir, train_split if training else None, eval_split
    )
    if training:
        check_one_batch(dataset, train, batch_size)
    sizes = {"image_size": as_saved(image_size), "crop_pct": crop_pct, "exif": exif}
    return Data(
        load_example=load_noise if dataset == "synthetic" else load_example,
        train=train,
        eval=evaluation,
        class_names=class_names,
        batch_size=batch_size,
        workers=workers,
        prefetch=prefetch,
        on_broken=on_broken,
        options=sizes | {"augmentation": augmentation},
        about=sizes | {"class_names": list(class_names)},
        constant=dataset == "synthetic",
    )


def _open_splits(
    dataset: str, batch_size: int, data_dir: str, train_split: str | None, eval_split: str
) -> tuple[Source | None, Source, tuple[str, ...]]:
    """The sources of the two splits, and the names of the classes; without training images if train_split is None."""
    if dataset == "synthetic":
        train = None if train_split is None else Numbers(1_281_167)
        return train, Numbers(batch_size), tuple(f"class {i}" for i in range(1000))
    if dataset.startswith("folder:"):
        for key, split in {"train_split": train_split, "eval_split": eval_split}.items():
            if split is not None and "[" in split:
                log.warning("data.%s=%s takes no part of a folder: all of its images are used.", key, split)
        return sources.open_folder(str(storage.local_path(dataset.removeprefix("folder:"))), train_split is not None)
    return sources.open_tfds(dataset, str(storage.as_path(data_dir)), train_split, eval_split)


def load_noise(data: Data, record: int, rng: np.random.Generator | None) -> Example:
    """A synthetic example: an image of noise with a random label, both of the record's number alone."""
    del rng
    rng, size = np.random.default_rng(record), height_width(data.options["image_size"])
    return {
        "image": rng.integers(0, 256, (*size, 3), np.uint8),
        "label": np.int32(rng.integers(data.num_classes)),
    }


def load_example(data: Data, record: tuple[bytes, int], rng: np.random.Generator | None) -> Example:
    """Decodes and transforms an image.

    Args:
      data: from `open_dataset`.
      record: the encoded image and its label.
      rng: the source of randomness in training; None: the transform of evaluation.

    Returns:
      "image", (height, width, 3) uint8, and "label", () int32.

    Raises:
      Unreadable: the image is broken.
      UserError: there is no such label.
    """
    encoded, label = record
    if not 0 <= label < data.num_classes:
        raise UserError(f"its label {label} is none of the {data.num_classes} classes")
    options = data.options
    try:
        if rng is None:
            image = augment.eval_transform(encoded, options["image_size"], options["crop_pct"], options["exif"])
        else:
            how = options["augmentation"] | {"exif": options["exif"]}
            image = augment.train_transform(encoded, rng, options["image_size"], **how)
    except UserError as error:
        raise Unreadable(f"not a readable image: {error}") from error
    return {"image": image, "label": np.int32(label)}
