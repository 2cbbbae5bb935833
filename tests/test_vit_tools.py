"""The tools with a ViT's weights: its own mean, its blocks in order, files of weights, and what cannot be drawn."""

import json

import jax
import numpy as np
import pytest
import tiny_vit
from test_predict import exit_of, save_images, save_tiny
from tiny_vit import METADATA, pixels_of, save_vit

from fcvit_jax import attention, convert, export, predict, summary, visualize
from fcvit_jax.attention.__main__ import main as measure
from fcvit_jax.networks.convnext import create_convnext
from fcvit_jax.networks.fcvit import abstract_variables
from fcvit_jax.run.checkpoint import save_variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a ViT's checkpoint "vit", the same as the file vit.npz, three images, and what the network makes of them."""
    folder = tmp_path_factory.mktemp("vit")
    save_vit(folder / "vit")
    convert.convert(folder / "vit", folder / "vit.npz")
    save_images(folder / "images", 3)
    return folder


@pytest.fixture(scope="module")
def truth(folder):
    """The images as evaluation sees them, the logits, and the attention of every block."""
    images = np.stack([predict.read_image(path, METADATA) for path in sorted((folder / "images").iterdir())])
    model, variables = tiny_vit.model_and_variables()
    apply = jax.jit(lambda x: model.apply(variables, x, mutable=["intermediates"]))
    logits, state = apply(pixels_of(images))
    blocks = [np.asarray(state["intermediates"][f"block_{i}"]["attention"][0]) for i in range(model.depth)]
    assert np.ptp(logits, axis=0).min() > 0.05 and np.std(blocks[-1]) > 0.01
    return images, np.asarray(logits), blocks


@pytest.mark.parametrize("source", ["vit", "vit.npz"])
def test_predictions_are_those_of_the_network_with_its_own_mean(folder, truth, source, capsys):
    args = "--checkpoint", folder / source, folder / "images", "--json", "--top", 3
    assert exit_of(predict.main, *args) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, logits in zip(lines, truth[1], strict=True):
        found = {p["class"]: p["probability"] for p in line["predictions"]}
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose([found[name] for name in METADATA["class_names"]], expected, rtol=1e-4)


def test_the_exported_program_gives_the_logits_and_its_weights_load_again(folder, truth):
    export.main(["--checkpoint", str(folder / "vit"), str(folder / "exported")])
    program = jax.export.deserialize((folder / "exported/model.jax_export").read_bytes())
    np.testing.assert_allclose(program.call(truth[0]), truth[1], rtol=1e-4, atol=1e-5)
    loaded = predict.load(folder / "exported/model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, predict.load(folder / "vit"))


@pytest.mark.parametrize("source", ["vit", "vit.npz"])
def test_the_measures_are_those_of_the_attention_block_by_block(folder, truth, source, capsys):
    run = ["--checkpoint", str(folder / source), "--images", str(folder / "images"), "--batch-size", "2"]
    measure([*run, "--json"])
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    names = [f"block_{i}" for i in range(11)]
    assert list(blocks) == names
    for name, x in zip(names, truth[2], strict=True):
        for key, values in attention.measures(x).items():
            found = blocks[name][key]
            np.testing.assert_allclose([found["mean"], found["std"]], [np.mean(values), np.std(values)], atol=1e-5)
    if source == "vit":
        measure(run)
        rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("block_")]
        assert rows == names


def test_a_summary_knows_the_network(folder, capsys):
    summary.main(["--checkpoint", str(folder / "vit")])
    assert "3 classes, float32, one image of 24 x 24" in capsys.readouterr().out


@pytest.fixture
def drawn(monkeypatch):
    """What visualize gives to the functions that draw."""
    found = {}
    for name in ("draw_queries", "draw_heads"):
        original = getattr(visualize, name)

        def draw(*args, name=name, original=original):
            found[name] = args
            return original(*args)

        monkeypatch.setattr(visualize, name, draw)
    return found


def share(row, prefix=1):
    """The patches' share of a query's attention, as a map of 3 x 3 patches."""
    return (row[prefix:] / row[prefix:].sum()).reshape(3, 3)


def test_queries_are_drawn_with_the_map_of_their_patch(folder, truth, drawn):
    out = folder / "queries.png"
    images = sorted((folder / "images").iterdir())[:2]
    args = ["--query", "23,8", "--query", "class", "--block", "block_10", "--head", "2", "--output", out]
    visualize.main([*map(str, ["attention", "--checkpoint", folder / "vit", *images, *args])])
    shown, points, maps, _ = drawn["draw_queries"]
    np.testing.assert_array_equal(shown, truth[0][[0, 0, 1, 1]])
    assert points == [(8.5 / 24, 23.5 / 24), None] * 2
    ((name, found),) = maps.items()
    assert name == f"{folder / 'vit'}, block_10, head 2"
    x = truth[2][10][:2, 1]
    expected = [share(x[i, query]) for i in range(2) for query in (1 + 2 * 3 + 1, 0)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert out.stat().st_size > 10_000


def test_all_heads_are_drawn_beside_those_of_an_fcvit(folder, truth, drawn):
    save_tiny(folder / "fcvit")  # it sees 40 x 40 pixels
    image = sorted((folder / "images").iterdir())[0]
    args = ["attention", "--checkpoint", folder / "fcvit", "--beside", folder / "vit.npz", image, "--query", "39,15"]
    visualize.main([*map(str, [*args, "--output", folder / "heads.png"])])
    _, maps, queries, _ = drawn["draw_heads"]
    (fcvit, heads), (vit, theirs) = maps.items()
    assert fcvit.endswith("fcvit, stages_3_block_0") and heads.shape == (8, 2, 2) and queries[fcvit] is None
    assert vit.endswith("vit.npz, block_10") and queries[vit] == (2, 1)
    np.testing.assert_allclose(theirs, [share(x) for x in truth[2][10][0, :, 1 + 2 * 3 + 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--query", "24,0"], "--query=24,0 is outside the image, of which the network sees 24 x 24 pixels"),
        (["--query", "-1,0"], "y,x in pixels"),
        (["--query", "3"], "y,x in pixels"),
        (["--head", "3"], "choose from 1 to 2"),
        (["--head", "0"], "choose from 1 to 2"),
        (["--block", "block_11"], "choose from block_0 to block_10"),
        (["--beside", "{}/convnext"], "convnext: The network computes no similarity"),
        (["--beside", "{}/vit", "--head", "1"], "--beside"),
        (["--beside", "{}/vit", "--query", "1,1", "--query", "2,2"], "--beside"),
        (["--checkpoint", "{}/convnext"], "convnext: This network has no attention of queries"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(folder, args, message):
    if not (folder / "convnext").exists():
        fields = {"name": "convnext_tiny", "depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_classes": 3}
        shapes = abstract_variables(create_convnext(**fields))
        ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
        save_variables(folder / "convnext", ones, METADATA | {"model": fields, "image_size": 40})
    args = [arg.format(folder) for arg in args]
    image = sorted((folder / "images").iterdir())[0]
    fixed = ["attention", "--checkpoint", folder / "vit", image, "--output", folder / "bad.png"]
    code = exit_of(visualize.main, *fixed, *[f"{args[0]}={args[1]}"], *args[2:])
    assert message in code and "\n" not in code
