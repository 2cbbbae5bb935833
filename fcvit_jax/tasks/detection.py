"""Object detection and instance segmentation with Mask R-CNN, scored by COCO's average precision of boxes and masks."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from fcvit_jax import convert, freezing, networks, optim
from fcvit_jax.data import coco_eval, detection_examples
from fcvit_jax.data import detection as datasets
from fcvit_jax.data.loader import Data
from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError
from fcvit_jax.networks import mask_rcnn
from fcvit_jax.networks.fpn import fields_around_backbone
from fcvit_jax.networks.normalize import normalize_inside
from fcvit_jax.networks.objects import Detections, Objects
from fcvit_jax.run.config import match_classes
from fcvit_jax.tasks import detection_prediction as prediction

BEST = ("mask_ap", "box_ap")
create_model, init_variables = mask_rcnn.create_detector, mask_rcnn.init_variables
model_fields = functools.partial(fields_around_backbone, mask_rcnn.MaskRCNN)
open_dataset, load_example, read_pair = datasets.open_dataset, detection_examples.load_example, datasets.read_pair
complete_metadata, read_image, detect = prediction.complete_metadata, prediction.read_image, prediction.detect
add_arguments, predict, predict_files = prediction.add_arguments, prediction.predict, prediction.predict_files
make_program = prediction.make_program


def load_pretrained(path: str | Path, model: nn.Module, data: Data) -> dict[str, Any]:
    """Reads the weights that a run starts from, a detector's or a classifier's; says what starts afresh.

    Raises:
      UserError: as `convert.load_pretrained`.
    """
    variables, metadata = convert.load_pretrained(path, model), convert.read_metadata(path)
    names = metadata.get("class_names", ()) if metadata.get("task") == "detection" else ()
    return match_classes(path, variables, names, data.class_names, reorder_classes)


def reorder_classes(variables: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The variables of the same network with its classes in another order: class i is what class order[i] was."""
    order = np.array(order)
    outputs = {
        ("box_head", "logits"): np.append(order, len(order)),  # the last is the background
        ("box_head", "deltas"): (4 * order[:, None] + np.arange(4)).reshape(-1),
        ("mask_head", "logits"): order,
    }
    params = dict(variables["params"])
    for (head, layer), places in outputs.items():
        if head in params:
            params[head] = {**params[head], layer: jax.tree.map(lambda x, i=places: x[..., i], params[head][layer])}
    return {**variables, "params": params}


