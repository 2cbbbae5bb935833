"""The network equals the original: against stored outputs of it, and module by module against torch_reference.py."""

import functools
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from flax import traverse_util
from hypothesis import Phase, given, settings

from fcvit_jax import convert, model
from fcvit_jax.errors import UserError
from fcvit_jax.model import VARIANTS, Backbone, FCViT, create_backbone, create_model

DATA = Path(__file__).parent / "data"
# What differs from the defaults in each file; spec of the files: the option's name in the original.
GOLDENS = {
    "fcvit_small": {},
    "fcvit_small_no_compete": {"competition": False},
    "fcvit_small_unweighted_context": {"weighted_context": False},
    "fcvit_small_attention": {"spatial_attention": True, "channel_attention": True},
}
# Sums that nearly cancel: what PyTorch stored is itself 2e-5 and 7e-5 away from the same computation in float64.
CANCELLING = {
    ("fcvit_small", "network.2.0.token_mixer.gc1.fc1.bias"): 5e-5,
    ("fcvit_small_attention", "network.4.0.channel_mixer.channel_att.channelConv1.bias"): 3e-4,
}
# Gradients of small networks run in no time and compile for long: twice as fast without LLVM's optimiser.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def golden(name):
    """A stored file: its arrays (float16 as float32), its meta data, and the original's state dict."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: x.astype(np.float32) if x.dtype == np.float16 else x for key, x in file.items()}
    meta = json.loads(str(arrays.pop("meta")))
    return arrays, meta, {key[3:]: x for key, x in arrays.items() if key.startswith("sd/")}


def small(name, make=FCViT, **options):
    """The model and the variables of a stored file."""
    _, meta, state_dict = golden(name)
    if make is FCViT:
        options["num_classes"] = meta["num_classes"]
    sizes = {"depths": "layers", "dims": "embed_dims", "mlp_ratios": "mlp_ratios"}
    model = make(**{field: tuple(meta[key]) for field, key in sizes.items()}, **options)
    return model, convert.from_torch(state_dict, model)


def nhwc(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def assert_close(actual, expected, what, tolerance=1e-5):
    """Within `tolerance` of the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, should be {expected.shape}"
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= tolerance, f"{what}: {error:.2e} of the largest value apart"


def smoothed_cross_entropy(logits, labels):
    log_p = jax.nn.log_softmax(logits)
    return -(0.9 * jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0] + 0.1 * log_p.mean(1)).mean()


class Step(NamedTuple):
    loss: jax.Array
    logits: jax.Array
    batch_stats: dict
    grads: dict
    image_grad: jax.Array


@functools.partial(quick_jit, static_argnums=0)
def train_step(model, variables, images, labels):
    """What a training step computes, without dropout."""

    def loss_fn(params, images):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return smoothed_cross_entropy(logits, labels), (logits, updates["batch_stats"])

    (loss, (logits, stats)), grads = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(variables["params"], images)
    return Step(loss, logits, stats, *grads)


@pytest.mark.parametrize(
    ("name", "size"), [*(("fcvit_small", k) for k in range(3)), *((name, 0) for name in list(GOLDENS)[1:])]
)
def test_outputs_equal_the_originals(name, size):
    arrays, _, _ = golden(name)
    model, variables = small(name, **GOLDENS[name])
    images = nhwc(arrays[f"in{size}/images_nchw"])

    @quick_jit
    def outputs(variables, images):
        def wanted(module, method):
            return module.name == "stem" or method == "features"

        return model.apply(variables, images, capture_intermediates=wanted, mutable=["intermediates"])

    logits, state = outputs(variables, images)
    (stem,), (maps,) = state["intermediates"]["stem"]["__call__"], state["intermediates"]["features"]
    assert_close(stem, nhwc(arrays[f"in{size}/stem"]), "stem")
    for i, x in enumerate(maps, 1):
        assert_close(x, nhwc(arrays[f"in{size}/stage{i}"]), f"stage {i}")
    assert_close(logits, arrays[f"in{size}/logits"], "logits")
    assert logits.dtype == jnp.float32


