"""The counts of the summary against the published table and against counts made in another way."""

import re

import jax
from helpers import TINY, exit_of, save_tiny

from fcvit_jax import summary
from fcvit_jax.networks.fcvit import create_model
from fcvit_jax.networks.layers import Downsample
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


def test_small_images_are_refused():
    assert exit_of(summary.main, "fcvit_tiny", "--image-size", 31).startswith("error: --image-size=31")
    assert "Unknown model 'resnet'" in exit_of(summary.main, "resnet")
