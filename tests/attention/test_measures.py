"""The measures of attention equal stored ones, and direct computation over all pairs."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from equality import nhwc
from flax import linen as nn
from helpers import exit_of, save_images, save_tiny
from PIL import Image
from timm_equality import variables_of

from fcvit_jax import attention
from fcvit_jax.attention.__main__ import main
from fcvit_jax.convert import vit as convert_vit
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import FCViT, abstract_variables
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.networks.vit import ViT
from fcvit_jax.predict import read_image
from fcvit_jax.run import saved

DATA = Path(__file__).parent.parent / "data" / "attention"
NAMES = {
    *("query_cosine", "query_cosine_all", "query_correlation", "nmi"),
    *("head_correlation", "head_correlation_per_query", "prefix_mass"),
    *("entropy", "entropy_all", "top_mass", "top_mass_all", "gini", "gini_all"),
}


def load(name):
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


CASES = load("metrics_cases")


def assert_measures(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(actual[name], x, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", sorted({name.split("/")[0] for name in CASES} - {"maps"}))
def test_measures_equal_stored_ones(case):
    expected = {name.split("/")[1]: x for name, x in CASES.items() if name.startswith(f"{case}/")}
    maps, prefix = expected.pop("attention"), 2 if case == "random_two_prefix" else 1
    assert expected.keys() == NAMES
    assert_measures(attention.measures(maps, prefix), expected)
    single = attention.measures(maps[0], prefix)
    assert all(isinstance(x, float) for x in single.values())
    assert_measures(single, {name: x[0] for name, x in expected.items()})


def test_map_measures_equal_stored_ones():
    expected = {name.split("/")[1]: x for name, x in CASES.items() if name.startswith("maps/")}
    maps = expected.pop("similarity")
    assert_measures(attention.map_measures(maps), expected)
    assert_measures(attention.map_measures(maps[1]), {name: x[1] for name, x in expected.items()})


@pytest.mark.parametrize("name", ["vit_plain", "vit_distilled"])
def test_measures_of_networks_equal_stored_ones(name):
    arrays, prefix = load(name), 2 if name == "vit_distilled" else 1
    for size, block in itertools.product(range(3), range(3)):
        actual = attention.measures(arrays[f"in{size}/attn{block}"], prefix)
        assert_measures(actual, {key: arrays[f"in{size}/metrics/{key}"][block] for key in NAMES})


def test_measures_equal_all_pairs_and_leave_constant_maps_out():
    """Two maps of head 0 and all of head 2 are constant."""
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.full(9, 0.3), (3, 9))
    maps[0, [2, 5]] = maps[2] = 1 / 9
    a = maps[:, 1:, 1:] / maps[:, 1:, 1:].sum(-1, keepdims=True)

    def mean_correlation(rows):
        rows = [row for row in rows if np.ptp(row) > 1e-9]
        pairs = [np.corrcoef(x, y)[0, 1] for x, y in itertools.combinations(rows, 2)]
        return np.mean(pairs) if pairs else np.nan

    found = attention.measures(maps)
    np.testing.assert_allclose(found["query_correlation"], np.mean([mean_correlation(a[h]) for h in (0, 1)]), atol=1e-5)
    np.testing.assert_allclose(found["head_correlation"], mean_correlation(a.mean(1)), atol=1e-5)
    # With head 0 constant for two queries, they have no pair of heads.
    per_query = [mean_correlation(a[:, q]) for q in range(8) if q not in (1, 4)]
    np.testing.assert_allclose(found["head_correlation_per_query"], np.mean(per_query), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 5), (1, 2, 1, 1)])
def test_what_is_no_attention_is_refused(shape):
    with pytest.raises(UserError, match=r"T > 1"):
        attention.measures(np.ones(shape))
    with pytest.raises(UserError, match=r"heads"):
        attention.map_measures(np.ones((4, 4)))


class Sower(nn.Module):
    @nn.compact
    def __call__(self, attention):
        self.sow("intermediates", "attention", attention)


class Eleven(nn.Module):
    """Eleven blocks whose attention is what comes in, mixed with ever more evenness."""

    prefix = 1

    @nn.compact
    def __call__(self, attention):
        for i in range(11):
            Sower(name=f"block_{i}")(attention * (1 - i / 10) + i / 10 / attention.shape[-1])


def test_blocks_are_measured_in_their_order():
    maps = np.random.default_rng(0).dirichlet(np.full(5, 0.1), (2, 3, 5)).astype(np.float32)
    found = attention.block_measures(Eleven(), {}, maps)
    assert list(found) == [f"block_{i}" for i in range(11)]
    assert (np.diff([x["entropy"] for x in found.values()], axis=0) > 0).all()


def test_blocks_of_a_vit_are_measured():
    arrays = {key: x.astype(np.float32) for key, x in load("vit_distilled").items() if key != "meta"}
    fields = {"dim": 48, "depth": 3, "heads": 3, "patch_size": 8, "image_size": 32, "num_classes": 10}
    model = ViT(distilled=True, **fields)
    variables = variables_of({key[3:]: x for key, x in arrays.items() if key.startswith("sd/")}, model, convert_vit)
    found = attention.block_measures(model, variables, nhwc(arrays["in0/images_nchw"]))
    for i in range(3):
        assert_measures(found[f"block_{i}"], {key: arrays[f"in0/metrics/{key}"][i] for key in NAMES})


def test_contexts_of_an_fcvit_are_measured_where_maps_have_positions():
    model = FCViT(depths=(1, 0, 0, 1), dims=(8,) * 4, mlp_ratios=(1,) * 4, context_heads=4, num_classes=2)
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1, (2, 32, 32, 3)).astype(np.float32)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32), abstract_variables(model))
    found = attention.block_measures(model, variables, images)
    assert list(found) == ["stages_0_block_0/context1", "stages_0_block_0/context2"]
    sown = jax.jit(lambda v: model.apply(v, images, mutable=["intermediates"]))(variables)[1]["intermediates"]
    maps = sown["stages_0_block_0"]["token_mixer"]["context2"]["similarity"][0]
    assert_measures(found["stages_0_block_0/context2"], attention.map_measures(maps))


def test_a_network_without_attention_is_refused():
    with pytest.raises(UserError, match="measure"):
        attention.block_measures(nn.Dense(2), {"params": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}}, np.ones(3))


def test_summary_is_over_images_and_the_table_shows_it():
    batches = [{"block_0": {"entropy": [0.1, 0.3], "nmi": [np.nan] * 2}}, {"block_0": {"entropy": [0.8], "nmi": [0.5]}}]
    summary = attention.summarise(batches)
    np.testing.assert_allclose(summary["block_0"]["entropy"]["mean"], 0.4)
    np.testing.assert_allclose(summary["block_0"]["entropy"]["std"], np.std([0.1, 0.3, 0.8]))
    assert summary["block_0"]["nmi"] == {"mean": 0.5, "std": 0.0}
    head, line = attention.table(summary, names=("entropy", "gini", "nmi")).splitlines()
    assert head.split() == ["block", "entropy", "nmi"]
    assert line.split() == ["block_0", "0.400", "±", "0.294", "0.500", "±", "0.000"]


def test_the_tool_measures_every_image_once_whatever_the_batches(tmp_path, capsys):
    checkpoint, images = save_tiny(tmp_path / "tiny"), save_images(tmp_path / "images", 3)
    run = ["--checkpoint", str(checkpoint), "--images", str(tmp_path / "images")]
    main([*run, "--batch-size", "2", "--json", "--figure", str(tmp_path / "new/depth.png")])
    (line,) = capsys.readouterr().out.splitlines()
    printed = json.loads(line)
    assert (printed["checkpoint"], printed["images"]) == (str(checkpoint), 3)
    assert Image.open(tmp_path / "new/depth.png").size[0] > 500

    loaded = saved.load(checkpoint)
    pixels = np.stack([read_image(path, loaded.metadata) for path in images])
    found = attention.block_measures(loaded.model, loaded.variables, normalize(pixels))
    assert printed["blocks"].keys() == found.keys() and len(found) == 4
    for block, values in found.items():
        for name, x in values.items():
            shown = printed["blocks"][block][name]
            np.testing.assert_allclose([shown["mean"], shown["std"]], [np.mean(x), np.std(x)], atol=1e-5)
            assert np.std(x) > 1e-4

    main([*run, "--limit", "1"])
    text = capsys.readouterr().out
    assert "1 images" in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith("stages")] == list(found)


@pytest.mark.parametrize("argv", [["--limit", "0"], ["--batch-size", "0"], ["--figure", "depth.txt"]])
def test_mistakes_in_the_tools_arguments_are_told_before_any_work(tmp_path, argv):
    message = exit_of(main, "--checkpoint", tmp_path, "--images", tmp_path, *argv)
    assert argv[0] in message or argv[1] in message
