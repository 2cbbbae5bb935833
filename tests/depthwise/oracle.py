"""What the tests of the depthwise convolution share: inputs, and the convolution by JAX itself as the oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.depthwise import depthwise_conv


def draw(size, dtype=jnp.float32):
    n, height, width, channels, k = size
    rng = np.random.default_rng(0)
    shapes = (n, height, width, channels), (k, k, channels), (n, height, width, channels)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def oracle(x, kernel):
    """The convolution with the derivatives that JAX gives it."""
    half, numbers = kernel.shape[0] // 2, ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), [(half, half)] * 2, dimension_numbers=numbers, feature_group_count=x.shape[3]
    )


def ours(impl):
    return lambda x, kernel: depthwise_conv(x, kernel, impl)


def value_and_gradients(op):
    def run(x, kernel, g):
        y, pullback = jax.vjp(op, x, kernel)
        return y, *pullback(g)

    return run


def assert_close(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.abs(a - e).max() <= tolerance * np.abs(e).max()