@functools.cache
def step_of(name):
    """The training step of a stored file, and its gradients and statistics by the original's names."""
    arrays, _, _ = golden(name)
    model, variables = small(name, **GOLDENS[name])
    step = train_step(model, variables, nhwc(arrays["in0/images_nchw"]), arrays["train/labels"])
    # Gradients have the shapes of the parameters, so the conversion can name them; the statistics come along.
    return step, convert.to_torch({"params": step.grads, "batch_stats": step.batch_stats}, model)


@pytest.mark.parametrize("name", GOLDENS)
def test_training_step_equals_the_originals(name):
    arrays, _, state_dict = golden(name)
    step, converted = step_of(name)
    assert_close(step.loss, arrays["train/loss"], "loss")
    assert_close(step.logits, arrays["train/logits"], "logits")
    assert_close(step.image_grad, nhwc(arrays["train/grad_images_nchw"]), "gradient of the images")
    for key, grad in ((key[5:], x) for key, x in arrays.items() if key.startswith("grad/")):
        if key.endswith("proj.bias"):  # in front of a BatchNorm: zero but for rounding
            np.testing.assert_allclose(converted[key], grad, rtol=0, atol=1e-6, err_msg=key)
        else:
            assert np.abs(grad).max() > 0, key
            assert_close(converted[key], grad, key, CANCELLING.get((name, key), 1e-5))

    sizes = dict(zip(("patch_embed", "network.1", "network.3", "network.5"), (16, 8, 4, 2), strict=True))
    for key, after in ((key[12:], x) for key, x in arrays.items() if key.startswith("train/after/")):
        if key.endswith("running_var"):
            # PyTorch adds the unbiased variance of n = N * H * W values to its average, we the biased one.
            n = 2 * sizes[key.removesuffix(".norm.running_var")] ** 2
            after = 0.9 * state_dict[key] + (after - 0.9 * state_dict[key]) * (n - 1) / n
        assert_close(converted[key], after, key)


def test_pyramid_equals_the_originals():
    arrays, _, _ = golden("fcvit_small_pyramid")
    model, variables = small("fcvit_small_pyramid", Backbone)
    maps = quick_jit(model.apply)(variables, nhwc(arrays["in0/images_nchw"]))
    assert isinstance(maps, tuple)
    for i, x in enumerate(maps, 1):
        assert_close(x, nhwc(arrays[f"in0/feature{i}"]), f"map {i}")


def formula_weights(shapes, seed):
    """Weights that take no room in the repository: drawn from the seed, the name and the shape of each tensor.

    Layer scales are near 1: at their initial 1e-5 a block is almost the identity, and a wrong one goes unseen.
    """
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("num_batches_tracked"):
            weights[name] = np.zeros(shape, np.int64)
            continue
        if name.endswith("running_var") or "rescale_weight" in name:
            x = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            x = rng.normal(0, 0.1, shape)
        elif "layer_scale" in name:
            x = rng.uniform(0.3, 1, shape)
        elif "rescale_bias" in name:
            x = rng.normal(0, 0.3, shape)
        elif name.endswith("bias"):
            x = rng.normal(0, 0.1, shape)
        elif len(shape) == 1:
            x = rng.uniform(0.5, 1.5, shape)
        else:
            x = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        weights[name] = x.astype(np.float16).astype(np.float32)
    return weights


@pytest.mark.parametrize("name", ["fcvit_tiny", "fcvit_s12"])
def test_full_size_equals_the_originals(name):
    arrays, meta, _ = golden(f"{name}_full")
    shapes = dict(zip(arrays["keys"].tolist(), map(tuple, json.loads(str(arrays["shapes"]))), strict=True))
    model = create_model(name)
    variables = convert.from_torch(formula_weights(shapes, meta["seed"]), model)
    images = np.random.default_rng([meta["seed"], 77, 0]).normal(0, 1, arrays["in0/shape"])
    images = nhwc(images.astype(np.float16).astype(np.float32))

    @jax.jit
    def outputs(variables, images):
        captured = {"capture_intermediates": lambda _, method: method == "features", "mutable": ["intermediates"]}
        return model.apply(variables, images, **captured)

    logits, state = outputs(variables, images)
    for i, x in enumerate(state["intermediates"]["features"][0], 1):
        x, stored = np.moveaxis(np.asarray(x), -1, 1), arrays[f"in0/stage{i}_mean_std_first8"]
        for what, actual, expected in (("mean", x.mean(), stored[0]), ("std", x.std(ddof=1), stored[1])):
            assert abs(actual - expected) <= 1e-5 * np.abs(x).max(), f"stage {i}, {what}"
        np.testing.assert_allclose(x.reshape(-1)[:8], stored[2:], rtol=0, atol=1e-5 * np.abs(x).max())
    assert_close(logits, arrays["in0/logits"], "logits")


