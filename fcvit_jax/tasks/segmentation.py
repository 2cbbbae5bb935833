"""Semantic segmentation: the class of every pixel, scored by the mean intersection over union (mIoU)."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from fcvit_jax import convert, freezing, networks, optim
from fcvit_jax.augment.paired import IGNORED
from fcvit_jax.data import segmentation as datasets
from fcvit_jax.data.confusion import count_confusions, metrics
from fcvit_jax.data.loader import Data
from fcvit_jax.depthwise.spread import summed_over_devices
from fcvit_jax.networks import semantic_fpn
from fcvit_jax.networks.normalize import normalize, normalize_inside
from fcvit_jax.run.config import match_classes
from fcvit_jax.tasks import segmentation_prediction as prediction
from fcvit_jax.tasks.segmentation_prediction import resize_logits

BEST = "miou"
PIXELS = 65_536  # of an image that are classified at once
create_model, model_fields = semantic_fpn.create_segmenter, semantic_fpn.model_fields
init_variables = semantic_fpn.init_variables
open_dataset, load_example, read_pair = datasets.open_dataset, datasets.load_example, datasets.read_pair
complete_metadata, read_image, eval_image = prediction.complete_metadata, prediction.read_image, prediction.eval_image
add_arguments, predict, predict_files = prediction.add_arguments, prediction.predict, prediction.predict_files
make_program = prediction.make_program


def load_pretrained(path: str | Path, model: nn.Module, data: Data) -> dict[str, Any]:
    """Reads the weights that a run starts from, a segmenter's or a classifier's; says what starts afresh.

    Raises:
      UserError: as `convert.load_pretrained`.
    """
    variables, metadata = convert.load_pretrained(path, model), convert.read_metadata(path)
    names = metadata.get("class_names", ()) if metadata.get("task") == "segmentation" else ()
    return match_classes(path, variables, names, data.class_names, reorder_classes)


def reorder_classes(variables: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The variables of the same network with its outputs in another order: output i is what output order[i] was."""
    params = variables["params"]
    classifier = jax.tree.map(lambda x: x[..., list(order)], params["head"]["classifier"])
    return {**variables, "params": {**params, "head": {**params["head"], "classifier": classifier}}}


