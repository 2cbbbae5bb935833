"""The counts of the summary against the published table and against counts made in another way."""

import re

import jax
import pytest
from helpers import TINY, exit_of, save_tiny

from fcvit_jax import networks, summary
from fcvit_jax.networks.fcvit import create_model
from fcvit_jax.networks.layers import Downsample
from fcvit_jax.networks.vit import create_vit
from fcvit_jax.summary import summarize


def test_costs_equal_the_published_table(capsys):
    summary.main([])
    rows = {row[0]: row for row in map(str.split, capsys.readouterr().out.splitlines()) if row and "fcvit" in row[0]}
    found = {name: (row[5], f"{int(row[6].replace(',', '')) / 1e9:.3f}") for name, row in rows.items()}
    assert found == {
        "fcvit_tiny": ("4,784,752", "0.902"),
        "fcvit_s12": ("14,701,832", "2.645"),
        "fcvit_s24": ("26,960,232", "5.059"),
        "fcvit_s48": ("51,477,032", "9.885"),
    }


def test_multiply_adds_of_the_options_by_hand():
    kwargs = TINY | {"depths": [1, 0, 0, 0], "kernel_sizes": [3], "mlp_ratios": [2, 1, 1, 1]}
    parts = summarize(create_model(**kwargs, spatial_attention=True, channel_attention=True), image_size=64)
    positions, c = 16 * 16, 16
    context = c * 4 + 2 * c + positions * c  # to twice c // 8 channels and back, and the similarity
    token_mixer = context + positions * (9 * c + c * 16 + 16 * c) + positions * (9 * c + c * 2 + 2 * c)
    channel_mixer = positions * (c * 2 * c + 9 * 2 * c + 2 * c * c) + c * (3 + 5)
    assert parts["stages 0"].multiply_adds == token_mixer + channel_mixer
    assert parts["stem"].multiply_adds == positions * 49 * 3 * c


def test_a_checkpoint_is_summarised_without_being_run(tmp_path, capsys, monkeypatch):
    save_tiny(tmp_path / "tiny")
    images = []

    def call(self, x, *args, _original=Downsample.__call__, **kwargs):
        images.append(x)
        return _original(self, x, *args, **kwargs)

    monkeypatch.setattr(Downsample, "__call__", call)
    summary.main(["--checkpoint", str(tmp_path / "tiny")])
    assert "one image of 40 x 40" in capsys.readouterr().out  # as it was trained
    summary.main(["--checkpoint", str(tmp_path / "tiny"), "--image-size", "70"])
    assert images and all(isinstance(x, jax.core.Tracer) for x in images)
    out = capsys.readouterr().out
    assert "3 classes, float32, one image of 70 x 70" in out
    rows = {row[0]: row[1] for line in out.splitlines() if len(row := re.split("  +", line)) > 2}
    assert rows["stages 0"] == "18 x 18 x 16" and rows["stages 3"] == "3 x 3 x 32" and rows["head"] == "3"


# Parameters: counted by timm. Multiply-adds in millions: by hand below, and 4.6 and 4.5 thousand in the papers.
@pytest.mark.parametrize(
    ("name", "parameters", "millions"),
    [
        ("deit_small_patch16_224", 22_050_664, 4_599),
        ("deit_tiny_distilled_patch16_224", 5_910_800, None),
        ("vit_base_patch16_384", 86_859_496, None),
        ("vit_small_patch14_dinov2", 22_056_192 + 385 * 1000, None),
        ("convnext_tiny", 28_589_128, 4_456),
    ],
)
def test_costs_of_vit_and_convnext(name, parameters, millions):
    total = summarize(networks.create_model(name), networks.settings(name)["image_size"])["total"]
    assert total.parameters == parameters
    assert millions is None or round(total.multiply_adds / 1e6) == millions


def test_costs_of_a_narrow_convnext():
    """The parameters were counted by timm."""
    fields = {"depths": (2, 2, 5, 1), "dims": (32, 64, 128, 256)}
    costs = summarize(networks.create_model("convnext_tiny", 10, **fields), 64)["total"]
    assert costs.parameters == 1_502_314 and round(costs.multiply_adds / 1e6) == 25


def test_multiply_adds_of_a_vit_by_hand():
    c, tokens = 12, 2 + 3 * 3
    model = create_vit("deit_tiny_distilled_patch16_224", 5, dim=c, depth=2, heads=3, patch_size=8, image_size=16)
    parts = summarize(model, 24)
    assert parts["patch embed"].multiply_adds == 9 * 8 * 8 * 3 * c
    # The layers qkv, proj, fc1 and fc2; then two products, each of every pair of tokens over the channels of all heads.
    assert parts["blocks"].multiply_adds == 2 * (tokens * 12 * c * c + 2 * tokens**2 * c)
    assert parts["head"].multiply_adds == parts["head dist"].multiply_adds == 5 * c
    assert parts["pos embed"] == summary.Part((6, c), 6 * c, 0) and parts["cls token"].parameters == c
    assert parts["blocks"].shape == (tokens, c)


def test_the_tool_takes_the_names_and_the_image_size_of_vits(capsys):
    summary.main(["vit_base_patch16_384"])
    out = capsys.readouterr().out
    assert "one image of 384 x 384" in out and "577 x 768" in out and "86,859,496" in out


def test_images_need_not_be_square(capsys):
    model = create_vit("deit_tiny_patch16_224", 5, dim=12, depth=1, heads=3, patch_size=8, image_size=(16, 40))
    parts = summarize(model, (24, 40))
    assert parts["patch embed"].multiply_adds == 3 * 5 * 8 * 8 * 3 * 12
    assert parts["pos embed"].shape == (1 + 2 * 5, 12) and parts["blocks"].shape == (1 + 3 * 5, 12)
    summary.main(["fcvit_tiny", "--image-size", "192x256"])
    out = capsys.readouterr().out
    assert "one image of 192 x 256" in out and "48 x 64 x 32" in out
    for size in ("192x", "1x2x3", "abc", "192,256"):
        assert exit_of(summary.main, "fcvit_tiny", "--image-size", size) == 2


def test_sizes_that_the_network_does_not_take_are_refused():
    for name, size, message in (
        ("fcvit_tiny", 31, "--image-size=31 must be at least 32"),
        ("fcvit_tiny", "64x31", "--image-size=31 must be at least 32"),
        ("convnext_tiny", 31, "at least 32"),
        ("deit_small_patch16_224", 15, "at least 16"),
        ("deit_small_patch16_224", 40, "40 x 40 pixels cannot be cut into patches"),
    ):
        code = exit_of(summary.main, name, "--image-size", size)
        assert code.startswith("error: ") and message in code and "\n" not in code
    assert "Unknown model 'resnet'" in exit_of(summary.main, "resnet")
