import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WELL
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import assert_close, draw, oracle, ours, value_and_gradients

from fcvit_jax.depthwise import IMPLS, depthwise_conv
from fcvit_jax.networks.layers import Conv1x1

# (N, H, W, C, k): odd and even maps, not square, smaller than the filter, one image, one pixel, blocks of channels.
SIZES = [
    (2, 6, 5, 3, 1),
    (2, 9, 6, 4, 3),
    (1, 4, 7, 3, 5),
    (2, 14, 17, 2, 11),
    (3, 4, 4, 2, 11),
    (2, 2, 3, 2, 11),
    (2, 1, 1, 3, 11),
    (2, 13, 6, 48, 5),
    (2, 5, 4, 32, 11),
]
ALL = [None, *IMPLS]


by_oracle = jax.jit(value_and_gradients(oracle))  # here, so that it is compiled once for each size


def second_derivatives(op):
    """The gradient of the squared norm of the gradient of a loss that is not quadratic."""

    def loss(x, kernel, g):
        return (g * jnp.sin(op(x, kernel))).sum()

    def norm(x, kernel, g):
        return sum((d**2).sum() for d in jax.grad(loss, argnums=(0, 1))(x, kernel, g))

    return jax.grad(norm, argnums=(0, 1))


def test_the_oracle_is_the_cross_correlation_by_definition():
    x, kernel, _ = draw((2, 5, 4, 3, 5))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = np.zeros(x.shape)
    for i in range(5):
        for j in range(5):
            expected += padded[:, i : i + 5, j : j + 4] * np.asarray(kernel[i, j])
    np.testing.assert_allclose(oracle(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("impl", ALL)
def test_values_and_gradients_equal_the_oracle(impl, size):
    args = draw(size)
    by_ours = jax.jit(value_and_gradients(ours(impl)), compiler_options=WELL)
    assert_close(by_ours(*args), by_oracle(*args))


@pytest.mark.parametrize("impl", ALL)
def test_second_derivatives_equal_the_oracle(impl):
    args = draw((2, 6, 5, 3, 5))
    assert_close(jax.jit(second_derivatives(ours(impl)))(*args), jax.jit(second_derivatives(oracle))(*args))


@pytest.mark.parametrize("impl", ALL)
def test_forward_mode_equals_the_oracle_and_is_the_transpose_of_reverse_mode(impl):
    x, kernel, g = draw((2, 6, 5, 3, 5))
    tangents = jnp.cos(x), jnp.sin(kernel)

    def forward(op, x, kernel):
        return jax.jvp(op, (x, kernel), tangents)

    y, dy = jax.jit(partial(forward, ours(impl)))(x, kernel)
    assert_close((y, dy), forward(oracle, x, kernel))
    gradients = jax.vjp(ours(impl), x, kernel)[1](g)
    backward = sum(jnp.vdot(t, d) for t, d in zip(tangents, gradients, strict=True))
    np.testing.assert_allclose(jnp.vdot(g, dy), backward, rtol=1e-4)


@pytest.mark.parametrize("impl", ALL)
def test_every_order_of_the_modes_gives_the_same_second_derivatives(impl):
    x, kernel, g = draw((1, 3, 4, 2, 3))

    def loss(op, args):
        return (g * jnp.sin(op(*args))).sum()

    def hessian(outer, inner, op):
        return jax.tree.leaves(jax.jit(outer(inner(partial(loss, op))))((x, kernel)))

    expected = hessian(jax.jacfwd, jax.jacrev, oracle)
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            assert_close(hessian(outer, inner, ours(impl)), expected)


@pytest.mark.parametrize("impl", ALL)
def test_bfloat16_sums_in_float32(impl):
    # 121 times 1 + 2^-7: bfloat16 sums would move in steps of a half before they get to 122.
    x = jnp.full((8, 13, 13, 2), 1 + 2**-7, jnp.bfloat16)
    kernel, g = jnp.ones((11, 11, 2), jnp.bfloat16), jnp.ones_like(x)
    y, dx, dk = jax.jit(value_and_gradients(ours(impl)))(x, kernel, g)
    assert y.dtype == dx.dtype == dk.dtype == jnp.bfloat16
    as_float32 = (a.astype(jnp.float32) for a in (x, kernel, g))
    expected = by_oracle(*as_float32)
    for actual, exact in zip((y, dx, dk), expected, strict=True):
        np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("impl", ALL)
def test_float32_kernel_of_bfloat16_images_keeps_its_dtype_in_the_gradient(impl):
    x, kernel, g = draw((2, 6, 6, 3, 3))
    y, dx, dk = value_and_gradients(ours(impl))(x.astype(jnp.bfloat16), kernel, g.astype(jnp.bfloat16))
    assert (y.dtype, dx.dtype, dk.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("impl", ALL)
def test_vmap_over_images_and_filters(impl):
    xs, kernels, gs = (jnp.stack([a, 2 * a, a + 1]) for a in draw((2, 5, 4, 3, 3)))
    expected = [value_and_gradients(oracle)(*args) for args in zip(xs, kernels, gs, strict=True)]
    actual = jax.jit(jax.vmap(value_and_gradients(ours(impl))))(xs, kernels, gs)
    assert_close(actual, [jnp.stack(a) for a in zip(*expected, strict=True)])
    images = jax.vmap(ours(impl), (1, None), 2)(jnp.moveaxis(xs, 0, 1), kernels[0])
    filters = jax.vmap(ours(impl), (None, 2))(xs[0], jnp.moveaxis(kernels, 0, 2))
    assert_close([images[:, :, 1], filters[1]], [oracle(xs[1], kernels[0]), oracle(xs[0], kernels[1])])
    assert jax.vmap(ours(impl), (0, None))(xs[:, :0], kernels[0]).shape == (3, 0, 5, 4, 3)


@pytest.mark.parametrize("impl", ALL)
def test_an_empty_batch_has_an_empty_result_and_no_gradient(impl):
    """As a detector gives it that has found nothing."""
    y, x_grad, kernel_grad = jax.jit(value_and_gradients(ours(impl)))(*draw((0, 5, 4, 16, 5)))
    assert y.shape == x_grad.shape == (0, 5, 4, 16)
    np.testing.assert_array_equal(kernel_grad, np.zeros((5, 5, 16)))


def test_checkpoint_gives_the_same_gradients():
    x, kernel, g = draw((2, 6, 5, 3, 5))

    def loss(op, kernel):
        return (g * jnp.sin(op(x, kernel))).sum()

    plain, remat = (jax.jit(jax.grad(partial(loss, op))) for op in (depthwise_conv, jax.checkpoint(depthwise_conv)))
    np.testing.assert_allclose(remat(kernel), plain(kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ALL)
def test_every_operation_by_itself_gives_the_same(impl):
    args = draw((2, 5, 4, 16, 3))
    with jax.disable_jit():
        found = value_and_gradients(ours(impl))(*args)
    assert_close(found, value_and_gradients(oracle)(*args))


def test_one_export_serves_every_platform_with_its_own_implementation():
    args = draw((2, 9, 9, 3, 5))
    run = jax.jit(value_and_gradients(ours(None)))
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(*args)
    assert_close(jax.export.deserialize(exported.serialize()).call(*args), run(*args))
    only = {p: jax.export.export(run, platforms=(p,))(*args).mlir_module() for p in ("cpu", "cuda", "tpu")}
    images = {p: set(re.findall(r"dim_numbers = \[b(.*?), f\]x", text)) for p, text in only.items()}
    assert images == {"cpu": set(), "cuda": {", 0, 1"}, "tpu": {", 0"}}  # no convolution, maps, sequences of tiles


def test_tpus_take_small_filters_and_long_rows_by_lax():
    for size in [(2, 9, 9, 3, 3), (1, 2, 129, 1, 11)]:
        x, kernel, _ = draw(size)
        by_default = jax.export.export(jax.jit(ours(None)), platforms=("tpu",))(x, kernel).mlir_module()
        assert "dim_numbers = [b, 0, 1, f]x" in by_default


@pytest.mark.parametrize("size", [9, 4])  # by shift and by banded
def test_an_export_may_leave_the_batch_open(size):
    x, kernel, _ = draw((3, size, size, 3, 5))
    n = jax.export.symbolic_shape("n")[0]
    spec = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(depthwise_conv), platforms=("cpu", "cuda", "tpu"))(spec, kernel)
    assert_close(exported.call(x, kernel), depthwise_conv(x, kernel))


@pytest.mark.parametrize("size", [(16, 14, 14, 32, 11), (16, 4, 4, 32, 11)], ids=str)
@pytest.mark.parametrize("impl", ALL)
def test_a_sharded_batch_needs_one_reduction_and_no_more(impl, size):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    batch, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    args = draw(size)
    run = value_and_gradients(ours(impl))

    def run_on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as the training step does
            return run(*args)

    sharded = jax.jit(run_on_mesh, in_shardings=(batch, everywhere, batch), out_shardings=(batch, batch, everywhere))
    lowered = sharded.lower(*args)
    # Convolutions are of a device's own two images, whatever XLA would make of a kernel that is split.
    assert set(re.findall(r"stablehlo\.convolution.*: \(tensor<(\d+)x", lowered.as_text())) <= {"2"}
    loops, entry = lowered.compile().as_text().split("\nENTRY")
    collective = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    assert mesh.size == 8
    assert (re.findall(collective, loops), re.findall(collective, entry)) == ([], ["all-reduce"])
    reduced = re.search(r"= f32\[([\d,]+)\]\S* all-reduce\(", entry)[1]
    assert np.prod([int(dim) for dim in reduced.split(",")]) <= args[1].size  # of the kernel's gradient alone
    assert_close(sharded(*args), jax.jit(run)(*args))


@pytest.mark.parametrize("impl", ALL)
def test_the_program_does_not_grow_with_the_kernel(impl):
    lines = {}
    for k in (3, 11, 21):
        lowered = jax.jit(value_and_gradients(ours(impl))).lower(*draw((2, 28, 28, 4, k)))
        lines[k] = len(lowered.as_text().splitlines())
    assert lines[11] < 1.5 * lines[3] and lines[21] < 1.5 * lines[3]


@pytest.mark.parametrize(
    ("x", "kernel", "impl", "message"),
    [
        ((1, 4, 4, 3), (2, 2, 3), None, "odd k"),
        ((1, 4, 4, 3), (3, 5, 3), None, "odd k"),
        ((4, 4, 3), (3, 3, 3), None, r"\(N, H, W, C\)"),
        ((1, 4, 4, 3), (3, 3, 1), None, "3 channels, the kernel has 1"),
        ((1, 4, 4, 3), (3, 3, 3), "fft", "unknown impl 'fft'"),
    ],
)
def test_bad_input_is_refused(x, kernel, impl, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(jnp.zeros(x), jnp.zeros(kernel), impl)


def test_images_that_are_integers_are_refused():
    with pytest.raises(ValueError, match="float dtype, got uint8"):
        depthwise_conv(jnp.zeros((1, 4, 4, 3), jnp.uint8), jnp.zeros((3, 3, 3)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_split_over_some_axes_of_a_mesh_has_the_same_gradient(impl):
    """As where other axes split the parameters; XLA by itself makes the weight gradient of `lax` twice as large."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(4, 6, 6, 16)).astype(np.float32), rng.normal(size=(5, 5, 16)).astype(np.float32)
    grad = jax.jit(jax.grad(lambda kernel, x: jnp.sin(depthwise_conv(x, kernel, impl)).sum()))
    alone = grad(kernel, x)
    with jax.set_mesh(mesh):
        assert_close(grad(kernel, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))), alone)


@pytest.mark.parametrize("impl", ALL)
def test_inside_shard_map_a_shared_filter_has_the_same_gradient(impl):
    """With JAX's own check of what varies from device to device; so has the kernel of a 1x1 convolution."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    x, kernel, g = draw((8, 5, 5, 16, 3))
    conv = Conv1x1(8)
    weights = conv.init(jax.random.key(0), x)

    def run(x, kernel, g, weights):
        y, pullback = jax.vjp(lambda *args: conv.apply(args[2], depthwise_conv(*args[:2], impl)), x, kernel, weights)
        return y, *pullback(g[..., :8])

    alone = jax.jit(run)(x, kernel, g, weights)
    split, whole = PartitionSpec("data"), PartitionSpec()
    specs = {"in_specs": (split, whole, split, whole), "out_specs": (split, split, whole, whole)}
    shared = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(x, kernel, g, weights)
    assert_close(jax.tree.leaves(shared), jax.tree.leaves(alone))
