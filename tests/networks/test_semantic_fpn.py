"""The segmenter equals the original's, MMSegmentation's FPN and FPNHead over its backbone, by stored values."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_segmenter
from equality import assert_close, formula_weights, nhwc, train_step
from flax import linen as nn
from flax import traverse_util

from fcvit_jax import convert
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import abstract_variables, with_fields
from fcvit_jax.networks.fpn import upsample_nearest
from fcvit_jax.networks.semantic_fpn import SemanticFPNHead, create_segmenter, init_variables, resize_bilinear

DATA = Path(__file__).parent.parent / "data"


@functools.cache
def golden(name):
    """A stored file: its arrays (float16 as float32), its meta data, and the original's state dict."""
    with np.load(DATA / f"segmentation_{name}.npz") as file:
        arrays = {key: x.astype(np.float32) if x.dtype == np.float16 else x for key, x in file.items()}
    meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}
    return arrays, meta, {key[3:]: x for key, x in arrays.items() if key.startswith("sd/")}


@functools.cache
def stored(name, **options):
    """The model and the variables of a stored file."""
    _, meta, state_dict = golden(name)
    sizes = {"depths": "layers", "dims": "embed_dims"} | {
        key: key for key in ("mlp_ratios", "num_classes", "neck_channels", "head_channels")
    }
    model = create_segmenter("fcvit_tiny", **{field: meta[key] for field, key in sizes.items()}, **options)
    return model, convert.from_torch(state_dict, model)


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, variables, images):
    """The backbone's maps, the neck's and the logits."""

    def wanted(module, method):
        return module.name in ("backbone", "neck") and method == "__call__"

    model = with_fields(model, share_blocks=True)
    logits, state = model.apply(variables, images, capture_intermediates=wanted, mutable=["intermediates"])
    return *(state["intermediates"][part]["__call__"][0] for part in ("backbone", "neck")), logits


def cross_entropy(logits, labels):
    """The mean over all pixels of logits that are resized to the labels, those with label 255 counting as 0."""
    log_p = jax.nn.log_softmax(resize_bilinear(logits, labels.shape[1:]))
    log_p = jnp.take_along_axis(log_p, jnp.where(labels == 255, 0, labels)[..., None], -1)[..., 0]
    return -jnp.where(labels == 255, 0, log_p).mean()


@pytest.mark.parametrize("size", [0, 1, 2])
def test_outputs_equal_the_originals(size):
    """Sizes: a multiple of 32, one as AlignResize makes it, and one where every map but the first is rounded up."""
    arrays, _, _ = golden("small")
    model, variables = stored("small", head_dropout_rate=0.0)
    images = nhwc(arrays[f"in{size}/images_nchw"])
    _, maps, logits = outputs(model, variables, images)
    if size != 1:
        for i, x in enumerate(maps, 1):
            assert_close(x, nhwc(arrays[f"in{size}/neck{i}"]), f"map {i}")
    if size == 2:
        by_method = jax.jit(functools.partial(model.apply, method="neck"))(variables, images)
        assert isinstance(by_method, tuple)
        jax.tree.map(functools.partial(assert_close, what="maps by method"), by_method, maps)
    assert_close(logits, nhwc(arrays[f"in{size}/logits4"]), "logits")
    assert logits.dtype == jnp.float32

    if size:  # first to the network's input size, then to that of the original image, where the third one shrinks
        logits = resize_bilinear(logits, arrays[f"in{size}/images_nchw"].shape[2:])
        logits = resize_bilinear(logits, arrays[f"in{size}/ori_hw"].tolist())
        np.testing.assert_array_equal(logits.argmax(-1), arrays[f"in{size}/pred_ori"])
    if size == 2:
        assert_close(logits, nhwc(arrays["in2/logits_ori"]), "logits at the original size")


