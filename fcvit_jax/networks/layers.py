"""The network's basic layers: norms, convolutions and GELU, in the forms that XLA computes fast and exactly enough."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.depthwise import depthwise_conv, primitives
from fcvit_jax.errors import UserError
from fcvit_jax.networks.dense_conv import Conv


def valid_cells(sizes: jax.Array | None, x: jax.Array, stride: int) -> jax.Array | None:
    """Which cells of a map belong to the image, and not to the padding to the right of it and below it.

    Args:
      sizes: (N, 2) int, height and width of each image in pixels; None: there is no padding.
      x: (N, H, W, C).
      stride: pixels per cell.

    Returns:
      (N, H, W, 1) bool; None without sizes.
    """
    if sizes is None:
        return None
    height, width = jnp.moveaxis(-(-sizes // stride), -1, 0)
    rows, columns = (jnp.arange(n) for n in x.shape[1:3])
    return ((rows < height[:, None])[:, :, None] & (columns < width[:, None])[:, None, :])[..., None]


def masked(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """x with zeros where it is not valid, which `valid_cells` says; x itself without padding."""
    return x if valid is None else jnp.where(valid, x, 0)


@jax.checkpoint  # recomputed in the backward pass, which otherwise would keep four arrays, not x alone
def gelu(x: jax.Array, bias: jax.Array | float = 0) -> jax.Array:
    """The exact GELU of x + bias, in the dtype of x, computed in float32.

    XLA's erf is cheaper than the erfc that `jax.nn.gelu` uses. The bias must broadcast to the shape of x.
    """
    y = (x + bias).astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


@jax.jit
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _kernel_grad(g, x, kernel):
    rows = tuple(range(x.ndim - 1))
    # On CPU, XLA transposes the left operand of this product in memory. JAX's rule puts the incoming gradient there;
    # use whichever operand is narrower.
    if x.shape[-1] < g.shape[-1]:
        return jnp.tensordot(x, g, (rows, rows))
    return jnp.tensordot(g, x, (rows, rows)).T


def _batch_product(x, kernel, x_axis, kernel_axis):
    if kernel_axis is None:
        return _product(jnp.moveaxis(x, x_axis, 0), kernel), 0
    return jax.vmap(jnp.matmul, (x_axis, kernel_axis))(x, kernel), 0


# x (..., C), kernel (C, D) to x @ kernel (..., D).
_product = primitives.bilinear(
    "channel_product",
    compute=_matmul,
    result=lambda x, kernel: primitives.array_type(x, (*x.shape[:-1], kernel.shape[1]), x.dtype),
    to_first=lambda g, x, kernel: g @ kernel.T,
    to_second=_kernel_grad,
    batch=_batch_product,
)


class Conv1x1(nn.Module):
    """A 1x1 convolution with a bias, as a matrix product over channels; (N, H, W, C) to (N, H, W, features).

    Attributes:
      features: channels of the result.
      with_gelu: apply GELU to the result.
      kernel_init: draws the kernel; None: a normal distribution of standard deviation sqrt(2 / features).
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    features: int
    with_gelu: bool = False
    kernel_init: Callable[..., jax.Array] | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init or normal((2 / self.features) ** 0.5), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = _product(x, kernel)
        return gelu(y, bias) if self.with_gelu else y + bias


def group_norm(x: jax.Array, valid: jax.Array | None = None, **kwargs) -> jax.Array:
    """GroupNorm with one group: statistics over H, W and C together, where `valid`, and affine per channel."""
    norm = nn.GroupNorm(num_groups=1, epsilon=1e-5, use_fast_variance=False, **kwargs)
    return norm(x, mask=None if valid is None else jnp.broadcast_to(valid, x.shape))


def layer_norm(**kwargs) -> nn.LayerNorm:
    """LayerNorm over channels, with the epsilon of ViT and ConvNeXt."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, **kwargs)


class BatchNorm(nn.Module):
    """Batch normalisation over groups of the batch, so that statistics depend neither on devices nor on processes.

    The running averages take the mean over the groups, and keep the biased variance (PyTorch keeps the unbiased one).

    Attributes:
      group_size: images (consecutive in the batch) that share statistics; None or 0: the whole batch.
      dtype: dtype of the result; statistics are float32.
      param_dtype: dtype of scale and bias.
    """

    group_size: int | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        if train:
            size = self.group_size or x.shape[0]
            if x.shape[0] % size:
                raise UserError(
                    f"BatchNorm: the batch of {x.shape[0]} images is not a multiple of bn_group_size={size}."
                )
            groups = x.reshape(-1, size, *x.shape[1:]).astype(jnp.float32)
            mean = groups.mean((1, 2, 3), keepdims=True)
            var = groups.var((1, 2, 3), keepdims=True)
            if not self.is_initializing():
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean.mean((0, 1, 2, 3))
                running_var.value = 0.9 * running_var.value + 0.1 * var.mean((0, 1, 2, 3))
        else:
            groups, mean, var = x.astype(jnp.float32), running_mean.value, running_var.value
        groups = (groups - mean) * (jax.lax.rsqrt(var + 1e-5) * scale) + bias
        return groups.reshape(x.shape).astype(self.dtype)


class DepthwiseConv(nn.Module):
    """Depthwise convolution; stride 1, the output as large as the input; kernel (k, k, C).

    Attributes:
      kernel_size: k, odd.
      with_gelu: apply GELU to the result.
      use_bias: add a bias.
      kernel_init: draws the kernel; None: a normal distribution of standard deviation sqrt(2) / k.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    kernel_size: int
    with_gelu: bool = False
    use_bias: bool = True
    kernel_init: Callable[..., jax.Array] | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, channels = self.kernel_size, x.shape[-1]
        # Not `variance_scaling(2, "fan_out")`, which takes all channels for outputs of one filter.
        init = self.kernel_init or normal(2**0.5 / k)
        kernel = self.param("kernel", init, (k, k, channels), self.param_dtype)
        if not self.use_bias:
            return depthwise_conv(*nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype))
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = depthwise_conv(x, kernel)
        return gelu(y, bias) if self.with_gelu else y + bias


class Downsample(nn.Module):
    """A strided convolution, padded by k // 2 on every side, then BatchNorm: the stem and the steps between stages.

    Attributes:
      features: channels of the result.
      kernel_size: k.
      stride: of the convolution.
      bn_group_size: as in `BatchNorm`.
      folded: there is no BatchNorm, since it is part of the convolution's weights.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    features: int
    kernel_size: int
    stride: int
    bn_group_size: int | None = None
    folded: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        k, dtypes = self.kernel_size, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        std = (2 / (k * k * self.features)) ** 0.5
        # 'SAME' would pad a strided convolution by less on the top left than on the bottom right.
        conv = Conv(self.features, (k, k), self.stride, k // 2, kernel_init=normal(std), name="conv", **dtypes)
        return conv(x) if self.folded else BatchNorm(self.bn_group_size, name="norm", **dtypes)(conv(x), train)
