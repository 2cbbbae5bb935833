"""The maps, marks and curves in the figures of attention, and that nothing of a figure is cut off."""

import numpy as np
import pytest
from helpers import assert_nothing_is_cut_off
from matplotlib.patches import Rectangle

from fcvit_jax.errors import UserError
from fcvit_jax.figures.attention import draw_depth, draw_heads, draw_queries, query_maps

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 48, 3), np.uint8)


def scaled(x):
    return (x - x.min()) / (x.max() - x.min())


def test_query_maps_are_rows_of_the_attention_over_patches():
    attention = RNG.dirichlet(np.ones(8), (2, 3, 8))  # two prefix tokens, 2 x 3 patches
    row = attention[:, :, 2 + 5, 2:]
    maps = query_maps(attention, (2, 3), (1, 2), prefix=2)
    np.testing.assert_allclose(maps, (row / row.sum(-1, keepdims=True)).reshape(2, 3, 2, 3))
    of_class = query_maps(attention[0, 0], (2, 3), None, prefix=2)
    np.testing.assert_allclose(of_class.ravel(), attention[0, 0, 0, 2:] / attention[0, 0, 0, 2:].sum())


@pytest.mark.parametrize(("grid", "query"), [((2, 4), (0, 0)), ((2, 3), (2, 0)), ((2, 3), (0, -1))])
def test_queries_outside_the_grid_are_refused(grid, query):
    with pytest.raises(UserError, match=f"{grid[0]} x {grid[1]}"):
        query_maps(np.ones((8, 8)), grid, query, prefix=2)


@pytest.mark.parametrize("rows", [1, 4])
def test_figure_of_queries(rows):
    points = [(0.25, 0.5), None, (0.75, 0.5), (0.1, 0.9)][:rows]
    names = ["deit_base_distilled_patch16_224", "a_$_\udcff"]
    maps = {name: RNG.random((rows, 4, 6)) for name in names}
    figure = draw_queries([IMAGE] * rows, points, maps, "Attention of head 12 in block 12")
    assert_nothing_is_cut_off(figure)
    grid = np.array(figure.axes[: 3 * rows]).reshape(rows, 3)
    for i, (row, point) in enumerate(zip(grid, points, strict=True)):
        np.testing.assert_array_equal(row[0].images[0].get_array(), IMAGE)
        for name, axis in zip(names, row[1:], strict=True):
            np.testing.assert_allclose(axis.images[1].get_array(), scaled(maps[name][i]))
            assert axis.images[1].get_clim() == (0, 1)
            assert axis.images[1].get_extent() == [-0.5, 47.5, 31.5, -0.5]
        for axis in row:
            assert {tuple(line.get_xydata()[0]) for line in axis.lines} == (
                {(point[0] * 48 - 0.5, point[1] * 32 - 0.5)} if point else set()
            )
    assert len(figure.axes) == 3 * rows + 1  # one colour bar


def test_figure_of_heads():
    maps = {"fcvit_s12": RNG.normal(0, 1, (8, 2, 3)), "vit_tiny": RNG.random((3, 4, 6))}
    maps["vit_tiny"][2] = 0.5  # says nothing, and is drawn in one colour
    figure = draw_heads(IMAGE, maps, {"fcvit_s12": None, "vit_tiny": (1, 4)}, "All heads of the last block")
    assert_nothing_is_cut_off(figure)
    image, *axes = figure.axes
    np.testing.assert_array_equal(image.images[0].get_array(), IMAGE)
    drawn = [axis for axis in axes if len(axis.images) == 2]
    assert len(drawn) == 11
    for axis, x in zip(drawn, [*maps["fcvit_s12"], *maps["vit_tiny"]], strict=True):
        np.testing.assert_allclose(axis.images[1].get_array(), scaled(x) if np.ptp(x) else np.zeros_like(x))
    frames = [[x.get_bbox().bounds for x in axis.patches if isinstance(x, Rectangle)] for axis in drawn]
    assert frames[:8] == [[]] * 8
    assert frames[8:] == [[(4 * 8 - 0.5, 1 * 8 - 0.5, 8, 8)] * 2] * 3


def test_figure_over_depth():
    def summary(depth, names):
        values = RNG.random((depth, len(names), 2))
        return {
            f"block_{i}": {name: dict(zip(("mean", "std"), x, strict=True)) for name, x in zip(names, row, strict=True)}
            for i, row in enumerate(values)
        }

    names = ("entropy", "nmi", "gini", "prefix_mass")
    networks = {"vit_$_base": summary(12, names), "fcvit_s12": summary(3, ("entropy",))}
    figure = draw_depth(networks, names)
    assert_nothing_is_cut_off(figure)
    entropy, nmi = figure.axes[:2]
    lines = [line.get_xydata() for line in entropy.lines if len(line.get_xdata())]
    for line, blocks in zip(lines, networks.values(), strict=True):
        np.testing.assert_array_equal(line[:, 0], np.arange(1, len(blocks) + 1))
        np.testing.assert_array_equal(line[:, 1], [x["entropy"]["mean"] for x in blocks.values()])
    assert sum(len(line.get_xdata()) > 0 for line in nmi.lines) == 1
    assert len(figure.legends[0].get_texts()) == 2
