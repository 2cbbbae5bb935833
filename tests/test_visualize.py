"""The maps and numbers in the figures, and that nothing of a figure is cut off."""

import json

import jax
import numpy as np
import pytest
from helpers import TINY, assert_nothing_is_cut_off, exit_of, save_images, save_tiny, tiny_variables
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fcvit_jax import visualize
from fcvit_jax.augment.mixing import normalize
from fcvit_jax.errors import UserError
from fcvit_jax.figures.curves import draw_curves, read_metrics, smoothed
from fcvit_jax.figures.similarity import draw_similarity, head_correlation, similarity_maps
from fcvit_jax.networks.fcvit import create_model

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), np.uint8)


def test_maps_are_those_of_the_last_context_of_the_block():
    model, variables = create_model(**TINY), tiny_variables()
    block, maps = similarity_maps(model, variables, IMAGES, "stages_0_block_0")
    assert block == "stages_0_block_0" and maps.shape == (2, 10, 16, 8)
    _, sown = jax.jit(lambda x: model.apply(variables, x, mutable="intermediates"))(normalize(IMAGES))
    sown = sown["intermediates"]["stages_0_block_0"]["token_mixer"]
    np.testing.assert_allclose(maps, sown["context2"]["similarity"][0], atol=1e-4)
    assert np.abs(maps - sown["context1"]["similarity"][0]).max() > 0.1


def test_the_default_is_the_last_block_with_a_map():
    model, variables = create_model(**TINY), tiny_variables()
    assert similarity_maps(model, variables, IMAGES)[0] == "stages_3_block_0"
    small = IMAGES[:, :32, :32]  # one position in the last stage
    assert similarity_maps(model, variables, small)[0] == "stages_0_block_0"
    with pytest.raises(UserError, match="block stages_3_block_0: choose from stages_0_block_0\\."):
        similarity_maps(model, variables, small, "stages_3_block_0")
    with pytest.raises(UserError, match="computes no similarity"):
        similarity_maps(model.clone(weighted_context=False), variables, small)


def test_blocks_are_counted_not_sorted_by_name():
    options = {"depths": [0, 0, 0, 11], "kernel_sizes": [1], "mlp_kernel_size": None}
    model, variables = create_model(**TINY | options), tiny_variables(**options)
    assert similarity_maps(model, variables, IMAGES)[0] == "stages_3_block_10"


def test_head_correlation():
    maps = np.random.default_rng(1).normal(size=(5, 7, 4))
    matrix = np.corrcoef(maps.reshape(35, 4).T)
    assert head_correlation(maps) == pytest.approx((matrix.sum() - 4) / 12)
    x = maps[..., :1]
    assert head_correlation(np.concatenate([x, 2 * x + 3, np.ones_like(x)], -1)) == pytest.approx(1)
    assert head_correlation(np.concatenate([x, -x], -1)) == pytest.approx(-1)
    assert np.isnan(head_correlation(x)) and np.isnan(head_correlation(np.ones((2, 2, 3))))


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (1, 8), (3, 8), (5, 2)])
def test_similarity_figure(rows, heads):
    rng = np.random.default_rng(2)
    maps = rng.normal(size=(rows, 4, 4, heads)) * np.logspace(0, 2, heads) + rng.normal(size=heads)
    maps[0, ..., -1] = 3  # says nothing, and is drawn in one colour
    images = [IMAGES[0, :, :40]] * rows
    title = "Token-global similarity in stages_2_block_11\nmean correlation between heads r = -0.12"
    figure = draw_similarity(images, maps, ["some/folder/a_name_$_$_long\udcff.jpeg"] * rows, title)
    assert_nothing_is_cut_off(figure)
    box = figure.get_tightbbox()
    assert figure.get_size_inches()[1] - box.height < 0.25  # no empty band above or below
    grid = np.array(figure.axes[: rows * (heads + 1)]).reshape(rows, heads + 1)
    for row, image_maps in zip(grid, maps, strict=True):
        np.testing.assert_array_equal(row[0].images[0].get_array(), images[0])
        for head, axis in enumerate(row[1:]):
            under, over = axis.images
            x = image_maps[..., head]
            np.testing.assert_allclose(over.get_array(), (x - x.mean()) / (x.std() or 1), atol=1e-6)
            assert over.get_extent() == under.get_extent() and over.norm is grid[0, 1].images[1].norm
    assert f"r = {head_correlation(maps[0]):.2f}" in grid[0, 0].get_xlabel()


def test_similarity_from_the_command_line(tmp_path, capsys):
    paths = save_images(tmp_path, 2)
    args = ["similarity", "--checkpoint", save_tiny(tmp_path / "tiny"), *paths, "--output"]
    visualize.main([*map(str, args), str(tmp_path / "new/out.png")])
    out = capsys.readouterr().out
    assert out.count("correlation between heads") == 2 and "mean correlation" in out and "stages_3_block_0" in out
    assert np.ptp(np.asarray(Image.open(tmp_path / "new/out.png").convert("L"))) > 200
    for name in ("out.xyz", "out"):
        assert f"{name}: its ending must be one of ." in exit_of(visualize.main, *args, tmp_path / name)
    visualize.main([*map(str, args[:3]), str(tmp_path), "--output", str(tmp_path / "new/of_a_folder.png")])
    assert str(paths[1]) in capsys.readouterr().out
    many = save_images(tmp_path / "many", 33)
    assert "33 images do not fit" in exit_of(visualize.main, *args[:3], *many, "--output", tmp_path / "out.png")
    assert "No such file" in exit_of(visualize.main, *args[:3], tmp_path / "no.png", "--output", tmp_path / "out.png")
    assert "out.png cannot be written" in exit_of(visualize.main, *args, paths[0] / "out.png")


