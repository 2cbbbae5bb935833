"""The classifier has derivatives of every order, in forward and reverse mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.networks.fcvit import FCViT
from fcvit_jax.networks.layers import Conv1x1, gelu


@pytest.fixture(scope="module")
def loss():
    """A scalar of three numbers: how much of each of three directions is added to the images."""
    network = FCViT(
        depths=(1, 1),
        dims=(16, 32),
        mlp_ratios=(4, 2),
        kernel_sizes=(5,),
        num_classes=3,
        spatial_attention=True,
        channel_attention=True,
        layer_scale_init=1.0,
        share_blocks=True,
    )
    images, *directions = jax.random.normal(jax.random.key(0), (4, 2, 32, 32, 3))
    variables = jax.jit(network.init)(jax.random.key(1), images)
    # Away from the initial weights, by which neither the context nor the head does much.
    variables = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), variables)

    def loss(amounts):
        logits = network.apply(variables, images + jnp.tensordot(amounts, jnp.stack(directions), 1))
        return jnp.square(jax.nn.log_softmax(logits)).sum()

    return loss


AMOUNTS = jnp.array([0.3, -0.2, 0.5])


def test_the_hessian_equals_reverse_over_reverse(loss):
    hessian = jax.jit(jax.hessian(loss))(AMOUNTS)
    twice_reverse = jax.jit(jax.jacrev(jax.jacrev(loss)))(AMOUNTS)
    assert np.abs(twice_reverse).max() > 1e-3
    np.testing.assert_allclose(hessian, twice_reverse, rtol=0, atol=1e-4 * np.abs(twice_reverse).max())


def test_forward_mode_equals_reverse_mode_and_finite_differences(loss):
    direction = jnp.array([1.0, 2.0, -1.0])
    value_and_slope = jax.jit(lambda amounts: jax.jvp(loss, (amounts,), (direction,)))
    slope = value_and_slope(AMOUNTS)[1]
    np.testing.assert_allclose(slope, jax.jit(jax.grad(loss))(AMOUNTS) @ direction, rtol=1e-4)
    after, before = (value_and_slope(AMOUNTS + step * direction)[0] for step in (1e-2, -1e-2))
    np.testing.assert_allclose(slope, (after - before) / 2e-2, rtol=1e-2)


def test_gelu_has_its_slope_in_forward_mode():
    x = jnp.linspace(-3, 3, 13)
    slope = jax.jvp(gelu, (x, 0.5), (jnp.ones_like(x), 1.0))[1]  # along x and the bias: twice the slope
    expected = jax.vmap(jax.grad(partial(jax.nn.gelu, approximate=False)))(x + 0.5)
    np.testing.assert_allclose(slope, 2 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [3, 7])  # narrower and wider than the input
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_1x1_convolution_has_the_derivatives_of_a_matrix_product(features, dtype):
    conv = Conv1x1(features, dtype=dtype)
    x, dx = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 5)).astype(dtype)
    params = conv.init(jax.random.key(1), x)["params"]
    kernel, bias = params["kernel"], params["bias"]
    dk = jnp.cos(kernel)

    def ours(x, kernel):
        return conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def expected(x, kernel):
        return x @ kernel.astype(dtype)

    def derivatives(f, x, kernel):
        def loss(x, kernel):
            return jnp.sin(f(x, kernel).astype(jnp.float32)).sum()

        _, tangent = jax.jvp(f, (x, kernel), (dx, dk))
        gradients = jax.grad(loss, (0, 1))(x, kernel)
        mixed = jax.jacfwd(jax.grad(loss), 1)(x, kernel)
        return tangent, *gradients, mixed

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    kernels, xs = jnp.stack([kernel, dk]), jnp.stack([x, 2 * x], 2)
    for args, axes in (((x, kernel), (None, None)), ((x, kernels), (None, 0)), ((xs, kernel), (2, None))):
        runs = (partial(derivatives, f) for f in (ours, expected))
        mapped = (run if axes == (None, None) else jax.vmap(run, axes) for run in runs)
        found, wanted = (jax.tree.leaves(run(*args)) for run in mapped)
        for a, e in zip(found, wanted, strict=True):
            assert a.shape == e.shape and a.dtype == e.dtype
            e = np.asarray(e, np.float32)
            np.testing.assert_allclose(np.asarray(a, np.float32), e, rtol=0, atol=tolerance * np.abs(e).max())
