"""Image classification: one label an image, softmax cross-entropy of mixed labels, top-1 and top-5."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from fcvit_jax import augment, convert, networks, optim
from fcvit_jax.augment import mixing
from fcvit_jax.data import sources
from fcvit_jax.data.loader import Data, Example, check_loading
from fcvit_jax.errors import UserError, check_range, log
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.run.config import class_changes
from fcvit_jax.tasks import classification_prediction as prediction

BEST = "top1"
create_model, model_fields, init_variables = networks.create_model, networks.model_fields, networks.init_variables
make_optimizer = optim.make_optimizer
# What the tools ask.
complete_metadata, read_image = prediction.complete_metadata, prediction.read_image
add_arguments, predict, predict_files = prediction.add_arguments, prediction.predict, prediction.predict_files
make_program, probabilities = prediction.make_program, prediction.probabilities


def open_dataset(
    training: bool = True,  # positional, since the keywords are the keys of a config
    *,
    dataset: str,
    batch_size: int,
    data_dir: str = "~/tensorflow_datasets",
    image_size: int = 224,
    workers: int = 0,
    prefetch: int = 1,
    train_split: str = "train",
    eval_split: str = "validation",
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
        with train/CLASS/*.jpg and val/CLASS/*.jpg (or validation/; also .jpeg, .png, .webp); or "synthetic", one batch
        of noise, for measuring the training step alone: as many images and classes as ImageNet, one batch to evaluate.
      batch_size: images per step over all processes.
      data_dir: where TFDS keeps its data.
      image_size: height and width of the images in pixels.
      workers: decoding processes of this process; 0 decodes in a thread of it; -1 uses one fewer than the cores that
        this process may use, to leave one for training, but at least one.
      prefetch: batches in each of a worker's two buffers; it holds up to 2 * prefetch + 2 in shared memory. In an
        evaluation during training there are two such sets of workers.
      train_split, eval_split: TFDS splits, slices such as "train[:1%]" included.
      crop_pct: share of the resized image that evaluation crops.
      crop_scale, crop_ratio, flip, rand_augment: see `augment.train_transform`.

    Raises:
      UserError: a value is out of its range; or the dataset is unknown, not prepared, or not made of images and labels;
        the message says what to do.
    """
    check_range("data", 1, image_size=image_size)
    workers = check_loading(batch_size, workers, prefetch)
    augment.eval_geometry(image_size, image_size, image_size, crop_pct)  # refuses a crop_pct out of range
    augmentation = dict(crop_scale=crop_scale, crop_ratio=crop_ratio, flip=flip, rand_augment=rand_augment)
    augment.check_augmentation(**augmentation)

    if dataset == "synthetic":
        train, evaluation = Noise(1_281_167 if training else 0), Noise(batch_size)
        class_names = tuple(f"class {i}" for i in range(1000))
    elif dataset.startswith("folder:"):
        for key, split in {"train_split": train_split, "eval_split": eval_split}.items():
            if "[" in split:
                log.warning("data.%s=%s takes no part of a folder: all of its images are used.", key, split)
        folder = os.path.expanduser(dataset.removeprefix("folder:"))
        train, evaluation, class_names = sources.open_folder(folder, training)
    else:
        train, evaluation, class_names = sources.open_tfds(
            dataset, os.path.expanduser(data_dir), train_split if training else None, eval_split
        )
    if training and len(train) < batch_size:
        raise UserError(
            f"{dataset} has {len(train)} training images, less than one batch: data.batch_size is {batch_size}"
        )
    return Data(
        load_example=load_noise if dataset == "synthetic" else load_example,
        train=train if training else None,
        eval=evaluation,
        class_names=class_names,
        batch_size=batch_size,
        workers=workers,
        prefetch=prefetch,
        options={"image_size": image_size, "crop_pct": crop_pct, "augmentation": augmentation},
        about={"class_names": list(class_names), "image_size": image_size, "crop_pct": crop_pct},
        constant=dataset == "synthetic",
    )


@dataclasses.dataclass(frozen=True)
class Noise:
    """A source of `count` examples without images, whose records are their numbers."""

    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Sequence[int]:
        return indices

    def describe(self, index: int) -> str:
        return f"synthetic image {index}"


def load_noise(data: Data, record: int, rng: np.random.Generator | None) -> Example:
    """A synthetic example: an image of noise with a random label, both of the record's number alone."""
    del rng
    rng, size = np.random.default_rng(record), data.options["image_size"]
    return {
        "image": rng.integers(0, 256, (size, size, 3), np.uint8),
        "label": np.int32(rng.integers(data.num_classes)),
    }


