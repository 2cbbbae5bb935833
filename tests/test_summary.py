"""The counts of the summary against the published table and against counts made in another way."""

import re

import jax
import jax.numpy as jnp
import pytest
from test_predict import TINY, exit_of, save_tiny

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
    assert parts["stage 1"].multiply_adds == token_mixer + channel_mixer
    assert parts["stem"].multiply_adds == positions * 49 * 3 * c


def residual_bytes(model, images):
    """What JAX keeps between the passes of the whole network."""
    x = jax.ShapeDtypeStruct((images, 96, 96, 3), jnp.float32)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    variables = jax.eval_shape(lambda x: model.init(rngs, x), x)

    def kept(variables, x):
        def loss(params):
            variables_ = variables | {"params": params}
            return model.apply(variables_, x, train=True, mutable=["batch_stats"], rngs=rngs)[0]

        return jax.vjp(loss, variables["params"])[1]

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(kept, variables, x)))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16", "dropout_rate": 0.1, "drop_path_rate": 0.5}, {"remat": True}]
)
def test_activations_are_what_a_further_image_adds_to_the_residuals(options):
    model = create_model(**TINY | options | {"bn_group_size": None, "depths": [2, 0, 0, 1]})
    expected = residual_bytes(model, 2) - residual_bytes(model, 1)
    assert summarize(model, 96)["total"].activations == pytest.approx(expected, rel=0.04)


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
    assert rows["stage 1"] == "18 x 18 x 16" and rows["stage 4"] == "3 x 3 x 32" and rows["head"] == "3"


def test_small_images_are_refused():
    assert exit_of(summary.main, "fcvit_tiny", "--image-size", 31).startswith("error: --image-size=31")
    assert "Unknown model 'resnet'" in exit_of(summary.main, "resnet")
