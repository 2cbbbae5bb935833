"""Figures of attention: the maps of queries, the maps of all heads, and the measures over depth."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fcvit_jax.attention import TABLE, intermediates
from fcvit_jax.errors import UserError
from fcvit_jax.figures import COLOURS, literal
from fcvit_jax.networks.normalize import normalize

_QUERY = "#D55E00"
_SCALE = ScalarMappable(Normalize(0, 1), "viridis")
_SCALE_LABEL = "attention (each map from\nits least to its largest)"


def attention_of(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, block: str | None = None
) -> tuple[str, np.ndarray]:
    """Computes the attention of one block.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, 3) uint8.
      block: its name, such as "block_11"; None: the last.

    Returns:
      The block's name, and (N, heads, T, T) float32, rows being queries.

    Raises:
      UserError: there is no such block, or the network has no attention of queries.
    """
    sown = intermediates(model, variables, normalize(images, model.mean, model.std))
    found = {name: x["attention"][0] for name, x in sown.items() if "attention" in x}
    if not found:
        raise UserError("This network has no attention of queries, as a ViT has.")
    names = [f"block_{i}" for i in range(len(found))]
    block = block or names[-1]
    if block not in names:
        raise UserError(f"There is no block {block}: choose from {names[0]} to {names[-1]}.")
    return block, np.asarray(found[block])


def query_maps(
    attention: np.ndarray, grid: tuple[int, int], query: tuple[int, int] | None, prefix: int = 1
) -> np.ndarray:
    """Computes the share of one query's attention that each patch gets.

    Args:
      attention: (..., T, T), rows being queries, with T = prefix + rows * columns.
      grid: rows and columns of patches.
      query: row and column of the patch that is the query; None: the class token is the query.
      prefix: class and distillation tokens, in front of the patches.

    Returns:
      (..., rows, columns) of sum 1. The attention to the prefix is left out.

    Raises:
      UserError: there is no such patch, or the grid does not fit.
    """
    rows, columns = grid
    if attention.shape[-1] != prefix + rows * columns:
        raise UserError(f"{attention.shape[-1]} tokens are not {prefix} and {rows} x {columns} patches.")
    if query is not None and not (0 <= query[0] < rows and 0 <= query[1] < columns):
        raise UserError(f"There is no patch in row {query[0]}, column {query[1]}: there are {rows} x {columns}.")
    maps = attention[..., 0 if query is None else prefix + query[0] * columns + query[1], prefix:]
    maps = maps / maps.sum(-1, keepdims=True)
    return maps.reshape(*maps.shape[:-1], rows, columns)


def draw_queries(
    images: Sequence[np.ndarray],
    points: Sequence[tuple[float, float] | None],
    maps: Mapping[str, Sequence[np.ndarray]],
    title: str,
) -> Figure:
    """Draws one row per query: the image with the query marked, then each network's map, as in the paper's figure 1.

    Args:
      images: (H, W, 3) uint8 for each row; several queries of an image are as many rows.
      points: of each row the query, x and y as fractions of the image's width and height; None: the class token.
      maps: by the name of the network, a map (rows, columns) for each row of the figure. Each is drawn on a scale of
        its own, from its least to its largest value.
      title: of the figure.
    """
    columns = 1 + len(maps)
    figure = Figure(figsize=(1.9 * columns + 1.3, 1.95 * len(images) + 1.0), dpi=150, layout="compressed")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for i, (row, image, point) in enumerate(zip(axes, images, points, strict=True)):
        row[0].imshow(image)
        _mark(row[0], image, point, face=_QUERY)
        for axis, drawn in zip(row[1:], maps.values(), strict=True):
            _overlay(axis, image, drawn[i])
            _mark(axis, image, point, face="none")  # a patch often attends to itself: leave its colour visible
        for axis in row:
            axis.set(xticks=[], yticks=[])
        if point is None:
            row[0].set_xlabel("query: class token", fontsize=9)
    axes[0, 0].set_title("image and query", fontsize=10)
    for axis, name in zip(axes[0, 1:], maps, strict=True):
        axis.set_title(_wrapped(name), fontsize=10)
    bar = figure.colorbar(_SCALE, ax=axes, shrink=min(1.0, 2 / len(images)), pad=0.02)
    bar.set_label(_SCALE_LABEL, fontsize=9)
    figure.suptitle(literal(title), fontsize=12)
    return figure


def draw_heads(
    image: np.ndarray, maps: Mapping[str, np.ndarray], query: Mapping[str, tuple[int, int] | None], title: str
) -> Figure:
    """Draws the maps of all heads of some networks side by side, on top of the image, as in the paper's figure 3.

    Args:
      image: (H, W, 3) uint8.
      maps: by the name of the network, (heads, rows, columns). They are drawn without interpolation.
      query: by the name of the network, row and column of the patch that is the query; None: there is none (FCViT).
      title: of the figure.
    """
    columns = [-(-len(heads) // 2) for heads in maps.values()]
    widths = [1.3, *columns, 1.0]  # the image, the networks, the colour bar
    figure = Figure(figsize=(1.35 * sum(widths), 4.0), dpi=150, layout="constrained")
    parts = figure.subfigures(1, len(widths), width_ratios=widths)
    parts[0].subplots().imshow(image)
    parts[0].axes[0].set(xticks=[], yticks=[])
    parts[0].suptitle("image", fontsize=10)
    for part, width, (name, heads) in zip(parts[1:-1], columns, maps.items(), strict=True):
        for head, axis in enumerate(part.subplots(2, width, squeeze=False).flat):
            if head >= len(heads):
                axis.set_axis_off()
                continue
            _overlay(axis, image, heads[head])
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"head {head + 1}", fontsize=8, pad=2)
            if query[name] is not None:
                _frame(axis, image, heads[head].shape, query[name])
        asked = "no patch asks" if query[name] is None else "query framed"
        part.suptitle(f"{literal(name)}\n{heads.shape[1]} x {heads.shape[2]} positions, {asked}", fontsize=10)
    bar = figure.colorbar(_SCALE, cax=parts[-1].add_axes((0.1, 0.1, 0.13, 0.68)))
    bar.set_label(_SCALE_LABEL, fontsize=9)
    figure.suptitle(literal(title), fontsize=12)
    return figure


def draw_depth(
    networks: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], names: Sequence[str] = TABLE
) -> Figure:
    """Draws measures over depth: the mean over images, and one standard deviation on either side.

    Args:
      networks: summaries (`fcvit_jax.attention.summarise`) by the name of the network.
      names: of the measures.
    """
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.25 * len(networks)), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    handles = []
    for (network, summary), colour in zip(networks.items(), itertools.cycle(COLOURS), strict=False):
        for axis, name in zip(axes, names, strict=False):
            points = [(i, x[name]["mean"], x[name]["std"]) for i, x in enumerate(summary.values(), 1) if name in x]
            block, mean, std = np.array(points).reshape(-1, 3).T
            axis.plot(block, mean, color=colour, marker="o", markersize=3.5, linewidth=1.3)
            axis.fill_between(block, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
        handles += axes[0].plot((), (), color=colour, marker="o", markersize=3.5, label=literal(network))
    for axis, name in itertools.zip_longest(axes, names):
        if name is None:
            axis.set_axis_off()
            continue
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("block (FCViT: context)", fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", fontsize=9)
    figure.suptitle("Attention over depth (mean and standard deviation over images)", fontsize=12)
    return figure


def _overlay(axis: Axes, image: np.ndarray, drawn: np.ndarray) -> None:
    """Draws a map, scaled to [0, 1], on top of its image, in grey with weak contrast: colours show the map alone."""
    axis.imshow(image.mean(-1), cmap="gray", vmin=-200, vmax=455)
    spread = np.ptp(drawn)
    scaled = (drawn - drawn.min()) / spread if spread > 0 else np.zeros_like(drawn)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    axis.imshow(scaled, cmap=_SCALE.cmap, norm=_SCALE.norm, alpha=0.65, interpolation="nearest", extent=extent)


def _mark(axis: Axes, image: np.ndarray, point: tuple[float, float] | None, face: str) -> None:
    """Draws a ring around a point, filled with the colour `face`. Its white edge is visible on every colour."""
    if point is not None:
        x, y = point[0] * image.shape[1] - 0.5, point[1] * image.shape[0] - 0.5
        axis.plot(x, y, "o", markerfacecolor="none", markeredgecolor="white", markersize=9.5, markeredgewidth=3)
        axis.plot(x, y, "o", markerfacecolor=face, markeredgecolor=_QUERY, markersize=9, markeredgewidth=1.4)


def _frame(axis: Axes, image: np.ndarray, grid: tuple[int, int], query: tuple[int, int]) -> None:
    """Draws a square around one patch. Its white edge is visible on every colour."""
    height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
    corner = (query[1] * width - 0.5, query[0] * height - 0.5)
    for colour, line in (("white", 2.6), (_QUERY, 1.4)):
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line))


def _wrapped(name: str) -> str:
    """Breaks a network's name into lines that fit over a column: after commas, and in long parts after "_" and "/"."""
    lines = []
    for whole in name.split(", "):
        lines.append("")
        for part in re.findall(r"[^_/]*[_/]?", whole):
            if lines[-1] and len(lines[-1]) + len(part) > 18:
                lines.append("")
            lines[-1] += part
    return literal("\n".join(lines))
