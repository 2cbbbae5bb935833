"""A network whose constants are folded into its weights gives what the network gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_close
from flax import traverse_util

from fcvit_jax import networks
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import abstract_variables, create_backbone, create_model
from fcvit_jax.networks.folded import fold
from fcvit_jax.networks.semantic_fpn import create_segmenter

SIZES = {"depths": (2, 1, 0, 1), "dims": (8, 16, 16, 24), "mlp_ratios": (2, 2, 1, 1), "kernel_sizes": (5, 3)}


def trained(model, seed=0):
    """Variables far from their start: a constant at 0 or 1 could be lost unseen."""
    rng = np.random.default_rng(seed)

    def values(path, leaf):
        name = path[-1].key
        x = rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-1, 1], leaf.shape)
        if name == "kernel":
            x /= np.prod(leaf.shape[:-1]) ** 0.5
        return (np.abs(x) if name == "var" else x).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, abstract_variables(model))


def outputs(model, variables, images, **options):
    """What the network gives, and the similarities that it sows."""
    run = functools.partial(model.apply, mutable=["intermediates"], **options)
    return jax.jit(run)(variables, images)


def assert_folded_gives_the_same(model, shape, seed=0, sizes=None):
    variables = trained(model, seed)
    images = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    before = jax.tree.map(np.copy, variables)
    fast, weights = fold(model, variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)  # they are not changed in place

    options = {} if sizes is None else {"sizes": np.array(sizes)}
    expected = jax.tree_util.tree_leaves_with_path(outputs(model, variables, images, **options))
    found = jax.tree_util.tree_leaves_with_path(outputs(fast, weights, images, **options))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, x), (_, y) in zip(found, expected, strict=True):
        assert_close(x, y, jax.tree_util.keystr(path))
    return fast, weights


@pytest.mark.parametrize(
    "options",
    [
        {"channel_attention": True, "spatial_attention": True, "competition": False, "share_blocks": True},
        {"weighted_context": False, "mix_reduction": 1, "freeze_bn": True},
        {"use_context": False, "mlp_kernel_size": None, "num_classes": 0, "bn_group_size": 1, "remat": True},
        {"layer_scale_init": None, "channel_attention": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_classifier(options):
    seed = len(str(options))
    size = np.random.default_rng(seed).integers([1, 32, 32], [3, 70, 70])
    assert_folded_gives_the_same(create_model("fcvit_tiny", **{"num_classes": 3} | SIZES | options), (*size, 3), seed)


def test_folded_constants_are_gone_and_no_others():
    model = create_model("fcvit_tiny", 3, **SIZES)
    fast, weights = assert_folded_gives_the_same(model, (2, 40, 64, 3))
    before = traverse_util.flatten_dict(trained(model), sep="/")
    gone = before.keys() - traverse_util.flatten_dict(weights, sep="/").keys()
    constants = ("/norm/", "/norm2/", "layer_scale2", "token_mixer/depthwise1/bias", "token_mixer/depthwise2/bias")
    assert gone == {name for name in before if any(part in name for part in constants)}
    # The folded network is a network like any other: it has such variables and no others.
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, abstract_variables(fast))
    assert jax.tree.map(lambda x: x.dtype, weights) == jax.tree.map(lambda x: x.dtype, abstract_variables(fast))


def test_pyramid_of_images_on_a_canvas():
    backbone = create_backbone("fcvit_tiny", **SIZES | {"kernel_sizes": (5,)})
    assert_folded_gives_the_same(backbone, (2, 64, 80, 3), sizes=[(44, 70), (64, 80)])


def test_a_network_with_a_backbone():
    segmenter = create_segmenter("fcvit_tiny", 3, neck_channels=8, head_channels=8, **SIZES | {"dims": (8, 8, 8, 8)})
    fast, weights = assert_folded_gives_the_same(segmenter, (1, 64, 32, 3))
    assert fast.backbone.folded and set(weights["batch_stats"]) == {"head"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_tiny"])
def test_other_networks_stay_as_they_are(name):
    model, variables = networks.create_model(name, 3), {"params": {}}
    assert fold(model, variables) == (model, variables)


def test_twice_is_once():
    model = create_model("fcvit_tiny", 3, **SIZES)
    once = fold(model, trained(model))
    assert fold(*once) == once


def test_a_folded_network_is_not_trained_and_no_option_of_configs():
    fast, weights = fold(model := create_model("fcvit_tiny", 3, **SIZES), trained(model))
    with pytest.raises(UserError, match="folded"):
        fast.apply(weights, jnp.zeros((1, 32, 32, 3)), train=True)
    assert "folded" not in networks.model_fields("fcvit_tiny")
