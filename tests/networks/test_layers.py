"""The basic layers: downsampling against `torch_reference`, and BatchNorm's groups."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference
from equality import assert_module_equals, at_random

from fcvit_jax.errors import UserError
from fcvit_jax.networks import create_model
from fcvit_jax.networks.layers import BatchNorm, Downsample


@at_random(kernel=st.sampled_from([(7, 4), (3, 2)]), train=st.booleans())
def test_downsampling_equals_the_reference(shape, seed, options):
    (kernel_size, stride), train = options["kernel"], options["train"]
    ours = Downsample(16, kernel_size, stride)
    theirs = torch_reference.Downsample(shape[-1], 16, kernel_size, stride).train(train)
    shape = (shape[0] + 1, *(4 * n for n in shape[1:3]), shape[3])
    assert_module_equals(ours, theirs, ("stem", "patch_embed"), shape, seed, train)


def test_an_empty_batch_can_be_evaluated():
    """As a detector gives it that has found nothing."""
    y, _ = BatchNorm(group_size=4).init_with_output(jax.random.key(0), jnp.zeros((0, 2, 2, 3)), train=False)
    assert y.shape == (0, 2, 2, 3)


def test_batch_statistics_of_groups():
    """Groups are normalised apart; the running averages move to the mean over the groups."""
    x = np.random.default_rng(0).normal(3, 2, (6, 2, 2, 5)).astype(np.float32)
    module = BatchNorm(group_size=2)
    variables = {
        "params": {"scale": np.ones(5, np.float32), "bias": np.zeros(5, np.float32)},
        "batch_stats": {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)},
    }
    y, state = module.apply(variables, x, True, mutable=["batch_stats"])
    groups = x.reshape(3, 2, 2, 2, 5)
    mean, var = groups.mean((1, 2, 3), keepdims=True), groups.var((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(y, ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * mean.mean((0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["var"], 0.9 + 0.1 * var.mean((0, 1, 2, 3)), rtol=1e-5)
    with pytest.raises(UserError, match="batch of 5 images.*bn_group_size=2"):
        module.apply(variables, x[:5], True, mutable=["batch_stats"])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("fcvit_tiny", field, 8.0) for field in ("num_classes", "mlp_kernel_size", "context_heads", "bn_group_size")),
        *(("fcvit_tiny", field, (3.0,) * 4) for field in ("depths", "dims", "mlp_ratios", "kernel_sizes")),
        *(("fcvit_tiny", field, "0.1") for field in ("num_classes", "dropout_rate", "layer_scale_init", "use_context")),
        *(("fcvit_tiny", field, float("nan")) for field in ("drop_path_rate", "layer_scale_init", "num_classes")),
        ("vit_tiny_patch16_224", "dim", 192.0),
        ("vit_tiny_patch16_224", "layer_scale_init", float("inf")),
        ("convnext_tiny", "dims", (1.0,) * 4),
        ("convnext_tiny", "layer_scale_init", float("nan")),
    ],
)
def test_numbers_of_the_wrong_kind_are_named(name, field, value):
    with pytest.raises(UserError, match=f"model.{field}="):
        create_model(name, **{field: value})
