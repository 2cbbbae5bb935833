"""Image classification: one label an image, softmax cross-entropy of mixed labels, top-1 and top-5."""

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

from fcvit_jax import convert, networks, optim
from fcvit_jax.augment import mixing
from fcvit_jax.data import classification as datasets
from fcvit_jax.data.loader import Data
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