def with_unbiased_variance(name, average, before, batch, height, width):
    """A running average of ours after one step as PyTorch has it, with an unbiased variance."""
    if not name.endswith("running_var"):
        return average
    if name.startswith("backbone."):
        module = name.removeprefix("backbone.").removesuffix(".norm.running_var")
        stride = {"patch_embed": 4, "network.1": 8, "network.3": 16, "network.5": 32}[module]
    else:
        level, step = map(int, name.split(".")[2:4])
        stride = 4 * 2 ** (level - step // 2)
    n = batch * (height // stride) * (width // stride)
    return 0.9 * before + (average - 0.9 * before) * n / (n - 1)


def assert_step_equals(step, part, model, tolerance):
    """Compares a step with a part of the stored file; statistics of the backbone only where they are of all images."""
    arrays, _, state_dict = golden("small")
    converted = convert.to_torch({"params": step.grads, "batch_stats": step.batch_stats}, model)
    assert_close(step.loss, arrays[f"{part}/loss"], "loss", 1e-6)
    assert_close(step.logits, nhwc(arrays[f"{part}/logits4"]), "logits")
    start, compared = f"{part}/grad/", 0
    for key, grad in ((key.removeprefix(start), x) for key, x in arrays.items() if key.startswith(start)):
        if key.endswith("proj.bias"):  # in front of a BatchNorm: zero but for rounding
            np.testing.assert_allclose(converted[key], grad, rtol=0, atol=1e-6, err_msg=key)
        else:
            assert np.abs(grad).max() > 0, key
            assert_close(converted[key], grad, key, tolerance)
        compared += 1
    start = f"{part}/after/"
    for key, after in ((key.removeprefix(start), x) for key, x in arrays.items() if key.startswith(start)):
        if part == "train" or key.startswith("decode_head"):
            batch, _, height, width = arrays["train/images_nchw"].shape
            ours = with_unbiased_variance(key, converted[key], state_dict[key], batch, height, width)
            assert_close(ours, after, key)
            compared += 1
    return compared


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_compact_pytorch_version_equals_the_originals(size):
    """The one that benchmarks.train_step times ours beside."""
    arrays, meta, state_dict = golden("small")
    sizes = {"depths": meta["layers"], "dims": meta["embed_dims"]}
    sizes |= {key: meta[key] for key in ("mlp_ratios", "num_classes", "neck_channels", "head_channels")}
    network = torch_segmenter.SemanticFPN(**sizes)
    network.load_state_dict({name: torch.tensor(x) for name, x in state_dict.items()})
    with torch.inference_mode():
        logits = network.eval()(torch.tensor(arrays[f"in{size}/images_nchw"]))
    assert_close(nhwc(logits.numpy()), nhwc(arrays[f"in{size}/logits4"]), "logits")


def test_training_step_equals_the_originals():
    arrays, _, state_dict = golden("small")
    model, variables = stored("small", head_dropout_rate=0.0)
    images, labels = nhwc(arrays["train/images_nchw"]), arrays["train/labels"].astype(int)
    step = train_step(model, cross_entropy, variables, images, labels)
    compared = assert_step_equals(step, "train", model, 1e-5)
    assert compared == sum("num_batches" not in name for name in state_dict)
    assert_close(step.image_grad, nhwc(arrays["train/grad_images"]), "gradient of the images")


def test_statistics_are_of_a_group_in_the_backbone_and_of_the_whole_batch_in_the_head():
    arrays, meta, _ = golden("small")
    model, variables = stored("small", head_dropout_rate=0.0, bn_group_size=meta["devices_images_each"])
    images, labels = nhwc(arrays["train/images_nchw"]), arrays["train/labels"].astype(int)
    step = train_step(model, cross_entropy, variables, images, labels)
    assert assert_step_equals(step, "devices", model, 5e-5) == 49 + 14


def test_dropout_is_of_the_sum_of_all_levels():
    """With the stored draw in place of ours."""
    arrays, _, _ = golden("small")
    model, variables = stored("small")
    keep = arrays["dropout/keep"]

    def with_stored_draw(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.module.path[0] == "head":
            assert context.module.rate == 0.1
            return args[0] * keep[:, None, None, :] / 0.9
        return call(*args, **kwargs)

    @jax.jit
    def logits(variables, images):
        with nn.intercept_methods(with_stored_draw):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    y = logits(variables, nhwc(arrays["train/images_nchw"]))
    assert_close(y, nhwc(arrays["dropout/logits4"]), "logits")


def test_dropout_is_of_whole_channels():
    maps = [jnp.ones((3, 8 >> i, 8 >> i, 4)) for i in range(4)]
    head = SemanticFPNHead(num_classes=2, channels=32, dropout_rate=0.25)
    variables = head.init(jax.random.key(0), maps, False)
    _, state = head.apply(
        variables,
        maps,
        True,
        rngs={"dropout": jax.random.key(1)},
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        mutable=["intermediates", "batch_stats"],
    )
    (dropped,) = state["intermediates"]["Dropout_0"]["__call__"]
    is_zero = np.asarray(dropped == 0)
    # Where the input has a zero of its own, at an edge, channels differ from position to position.
    whole = is_zero.all((1, 2))
    assert 0 < whole.mean() < 0.5 and not np.array_equal(whole[0], whole[1])


@pytest.mark.parametrize("name", ["tiny", "s12"])
def test_full_size_equals_the_originals(name):
    arrays, meta, _ = golden(f"{name}_full")
    shapes = dict(zip(arrays["keys"].tolist(), map(json.loads, arrays["shapes"].tolist()), strict=True))
    model = create_segmenter(f"fcvit_{name}")
    weights = formula_weights({key: tuple(shape) for key, shape in shapes.items()}, meta["seed"])
    variables = convert.from_torch(weights, model)
    sizes = {
        part: sum(x.size for x in jax.tree.leaves(variables["params"][part])) for part in ("backbone", "neck", "head")
    }
    assert list(sizes.values()) == arrays["parameters"].tolist()
    images = np.random.default_rng([meta["seed"], 77, 0]).normal(0, 1, meta["image_shape"])
    images = nhwc(images.astype(np.float16).astype(np.float32))

    *maps, logits = outputs(model, variables, images)
    for what, levels in zip(("pyramid", "neck"), maps, strict=True):
        for i, x in enumerate(levels, 1):
            x, stored = np.moveaxis(np.asarray(x), -1, 1), arrays[f"{what}{i}_mean_std_first8"]
            found = [x.mean(), x.std(ddof=1), *x.reshape(-1)[:8]]
            np.testing.assert_allclose(found, stored, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=f"{what} {i}")
    assert_close(logits[:, ::3, ::3], nhwc(arrays["logits4"]), "logits")


def test_six_optimizer_steps_equal_the_originals():
    arrays, meta, state_dict = golden("trajectory")
    model, variables = stored("trajectory", head_dropout_rate=0.0)
    tx = optax.adamw(lambda step: jnp.asarray(arrays["lr"], jnp.float32)[step], weight_decay=meta["weight_decay"])

    @jax.jit
    def update(variables, opt_state, images, labels):
        step = train_step(model, cross_entropy, variables, images, labels)
        updates, opt_state = tx.update(step.grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": step.batch_stats}, opt_state, step.loss

    opt_state, losses = tx.init(variables["params"]), []
    for images, labels in zip(arrays["images_nchw"], arrays["labels"].astype(int), strict=True):
        variables, opt_state, loss = update(variables, opt_state, nhwc(images), labels)
        losses.append(loss)
    np.testing.assert_allclose(losses, arrays["losses"], rtol=1e-5)
    converted, compared = convert.to_torch(variables, model), 0
    for name, x in ((key[6:], x) for key, x in arrays.items() if key.startswith("final/")):
        # Biases in front of a BatchNorm follow rounding noise, and running means follow them; variances are biased.
        if name.startswith("backbone.") and name.endswith(("running_mean", "proj.bias")):
            np.testing.assert_allclose(converted[name], x, rtol=0, atol=1e-2, err_msg=name)
        elif not name.endswith(("running_var", "num_batches_tracked")):
            assert_close(converted[name], x, name, 3e-4)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("case", range(7))
def test_resizing_equals_pytorchs(case):
    arrays, _, _ = golden("loss_and_resize")
    x, expected = nhwc(arrays[f"resize{case}/input_nchw"]), nhwc(arrays[f"resize{case}/bilinear"])
    assert_close(resize_bilinear(x, expected.shape[1:3]), expected, "bilinear")
    if f"resize{case}/nearest" in arrays:
        expected = nhwc(arrays[f"resize{case}/nearest"])
        np.testing.assert_array_equal(upsample_nearest(x, *expected.shape[1:3]), expected)


@pytest.mark.parametrize("shape, size", [((1, 4), (3, 4)), ((3, 5), (12, 10)), ((4, 2), (5, 16)), ((6, 3), (3, 27))])
def test_resizing_by_whole_factors_and_its_gradient_equal_pytorchs(shape, size):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 3, *shape)).astype(np.float32), rng.normal(size=(2, 3, *size)).astype(np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    expected = torch.nn.functional.interpolate(leaf, size, mode="bilinear", align_corners=False)
    expected.backward(torch.from_numpy(g))
    actual, gradient = jax.vjp(lambda x: resize_bilinear(x, size), nhwc(x))
    assert_close(actual, nhwc(expected.detach()), "resized")
    assert_close(*gradient(nhwc(g)), nhwc(leaf.grad), "gradient")


def test_resizing_to_the_same_size_and_in_half_precision_keeps_the_dtype():
    x = jnp.arange(2 * 3 * 5 * 4, dtype=jnp.bfloat16).reshape(2, 3, 5, 4)
    assert resize_bilinear(x, (3, 5)) is x
    assert resize_bilinear(x, (6, 10)).dtype == jnp.bfloat16


def test_initial_weights_are_those_of_the_documented_run():
    model = create_segmenter("fcvit_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=1000)
    dims = model.backbone.dims
    maps = [jnp.zeros((1, 8 >> i, 8 >> i, dim)) for i, dim in enumerate(dims)]
    params = jax.jit(functools.partial(model.init, method="decode"))(jax.random.key(0), maps)["params"]
    flat = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    for path, x in flat.items():
        if "classifier" in path:
            assert abs(np.abs(x).max() * 128**0.5 - 1) < 5e-3 and abs(x.std() * (3 * 128) ** 0.5 - 1) < 0.1, path
        elif path.endswith("scale"):
            assert (x == 1).all(), path
        elif path.endswith("bias"):
            assert not x.any(), path
        else:
            std = {"lateral": 0.08839, "output": 0.02946, "level": 0.04167}[path.split("/")[1].split("_")[0]]
            assert abs(x.std() / std - 1) < (0.08 if "lateral" in path else 0.02), path
            assert np.abs(x).max() > 2.5 * std, path  # normal, not uniform
    shapes = abstract_variables(create_segmenter("fcvit_tiny"))["params"]
    assert sorted(shapes) == ["backbone", "head", "neck"]
    assert create_segmenter("fcvit_tiny").backbone.layer_scale_init == 1e-6


def test_initial_weights_can_be_drawn_block_by_block():
    model = create_segmenter("fcvit_tiny", depths=(2, 1, 1, 1), dims=(8, 8, 8, 8), neck_channels=4, head_channels=4)
    variables = init_variables(model, jax.random.key(0))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda x: x.shape, abstract_variables(model))
    first, second = (variables["params"]["backbone"][f"stages_0_block_{i}"]["channel_mixer"] for i in range(2))
    assert not np.array_equal(first["expand"]["kernel"], second["expand"]["kernel"])


def test_half_precision_and_other_fields_reach_every_part():
    fields = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "neck_channels": 8, "head_channels": 4, "num_classes": 3}
    fields |= {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    model = create_segmenter("fcvit_b12", **fields)
    assert model == create_segmenter("fcvit_s12", **fields) and hash(model) == hash(
        create_segmenter("fcvit_s12", **fields)
    )
    shapes = abstract_variables(model)
    assert {x.dtype for x in jax.tree.leaves(shapes["params"])} == {jnp.dtype("bfloat16")}
    images = jnp.zeros((2, 40, 64, 3))
    maps = jax.eval_shape(functools.partial(model.apply, method="neck"), shapes, images)
    assert [x.shape for x in maps] == [(2, 10, 16, 8), (2, 5, 8, 8), (2, 3, 4, 8), (2, 2, 2, 8)]
    assert {x.dtype for x in maps} == {jnp.dtype("bfloat16")}
    logits = jax.eval_shape(model.apply, shapes, images)
    assert (logits.shape, logits.dtype) == ((2, 10, 16, 3), jnp.float32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 0}, "model.num_classes=0"),
        ({"neck_channels": 0}, "model.neck_channels=0"),
        ({"head_channels": 0}, "model.head_channels=0"),
        ({"head_dropout_rate": 1}, "model.head_dropout_rate=1"),
        ({"dims": (0, 8, 8, 8)}, "model.dims=0"),
    ],
)
def test_values_that_make_no_segmenter_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        create_segmenter("fcvit_tiny", **values)


def test_images_and_maps_that_do_not_fit_are_refused():
    model, variables = stored("small")
    for method in ("__call__", "neck"):
        with pytest.raises(UserError, match=r"Images must be \(N, H, W, 3\) floats"):
            jax.eval_shape(lambda m=method: model.apply(variables, jnp.zeros((1, 3, 32, 32)), method=m))
    with pytest.raises(UserError, match="map of 9x9 must be followed by one of half its size, rounded up"):
        upsample_nearest(jnp.zeros((1, 4, 5, 2)), 9, 9)


def test_the_network_alone_imports_no_other_library():
    code = """
import sys
from fcvit_jax.networks import semantic_fpn
print([m for m in ("orbax.checkpoint", "grain", "torch", "PIL", "cv2", "tensorflow_datasets") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert out.stdout.strip() == "[]"
