"""Image classification: one label an image, softmax cross-entropy of mixed labels, top-1 and top-5."""

import functools
import itertools
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
from fcvit_jax.data import classification as datasets
from fcvit_jax.data.loader import Data
from fcvit_jax.errors import UserError
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.run.config import match_classes
from fcvit_jax.tasks import classification_prediction as prediction

BEST = "top1"
create_model, model_fields, init_variables = networks.create_model, networks.model_fields, networks.init_variables
make_optimizer = optim.make_optimizer
open_dataset, load_example = datasets.open_dataset, datasets.load_example
# What the tools ask.
complete_metadata, read_image = prediction.complete_metadata, prediction.read_image
add_arguments, predict, predict_files = prediction.add_arguments, prediction.predict, prediction.predict_files
make_program, probabilities = prediction.make_program, prediction.probabilities


def load_pretrained(path: str | Path, model: nn.Module, data: Data) -> dict[str, Any]:
    """Reads the weights that a run starts from; its classes are matched with theirs by name.

    Where the names are not the same, the classes are matched by place, and a message says so.

    Raises:
      UserError: as `convert.load_pretrained`.
    """
    variables = convert.load_pretrained(path, model)
    names = convert.read_metadata(path).get("class_names", ())
    return match_classes(path, variables, names, data.class_names, reorder_classes)


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
