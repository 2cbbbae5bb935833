"""A picture of what a detector finds: `python -m fcvit_jax.visualize detections ...`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fcvit_jax.data.coco_eval import Detections, Truth
from fcvit_jax.data.image_files import count
from fcvit_jax.errors import UserError
from fcvit_jax.figures import class_patches, legend_below, legend_height, literal
from fcvit_jax.figures.overlay import colours, draw_objects
from fcvit_jax.figures.validation import choose_examples

WIDTH = 9  # of a picture in inches


def draw_detections(
    images: Sequence[np.ndarray],
    truths: Sequence[Truth],
    found: Sequence[Detections],
    class_names: Sequence[str],
    names: Sequence[str],
) -> Figure:
    """Draws a row for each image: the objects that are in it, beside those that were found.

    Args:
      images: (H, W, 3) uint8 each.
      truths, found: of each image.
      class_names: of all classes; the legend has those that are drawn.
      names: of the images.
    """
    heights = [image.shape[0] / image.shape[1] for image in images]
    classes = np.unique(np.concatenate([objects.classes for objects in (*truths, *found)])).astype(int).tolist()
    handles = class_patches(classes, class_names, colours(len(class_names)))
    size = WIDTH, sum(4.25 * height + 0.3 for height in heights) + 0.4 + legend_height(handles, WIDTH)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, height_ratios=heights)
    for row, image, truth, there, name in zip(axes, images, truths, found, names, strict=True):
        low, high = truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]
        known = draw_objects(image, np.concatenate([low, high], 1), truth.classes, class_names, None, truth.rles)
        drawn = draw_objects(image, there.boxes, there.classes, class_names, there.scores, there.rles)
        for axis, picture, objects in zip(row, (known, drawn), (truth, there), strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(count(len(objects.classes), "object"), fontsize=8)
        row[0].set_ylabel(literal(name), fontsize=8)
    for axis, title in zip(axes[0], ("truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=10)
    legend_below(figure, handles)
    return figure


def from_arguments(args: argparse.Namespace) -> Figure:
    """The picture that the arguments of `visualize detections` ask for.

    Raises:
      UserError: as `choose_examples`, or the threshold is no score.
    """
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold={args.threshold} must be from 0 to 1.")
    task, model, variables, metadata, data, numbers = choose_examples(args, "detection", "a detector")
    images, truths = zip(*(task.read_pair(data, number) for number in numbers), strict=True)
    found = list(task.predict(model, variables, images, metadata, args.threshold))
    names = [Path(data.eval.describe(number)).name for number in numbers]
    return draw_detections(images, truths, found, data.class_names, names)
