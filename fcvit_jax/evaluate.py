"""Evaluation that counts every example exactly once."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fcvit_jax.augment import mixing
from fcvit_jax.devices.sharding import global_batch
from fcvit_jax.networks.fcvit import FCViT


@functools.partial(jax.jit, static_argnames="model")
def eval_step(model: FCViT, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums, not means, over the examples of a batch that its mask keeps.

    Args:
      model: the network.
      variables: its "params" and "batch_stats".
      batch: "image" (N, H, W, 3) uint8, "label" (N,) int32, "mask" (N,) bool: False where a row is padding.

    Returns:
      Scalars: "loss" (cross-entropy) float32; "top1", "top5" and "count" int32.
    """
    logits = model.clone(share_blocks=True).apply(variables, mixing.normalize(batch["image"]))
    label, mask = batch["label"], batch["mask"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])
    # How many classes rank before the label: larger logits (NaN is the largest) and, as in argmax, earlier equal ones.
    rank = (~(logits <= own) | ((logits == own) & (classes < label[:, None]))).sum(1)
    return {
        "loss": jnp.where(mask, loss, 0).sum(),
        "top1": (mask & (rank < 1)).sum(),
        "top5": (mask & (rank < 5)).sum(),
        "count": mask.sum(),
    }


def evaluate(
    model: FCViT, variables: Mapping[str, Any], batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> dict[str, float | int]:
    """Evaluates a model over all batches.

    Args:
      model: the network.
      variables: its "params" and "batch_stats", on the mesh.
      batches: this host's rows of each batch, as `data.eval_batches` yields them.
      mesh: the devices.

    Returns:
      "loss" (mean cross-entropy), "top1" and "top5" (fractions) and "count" (examples).
    """
    totals: Counter[str] = Counter()
    ahead: dict[str, jax.Array] = {}  # read one batch late, so that the device never waits for the host
    for batch in batches:
        with jax.set_mesh(mesh):  # for the depthwise convolutions
            sums = eval_step(model, variables, global_batch(batch, mesh))
        totals.update(_as_floats(ahead))
        ahead = sums
    totals.update(_as_floats(ahead))
    count = int(totals["count"])
    return {name: totals[name] / max(count, 1) for name in ("loss", "top1", "top5")} | {"count": count}


def _as_floats(sums: Mapping[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(sums).items()}
