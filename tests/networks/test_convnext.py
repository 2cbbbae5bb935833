"""ConvNeXt equals torch_convnext.py, which is written from the paper, in logits and gradients."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_convnext
from equality import assert_close
from hypothesis import Phase, given, settings
from timm_equality import abstract, assert_fresh_weights, assert_network_equals, variables_of, weights_of

from fcvit_jax.convert import convnext as names
from fcvit_jax.errors import UserError
from fcvit_jax.networks.convnext import SETTINGS, VARIANTS, ConvNeXt, create_convnext, init_variables

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5}


@pytest.fixture(scope="module")
def small():
    """A small network, its variables, and images in which the last map has one column."""
    model = ConvNeXt(**SMALL)
    variables = variables_of(weights_of(torch_convnext.ConvNeXt(**SMALL), 1), model, names)
    return model, variables, np.random.default_rng(0).normal(0, 1, (2, 64, 40, 3)).astype(np.float32)


@settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    size=st.tuples(st.integers(32, 80), st.integers(32, 80)),
    depths=st.tuples(*[st.integers(0, 2)] * 4),
    dims=st.tuples(*[st.sampled_from([4, 8, 16])] * 4),
    layer_scale_init=st.sampled_from([1e-6, 1e-6, None]),
    seed=st.integers(0, 999),
)
def test_logits_and_gradients_equal_pytorchs(size, depths, dims, layer_scale_init, seed):
    fields = {"depths": depths, "dims": dims, "num_classes": 5, "layer_scale_init": layer_scale_init}
    assert_network_equals(ConvNeXt(**fields), torch_convnext.ConvNeXt(**fields), names, (2, *size, 3), seed)


def test_variants_have_the_published_numbers_of_parameters():
    counts = {name: sum(x.size for x in abstract(create_convnext(name)).values()) for name in VARIANTS}
    assert counts == {"convnext_tiny": 28_589_128, "convnext_small": 50_223_688, "convnext_base": 88_591_464}
    assert SETTINGS.keys() == VARIANTS.keys()
    narrow = create_convnext("convnext_tiny", 10, depths=[2, 2, 5, 1], dims=[32, 64, 128, 256])
    assert sum(x.size for x in abstract(narrow).values()) == 1_502_314


def test_features_and_pooled_features(small):
    model, variables, images = small

    @jax.jit
    def run(variables, images):
        params = {name: x for name, x in variables["params"].items() if name != "head"}
        bare = model.clone(num_classes=0)
        return model.apply(variables, images, method="features"), bare.apply({"params": params}, images)

    maps, pooled = run(variables, images)
    assert [x.shape for x in maps] == [(2, 16, 10, 8), (2, 8, 5, 16), (2, 4, 2, 24), (2, 2, 1, 32)]
    assert [x["channels"] for x in model.feature_info] == [x.shape[-1] for x in maps]
    mean = np.asarray(maps[-1]).mean((1, 2))
    mean -= mean.mean(-1, keepdims=True)
    norm = variables["params"]["norm"]
    expected = mean / np.sqrt(mean.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    assert_close(pooled, expected, "pooled features")


@pytest.mark.parametrize("options", [{"share_blocks": True}, {"remat": True}])
def test_ways_to_compile_change_nothing(small, options):
    model, variables, images = small

    def run(model):
        return jax.jit(jax.value_and_grad(lambda v: jnp.square(model.apply(v, images)).sum()))(variables)

    jax.tree.map(lambda x, y: assert_close(x, y, "result", 2e-5), run(model.clone(**options)), run(model))


def test_drop_path_leaves_out_whole_branches_of_images(small):
    model, variables, images = small
    model = model.clone(depths=(1, 1, 0, 0), drop_path_rate=0.5)
    unused = ("stages_1_block_1", "stages_2_block_0", "stages_3_block_0")
    params = {"params": {name: x for name, x in variables["params"].items() if name not in unused}}
    images = np.repeat(images[:1], 32, axis=0)

    @jax.jit
    def run(params):
        return model.apply(params, images, train=True, rngs={"dropout": jax.random.key(0)})

    # The first block always stays, the second stays or goes.
    assert len(np.unique(np.asarray(run(params)).round(3), axis=0)) == 2


def test_bfloat16_stays_near(small):
    model, variables, images = small
    half = model.clone(dtype=jnp.bfloat16)
    actual, expected = jax.jit(lambda v, x: (half.apply(v, x), model.apply(v, x)))(variables, images)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, "logits", 0.05)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("convnext_huge", {}),
        ("convnext_tiny", {"depths": (3, 3, 9)}),
        ("convnext_tiny", {"dims": (96, 192, 384, 0)}),
        ("convnext_tiny", {"dims": 96}),
        ("convnext_tiny", {"drop_path_rate": 1.0}),
        ("convnext_tiny", {"dtype": "float16"}),
    ],
)
def test_mistakes_in_fields_are_told_in_a_line(name, fields):
    with pytest.raises(UserError) as error:
        create_convnext(name, **fields)
    assert "\n" not in str(error.value)
    assert next(iter(fields), name) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 31, 64, 3), (1, 3, 64, 64)])
def test_images_that_do_not_fit_are_refused(small, shape):
    model, variables, _ = small
    with pytest.raises(UserError, match=r"\d"):
        model.apply(variables, jnp.zeros(shape))


def test_initial_weights_are_the_authors_and_differ_from_block_to_block():
    model = ConvNeXt(**SMALL)
    variables = init_variables(model, jax.random.key(0))
    assert_fresh_weights(variables, model, {"kernel": 0.02}, {"layer_scale": 1e-6})