@pytest.mark.parametrize(
    ("name", "original", "count"),
    [
        ("fcvit_tiny", "fcvit_tiny", 4_784_752),
        ("fcvit_s12", "fcvit_b12", 14_701_832),
        ("fcvit_s24", "fcvit_b24", 26_960_232),
        ("fcvit_s48", "fcvit_b48", 51_477_032),
    ],
)
def test_variants_have_the_originals_size_and_names(name, original, count):
    variables = jax.eval_shape(lambda: create_model(name).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == count
    assert create_model(original) == create_model(name)
    assert create_backbone(original) == create_backbone(name)


def test_every_variant_is_pinned():
    assert set(VARIANTS) == {"fcvit_tiny", "fcvit_s12", "fcvit_s24", "fcvit_s48"}
    with pytest.raises(UserError, match="fcvit_s13.*fcvit_tiny, fcvit_s12"):
        create_model("fcvit_s13")


# Modules one by one, with sizes and options at random, in float64 on PyTorch's side.

kernels = st.sampled_from([1, 3, 5, 7, 11])
contexts = {"heads": st.sampled_from([2, 4, 8]), "reduction": st.sampled_from([2, 4, 8])}
contexts |= {"weighted": st.booleans(), "competition": st.booleans()}
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


def at_random(**options):
    """Runs a test with random options, a random (N, H, W, C) and a random seed; the same ones every time.

    Every example is compiled, so there are few of them, and a failing one is not made smaller.
    """
    shapes = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.sampled_from([8, 24, 40]))
    drawn = given(shape=shapes, seed=st.integers(0, 999), options=st.fixed_dictionaries(options))
    few = settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    return lambda test: few(drawn(test))


def assert_module_equals(ours, theirs, place, shape, seed, *args):
    """Compares a module's output, the gradients of its parameters and of its input, and the similarities it sows.

    Args:
      ours: a linen module.
      theirs: the same in PyTorch.
      place: our path and the original's name of such a module in the whole network.
      shape: of the input, (N, H, W, C).
      seed: of the weights, the input and the gradient that comes from above.
      *args: further arguments of our module.
    """
    weights = formula_weights({name: tuple(x.shape) for name, x in theirs.state_dict().items()}, seed)
    theirs.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    theirs.double()
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1, shape).astype(np.float32)

    path, name = place
    flat = traverse_util.flatten_dict(jax.eval_shape(lambda: ours.init(jax.random.key(0), images, *args)), sep="/")
    whole = {key: key.replace("/", f"/{path}/" if path else "/", 1) for key in flat}
    names = convert._names({whole[key]: x.shape for key, x in flat.items()})
    names = {key: names[whole[key]].removeprefix(name and f"{name}.") for key in flat}
    layouts = {key: convert._layout(whole[key]) for key in flat}
    variables = {key: convert._from_layout(weights[names[key]], layouts[key]) for key in flat}
    assert {names[key] for key in flat} == {key for key in weights if "num_batches_tracked" not in key}

    @quick_jit
    def run(variables, images, cotangent):
        def outputs(params, images):
            tree = {"params": params, **{k: x for k, x in variables.items() if k != "params"}}
            return ours.apply(tree, images, *args, mutable=["batch_stats", "intermediates"])

        y, vjp, state = jax.vjp(outputs, variables["params"], images, has_aux=True)
        return y, vjp(cotangent), state.get("intermediates", {})

    theirs_x = torch.from_numpy(np.moveaxis(images, -1, 1)).double().requires_grad_()
    theirs_y = theirs(theirs_x)
    cotangent = rng.normal(0, 1, theirs_y.shape).astype(np.float32)
    theirs_y.backward(torch.from_numpy(cotangent).double())
    cotangent = nhwc(cotangent) if cotangent.ndim == 4 else cotangent
    y, (grads, image_grad), sown = run(traverse_util.unflatten_dict(variables, sep="/"), images, cotangent)

    theirs_y = theirs_y.detach().numpy()
    assert_close(y, nhwc(theirs_y) if theirs_y.ndim == 4 else theirs_y, "output")
    assert_close(image_grad, nhwc(theirs_x.grad), "gradient of the input", 2e-5)
    expected = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    largest = max(np.abs(x).max() for x in expected.values())
    for key, grad in traverse_util.flatten_dict({"params": grads}, sep="/").items():
        grad, right = convert._to_layout(np.asarray(grad), layouts[key]), expected[names[key]]
        # Some sums cancel: they are as exact as their terms are large.
        np.testing.assert_allclose(grad, right, rtol=0, atol=1e-5 * np.abs(right).max() + 2e-6 * largest, err_msg=key)
    return sown, theirs_x


