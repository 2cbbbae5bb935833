"""A picture of what a segmenter gets right and wrong: `python -m fcvit_jax.visualize segmentation ...`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fcvit_jax.augment.paired import IGNORED
from fcvit_jax.figures import class_patches, legend_below, legend_height
from fcvit_jax.figures.validation import choose_examples

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
    handles = [*class_patches(classes, class_names, colours), Patch(facecolor=np.array(RED) / 255, label="wrong")]
    if any((maps == IGNORED).any() for maps in labels):
        handles.append(Patch(facecolor=np.array(GREY) / 255, label="ignored"))
    width = 8 * widest + 1.0
    size = width, 2.2 * len(images) + 0.5 + legend_height(handles, width)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
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
    legend_below(figure, handles)
    return figure


def from_arguments(args: argparse.Namespace) -> Figure:
    """The picture that the arguments of `visualize segmentation` ask for.

    Raises:
      UserError: as `choose_examples`.
    """
    task, model, variables, metadata, data, numbers = choose_examples(args, "segmentation", "a segmenter")
    images, labels = zip(*(task.read_pair(data, number) for number in numbers), strict=True)
    predictions = list(task.predict(model, variables, images, metadata))
    names = [Path(data.eval.describe(number)).name for number in numbers]
    return draw_segmentation(images, labels, predictions, data.class_names, np.array(metadata["palette"]), names)