def write_run(folder, factor):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    lines = [
        {"step": 10, "epoch": 1.0, "train/loss": 2.0 * factor, "train/lr": 0.1},
        {"step": 15, "epoch": 1.5, "eval/loss": 1.5 * factor, "eval/top1": 0.5 * factor},
        {"step": 20, "epoch": 2.0, "train/loss": 1.0 * factor, "train/lr": 0.2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves(tmp_path):
    for factor, name in [(1, "a"), (0.5, "_b$x$")]:
        write_run(tmp_path / name, factor)
    with (tmp_path / "_b$x$" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')  # the run was killed
    runs = {str(tmp_path / name): read_metrics(tmp_path / name) for name in ("a", "_b$x$")}
    figure = draw_curves(runs)
    assert_nothing_is_cut_off(figure)
    loss, rate, top1 = figure.axes
    curves = [[line.get_xydata().tolist() for line in axis.lines if len(line.get_xydata())] for axis in figure.axes]
    points, smooth, validation = curves[0][::3], curves[0][1::3], curves[0][2::3]
    assert points == [[[1, 2], [2, 1]], [[1, 1], [2, 0.5]]] and validation == [[[1.5, 1.5]], [[1.5, 0.75]]]
    np.testing.assert_allclose(smooth, points, atol=1e-3)  # too few to smooth
    assert curves[1] == [[[1, 0.1], [2, 0.2]]] * 2 and curves[2] == [[[1.5, 50]], [[1.5, 25]]]
    assert [axis.get_title() for axis in figure.axes] == ["Loss", "Learning rate", "top1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"{tmp_path / 'a'}: best top1 50.00 %",
        rf"{tmp_path}/_b\$x\$: best top1 25.00 %",
    ]
    visualize.main(["curves", str(tmp_path / "a"), "--output", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_drawn_loss_is_smoothed_and_the_legends_are_off_the_curves(tmp_path):
    rng = np.random.default_rng(0)
    losses = 2 - 0.01 * np.arange(100) + rng.uniform(-0.5, 0.5, 100)
    lines = [{"step": i, "epoch": i / 10, "train/loss": x, "train/lr": None} for i, x in enumerate(losses)]
    lines += [{"step": 99, "epoch": 9.9, "eval/loss": 1.0, "eval/mask_ap": 0.25, "eval/box_ap": 0.5}]
    figure = draw_curves({"a": lines, "b": lines[:-1], "c": []}, "mask_ap")
    points, smooth = figure.axes[0].lines[:2]
    np.testing.assert_array_equal(points.get_ydata(), losses)
    assert points.get_alpha() < 0.5 and points.get_linestyle() == "None" and smooth.get_linestyle() == "-"
    np.testing.assert_array_equal(smooth.get_xdata(), points.get_xdata())
    np.testing.assert_allclose(smooth.get_ydata()[10:-10], (2 - 0.01 * np.arange(100))[10:-10], atol=0.25)
    assert np.abs(np.diff(smooth.get_ydata())).max() < 0.06 < np.abs(np.diff(losses)).max() / 10
    assert figure.axes[2].lines[0].get_ydata().tolist() == [25.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a: best mask_ap 25.00 %",
        "b: not evaluated yet",
        "c: not evaluated yet",
    ]
    assert_nothing_is_cut_off(figure)
    canvas = FigureCanvasAgg(figure)
    boxes = [axis.get_tightbbox(canvas.get_renderer()) for axis in figure.axes]
    for legend in figure.legends:
        assert not legend.get_window_extent(canvas.get_renderer()).count_overlaps(boxes)
    assert len(figure.legends) == 2 and not any(axis.get_legend() for axis in figure.axes)


def test_smoothing_keeps_constants_and_takes_any_number_of_values():
    for count in (0, 1, 2, 3, 50):
        np.testing.assert_allclose(smoothed([0.7] * count), np.full(count, 0.7))


def test_curves_of_what_is_no_run(tmp_path):
    args = "curves", tmp_path, "--output", tmp_path / "curves.png"
    assert "metrics.jsonl: No such file" in exit_of(visualize.main, *args)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "reported nothing yet" in exit_of(visualize.main, *args)
    (tmp_path / "metrics.jsonl").write_text('broken\n{"step": 1}\n')
    assert "line 1 is not JSON" in exit_of(visualize.main, *args)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    assert "of another program" in exit_of(visualize.main, *args)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 1, "epoch": "x"}', "damaged: epoch is 'x', not a number"),
        (b'{"epoch": 1, "train/loss": [1]}', "damaged: train/loss"),
        (b'{"epoch": ' * 2000, "line 1 is not JSON"),
        (b"[1]", "line 1 is not JSON"),
        (b"\xff\xfe", "line 1 is not JSON"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_bytes(line + b'\n{"step": 2, "epoch": 2}\n')
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)