@at_random(**contexts)
def test_global_context_equals_the_reference(shape, seed, options):
    ours, theirs = model.GlobalContext(**options), torch_reference.GlobalContext(shape[-1], **options)
    place = "stages_0_block_0/token_mixer/context1", "network.0.0.token_mixer.gc1"
    sown, x = assert_module_equals(ours, theirs, place, shape, seed)
    if options["weighted"]:
        similarity = theirs.similarity(x, x.mean((2, 3))).detach()
        assert_close(sown["similarity"][0], nhwc(similarity), "similarity")
    else:
        assert not sown


@at_random(**mixers)
def test_token_mixer_equals_the_reference(shape, seed, options):
    ours, theirs = model.TokenMixer(**options), torch_reference.TokenMixer(shape[-1], **options)
    place = "stages_0_block_0/token_mixer", "network.0.0.token_mixer"
    assert_module_equals(ours, theirs, place, shape, seed)


@at_random(**channel_mixers)
def test_channel_mixer_equals_the_reference(shape, seed, options):
    ours, theirs = model.ChannelMixer(**options), torch_reference.ChannelMixer(shape[-1], **options)
    place = "stages_0_block_0/channel_mixer", "network.0.0.channel_mixer"
    assert_module_equals(ours, theirs, place, shape, seed, True)


@at_random(layer_scale=st.booleans(), mixer=st.fixed_dictionaries(channel_mixers))
def test_block_equals_the_reference(shape, seed, options):
    channels, mixer = shape[-1], options["mixer"]
    ours = model.Block(
        functools.partial(model.TokenMixer, kernel_sizes=(5, 3)),
        functools.partial(model.ChannelMixer, **mixer),
        layer_scale_init=1e-5 if options["layer_scale"] else None,
    )
    theirs = torch_reference.Block(
        channels,
        torch_reference.TokenMixer(channels, kernel_sizes=(5, 3)),
        torch_reference.ChannelMixer(channels, **mixer),
        options["layer_scale"],
    )
    assert_module_equals(ours, theirs, ("stages_0_block_0", "network.0.0"), shape, seed, True)


@at_random(kernel=st.sampled_from([(7, 4), (3, 2)]), train=st.booleans())
def test_downsampling_equals_the_reference(shape, seed, options):
    (kernel_size, stride), train = options["kernel"], options["train"]
    ours = model.Downsample(16, kernel_size, stride)
    theirs = torch_reference.Downsample(shape[-1], 16, kernel_size, stride).train(train)
    shape = (shape[0] + 1, *(4 * n for n in shape[1:3]), shape[3])
    assert_module_equals(ours, theirs, ("stem", "patch_embed"), shape, seed, train)


@pytest.mark.parametrize(
    "options",
    [
        {"use_context": False, "mix_reduction": 1},
        {"kernel_sizes": (11,), "mlp_kernel_size": None},
        {"kernel_sizes": (3, 7), "mlp_kernel_size": 5},
        {"context_heads": 4, "context_reduction": 4, "mix_reduction": 4, "mix_min_dim": 3},
        {"layer_scale_init": None, "num_classes": 0},
    ],
    ids=str,
)
def test_options_equal_the_reference(options):
    """The options that no stored file covers, as the whole network passes them on."""
    fields = {"depths": (1,), "dims": (16,), "mlp_ratios": (2,), "num_classes": 5} | options
    assert_module_equals(FCViT(**fields), torch_reference.FCViT(**fields).eval(), ("", ""), (2, 32, 39, 3), 0)
