"""Blocks and their parts against `torch_reference`; drop-path and dropout."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference
from equality import assert_close, assert_module_equals, at_random, nhwc
from flax import linen as nn

from fcvit_jax.errors import UserError
from fcvit_jax.networks.blocks import Block, ChannelMixer, GlobalContext, TokenMixer, drop_path_factors, standardize

kernels = st.sampled_from([1, 3, 5, 7, 11])
contexts = {"heads": st.sampled_from([2, 4, 8]), "reduction": st.sampled_from([2, 4, 8])}
mixers = {
    "kernel_sizes": st.lists(kernels, min_size=1, max_size=2).map(tuple),
    "use_context": st.booleans(),
    "weighted_context": st.booleans(),
    "competition": st.booleans(),
    "context_heads": contexts["heads"],
    "context_reduction": contexts["reduction"],
    "mix_reduction": st.sampled_from([1, 2, 8]),
    "mix_min_dim": st.sampled_from([3, 16]),
    "spatial_attention": st.booleans(),
}
channel_mixers = {"ratio": st.integers(1, 4), "kernel_size": st.none() | kernels, "channel_attention": st.booleans()}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("competition", [True, False])
@at_random(**contexts)
def test_global_context_equals_the_reference(weighted, competition, shape, seed, options):
    options |= {"weighted": weighted, "competition": competition}
    ours, theirs = GlobalContext(**options), torch_reference.GlobalContext(shape[-1], **options)
    place = "stages_0_block_0/token_mixer/context1", "network.0.0.token_mixer.gc1"
    sown, x = assert_module_equals(ours, theirs, place, shape, seed)
    if weighted:
        similarity = theirs.similarity(x, x.mean((2, 3))).detach()
        assert_close(sown["similarity"][0], nhwc(similarity), "similarity")
    else:
        assert not sown


@pytest.mark.parametrize("option, value", [("heads", 3), ("reduction", 32)])
def test_a_context_that_does_not_fit_the_channels_is_refused(option, value):
    with pytest.raises(UserError, match=f"context_{option}={value} .* the 16 channels"):
        GlobalContext(**{option: value}).init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))


@at_random(**mixers)
def test_token_mixer_equals_the_reference(shape, seed, options):
    ours, theirs = TokenMixer(**options), torch_reference.TokenMixer(shape[-1], **options)
    place = "stages_0_block_0/token_mixer", "network.0.0.token_mixer"
    assert_module_equals(ours, theirs, place, shape, seed)


@at_random(**channel_mixers)
def test_channel_mixer_equals_the_reference(shape, seed, options):
    ours, theirs = ChannelMixer(**options), torch_reference.ChannelMixer(shape[-1], **options)
    place = "stages_0_block_0/channel_mixer", "network.0.0.channel_mixer"
    assert_module_equals(ours, theirs, place, shape, seed, True)


@at_random(layer_scale=st.booleans(), mixer=st.fixed_dictionaries(channel_mixers))
def test_block_equals_the_reference(shape, seed, options):
    channels, mixer = shape[-1], options["mixer"]
    ours = Block(
        functools.partial(TokenMixer, kernel_sizes=(5,)),
        functools.partial(ChannelMixer, **mixer),
        layer_scale_init=1e-5 if options["layer_scale"] else None,
    )
    theirs = torch_reference.Block(
        channels,
        torch_reference.TokenMixer(channels, kernel_sizes=(5,)),
        torch_reference.ChannelMixer(channels, **mixer),
        options["layer_scale"],
    )
    assert_module_equals(ours, theirs, ("stages_0_block_0", "network.0.0"), shape, seed, True)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1)])
def test_standardize_of_a_constant_is_zero_with_a_finite_gradient(shape):
    value, grad = jax.value_and_grad(lambda x: standardize(x)[0, 0, 0])(jnp.full(shape, 5.0))
    assert value == 0 and np.isfinite(grad).all()


def test_drop_path_leaves_out_whole_branches_of_single_examples():
    block = Block(
        functools.partial(TokenMixer, kernel_sizes=(3,)),
        functools.partial(ChannelMixer, ratio=1),
        layer_scale_init=1.0,
    )
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 4, 4, 16)), (400, 4, 4, 16))
    variables = jax.jit(lambda: block.init(jax.random.key(1), x, False))()
    apply = jax.jit(block.apply, static_argnums=2)
    factors = drop_path_factors(jax.random.key(2), np.array([0, 0.25, 1]), 400)
    np.testing.assert_array_equal(factors[0], 1)
    np.testing.assert_array_equal(factors[2], 0)
    kept = []
    for branch in (1, 2):
        other = {f"layer_scale{3 - branch}": jnp.zeros(16)}  # what remains is x plus this branch
        alone = {"params": variables["params"] | other}
        whole = apply(alone, x, False) - x
        dropped = apply(alone, x, True, factors[1]) - x
        factor = (dropped * whole).sum((1, 2, 3)) / jnp.square(whole).sum((1, 2, 3))
        np.testing.assert_allclose(dropped, factor[:, None, None, None] * whole, atol=1e-4)
        kept.append(np.asarray(factor > 0.5))
        np.testing.assert_allclose(factor, kept[-1] / 0.75, atol=1e-4)
        assert abs(kept[-1].mean() - 0.75) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert abs(np.corrcoef(*kept)[0, 1]) < 4 / 20


def test_dropout_acts_twice_in_the_channel_mixer_and_in_training_alone():
    mixer = ChannelMixer(ratio=2, kernel_size=None, dropout_rate=0.4)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 16))
    variables = jax.jit(lambda: mixer.init(jax.random.key(1), x, False))()

    @jax.jit
    def in_training(key):
        def is_dropout(module, _):
            return isinstance(module, nn.Dropout)

        rngs = {"dropout": key}
        return mixer.apply(variables, x, True, rngs=rngs, capture_intermediates=is_dropout, mutable=["intermediates"])

    y, state = in_training(jax.random.key(2))
    (hidden,), (last,) = (state["intermediates"][f"Dropout_{i}"]["__call__"] for i in range(2))
    assert hidden.shape[-1] == 32 and (last == y).all()
    for x_dropped in (hidden, last):
        assert abs((x_dropped == 0).mean() - 0.4) < 0.02
    assert (jax.jit(lambda: mixer.apply(variables, x, False))() != 0).all()
