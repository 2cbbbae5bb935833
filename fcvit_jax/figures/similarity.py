"""The figure of token-global similarity: what every head of an FCViT's context sees."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fcvit_jax.attention import intermediates
from fcvit_jax.errors import UserError
from fcvit_jax.figures import literal
from fcvit_jax.networks.normalize import normalize


def similarity_maps(
    model: nn.Module, variables: Mapping[str, Any], images: np.ndarray, block: str | None = None
) -> tuple[str, np.ndarray]:
    """Computes the similarity of every position to the image's mean, by the last context of a block (paper, figure 3).

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, 3) uint8.
      block: the block's name, such as "stages_3_block_1"; None: the last block whose map has more than one position.

    Returns:
      The block's name, and (N, h, w, context_heads) float32, with zero mean and unit variance for each image.

    Raises:
      UserError: there is no such block, its map has only one position, or the network computes no similarity.
    """
    sown = traverse_util.flatten_dict(intermediates(model, variables, normalize(images, model.mean, model.std)))
    paths = sorted((path for path in sown if path[-1] == "similarity"), key=_natural_order)
    if not paths:
        raise UserError("The network computes no similarity: it has no weighted context.")
    maps = {path[0]: np.asarray(sown[path][0]) for path in paths}  # the last context of a block replaces the others
    wide = [name for name in maps if maps[name][0, ..., 0].size > 1]
    if not wide or (block is not None and block not in wide):
        raise UserError(f"There is no map to draw of block {block}: choose from {', '.join(wide)}.")
    return block or wide[-1], maps[block or wide[-1]]


def _natural_order(path: Sequence[str]) -> list:
    """A sort key that compares numbers in names by value: block 2 comes before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", "/".join(path))]


def head_correlation(maps: np.ndarray) -> float:
    """The mean Pearson correlation between the maps of every pair of heads.

    Args:
      maps: (h, w, heads).

    Returns:
      A number in [-1, 1]; NaN if fewer than two heads have a map that varies.
    """
    maps = maps.reshape(-1, maps.shape[-1])
    maps = maps[:, maps.std(0) > 0]
    pairs = np.atleast_2d(np.corrcoef(maps, rowvar=False))[np.triu_indices(maps.shape[1], 1)]
    return float(pairs.mean()) if pairs.size else float("nan")


def draw_similarity(images: Sequence[np.ndarray], maps: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draws one row per image: the image, then the standardised map of each head on top of the grey image.

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
    # Standardised, as in the correlation. Heads differ so much in strength that most maps would show a single colour.
    deviations = (maps - maps.mean((1, 2), keepdims=True)) / np.maximum(maps.std((1, 2), keepdims=True), 1e-6)
    norm = Normalize(*np.percentile(deviations, (1, 99)))
    for row, image, image_maps, drawn, name in zip(axes, images, maps, deviations, names, strict=True):
        grey = image.mean(-1)
        for axis in row:
            axis.set(xticks=[], yticks=[])
        row[0].imshow(image)
        label = literal(name if len(name) <= 18 else "…" + name[-17:])
        row[0].set_xlabel(f"{label}\nr = {head_correlation(image_maps):.2f}", fontsize=9)
        for head, axis in enumerate(row[1:]):
            # Grey with weak contrast, so that brightness and colour show the similarity.
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
    figure.draw_without_rendering()
    figure.set_figheight(figure.get_tightbbox().height + 0.1)  # the images' shape may leave bands above and below
    return figure
