"""Draws what networks attend to, how runs went, what segmenters see: `python -m fcvit_jax.visualize TOOL ...`."""

import argparse
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fcvit_jax import segmentation_figure, tasks
from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.predict import CHECKPOINT_HELP, find_images, load, read_image

# Okabe and Ito's colours, which stay apart for every kind of colour vision; without yellow, too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MAX_IMAGES = 32  # of one picture


def similarity_maps(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, block: str | None = None
) -> tuple[str, np.ndarray]:
    """Computes the token-global similarity of the last context in a block, in the order of the paper's figure 3.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, 3) uint8.
      block: its name, such as "stages_3_block_1"; None: the last one whose map is larger than a single position.

    Returns:
      The block's name, and (N, h, w, context_heads) float32: of zero mean and unit variance per image.

    Raises:
      UserError: there is no such block, its map is a single position, or the network computes no similarity.
    """
    sown = traverse_util.flatten_dict(_intermediates(model, variables, images))
    paths = sorted((path for path in sown if path[-1] == "similarity"), key=_natural_order)
    if not paths:
        raise UserError("The network computes no similarity: it has no weighted context.")
    maps = {path[0]: np.asarray(sown[path][0]) for path in paths}  # of several contexts in a block, the last
    wide = [name for name in maps if maps[name][0, ..., 0].size > 1]
    if not wide or (block is not None and block not in wide):
        raise UserError(f"There is no map to draw of block {block}: choose from {', '.join(wide)}.")
    return block or wide[-1], maps[block or wide[-1]]