def make_prepare(model: nn.Module) -> Callable[[jax.Array, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """Makes the function that prepares a training batch on the device: it normalises, and makes the padding 0.

    Args:
      model: the network.

    Returns:
      prepare(key, batch): from "image" uint8 (N, S, S, 3), "label" uint8 (N, S, S) and "size" int32 (N, 2) to "image"
      float32 and "label".
    """

    def prepare(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        del key
        images = normalize_inside(batch["image"], batch["size"], model.mean, model.std)
        return {"image": images, "label": batch["label"]}

    return prepare


def make_optimizer(
    steps_per_epoch: int,
    epochs: int,
    batch_size: int,
    steps: int,
    *,
    lr: float = 2e-4,
    power: float = 0.9,
    weight_decay: float = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    freeze: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes AdamW, which decays every parameter, with a rate that falls to 0 over the run.

    Example::

        tx, schedule = make_optimizer(631, 64, 32, 40_000)                  # as by default: ADE20K's
        state = tx.init(params)

    Args:
      steps_per_epoch, epochs, batch_size: what the engine says of the run; nothing here depends on them.
      steps: updates of the whole run.
      lr, power: of `optim.make_poly_schedule`.
      weight_decay, b1, b2, eps: of `optim.adamw_for_all`.
      freeze: paths of parameters that are not trained, see `freezing.frozen`.

    Returns:
      The gradient transformation, and the schedule (step -> rate, float32).

    Raises:
      UserError: a value is out of its range; and as `freezing.freeze`.
    """
    del steps_per_epoch, epochs, batch_size
    schedule = optim.make_poly_schedule(lr, steps, power)
    return freezing.freeze(optim.adamw_for_all(schedule, weight_decay, b1, b2, eps), freeze), schedule


def num_epochs(config: ConfigDict) -> int:
    """The epochs of a whole run."""
    return config.train.epochs


def loss(
    model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The cross-entropy of a prepared batch, in training mode: a mean over all pixels, in which ignored ones are 0.

    Args:
      model: the network.
      variables: its variables.
      batch: from `make_prepare`'s function.
      key: for dropout and drop-path.

    Returns:
      The loss, () float32; the collections that the network updates; and "accuracy", the share of right pixels among
      all, the ignored ones included.
    """
    network = networks.traced_once(model)
    logits, updates = network.apply(
        variables, batch["image"], train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    value, accuracy = pixel_loss(logits, batch["label"])
    return value, (updates, {"accuracy": accuracy})


def pixel_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy of logits, which are resized to the size of the labels first; see `loss`.

    Args:
      logits: (N, h, w, classes) float.
      labels: (N, H, W) integers, classes from 0; 255: ignored.

    Returns:
      Two scalars, float32. They are means over all pixels, so that those of the parts of a batch average to those of
      the batch.
    """
    logits = resize_logits(logits, labels.shape[1:])
    losses, right = _compare(logits, labels)
    return losses.mean(), jnp.mean(right, dtype=jnp.float32)


def _compare(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of every position, and whether the label's logit is the highest; 0 and False if ignored."""
    counts = labels != IGNORED
    labels = jnp.where(counts, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    of_label = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.where(counts, losses, 0), counts & (of_label == logits.max(-1))  # faster than argmax on CPUs


def eval_step(model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums over the pixels of the images of a batch, at the size that each had, of those that the mask keeps.

    Args:
      model: the network.
      variables: its variables.
      batch: "image" (N, h, w, 3) uint8, "label" (N, P) uint8, row by row, "size" (N, 2) int32, the height and width of
        the labels, and "mask" (N,) bool: False where a row is padding.

    Returns:
      "confusion" (classes, classes) int32, see `count_confusions`; and scalars: "loss" (cross-entropy) float32,
      "pixels" and "count" (images) int32.
    """
    images = normalize(batch["image"], model.mean, model.std)
    logits = networks.traced_once(model).apply(variables, images)
    function = functools.partial(_sum_images, images.shape[1:3])
    return summed_over_devices(function, logits, batch["label"], batch["size"], batch["mask"])


def _sum_images(shape: tuple[int, int], *rows: jax.Array) -> dict[str, jax.Array]:
    """`eval_step`'s sums of logits at stride 4, labels, sizes and the mask, one image after the other."""
    classes = rows[0].shape[-1]
    start = {"confusion": jnp.zeros((classes, classes), jnp.int32), "loss": jnp.float32(0)}
    start |= {"pixels": jnp.int32(0), "count": jnp.int32(0)}
    return lax.scan(lambda sums, row: (_add_image(sums, shape, *row), None), start, rows)[0]


def _add_image(
    sums: dict[str, jax.Array],
    shape: tuple[int, int],
    logits: jax.Array,
    labels: jax.Array,
    size: jax.Array,
    counts: jax.Array,
) -> dict[str, jax.Array]:
    """The sums with those of an image: resizes its logits to its shape, and from there to its size as it was.

    The size is known only as the program runs, so one program serves all sizes. The second resize is done for some
    pixels at a time, since images may be large and classes many.
    """
    logits = resize_logits(logits[None], shape)[0]
    at_once = min(PIXELS, len(labels))
    labels = jnp.pad(labels, (0, -len(labels) % at_once), constant_values=IGNORED)
    pixels = jnp.where(counts, size.prod(), 0)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own = lax.dynamic_slice(labels, (i * at_once,), (at_once,))
        row, column = jnp.divmod(i * at_once + jnp.arange(at_once), size[1])
        found = _interpolate(logits, row, column, size)
        confusion = count_confusions(found.argmax(-1)[None, None], own[None, None], logits.shape[-1])
        return sums[0] + confusion, sums[1] + _compare(found, own)[0].sum()

    steps = -(-pixels // at_once)
    confusion, total = lax.fori_loop(0, steps, add, (sums["confusion"], sums["loss"]))
    return {
        "confusion": confusion,
        "loss": total,
        "pixels": sums["pixels"] + pixels,
        "count": sums["count"] + counts.astype(jnp.int32),
    }


def _interpolate(logits: jax.Array, row: jax.Array, column: jax.Array, size: jax.Array) -> jax.Array:
    """Some positions of what `resize_logits` makes of logits (h, w, classes) for a size: rows (P,), columns (P,)."""

    def taps(place: jax.Array, length: jax.Array, own: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        # (place + 1/2) * own / length - 1/2, in integers, whose quotient and remainder are exact.
        below, rest = jnp.divmod(jnp.maximum((2 * place + 1) * own - length, 0), 2 * length)
        return jnp.minimum(below, own - 1), jnp.minimum(below + 1, own - 1), (rest / (2 * length))[:, None]

    top, bottom, y = taps(row, size[0], logits.shape[0])
    left, right, x = taps(column, size[1], logits.shape[1])
    upper = logits[top, left] * (1 - x) + logits[top, right] * x
    lower = logits[bottom, left] * (1 - x) + logits[bottom, right] * x
    return upper * (1 - y) + lower * y


def finish(outputs: Iterable[Mapping[str, np.ndarray]], data: Data) -> dict[str, Any]:
    """The metrics of the whole set.

    Args:
      outputs: of `eval_step`, batch by batch.
      data: what was evaluated.

    Returns:
      "miou", "macc" and "aacc" as `metrics` gives them; "loss", as in training over all pixels, ignored ones as zeros;
      "count" (images); and "classes", a row for each: "class" (its name), "iou", "accuracy" of its labelled pixels and
      "pixels", their number; None where there are none.
    """
    confusion, totals = np.zeros((data.num_classes, data.num_classes), np.int64), Counter()
    for sums in outputs:
        confusion += sums["confusion"]
        totals.update({name: float(sums[name]) for name in ("loss", "pixels", "count")})
    result, labelled = metrics(confusion), confusion.sum(1).tolist()
    rows = [
        {"class": name, "iou": iou, "accuracy": int(right) / pixels if pixels else None, "pixels": pixels}
        for name, iou, right, pixels in zip(
            data.class_names, result.pop("iou"), np.diag(confusion), labelled, strict=True
        )
    ]
    return result | {
        "loss": totals["loss"] / max(totals["pixels"], 1),
        "count": int(totals["count"]),
        "classes": rows,
    }


def describe(result: Mapping[str, Any]) -> str:
    """mIoU, mean and overall accuracy, which `result` has as fractions, in percent, and the loss."""
    absent = sum(row["iou"] is None for row in result["classes"])
    without = f" without {absent} of {len(result['classes'])} classes, which are nowhere" if absent else ""
    means = f"mIoU {result['miou']:.2%}{without}, mAcc {result['macc']:.2%}, aAcc {result['aacc']:.2%}"
    return f"{means}, loss {result['loss']:.4f}"
