"""The network equals the original: against stored outputs of it, and with every option against torch_reference.py."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference
from conftest import WELL
from equality import assert_close, assert_module_equals, formula_weights, nhwc, train_step
from flax import linen as nn
from flax import nnx, traverse_util

from fcvit_jax import convert, networks, optim
from fcvit_jax.convert.weights import abstract_weights
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import UserError
from fcvit_jax.networks import fcvit
from fcvit_jax.networks.blocks import Block
from fcvit_jax.networks.fcvit import VARIANTS, Backbone, FCViT, abstract_variables, create_backbone, create_model
from fcvit_jax.run import step as run_step
from fcvit_jax.run.state import abstract_state, create_state
from fcvit_jax.tasks import classification

DATA = Path(__file__).parent.parent / "data"
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


def smoothed_cross_entropy(logits, labels):
    log_p = jax.nn.log_softmax(logits)
    return -(0.9 * jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0] + 0.1 * log_p.mean(1)).mean()


@pytest.mark.parametrize(
    ("name", "size"), [*(("fcvit_small", k) for k in range(3)), *((name, 0) for name in list(GOLDENS)[1:])]
)
def test_outputs_equal_the_originals(name, size):
    arrays, _, _ = golden(name)
    model, variables = small(name, **GOLDENS[name])
    images = nhwc(arrays[f"in{size}/images_nchw"])

    @jax.jit
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


def with_unbiased_variance(name, average, before, batch, steps=1):
    """A running average of ours after some steps on 64x64 images as PyTorch has it, with unbiased variances."""
    if not name.endswith("running_var"):
        return average
    side = {"patch_embed": 16, "network.1": 8, "network.3": 4, "network.5": 2}[name.removesuffix(".norm.running_var")]
    n, kept = batch * side**2, 0.9**steps * before
    return kept + (average - kept) * n / (n - 1)


@functools.cache
def step_of(name):
    """The training step of a stored file, and its gradients and statistics by the original's names."""
    arrays, _, _ = golden(name)
    model, variables = small(name, **GOLDENS[name])
    step = train_step(model, smoothed_cross_entropy, variables, nhwc(arrays["in0/images_nchw"]), arrays["train/labels"])
    # Gradients have the shapes of the parameters, so the conversion can name them; the statistics come along.
    return step, convert.to_torch({"params": step.grads, "batch_stats": step.batch_stats}, model)


@pytest.mark.parametrize("name", ["fcvit_small", "fcvit_small_attention"])
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

    for key, after in ((key[12:], x) for key, x in arrays.items() if key.startswith("train/after/")):
        assert_close(with_unbiased_variance(key, converted[key], state_dict[key], 2), after, key)


def test_pyramid_equals_the_originals():
    arrays, _, _ = golden("fcvit_small_pyramid")
    model, variables = small("fcvit_small_pyramid", Backbone)
    maps = jax.jit(model.apply)(variables, nhwc(arrays["in0/images_nchw"]))
    assert isinstance(maps, tuple)
    for i, x in enumerate(maps, 1):
        assert_close(x, nhwc(arrays[f"in0/feature{i}"]), f"map {i}")


@pytest.mark.parametrize("name", ["fcvit_tiny", "fcvit_s12"])
def test_full_size_equals_the_originals(name):
    arrays, meta, _ = golden(f"{name}_full")
    shapes = dict(zip(arrays["keys"].tolist(), map(tuple, json.loads(str(arrays["shapes"]))), strict=True))
    model = create_model(name)
    variables = convert.from_torch(formula_weights(shapes, meta["seed"]), model)
    images = np.random.default_rng([meta["seed"], 77, 0]).normal(0, 1, arrays["in0/shape"])
    images = nhwc(images.astype(np.float16).astype(np.float32))

    @functools.partial(jax.jit, compiler_options=WELL)
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