def _natural_order(path: Sequence[str]) -> list:
    """Sorts numbers in names by value: block 2 before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", "/".join(path))]


@functools.partial(jax.jit, static_argnames="model")
def _intermediates(model: nn.Module, variables: Mapping[str, Any], images: jax.Array) -> dict[str, Any]:
    images = normalize(images, model.mean, model.std)
    return model.apply(variables, images, mutable="intermediates")[1].get("intermediates", {})


def head_correlation(maps: np.ndarray) -> float:
    """The mean Pearson correlation between the maps of every pair of heads.

    Args:
      maps: (h, w, heads).

    Returns:
      In [-1, 1]; NaN where no two heads have a map that varies.
    """
    maps = maps.reshape(-1, maps.shape[-1])
    maps = maps[:, maps.std(0) > 0]
    pairs = np.atleast_2d(np.corrcoef(maps, rowvar=False))[np.triu_indices(maps.shape[1], 1)]
    return float(pairs.mean()) if pairs.size else float("nan")


def _literal(text: str) -> str:
    """Text for matplotlib, which sets what is between two $ as a formula, and refuses bytes that are no UTF-8."""
    return text.replace("$", r"\$").encode(errors="replace").decode()


def draw_similarity(images: Sequence[np.ndarray], maps: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draws one row per image: the image, then the map of each head laid over it, each on a scale of its own.

    Args:
      images: (H, W, 3) uint8 each.
      maps: (N, h, w, heads), as `similarity_maps` gives them.
      names: of the images.
      title: of the figure.
    """
    heads = maps.shape[-1]
    size = 1.35 * (heads + 1) + 1.5, 1.7 * len(images) + 1.0
    figure = Figure(figsize=size, dpi=150, layout="compressed")
    axes = figure.subplots(len(images), heads + 1, squeeze=False)
    # As the correlation sees them: heads differ so much in strength that on one scale most would be of one colour.
    deviations = (maps - maps.mean((1, 2), keepdims=True)) / np.maximum(maps.std((1, 2), keepdims=True), 1e-6)
    norm = Normalize(*np.percentile(deviations, (1, 99)))
    for row, image, image_maps, drawn, name in zip(axes, images, maps, deviations, names, strict=True):
        grey = image.mean(-1)
        for axis in row:
            axis.set(xticks=[], yticks=[])
        row[0].imshow(image)
        label = _literal(name if len(name) <= 18 else "…" + name[-17:])
        row[0].set_xlabel(f"{label}\nr = {head_correlation(image_maps):.2f}", fontsize=9)
        for head, axis in enumerate(row[1:]):
            # Grey and of weak contrast, so that light and colour mean similarity.
            axis.imshow(grey, cmap="gray", vmin=-200, vmax=455)
            axis.imshow(
                drawn[..., head],
                cmap="viridis",
                norm=norm,
                alpha=0.7,
                interpolation="bicubic",
                extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5),
            )
    axes[0, 0].set_title("image", fontsize=10)
    for head in range(heads):
        axes[0, head + 1].set_title(f"head {head + 1}", fontsize=10)
    opaque = ScalarMappable(norm, "viridis")
    bar = figure.colorbar(opaque, ax=axes, extend="both", shrink=min(1.0, 2.5 / len(images)), pad=0.01)
    bar.set_label("similarity to the mean\n(each map standardised)", fontsize=9)
    figure.suptitle(title, fontsize=12)
    return figure


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl.

    Raises:
      UserError: there is no such file, it is empty, or a line cannot be read (except the last, cut off by a kill).
    """
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give folders of runs.") from error
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    if not all(isinstance(line, dict) and "epoch" in line for line in metrics):
        raise UserError(f"{path} is of another program: its lines have no epoch.")
    if not metrics:
        raise UserError(f"{path} is empty: the run has reported nothing yet.")
    return metrics


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], metric: str | None = None) -> Figure:
    """Draws loss, learning rate and a metric over epochs.

    Args:
      runs: lines of metrics.jsonl by the run's name.
      metric: a fraction that evaluation gives, such as "top1"; None: the first that it gives besides the loss.
    """
    if metric is None:
        evaluated = (
            name.removeprefix("eval/")
            for lines in runs.values()
            for line in lines
            for name in line
            if name.startswith("eval/") and name not in ("eval/loss", "eval/count")
        )
        metric = next(evaluated, "not evaluated yet")
    figure = Figure(figsize=(12, 4.2 + 0.25 * len(runs)), dpi=120, layout="constrained")
    loss, rate, quality = figure.subplots(1, 3)
    handles, labels = [], []  # given to the legend as they are: it would leave out names that begin with "_"
    for (name, metrics), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):

        def curve(axis, key, scale=1.0, metrics=metrics, **style):
            points = [(line["epoch"], line[key] * scale) for line in metrics if key in line]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), **style)
            return [value for _, value in points]

        curve(loss, "train/loss", color=colour, linewidth=1.2)
        curve(loss, "eval/loss", color=colour, linestyle="--", marker="o", markersize=4)
        curve(rate, "train/lr", color=colour)
        values = curve(quality, f"eval/{metric}", 100.0, color=colour, marker="o", markersize=4)
        best = f"best {metric} {max(values):.2f} %" if values else "not evaluated yet"
        handles += quality.plot((), (), color=colour)
        labels.append(_literal(f"{name}: {best}"))
    loss.plot((), (), color="0.4", label="training (augmented)")
    loss.plot((), (), color="0.4", linestyle="--", marker="o", markersize=4, label="validation")
    loss.legend(fontsize=9)
    figure.legend(handles, labels, loc="outside lower center", fontsize=10)
    for axis, title, unit in ((loss, "Loss", "cross-entropy"), (rate, "Learning rate", ""), (quality, metric, "%")):
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.grid(alpha=0.3)
    return figure


def _similarity(args: argparse.Namespace) -> Figure:
    model, variables, metadata = load(args.checkpoint)
    paths = find_images(args.images)
    if len(paths) > _MAX_IMAGES:
        raise UserError(f"{len(paths)} images do not fit a picture: choose at most {_MAX_IMAGES}.")
    images = [read_image(path, metadata) for path in paths]
    if len({image.shape for image in images}) > 1:
        raise UserError(
            "These images are of several sizes, which this network takes as they are: give those of one size."
        )
    block, maps = similarity_maps(model, variables, np.stack(images), args.block)
    correlations = [head_correlation(image_maps) for image_maps in maps]
    for path, value in zip(paths, correlations, strict=True):
        print(f"{path}: correlation between heads {value:.3f}")
    mean = float(np.mean([value for value in correlations if not np.isnan(value)] or [np.nan]))
    print(f"mean correlation between the maps of two heads, {block}: {mean:.3f}")
    place = f"{block}, {maps.shape[1]} x {maps.shape[2]} positions"
    title = f"Token-global similarity in {place}\nmean correlation between heads r = {mean:.2f}"
    return draw_similarity(images, maps, [path.name for path in paths], title)


def _metric(workdir: Path) -> str:
    """The metric by which a run chooses its best checkpoint."""
    try:
        config = json.loads((workdir / "config.json").read_text())
        task = config.get("task", "classification")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{workdir / 'config.json'} cannot be read: {error}; give folders of runs.") from error
    return tasks.load(task).BEST


def _curves(args: argparse.Namespace) -> Figure:
    runs = {str(workdir): read_metrics(workdir) for workdir in args.workdirs}
    metrics = {_metric(workdir) for workdir in args.workdirs}
    if len(metrics) > 1:
        raise UserError(f"These runs are of different tasks ({', '.join(sorted(metrics))}): draw each task by itself.")
    return draw_curves(runs, metrics.pop())


def main(argv: list[str] | None = None) -> None:
    prog = "python -m fcvit_jax.visualize"
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Draw what a network attends to, how runs went, or what a segmenter sees; each has its own --help.",
        epilog=f"example: {prog} curves runs/digits --output curves.png",
    )
    tools = parser.add_subparsers(required=True, metavar="similarity|curves|segmentation")
    tool = tools.add_parser(
        "similarity",
        help="what a network attends to",
        description="Draw each head's similarity between every position and the image's mean, laid over the images.",
        epilog=f"example: {prog} similarity --checkpoint runs/digits a.png b.png --output similarity.png",
    )
    tool.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    tool.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="a folder: all images beneath it")
    tool.add_argument("--block", help="such as stages_2_block_0; default: the last whose map is more than one position")
    tool.set_defaults(draw=_similarity)
    tool_curves = tools.add_parser(
        "curves",
        help="how runs went",
        description="Draw loss, learning rate and the main metric of runs, such as top-1.",
        epilog=f"example: {prog} curves runs/a runs/b --output curves.png",
    )
    tool_curves.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR", help="a run's folder")
    tool_curves.set_defaults(draw=_curves)
    tool_segmentation = tools.add_parser(
        "segmentation",
        help="what a segmenter gets right and wrong",
        description="Draw images of the validation set beside their labels, the predictions and the errors.",
        epilog=f"example: {prog} segmentation --checkpoint runs/scenes --output segmentation.png",
    )
    tool_segmentation.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    tool_segmentation.add_argument("--dataset", help="as config.data.dataset (default: that of the checkpoint's run)")
    tool_segmentation.add_argument("--first", type=int, default=0, metavar="N", help="number of the first image (0)")
    tool_segmentation.add_argument("--count", type=int, default=4, metavar="N", help="how many images (4)")
    tool_segmentation.set_defaults(draw=segmentation_figure.from_arguments)
    for subparser in (tool, tool_curves, tool_segmentation):
        subparser.add_argument("--output", required=True, type=Path, help="the picture: .png, .pdf, .svg, ...")
    args = parser.parse_args(argv)
    with exit_on_error():
        output = args.output.expanduser()
        formats = Figure().canvas.get_supported_filetypes()
        if output.suffix[1:].lower() not in formats:
            raise UserError(f"--output {output}: its ending must be one of .{', .'.join(formats)}.")
        figure = args.draw(args)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output)
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error}") from error
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
