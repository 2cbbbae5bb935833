"""ViT equals timm's and Hugging Face's: against stored outputs of them, and with every option against torch_vit.py."""

import functools
import json
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_vit
from equality import assert_close, nhwc
from hypothesis import Phase, given, settings
from timm_equality import abstract, assert_fresh_weights, assert_network_equals, variables_of

from fcvit_jax.convert import vit as names
from fcvit_jax.errors import UserError
from fcvit_jax.networks.vit import SETTINGS, VARIANTS, Block, ViT, create_vit, init_variables, resize_positions

DATA = Path(__file__).parent.parent / "data" / "attention"
SMALL = {"dim": 48, "depth": 3, "heads": 3, "patch_size": 8, "image_size": 32, "num_classes": 10}
GOLDENS = {"vit_plain": {}, "vit_distilled": {"distilled": True}, "vit_layer_scale": {"layer_scale_init": 1e-5}}
SIZES = {"vit_plain": 4, "vit_distilled": 3, "vit_layer_scale": 2}


@functools.cache
def golden(name):
    """A stored file: its arrays, and the model and the variables of its weights."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: x.astype(np.float32) if x.dtype == np.float16 else x for key, x in file.items()}
    model = ViT(**SMALL, **GOLDENS[name])
    return arrays, model, variables_of({key[3:]: x for key, x in arrays.items() if key.startswith("sd/")}, model, names)


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, variables, images):
    """The logits of all classifiers, and everything on the way."""

    def wanted(module, method):
        return method == "features" or isinstance(module, Block)

    return model.apply(variables, images, method="all_logits", capture_intermediates=wanted, mutable=["intermediates"])


@pytest.mark.parametrize(("name", "size"), [(name, k) for name, count in SIZES.items() for k in range(count)])
def test_outputs_equal_timms(name, size):
    arrays, model, variables = golden(name)
    images = nhwc(arrays[f"in{size}/images_nchw"])
    grid = (images.shape[1] // 8, images.shape[2] // 8)
    positions = resize_positions(variables["params"]["pos_embed"], model.prefix, grid)
    assert_close(positions, arrays[f"in{size}/pos_embed"][0], "positions")
    logits, state = outputs(model, variables, images)
    sown = state["intermediates"]
    for i in range(model.depth):
        attention, expected = sown[f"block_{i}"]["attention"][0], arrays[f"in{size}/attn{i}"]
        assert attention.dtype == jnp.float32
        np.testing.assert_allclose(attention, expected, rtol=0, atol=1e-5, err_msg=f"attention {i}")
        assert_close(sown[f"block_{i}"]["__call__"][0], arrays[f"in{size}/block{i}"], f"block {i}")
    assert_close(sown["features"][0], arrays[f"in{size}/features"], "features")
    apart = ("logits_cls", "logits_dist") if model.distilled else ("logits",)
    assert len(logits) == len(apart)
    for what, x in zip(apart, logits, strict=True):
        assert_close(x, arrays[f"in{size}/{what}"], what)
    assert_close(jax.jit(model.apply)(variables, images), arrays[f"in{size}/logits"], "logits")


@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stored=st.integers(2, 5),
    heads=st.sampled_from([1, 2, 4]),
    options=st.fixed_dictionaries(
        {"distilled": st.booleans(), "layer_scale_init": st.sampled_from([None, 1e-5]), "mlp_ratio": st.integers(1, 4)}
    ),
    seed=st.integers(0, 999),
)
def test_logits_and_gradients_equal_pytorchs(grid, stored, heads, options, seed):
    fields = {"dim": 24, "depth": 2, "heads": heads, "patch_size": 4, "image_size": 4 * stored, "num_classes": 5}
    theirs = torch_vit.ViT(**fields, **options)
    assert_network_equals(ViT(**fields, **options), theirs, names, (2, 4 * grid[0], 4 * grid[1], 3), seed)


COUNTS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "vit_base_patch16_384": 86_859_496,
    "vit_small_patch32_224": 22_878_952,
    "vit_base_patch32_224": 88_224_232,
    "vit_small_patch14_dinov2": 22_056_192,
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_patch16_384": 86_859_496,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_distilled_patch16_384": 87_630_032,
}


def test_variants_have_the_published_numbers_of_parameters():
    def count(name):
        return sum(x.size for x in abstract(create_vit(name, 0 if "dinov2" in name else 1000)).values())

    assert {name: count(name) for name in VARIANTS} == COUNTS


def test_settings_follow_the_networks():
    assert SETTINGS.keys() == VARIANTS.keys()
    for name, values in SETTINGS.items():
        model = create_vit(name)
        assert values["image_size"] == model.image_size
        half = name.startswith("vit") and "dinov2" not in name
        assert (model.mean[0], model.std[0]) == ((0.5, 0.5) if half else (0.485, 0.229))


def test_attention_is_formed_apart_only_where_asked_for():
    arrays, model, variables = golden("vit_plain")
    images = nhwc(arrays["in0/images_nchw"])
    logits = jax.eval_shape(model.apply, variables, images)
    assert logits.shape == (2, 10)
    assert "intermediates" not in jax.eval_shape(model.init, jax.random.key(0), images)
    _, state = jax.eval_shape(functools.partial(model.apply, mutable=["intermediates"]), variables, images)
    assert state["intermediates"] == {
        f"block_{i}": {"attention": (jax.ShapeDtypeStruct((2, 3, 17, 17), jnp.float32),)} for i in range(3)
    }


@pytest.mark.parametrize("options", [{"share_blocks": True}, {"remat": True}, {"share_blocks": True, "remat": True}])
def test_ways_to_compile_change_nothing(options):
    arrays, model, variables = golden("vit_layer_scale")
    images = nhwc(arrays["in1/images_nchw"])

    def run(model):
        def loss(variables):
            logits, state = model.apply(variables, images, mutable=["intermediates"])
            return jnp.square(logits).sum(), state["intermediates"]["block_2"]["attention"][0]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)

    actual, expected = run(model.clone(**options)), run(model)
    jax.tree.map(lambda x, y: assert_close(x, y, "result", 2e-5), actual, expected)


def test_drop_path_leaves_out_whole_branches_of_images():
    arrays, model, variables = golden("vit_plain")
    images = np.repeat(nhwc(arrays["in0/images_nchw"])[:1], 64, axis=0)
    model = model.clone(depth=2, drop_path_rate=0.5)
    params = {name: x for name, x in variables["params"].items() if name != "block_2"}
    key = {"dropout": jax.random.key(3)}

    @jax.jit
    def run(params):
        return model.apply({"params": params}, images, train=True, rngs=key), model.apply({"params": params}, images)

    trained, evaluated = run(params)
    # The first block always stays, the second one's two branches stay or go: four kinds of images.
    kinds = np.unique(np.asarray(trained).round(3), axis=0)
    assert len(kinds) == 4
    assert np.ptp(evaluated, axis=0).max() < 1e-5


def test_without_classes_the_tokens_come_out():
    arrays, model, variables = golden("vit_distilled")
    images = nhwc(arrays["in0/images_nchw"])
    params = {name: x for name, x in variables["params"].items() if not name.startswith("head")}
    bare = model.clone(num_classes=0)
    pooled = bare.apply({"params": params}, images)
    assert_close(pooled, arrays["in0/features"][:, :2].mean(1), "class and distillation token")
    assert json.loads(str(golden("vit_distilled")[0]["meta"]))["params"] == sum(
        x.size for x in jax.tree.leaves(variables)
    )


def test_bfloat16_stays_near_and_attention_is_float32():
    arrays, model, variables = golden("vit_plain")
    images = nhwc(arrays["in0/images_nchw"])
    logits, state = outputs(model.clone(dtype=jnp.bfloat16), variables, images)
    assert logits[0].dtype == state["intermediates"]["block_2"]["attention"][0].dtype == jnp.float32
    assert_close(logits[0], arrays["in0/logits"], "logits", 0.05)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_giant", {}),
        ("vit_tiny_patch16_224", {"heads": 5}),
        ("vit_tiny_patch16_224", {"image_size": 100}),
        ("vit_tiny_patch16_224", {"image_size": (224, 100)}),
        ("vit_tiny_patch16_224", {"image_size": (224, 224, 3)}),
        ("vit_tiny_patch16_224", {"image_size": 224.0}),
        ("vit_tiny_patch16_224", {"depth": 2.0}),
        ("vit_tiny_patch16_224", {"drop_path_rate": 1.0}),
        ("vit_tiny_patch16_224", {"num_classes": -1}),
        ("vit_tiny_patch16_224", {"dtype": "float16"}),
    ],
)
def test_mistakes_in_fields_are_told_in_a_line(name, fields):
    with pytest.raises(UserError) as error:
        create_vit(name, **fields)
    assert "\n" not in str(error.value)
    assert all(f"{key}={value!r}" in str(error.value) for key, value in fields.items()) and (
        fields or name in str(error.value)
    )


@pytest.mark.parametrize("shape", [(1, 30, 32, 3), (1, 32, 4, 3), (1, 3, 32, 32), (32, 32, 3)])
def test_images_that_do_not_fit_are_refused(shape):
    _, model, variables = golden("vit_plain")
    with pytest.raises(UserError, match=r"\d"):
        model.apply(variables, jnp.zeros(shape))


def test_initial_weights_are_those_of_deit_and_differ_from_block_to_block():
    model = ViT(**SMALL, distilled=True)
    variables = init_variables(model, jax.random.key(0))
    # PyTorch's convolutions draw evenly from within 1 / sqrt(fan-in).
    patch = (3 * 8 * 8 * 3) ** -0.5
    assert_fresh_weights(variables, model, {"patch_embed/kernel": patch, "kernel": 0.02, "token": 0.02, "embed": 0.02})