def load_example(data: Data, record: tuple[bytes, int], rng: np.random.Generator | None) -> Example:
    """Decodes and transforms an image.

    Args:
      data: from `open_dataset`.
      record: the encoded image and its label.
      rng: the source of randomness in training; None: the transform of evaluation.

    Returns:
      "image", (image_size, image_size, 3) uint8, and "label", () int32.

    Raises:
      UserError: the image cannot be read, or there is no such label.
    """
    encoded, label = record
    if not 0 <= label < data.num_classes:
        raise UserError(f"its label {label} is none of the {data.num_classes} classes")
    options = data.options
    try:
        if rng is None:
            image = augment.eval_transform(encoded, options["image_size"], options["crop_pct"])
        else:
            image = augment.train_transform(encoded, rng, options["image_size"], **options["augmentation"])
    except UserError as error:
        raise UserError(f"not a readable image: {error}") from error
    return {"image": image, "label": np.int32(label)}


def load_pretrained(path: str | Path, model: nn.Module, data: Data) -> dict[str, Any]:
    """Reads the weights that a run starts from, and says where its classes are not theirs.

    Raises:
      UserError: as `convert.load_pretrained`.
    """
    variables = convert.load_pretrained(path, model)
    names = convert.read_metadata(path).get("class_names", ())
    changes = class_changes(names, data.class_names)
    if changes and len(names) == data.num_classes:
        lines = ["The head's weights are loaded as well, although the class names differ:", *changes]
        log.info("\n".join(lines))
    return variables


def make_prepare(
    model: nn.Module,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    mix_prob: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.1,
    erase_prob: float = 0.25,
    group_size: int = 128,
) -> Callable[[jax.Array, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """Makes the function that prepares a training batch on the device: mixing, normalisation and erasing.

    Args:
      model: the network.
      mixup_alpha, cutmix_alpha, mix_prob, switch_prob, smoothing, erase_prob, group_size: as in `mixing.make`.

    Returns:
      prepare(key, batch): from "image" uint8 (N, H, W, 3) and "label" (N,) to "image" float32, normalised, and "target"
      float32 (N, num_classes).

    Raises:
      UserError: an argument is out of its range.
    """
    mix = mixing.make(
        model.num_classes,
        model.mean,
        model.std,
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        mix_prob=mix_prob,
        switch_prob=switch_prob,
        smoothing=smoothing,
        erase_prob=erase_prob,
        group_size=group_size,
    )

    def prepare(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        images, targets = mix(key, batch["image"], batch["label"])
        return {"image": images, "target": targets}

    return prepare


def num_epochs(config: ConfigDict) -> int:
    """The epochs of a whole run: those of the cosine and the cool-down."""
    return config.train.epochs + config.optim.cooldown_epochs


def loss(
    model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The mean cross-entropy of a prepared batch, in training mode.

    Args:
      model: the network.
      variables: its variables.
      batch: from `make_prepare`'s function.
      key: for dropout and drop-path.

    Returns:
      The loss, () float32; the collections that the network updates; and no further scalars.
    """
    network = networks.traced_once(model)
    logits, updates = network.apply(
        variables, batch["image"], train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return optax.softmax_cross_entropy(logits, batch["target"]).mean(), (updates, {})


def eval_step(model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums, not means, over the examples of a batch that its mask keeps.

    Args:
      model: the network.
      variables: its variables.
      batch: "image" (N, H, W, 3) uint8, "label" (N,) int32, "mask" (N,) bool: False where a row is padding.

    Returns:
      Scalars: "loss" (cross-entropy) float32; "top1", "top5" and "count" int32.
    """
    logits = networks.traced_once(model).apply(variables, normalize(batch["image"], model.mean, model.std))
    label, mask = batch["label"], batch["mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])
    # How many classes rank before the label: larger logits (NaN is the largest) and, as in argmax, earlier equal ones.
    rank = (~(logits <= own) | ((logits == own) & (classes < label[:, None]))).sum(1)
    return {
        "loss": jnp.where(mask, losses, 0).sum(),
        "top1": (mask & (rank < 1)).sum(),
        "top5": (mask & (rank < 5)).sum(),
        "count": mask.sum(),
    }


def finish(outputs: Iterable[Mapping[str, np.ndarray]], data: Data) -> dict[str, float]:
    """The means over all batches.

    Args:
      outputs: of `eval_step`, batch by batch.
      data: what was evaluated.

    Returns:
      "loss" (mean cross-entropy), "top1" and "top5" (fractions) and "count" (examples).
    """
    del data
    totals: Counter[str] = Counter()
    for sums in outputs:
        totals.update({name: float(value) for name, value in sums.items()})
    count = int(totals["count"])
    return {name: totals[name] / max(count, 1) for name in ("loss", "top1", "top5")} | {"count": count}


def describe(result: Mapping[str, float]) -> str:
    """Loss, top-1 and top-5 in a line; the latter two, which `result` has as fractions, in percent."""
    return f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}"