def test_ten_optimizer_steps_equal_the_originals_and_averages_follow():
    """Through our own training step and AdamW; images come as they are, so `prepare` smooths the labels alone."""
    arrays, meta, state_dict = golden("trajectory")
    network, variables = small("trajectory")
    constant = {"lr": meta["lr"], "min_lr": meta["lr"], "lr_batch_size": None, "warmup_epochs": 0}
    tx, schedule = optim.make_optimizer(meta["steps"], 1, meta["batch"], weight_decay=meta["wd"], **constant)
    mesh, averages = make_mesh(data=1), variables
    state = create_state(variables, tx, abstract_state(networks.init_variables, network, tx, mesh, ema=True))

    def prepare(key, batch):
        targets = 0.9 * jax.nn.one_hot(batch["label"], meta["num_classes"]) + 0.1 / meta["num_classes"]
        return {"image": batch["image"], "target": targets}

    fixed = {"model": network, "tx": tx, "schedule": schedule, "prepare": prepare, "loss": classification.loss}
    fixed |= {"mesh": mesh, "ema_decay": 0.7}
    losses, size = [], (3, meta["hw"], meta["hw"])
    for step in range(meta["steps"]):
        rng = np.random.default_rng([meta["seed"], 900, step])
        images = rng.normal(0, 1, (meta["batch"], *size)).astype(np.float16).astype(np.float32)
        labels = rng.integers(0, meta["num_classes"], meta["batch"])
        for image, label in zip(images, labels, strict=True):
            if label < 3:
                image[label] += 1
        batch = {"image": nhwc(images), "label": labels.astype(np.int32)}
        state, metrics = run_step.train_step(state, batch, jax.random.key(0), **fixed)
        losses.append(float(metrics["loss"]))
        plain = jax.device_get(state.variables)
        averages = jax.tree.map(lambda average, x: 0.7 * average + 0.3 * x, averages, plain)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.ema, averages)
    np.testing.assert_allclose(losses, arrays["losses"], rtol=0, atol=1e-4)

    for name, x in convert.to_torch(plain, network).items():
        if name.endswith("num_batches_tracked"):
            continue
        x = with_unbiased_variance(name, x, state_dict[name], meta["batch"], meta["steps"])
        # Out of the rounding errors of a bias in front of a BatchNorm AdamW makes steps of the size of the rate; they
        # move the running mean too.
        tolerance = 0.1 if name.endswith(("proj.bias", "running_mean")) else 1e-4
        np.testing.assert_allclose(np.linalg.norm(x), arrays[f"final_norm/{name}"], rtol=tolerance, err_msg=name)
    images = np.random.default_rng([meta["seed"], 901]).normal(0, 1, (2, *size)).astype(np.float32)
    logits = jax.jit(network.apply)(plain, nhwc(images))
    np.testing.assert_allclose(logits, arrays["final_eval_logits"], rtol=0, atol=1e-2)


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
    assert sum(x.size for x in jax.tree.leaves(abstract_variables(create_model(name))["params"])) == count
    assert create_model(original) == create_model(name)
    assert create_backbone(original) == create_backbone(name)


def test_every_variant_is_pinned():
    assert set(VARIANTS) == {"fcvit_tiny", "fcvit_s12", "fcvit_s24", "fcvit_s48"}
    with pytest.raises(UserError, match="fcvit_s13.*fcvit_tiny, fcvit_s12"):
        create_model("fcvit_s13")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mlp_ratios": 4}, "mlp_ratios=4 must be a tuple"),
        ({"dims": [0, 8, 8, 8]}, "dims=0 must be at least 1"),
        ({"depths": (1, 1, -1, 1)}, "depths=-1 must be at least 0"),
        ({"mlp_kernel_size": -3}, "mlp_kernel_size=-3 must be at least 1"),
        ({"mlp_kernel_size": 0}, "mlp_kernel_size=0 must be at least 1"),
        ({"bn_group_size": -1}, "bn_group_size=-1 must be at least 0"),
        ({"context_heads": 2.5}, "context_heads=2.5 must be a whole number"),
        ({"kernel_sizes": ()}, "kernel_sizes=.. must be a tuple"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 0"),
    ],
)
def test_values_that_make_no_network_are_refused(values, message):
    with pytest.raises(UserError, match=f"model.{message}"):
        create_model("fcvit_tiny", **values)


