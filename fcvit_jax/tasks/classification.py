"""Image classification: one label an image, softmax cross-entropy of mixed labels, top-1 and top-5."""

import dataclasses
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fcvit_jax.run.config import class_changes, class_order

BEST = "top1"
create_model, model_fields, init_variables = networks.create_model, networks.model_fields, networks.init_variables
make_optimizer = optim.make_optimizer


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
        with train/CLASS/*.jpg and val/CLASS/*.jpg (or validation/; also .png, .webp, .bmp, .tif, .gif and kin, of which
        the first frame counts); or "synthetic", one batch of noise, for measuring the training step alone: as many
        images and classes as ImageNet, one batch to evaluate.
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
    """Reads the weights that a run starts from; its classes are matched with theirs by name.

    Where the names are not the same, the classes are matched by place, and a message says so.

    Raises:
      UserError: as `convert.load_pretrained`.
    """
    variables = convert.load_pretrained(path, model)
    names = convert.read_metadata(path).get("class_names", ())
    changes = class_changes(names, data.class_names)
    order = class_order(names, data.class_names)
    if changes and order is not None:
        log.info("%s has the classes of the data in another order: its head is matched by name", path)
        return reorder_classes(variables, order)
    if changes and len(names) == data.num_classes:
        lines = ["The head's weights are loaded as well, although the class names differ:", *changes]
        log.info("\n".join(lines))
    return variables


def reorder_classes(variables: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The variables of the same network with its outputs in another order: output i is what output order[i] was."""
    heads = {name: head for name, head in variables["params"].items() if name in ("head", "head_dist")}
    heads = jax.tree.map(lambda x: x[..., list(order)], heads)
    return {**variables, "params": {**variables["params"], **heads}}


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


def complete_metadata(source: Path, model: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a checkpoint with "class_names", "image_size" and "crop_pct"; says which it lacked.

    Args:
      source: of the metadata, to be named.
      model: the network.
      metadata: as it was saved; "model" names the variant, whose crop is the default.
    """
    defaults = networks.settings(metadata["model"]["name"])
    usual = {key: defaults[key] for key in ("image_size", "crop_pct")}
    usual["class_names"] = [str(i) for i in range(model.num_classes)]
    if missing := sorted(usual.keys() - metadata.keys()):
        log.warning(
            "%s says nothing of %s; the defaults are numbered classes, images of %d pixels a side and crop_pct %s",
            *(source, ", ".join(missing), usual["image_size"], usual["crop_pct"]),
        )
    return usual | metadata


def describe(result: Mapping[str, float]) -> str:
    """Loss, top-1 and top-5 in a line; the latter two, which `result` has as fractions, in percent."""
    return f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}"


def read_image(encoded: bytes, metadata: Mapping[str, Any]) -> np.ndarray:
    """Decodes an image as evaluation does: (image_size, image_size, 3) uint8.

    Raises:
      UserError: it cannot be read.
    """
    return augment.eval_transform(encoded, metadata["image_size"], metadata["crop_pct"])


@functools.partial(jax.jit, static_argnames="model")
def probabilities(model: nn.Module, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """The probability of every class.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, 3) uint8.

    Returns:
      (N, num_classes) float32; rows sum to 1.
    """
    return jax.nn.softmax(model.apply(variables, normalize(images, model.mean, model.std)))


def predict(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, metadata: Mapping[str, Any], top: int = 5
) -> list[list[dict[str, Any]]]:
    """The most probable classes of each image.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, 3) uint8, from `read_image`.
      metadata: of the checkpoint; its "class_names" are used.
      top: how many classes.

    Returns:
      For each image, the most probable class first: "class" (its name), "index" and "probability".

    Raises:
      UserError: a probability is not finite.
    """
    names, found = metadata["class_names"], []
    rows = np.asarray(probabilities(model, variables, images))
    if not np.isfinite(rows).all():
        raise UserError("The network's probabilities are not finite: its weights have diverged.")
    for row in rows:
        best = np.argsort(-row, kind="stable")[:top].tolist()
        found.append([{"class": names[i], "index": i, "probability": float(row[i])} for i in best])
    return found


def add_arguments(parser: Any) -> None:
    """Adds the options of `predict_files` to a parser or a group of one, without defaults."""
    parser.add_argument("--top", type=int, metavar="N", help="how many classes to print (default: 5)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: 32)")


def predict_files(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Iterable[tuple[Path, np.ndarray]],
    metadata: Mapping[str, Any],
    *,
    top: int = 5,
    batch_size: int = 32,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What the `predict` tool says of images.

    Args:
      model, variables, metadata, top: as in `predict`.
      images: paths, and what `read_image` gave for them.
      batch_size: images that are computed at once.

    Yields:
      For each image its path, and "predictions": what `predict` returns for it.

    Raises:
      UserError: a number is less than 1, or the network has no head.
    """
    if top < 1 or batch_size < 1:
        raise UserError("--top and --batch-size must be at least 1.")
    if not model.num_classes:
        raise UserError("The network has no head: there are no classes to predict.")
    images, filled = iter(images), 0
    while batch := list(itertools.islice(images, batch_size)):
        paths, pixels = zip(*batch, strict=True)
        filled = filled or len(batch)  # up to one size, so that one program serves all batches
        padded = np.stack(pixels + pixels[:1] * (filled - len(batch)))
        for path, predictions in zip(paths, predict(model, variables, padded, metadata, top), strict=False):
            yield path, {"predictions": predictions}


def make_program(
    model: nn.Module, variables: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[Callable[[jax.Array], jax.Array], jax.ShapeDtypeStruct]:
    """The function that `export` writes, with the weights and the normalisation in it.

    Args:
      model: the network.
      variables: its variables.
      metadata: of the checkpoint; its "image_size" S is used.

    Returns:
      The function from images to logits, or to the pooled features of a network without a head; and the images'
      shape, (N, S, S, 3) uint8 with any N.
    """

    def logits(images: jax.Array) -> jax.Array:
        return model.apply(variables, normalize(images, model.mean, model.std))

    size = metadata["image_size"]
    return logits, jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), size, size, 3), jnp.uint8)
