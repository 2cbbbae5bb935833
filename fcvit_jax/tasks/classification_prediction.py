"""What the tools ask of classification: the most probable classes of images, and a program for elsewhere."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fcvit_jax import augment, networks
from fcvit_jax.devices import cpu
from fcvit_jax.errors import UserError, log
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.sizes import check_size, describe_size, height_width


def complete_metadata(source: Path, model: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a checkpoint with "class_names", "image_size" and "crop_pct"; says which it lacked; and "exif".

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
            "%s says nothing of %s; the defaults are numbered classes, images of %s pixels and crop_pct %s",
            *(source, ", ".join(missing), describe_size(usual["image_size"]), usual["crop_pct"]),
        )
    complete = {"exif": False} | usual | metadata  # older runs, which did not turn images, do not say so
    _check_image_settings(source, complete)
    if len(complete["class_names"]) != model.num_classes:
        names = len(complete["class_names"])
        raise UserError(f"{source} has {model.num_classes} classes, but {names} class_names.")
    return complete


def _check_image_settings(source: Path, metadata: Mapping[str, Any]) -> None:
    """Checks "image_size" and "crop_pct" of a checkpoint's metadata.

    Raises:
      UserError: naming the source, and the one that is no such number.
    """
    share = metadata["crop_pct"]
    check_size(f"{source}: metadata", image_size=metadata["image_size"])
    if not isinstance(share, int | float) or not 0.1 <= share <= 1:
        raise UserError(f"{source} has crop_pct {share!r}, which is no number from 0.1 to 1.")


def read_image(encoded: bytes, metadata: Mapping[str, Any]) -> np.ndarray:
    """Decodes an image as evaluation does: (height, width, 3) uint8, of the size "image_size".

    Raises:
      UserError: it cannot be read.
    """
    return augment.eval_transform(encoded, metadata["image_size"], metadata["crop_pct"], metadata.get("exif", False))


@functools.partial(cpu.jit, static_argnames="model")
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
      metadata: of the checkpoint; its "image_size" is used.

    Returns:
      The function from images to logits, or to the pooled features of a network without a head; and the images'
      shape, (N, height, width, 3) uint8 with any N.
    """

    def logits(images: jax.Array) -> jax.Array:
        return model.apply(variables, normalize(images, model.mean, model.std))

    size = height_width(metadata["image_size"])
    return logits, jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *size, 3), jnp.uint8)
