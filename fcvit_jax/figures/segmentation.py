"""A picture of what a segmenter gets right and wrong: `python -m fcvit_jax.visualize segmentation ...`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fcvit_jax.augment.paired import IGNORED
from fcvit_jax.data.loader import Data
from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError
from fcvit_jax.run import saved

MAX_IMAGES = 16  # of one picture
MAX_CLASSES = 40  # of its legend; the rest is counted
WHITE, GREY, RED = (255, 255, 255), (150, 150, 150), (214, 39, 40)


def draw_segmentation(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    class_names: Sequence[str],
    palette: np.ndarray,
    names: Sequence[str],
) -> Figure:
    """Draws a row for each image: the image, its labels, the predictions, and where the two differ.

    Args:
      images: (H, W, 3) uint8 each.
      labels: (H, W) uint8 each; 255: ignored.
      predictions: (H, W) uint8 each.
      class_names, palette: names, and colours (classes, 3) uint8; the legend has the classes that are drawn.
      names: of the images.
    """
    colours = np.full((256, 3), WHITE, np.uint8)
    colours[: len(palette)] = palette
    widest = max(image.shape[1] / image.shape[0] for image in images)
    drawn = [np.unique(maps) for maps in (*labels, *predictions)]
    classes = [c for c in np.unique(np.concatenate(drawn)).tolist() if c != IGNORED]
    columns = 8
    lines = -(-min(len(classes), MAX_CLASSES + 1) // columns) + 1
    figure = Figure(figsize=(8 * widest + 1.0, 2.2 * len(images) + 0.5 + 0.25 * lines), dpi=150, layout="constrained")
    axes = figure.subplots(len(images), 4, squeeze=False)
    for row, image, truth, found, name in zip(axes, images, labels, predictions, names, strict=True):
        counts = truth != IGNORED
        errors = np.full((*truth.shape, 3), WHITE, np.uint8)
        errors[counts & (truth != found)] = RED
        errors[~counts] = GREY
        for axis, picture in zip(row, (image, colours[truth], colours[found], errors), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        right = (truth == found)[counts].mean() if counts.any() else 0.0
        row[0].set_xlabel(name, fontsize=8)
        row[3].set_xlabel(f"{right:.1%} of the pixels are right", fontsize=8)
    for axis, title in zip(axes[0], ("image", "labels", "prediction", "errors"), strict=True):
        axis.set_title(title, fontsize=10)
    handles = [Patch(facecolor=colours[c] / 255, edgecolor="0.4", label=class_names[c]) for c in classes[:MAX_CLASSES]]
    if classes[MAX_CLASSES:]:
        handles.append(Patch(facecolor="none", label=f"and {len(classes) - MAX_CLASSES} more classes"))
    handles.append(Patch(facecolor=np.array(RED) / 255, label="wrong"))
    if any((maps == IGNORED).any() for maps in labels):
        handles.append(Patch(facecolor=np.array(GREY) / 255, label="ignored"))
    # Given as they are: a legend would leave out labels that begin with "_".
    texts = [handle.get_label().replace("$", r"\$") for handle in handles]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def from_arguments(args: argparse.Namespace) -> Figure:
    """The picture that the arguments of `visualize segmentation` ask for.

    Raises:
      UserError: the checkpoint is of another task, or there are no such images.
    """
    if not 1 <= args.count <= MAX_IMAGES:
        raise UserError(f"--count={args.count} must be from 1 to {MAX_IMAGES}.")
    task, model, variables, metadata = saved.load(args.checkpoint)
    if saved.task_of(metadata) != "segmentation":
        raise UserError(f"{args.checkpoint} is of the task {saved.task_of(metadata)}: a segmenter is needed here.")
    data = _open_data(task, args.checkpoint, args.dataset)
    if data.num_classes != model.num_classes:
        raise UserError(f"The dataset has {data.num_classes} classes, the segmenter {model.num_classes}.")
    last = args.first + args.count
    if not 0 <= args.first < last <= data.num_eval:
        raise UserError(f"Images {args.first} to {last - 1} are not among the {data.num_eval} of the validation set.")
    numbers = range(args.first, last)
    images, labels = zip(*(task.read_pair(data, number) for number in numbers), strict=True)
    predictions = list(task.predict(model, variables, images, metadata))
    names = [Path(data.eval.describe(number)).name for number in numbers]
    return draw_segmentation(images, labels, predictions, data.class_names, np.array(metadata["palette"]), names)


def _open_data(task: Any, checkpoint: str, dataset: str | None) -> Data:
    """The validation set that the run of a checkpoint has, or another, read as the run's."""
    path = storage.run_path(checkpoint)  # a run's folder, one of those in it, or a step's in one of those
    configs = [folder / "config.json" for folder in (path, *path.parents[:2])]
    configs = [config for config in configs if storage.is_file(config)]
    if not configs and dataset is None:
        raise UserError(f"{checkpoint} is in no run's folder, whose config.json names the data: give --dataset.")
    try:
        options: Mapping[str, Any] = json.loads(storage.read_text(configs[0]))["data"] if configs else {"batch_size": 1}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{configs[0]} cannot be read: {error}") from error
    return task.open_dataset(training=False, **options | ({"dataset": dataset} if dataset else {}))