@pytest.mark.parametrize("off", [{"bn_group_size": None}, {"bn_group_size": 0}, {"mlp_kernel_size": None}])
def test_values_that_turn_an_option_off_are_accepted(off):
    assert create_model("fcvit_tiny", num_classes=np.int64(3), **off).num_classes == 3


@pytest.mark.parametrize(
    "shape, dtype", [((32, 32, 3), jnp.float32), ((1, 32, 32, 3), jnp.uint8), ((1, 3, 32, 32), jnp.float32)]
)
def test_images_that_are_none_are_refused(shape, dtype):
    with pytest.raises(UserError, match="Images must be .N, H, W, 3. floats.*normalize"):
        jax.eval_shape(create_model("fcvit_tiny").init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


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


# Numerical safety.


def test_gradients_are_finite_for_blank_images():
    """A blank image at initialisation, with its zero biases, is a zero feature map all the way."""
    network, rng = FCViT(depths=(1, 0), dims=(16, 16), mlp_ratios=(2, 2), num_classes=5), np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: np.zeros(x.shape) if path[-1].key in ("bias", "mean", "var") else rng.normal(0, 0.3, x.shape),
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))),
    )
    for blank in (0, 1.7):
        images, labels = np.full((2, 32, 32, 3), blank, np.float32), np.array([3, 1])
        step = train_step(network, smoothed_cross_entropy, variables, images, labels)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(step)), blank