def make_prepare(model: nn.Module) -> Callable[[jax.Array, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """Makes the function that prepares a training batch on the device: it normalises, and makes the padding 0.

    Args:
      model: the network.

    Returns:
      prepare(key, batch): of a batch of `load_example`'s arrays, with "image" float32. It raises a UserError if the
      network has masks and the batch has none.
    """

    def prepare(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        del key
        if model.masks and "masks" not in batch:
            raise UserError("There are no masks to train on: set --config.model.masks=False to train boxes alone.")
        return {**batch, "image": normalize_inside(batch["image"], batch["size"], model.mean, model.std)}

    return prepare


def make_optimizer(
    steps_per_epoch: int,
    epochs: int,
    batch_size: int,
    steps: int,
    *,
    lr: float = 2e-4,
    decay_epochs: Sequence[int] = (8, 11),
    warmup_steps: int = 500,
    warmup_factor: float = 1e-3,
    weight_decay: float = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    freeze: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes AdamW, which decays every parameter, with a rate that falls to a tenth from some epochs on.

    Example::

        tx, schedule = make_optimizer(3665, 12, 32, 12 * 3665)              # as by default: COCO's
        state = tx.init(params)

    Args:
      steps_per_epoch: updates in an epoch.
      epochs, batch_size, steps: what the engine says of the run; nothing here depends on them.
      lr, decay_epochs, warmup_steps, warmup_factor: of `optim.make_step_schedule`.
      weight_decay, b1, b2, eps: of `optim.adamw_for_all`.
      freeze: paths of parameters that are not trained, see `freezing.frozen`.

    Returns:
      The gradient transformation, and the schedule (step -> rate, float32).

    Raises:
      UserError: a value is out of its range; and as `freezing.freeze`.
    """
    del epochs, batch_size, steps
    schedule = optim.make_step_schedule(lr, steps_per_epoch, decay_epochs, warmup_steps, warmup_factor)
    return freezing.freeze(optim.adamw_for_all(schedule, weight_decay, b1, b2, eps), freeze), schedule


def num_epochs(config: ConfigDict) -> int:
    """The epochs of a whole run."""
    return config.train.epochs


def loss(
    model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The loss of a prepared batch, in training mode.

    Args:
      model: the network.
      variables: its variables.
      batch: from `make_prepare`'s function.
      key: for the samples of anchors and boxes, dropout and drop-path.

    Returns:
      The loss, () float32; the collections that the network updates; and the parts of the loss, as
      `MaskRCNN.sampled_losses` names them, with "class_accuracy".
    """
    masks = None
    if model.masks:
        masks = jnp.unpackbits(batch["masks"], axis=-1).astype(bool)
    objects = Objects(batch["boxes"], batch["labels"], batch["valid"], masks, batch.get("rows"), batch.get("columns"))
    dropout_key, key = jax.random.split(key)
    losses, updates = networks.traced_once(model).apply(
        variables,
        batch["image"],
        objects,
        batch["size"],
        key,
        method="losses",
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    return losses.pop("loss"), (updates, losses)


def eval_step(model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What is found in the images of a batch.

    Args:
      model: the network.
      variables: its variables.
      batch: "image", "size", "scale" and "index", as `load_example` makes them, and "mask" (N,) bool: False where a row
        is padding.

    Returns:
      The fields of `networks.objects.Detections`, "masks" without those where there is no mask branch, and "index" and
      "mask" of the batch.
    """
    found = detect(networks.traced_once(model), variables, batch["image"], batch["size"], batch["scale"])
    present = {name: x for name, x in found._asdict().items() if x is not None}
    return present | {"index": batch["index"], "mask": batch["mask"]}


def finish(outputs: Iterable[Mapping[str, np.ndarray]], data: Data) -> dict[str, Any]:
    """COCO's metrics of the whole set; writes the detections to `data.results` first, if that is asked for.

    Masks are drawn at the size of their images as the outputs come, while the device computes the next ones.

    Args:
      outputs: of `eval_step`, batch by batch.
      data: what was evaluated.

    Returns:
      "box_ap", "box_ap50", ... and, with a mask branch, "mask_ap", "mask_ap50", ...: COCO's twelve numbers by the names
      `coco_eval.NAMES`, None where no object counts, but for the AP itself, which is then 0; "count" (images); and
      "classes", a row for each: "class" (its name), "box_ap", "mask_ap" and "objects", their number without crowds.

    Raises:
      UserError: the file of `data.results` cannot be written.
    """
    found = {}
    for output in outputs:
        detections = Detections(**{name: output.get(name) for name in Detections._fields})
        for row in np.flatnonzero(output["mask"]).tolist():
            index = int(output["index"][row])
            size = tuple(data.eval.example_sizes[index, ::-1].tolist())
            found[index] = prediction.as_coco(detections, row, size)
    detections = [found[index] for index in range(data.num_eval)]
    if data.options["results"] is not None:
        _write_results(data, detections)
    truths = [data.eval.truth(index) for index in range(data.num_eval)]
    return score(truths, detections, data.class_names) | {"count": len(found)}


def score(
    truths: Sequence[coco_eval.Truth], detections: Sequence[coco_eval.Detections], class_names: Sequence[str]
) -> dict[str, Any]:
    """What `finish` returns, without the count, of what there is and what was found in every image."""
    labels = np.concatenate([truth.classes[~truth.crowd] for truth in truths])
    counts = np.bincount(labels.astype(int), minlength=len(class_names)).tolist()
    rows = [{"class": name} for name in class_names]
    with_masks = all(x.rles is not None for x in (*truths, *detections))
    result = {}
    for kind in ("box", "mask")[: 1 + with_masks]:
        precision = coco_eval.evaluate(truths, detections, len(class_names), masks=kind == "mask")
        result |= {f"{kind}_{name}": value for name, value in precision.summary.items()}
        result[f"{kind}_ap"] = result[f"{kind}_ap"] or 0.0
        for row, ap in zip(rows, precision.class_ap, strict=True):
            row[f"{kind}_ap"] = ap
    for row, count in zip(rows, counts, strict=True):
        row["objects"] = count
    return result | {"classes": rows}


def _write_results(data: Data, detections: Sequence[coco_eval.Detections]) -> None:
    if jax.process_index() != 0:
        return
    path = storage.as_path(data.options["results"])
    ids = [data.eval.image_id(index) for index in range(data.num_eval)]
    try:
        storage.replace_text(path, json.dumps(coco_eval.to_results(detections, ids, data.eval.category_ids)))
    except OSError as error:
        raise UserError(f"data.results={path} cannot be written: {storage.words(error)}.") from error


def describe(result: Mapping[str, Any]) -> str:
    """The average precision of boxes and masks, which `result` has as fractions, in percent."""

    def of_kind(kind: str) -> str:
        at = (f"AP{iou} {result[name]:.2%}" for iou in (50, 75) if result[name := f"{kind}_ap{iou}"] is not None)
        return f"{kind} AP {result[f'{kind}_ap']:.2%} ({', '.join(at)})"

    absent = sum(row["box_ap"] is None for row in result["classes"])
    without = f", without {absent} of {len(result['classes'])} classes, which are nowhere" if absent else ""
    return ", ".join(of_kind(kind) for kind in ("box", "mask") if f"{kind}_ap" in result) + without