def reductions(jaxpr):
    """The reductions in a program and in all programs within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("reduce_sum", "reduce_max", "reduce_min"):
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from reductions(getattr(inner, "jaxpr", inner))


def test_statistics_are_float32_under_bfloat16():
    network, variables = small("fcvit_small", dtype=jnp.bfloat16)
    images = nhwc(golden("fcvit_small")[0]["in0/images_nchw"])
    for training in (False, True):
        program = jax.make_jaxpr(lambda v, x, t=training: network.apply(v, x, t, mutable=["batch_stats"]))
        found = list(reductions(program(variables, images).jaxpr))
        # 11 GroupNorms and 10 contexts, the pooling; a BatchNorm's mean and variance, and their means over the groups.
        assert len(found) == 2 * 11 + 3 * 10 + 1 + (5 * 4 if training else 0)
        assert {equation.invars[0].aval.dtype for equation in found} == {jnp.dtype(jnp.float32)}
    collections = ["batch_stats", "intermediates"]
    _, state = jax.eval_shape(lambda: network.apply(variables, images, True, mutable=collections))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_close_to_float32():
    network, variables = small("fcvit_small", dtype=jnp.bfloat16)
    arrays, _, _ = golden("fcvit_small")
    logits = jax.jit(network.apply)(variables, nhwc(arrays["in0/images_nchw"]))
    assert logits.dtype == jnp.float32
    assert_close(logits, arrays["in0/logits"], "logits", 2e-2)


def test_drop_path_rates_rise_linearly_and_every_block_has_its_draw(monkeypatch):
    seen = {}

    def draw(key, rates, batch_size):
        seen["rates"] = rates
        return np.broadcast_to(np.arange(len(rates))[:, None, None], (len(rates), 2, batch_size))

    def record(call, args, kwargs, context):
        if isinstance(context.module, Block):
            seen[context.module.name] = args[2]
        return call(*args, **kwargs)

    monkeypatch.setattr(fcvit, "drop_path_factors", draw)
    network = create_model("fcvit_tiny", drop_path_rate=0.3, depths=(1, 2, 0, 1))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    for in_training in (True, False):
        with nn.intercept_methods(record):
            jax.eval_shape(functools.partial(network.init, train=in_training), rngs, jnp.zeros((3, 32, 32, 3)))
        drawn = [seen.pop(f"stages_{block}") for block in ("0_block_0", "1_block_0", "1_block_1", "3_block_0")]
        if in_training:
            np.testing.assert_array_equal(drawn, np.broadcast_to(np.arange(4)[:, None, None], (4, 2, 3)))
            np.testing.assert_allclose(seen.pop("rates"), [0, 0.1, 0.2, 0.3], atol=1e-12)
        else:
            assert drawn == [None] * 4 and not seen


def test_initial_weights():
    """64 draws of a small network: the standard deviation of each kind of tensor, and the constants."""
    network = FCViT(
        (1,), (16,), (2,), num_classes=9, kernel_sizes=(11,), spatial_attention=True, channel_attention=True
    )
    init = jax.jit(jax.vmap(lambda key: network.init(key, jnp.zeros((1, 32, 32, 3)))))
    variables = init(jax.random.split(jax.random.key(0), 64))
    flat = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(variables, sep="/").items()}
    mixers = "params/stages_0_block_0/token_mixer/", "params/stages_0_block_0/channel_mixer/"
    stds = {  # sqrt(2 / (k * k * out / groups)) of convolutions, 0.02 of linear layers
        "params/stem/conv/kernel": (2 / (49 * 16)) ** 0.5,
        mixers[0] + "context1/reduce/kernel": 0.02,
        mixers[0] + "context1/expand/kernel": 0.02,
        mixers[0] + "depthwise1/kernel": (2 / 121) ** 0.5,
        mixers[0] + "reduce1/kernel": (2 / 16) ** 0.5,
        mixers[0] + "expand1/kernel": (2 / 16) ** 0.5,
        mixers[0] + "spatial_attention/depthwise/kernel": (2 / 9) ** 0.5,
        mixers[0] + "spatial_attention/reduce/kernel": (2 / 2) ** 0.5,
        mixers[0] + "spatial_attention/expand/kernel": (2 / 16) ** 0.5,
        mixers[1] + "expand/kernel": (2 / 32) ** 0.5,
        mixers[1] + "depthwise/kernel": (2 / 9) ** 0.5,
        mixers[1] + "reduce/kernel": (2 / 16) ** 0.5,
        "params/head/kernel": 0.02,
    }
    for path, std in stds.items():
        x = flat.pop(path) / std
        assert abs(x.std() - 1) < 4 / (2 * x.size) ** 0.5, path
        assert abs(x.mean()) < 4 / x.size**0.5, path
        assert np.abs(x).max() > 2.5, f"{path} is truncated"
    for conv, taps in (("conv1", 3), ("conv2", 5)):
        for leaf in ("kernel", "bias"):
            x = flat.pop(f"{mixers[1]}channel_attention/{conv}/{leaf}") * taps**0.5
            assert np.abs(x).max() <= 1 and abs(x.std() * 3**0.5 - 1) < 4 / x.size**0.5, (conv, leaf)
    for path, x in flat.items():
        leaf = path.split("/")[-1]
        right = 1e-5 if "layer_scale" in leaf else {"bias": 0, "mean": 0, "scale": 1, "var": 1}[leaf]
        assert (x == np.float32(right)).all(), path


# What one expects of a Flax module.

TINY = FCViT((1,), (8,), (1,), num_classes=3, kernel_sizes=(3,), layer_scale_init=1.0, dropout_rate=0.5)


@functools.cache
def tiny(network=TINY):
    """Random weights of a network, and images."""
    shapes = abstract_weights(network)
    rng = np.random.default_rng(0)
    flat = {path: rng.uniform(0.1, 1, x.shape).astype(np.float32) for path, x in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/"), rng.normal(0, 1, (2, 32, 40, 3)).astype(np.float32)


def test_vmap_and_export_give_the_same_logits():
    variables, images = tiny()
    apply = jax.jit(TINY.apply)
    logits = apply(variables, images)
    one_by_one = jax.jit(jax.vmap(lambda x: TINY.apply(variables, x[None])[0]))(images)
    assert_close(one_by_one, logits, "vmap")
    exported = jax.export.deserialize(jax.export.export(apply)(variables, images).serialize())
    assert_close(exported.call(variables, images), logits, "export")


def test_nnx_users_can_wrap_it():
    variables, images = tiny()
    module = nnx.eval_shape(lambda: nnx.bridge.ToNNX(TINY, rngs=nnx.Rngs(0)).lazy_init(images))
    module.to_nnx__rngs = nnx.Rngs(0)
    flat = traverse_util.flatten_dict(variables)
    nnx.update(module, traverse_util.unflatten_dict({path[1:]: jnp.array(x) for path, x in flat.items()}))
    assert_close(nnx.jit(lambda module: module(images))(module), jax.jit(TINY.apply)(variables, images), "logits")


def test_remat_changes_nothing_but_memory():
    variables, images = tiny()
    results, programs = [], []
    for network in (TINY, TINY.clone(remat=True)):

        def loss(params, network=network):
            y, _ = network.apply(
                variables | {"params": params},
                images,
                True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            return jnp.square(y).sum()

        results.append(jax.jit(jax.grad(loss))(variables["params"]))
        programs.append(str(jax.make_jaxpr(jax.grad(loss))(variables["params"])))
        assert jax.tree.structure(abstract_weights(network)) == jax.tree.structure(abstract_weights(TINY))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(results[0]))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * largest)
    plain, remat = (program.count("remat") + program.count("checkpoint[") for program in programs)
    assert remat > plain  # where GELU has its own


def test_equal_blocks_are_one_function_if_shared():
    """The numbers stay, each block has its own dropout, and the program has one function for both blocks."""
    network = TINY.clone(depths=(2,), dropout_rate=0.0)
    variables, images = tiny(network)

    def lower(shared, **options):
        def loss(params):
            y, updates = network.clone(share_blocks=shared, **options).apply(
                variables | {"params": params},
                images,
                True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
            )
            return jnp.square(y).sum(), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"])

    def values(lowered):
        (loss, updates), grads = lowered.compile()(variables["params"])
        largest = max(np.abs(x).max() for x in jax.tree.leaves(grads))
        return loss, updates, jax.tree.map(lambda x: x / largest, grads)

    apart, together = lower(False), lower(True, remat=True)
    for x, y in zip(*map(jax.tree.leaves, map(values, (apart, together))), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)

    lowered = lower(True, dropout_rate=0.5)
    blocks = values(lowered)[1]["intermediates"]
    first, second = (blocks[f"stages_0_block_{i}"]["channel_mixer"]["Dropout_0"]["__call__"][0] == 0 for i in range(2))
    assert 0.4 < (first != second).mean() < 0.6
    of_one, of_two = (program.as_text().count("erf") for program in (lowered, lower(False, dropout_rate=0.5)))
    assert 0 < 2 * of_one == of_two


def test_features_are_the_four_stage_outputs():
    network = create_model("fcvit_tiny")
    variables = abstract_variables(network)
    maps = jax.eval_shape(lambda v: network.apply(v, jnp.zeros((2, 33, 100, 3)), method="features"), variables)
    assert isinstance(maps, tuple)
    assert [x.shape for x in maps] == [(2, 9, 25, 32), (2, 5, 13, 64), (2, 3, 7, 160), (2, 2, 4, 320)]


def test_the_model_alone_imports_little_and_touches_no_device():
    program = """
import sys
import fcvit_jax
fcvit_jax.create_model("fcvit_tiny")
heavy = {"orbax", "grain", "tensorflow_datasets", "tensorflow", "torch"} & set(sys.modules)
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=DATA.parent.parent, timeout=100)
