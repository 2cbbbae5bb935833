"""FCViT, the network: its parts, its variants and two ways to use it; docs/model.md says exactly what is computed."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import lift
from jax.experimental.scheduling_groups import xla_metadata_call

from fcvit_jax.depthwise import depthwise_conv
from fcvit_jax.errors import UserError

VARIANTS = {
    "fcvit_tiny": {"depths": (3, 3, 5, 2), "dims": (32, 64, 160, 320), "mlp_ratios": (8, 8, 4, 4)},
    "fcvit_s12": {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512), "mlp_ratios": (8, 8, 4, 4)},
    "fcvit_s24": {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512), "mlp_ratios": (8, 8, 4, 4)},
    "fcvit_s48": {"depths": (8, 8, 24, 8), "dims": (64, 128, 320, 512), "mlp_ratios": (8, 8, 4, 4)},
}

# `variance_scaling(2, "fan_out")` ignores groups, so the standard deviations are written out.
normal = nn.initializers.normal


@jax.checkpoint  # the gradient from the input alone: what it would keep of the forward pass is three maps
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, in float32 inside; XLA's erf is cheaper than the erfc that `jax.nn.gelu` takes."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_general(x, kernel, dimension_numbers, precision):
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision)


def _dot_general_fwd(x, kernel, dimension_numbers, precision):
    return _dot_general(x, kernel, dimension_numbers, precision), (x, kernel)


def _dot_general_bwd(dimension_numbers, precision, residuals, g):
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))
    # XLA:CPU transposes the left factor of this product in memory, and JAX's own rule puts g there: take the narrower.
    if x.shape[-1] < g.shape[-1]:
        kernel_grad = jnp.tensordot(x, g, (rows, rows), precision=precision)
    else:
        kernel_grad = jnp.tensordot(g, x, (rows, rows), precision=precision).T
    return jnp.matmul(g, kernel.T, precision=precision), kernel_grad


_dot_general.defvjp(_dot_general_fwd, _dot_general_bwd)


def conv1x1(features: int, **kwargs) -> nn.Dense:
    """A 1x1 convolution as a matrix product over channels, initialised as a convolution."""
    return nn.Dense(features, kernel_init=normal((2 / features) ** 0.5), dot_general=_dot_general, **kwargs)


def group_norm(**kwargs) -> nn.GroupNorm:
    """GroupNorm with one group: statistics over H, W and C together, affine per channel."""
    return nn.GroupNorm(num_groups=1, epsilon=1e-5, use_fast_variance=False, **kwargs)


def standardize(x: jax.Array) -> jax.Array:
    """Zero mean and unit standard deviation over all axes but the first; the gradient stays finite where x is constant.

    Args:
      x: float32, (N, ...). Bessel's correction is applied, and 1e-5 added to the standard deviation.
    """
    axes = tuple(range(1, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    variance = jnp.square(centred).sum(axes, keepdims=True) / max(math.prod(x.shape[1:]) - 1, 1)
    # Two wheres: sqrt has an infinite slope at 0, and infinity times the outer where's 0 would be NaN.
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    return centred / (std + 1e-5)


class BatchNorm(nn.Module):
    """Batch normalisation over groups of the batch, so that statistics depend on neither devices nor hosts.

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
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
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
    """Depthwise convolution with stride 1, same size and bias; kernel (k, k, C)."""

    kernel_size: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, channels = self.kernel_size, x.shape[-1]
        kernel = self.param("kernel", normal(2**0.5 / k), (k, k, channels), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return depthwise_conv(x, kernel) + bias


class Downsample(nn.Module):
    """A strided convolution, padded by k // 2 on every side, then BatchNorm: the stem and the steps between stages."""

    features: int
    kernel_size: int
    stride: int
    bn_group_size: int | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        k, dtypes = self.kernel_size, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        std = (2 / (k * k * self.features)) ** 0.5
        # 'SAME' would pad a strided convolution by less on the top left than on the bottom right.
        conv = nn.Conv(self.features, (k, k), self.stride, k // 2, kernel_init=normal(std), name="conv", **dtypes)
        return BatchNorm(self.bn_group_size, name="norm", **dtypes)(conv(x), train)


class GlobalContext(nn.Module):
    """The query-irrelevant attention: how much each position resembles the image's mean, times a gated mean.

    Attributes:
      heads: groups of channels with a similarity of their own; must divide the channels.
      reduction: the bottleneck that transforms the mean has C // reduction channels.
      weighted: weight positions by similarity; False: the same context everywhere.
      competition: the bottleneck is the maximum of two linear maps; False: one linear map and GELU.
      dtype: compute dtype; the mean and the similarity's statistics are float32.
      param_dtype: dtype of the parameters.
    """

    heads: int = 8
    reduction: int = 8
    weighted: bool = True
    competition: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (N, H, W, C). Returns the context, (N, H, W, C), or (N, 1, 1, C) where `weighted` is off."""
        n, height, width, channels = x.shape
        mean = x.mean((1, 2), dtype=jnp.float32)
        linear = functools.partial(nn.Dense, kernel_init=normal(0.02), dtype=self.dtype, param_dtype=self.param_dtype)
        bottleneck = channels // self.reduction
        if self.competition:
            hidden = linear(2 * bottleneck, name="reduce")(mean)
            hidden = jnp.maximum(*jnp.split(hidden, 2, axis=-1))
        else:
            hidden = gelu(linear(bottleneck, name="reduce")(mean))
        context = linear(channels, name="expand")(hidden)
        if not self.weighted:
            return context[:, None, None, :]

        if channels % self.heads:
            raise UserError(f"context_heads={self.heads} does not divide the {channels} channels of a stage.")
        head_dim = channels // self.heads
        # Products with (C, heads) block-diagonal matrices keep channels last, where a reshape to (heads, d) transposes.
        in_head = jnp.repeat(jnp.eye(self.heads, dtype=jnp.float32), head_dim, axis=0)
        tokens = x.reshape(n, height * width, channels)
        query = (mean[:, :, None] * (in_head * head_dim**-0.5)).astype(x.dtype)
        similarity = jnp.einsum("npc,nch->nph", tokens, query, preferred_element_type=jnp.float32)
        similarity = standardize(similarity)
        self.sow("intermediates", "similarity", similarity.reshape(n, height, width, self.heads))
        scale = self.param("scale", nn.initializers.ones, (self.heads,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.heads,), self.param_dtype)
        similarity = (similarity * scale + bias).astype(self.dtype)
        value = context[:, None, :] * in_head.T.astype(self.dtype)
        return jnp.einsum("nph,nhc->npc", similarity, value).reshape(x.shape)


class SpatialAttention(nn.Module):
    """A sigmoid gate per position and channel, from a 3x3 depthwise convolution and a bottleneck of C // 8."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = DepthwiseConv(3, name="depthwise", **dtypes)(x)
        gate = gelu(conv1x1(channels // 8, name="reduce", **dtypes)(gate))
        return x * nn.sigmoid(conv1x1(channels, name="expand", **dtypes)(gate))


class ChannelAttention(nn.Module):
    """Adds to every position what two convolutions along the channel axis make of the mean of GELU(x)."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def channel_conv(taps: int, name: str) -> nn.Conv:
            def init(key, shape, dtype):
                return jax.random.uniform(key, shape, dtype, -(taps**-0.5), taps**-0.5)

            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return nn.Conv(1, taps, padding=taps // 2, kernel_init=init, bias_init=init, name=name, **dtypes)

        mean = gelu(x).mean((1, 2), dtype=jnp.float32)[..., None]
        weights = channel_conv(5, "conv2")(gelu(channel_conv(3, "conv1")(mean)))
        return x + weights[:, None, None, :, 0]


class TokenMixer(nn.Module):
    """Mixes positions: per kernel size, add the global context, convolve depthwise, and mix channels in a bottleneck.

    Attributes:
      kernel_sizes: one step for each; odd.
      use_context: add the global context; the four options after it are those of `GlobalContext`.
      mix_reduction: the bottleneck has max(C // mix_reduction, mix_min_dim) channels; 1: a single 1x1 convolution.
      mix_min_dim: smallest bottleneck.
      spatial_attention: end with `SpatialAttention`.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    kernel_sizes: Sequence[int] = (11, 11)
    use_context: bool = True
    weighted_context: bool = True
    competition: bool = True
    context_heads: int = 8
    context_reduction: int = 8
    mix_reduction: int = 8
    mix_min_dim: int = 16
    spatial_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i, kernel_size in enumerate(self.kernel_sizes, 1):
            if self.use_context:
                x = x + GlobalContext(
                    heads=self.context_heads,
                    reduction=self.context_reduction,
                    weighted=self.weighted_context,
                    competition=self.competition,
                    name=f"context{i}",
                    **dtypes,
                )(x)
            x = DepthwiseConv(kernel_size, name=f"depthwise{i}", **dtypes)(x)
            if self.mix_reduction != 1:
                x = gelu(conv1x1(max(channels // self.mix_reduction, self.mix_min_dim), name=f"reduce{i}", **dtypes)(x))
            x = gelu(conv1x1(channels, name=f"expand{i}", **dtypes)(x))
        if self.spatial_attention:
            x = SpatialAttention(name="spatial_attention", **dtypes)(x)
        return x


class ChannelMixer(nn.Module):
    """Mixes channels: expand, convolve depthwise, GELU, and back, with dropout after both halves.

    Attributes:
      ratio: the hidden layer has ratio * C channels.
      kernel_size: of the depthwise convolution, odd; None: none.
      channel_attention: end with `ChannelAttention`.
      dropout_rate: of both dropouts; rng "dropout".
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    ratio: int
    kernel_size: int | None = 3
    channel_attention: bool = False
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = conv1x1(self.ratio * channels, name="expand", **dtypes)(x)
        if self.kernel_size is not None:
            x = DepthwiseConv(self.kernel_size, name="depthwise", **dtypes)(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(gelu(x))
        x = conv1x1(channels, name="reduce", **dtypes)(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.channel_attention:
            x = ChannelAttention(name="channel_attention", **dtypes)(x)
        return x


def drop_path_factors(key: jax.Array, rates: np.ndarray, batch_size: int) -> jax.Array:
    """Draws which branches drop-path leaves out for which examples: factors 0, or 1 / (1 - rate) to keep the mean.

    All blocks in one draw: with one for each branch fcvit_s48's step took 1.4 times as long to compile.

    Args:
      key: random key.
      rates: (blocks,), the probability that a branch is left out.
      batch_size: number of examples, N.

    Returns:
      (blocks, 2, N) float32.
    """
    keep = 1 - jnp.array(rates)[:, None, None]
    return jnp.where(jax.random.bernoulli(key, keep, (len(rates), 2, batch_size)), 1 / keep, 0)


class Block(nn.Module):
    """Two residual branches, each behind a norm, a layer scale and drop-path: the token mixer and the channel mixer.

    Attributes:
      token_mixer: makes the first branch's module from a name.
      channel_mixer: makes the second branch's module from a name.
      layer_scale_init: start of the learned scale per channel; None: no scale.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    token_mixer: Callable[..., nn.Module]
    channel_mixer: Callable[..., nn.Module]
    layer_scale_init: float | None = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, drop_path: jax.Array | None = None) -> jax.Array:
        """x: (N, H, W, C); drop_path: (2, N) float32 as `drop_path_factors` draws them, None: all branches stay."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def branch_end(y: jax.Array, branch: int) -> jax.Array:
            if self.layer_scale_init is not None:
                init = nn.initializers.constant(self.layer_scale_init)
                scale = self.param(f"layer_scale{branch + 1}", init, (x.shape[-1],), self.param_dtype)
                y = y * scale.astype(self.dtype)
            return y if drop_path is None else (y * drop_path[branch, :, None, None, None]).astype(self.dtype)

        y = self.token_mixer(name="token_mixer")(group_norm(name="norm1", **dtypes)(x))
        x = x + branch_end(y, 0)
        y = self.channel_mixer(name="channel_mixer")(group_norm(name="norm2", **dtypes)(x), train)
        return x + branch_end(y, 1)


def _called(block: Callable) -> Callable:
    """Lifts a block into a call that XLA does not inline, so that equal blocks go through most of its passes as one."""

    def lifted(scope_fn, repack_fn, variables, rngs, x, train, drop_path):
        @functools.partial(xla_metadata_call, inlineable="false")
        def call(variables, rngs, x, drop_path):
            scope = scope_fn(variables, rngs)
            return block(scope, x, train, drop_path), repack_fn(scope)

        return call(variables, rngs, x, drop_path)

    return lift.pack(lifted, (True,), (True,), (True,), name="called")


def _shared(block: type[nn.Module]) -> type[nn.Module]:
    """Blocks of equal shapes as one function, where a mesh is in context as in training; profiles name it by the first.

    For fcvit_s48, tracing takes half the time, and compiling for a CPU, as calls, three quarters of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return block
    on_one_cpu = mesh.size == 1 and mesh.abstract_device and mesh.abstract_device.device_kind == "cpu"
    # On several devices the gradients of each call would be reduced apart, and XLA for GPUs fuses worse around calls.
    if on_one_cpu and jax.__version_info__ > (0, 10, 0):  # JAX 0.10.0 cannot differentiate calls
        block = nn.transforms.lift_transform(_called, block)
    return nn.jit(block, static_argnums=(2,))


class _Stages(nn.Module):
    """The stem and the four stages, which `FCViT` and `Backbone` share."""

    depths: Sequence[int]
    dims: Sequence[int]
    mlp_ratios: Sequence[int]
    kernel_sizes: Sequence[int] = (11, 11)
    use_context: bool = True
    weighted_context: bool = True
    competition: bool = True
    context_heads: int = 8
    context_reduction: int = 8
    mix_reduction: int = 8
    mix_min_dim: int = 16
    mlp_kernel_size: int | None = 3
    spatial_attention: bool = False
    channel_attention: bool = False
    layer_scale_init: float | None = 1e-5
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    bn_group_size: int | None = None
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def features(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """The four stage outputs.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: batch statistics, dropout and drop-path as in training.

        Returns:
          Four arrays (N, ceil(H / s), ceil(W / s), dims[i]) of `dtype`, with s = 4, 8, 16 and 32.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        token_mixer = functools.partial(
            TokenMixer,
            kernel_sizes=self.kernel_sizes,
            use_context=self.use_context,
            weighted_context=self.weighted_context,
            competition=self.competition,
            context_heads=self.context_heads,
            context_reduction=self.context_reduction,
            mix_reduction=self.mix_reduction,
            mix_min_dim=self.mix_min_dim,
            spatial_attention=self.spatial_attention,
            **dtypes,
        )
        block = _shared(nn.remat(Block, static_argnums=(2,)) if self.remat else Block)
        downsample = functools.partial(Downsample, bn_group_size=self.bn_group_size, **dtypes)
        drop_path = [None] * sum(self.depths)
        if train and self.drop_path_rate > 0:
            rates = np.linspace(0, self.drop_path_rate, len(drop_path))
            drop_path = drop_path_factors(self.make_rng("dropout"), rates, images.shape[0])
        x, maps = images, []
        for s, (depth, dim, ratio) in enumerate(zip(self.depths, self.dims, self.mlp_ratios, strict=True)):
            if s == 0:
                x = downsample(dim, kernel_size=7, stride=4, name="stem")(x, train)
            else:
                x = downsample(dim, kernel_size=3, stride=2, name=f"downsample_{s}")(x, train)
            channel_mixer = functools.partial(
                ChannelMixer,
                ratio=ratio,
                kernel_size=self.mlp_kernel_size,
                channel_attention=self.channel_attention,
                dropout_rate=self.dropout_rate,
                **dtypes,
            )
            for i in range(depth):
                x = block(
                    token_mixer=token_mixer,
                    channel_mixer=channel_mixer,
                    layer_scale_init=self.layer_scale_init,
                    name=f"stages_{s}_block_{i}",
                    **dtypes,
                )(x, train, drop_path[sum(self.depths[:s]) + i])
            maps.append(x)
        return tuple(maps)


class FCViT(_Stages):
    """FCViT, the classifier.

    Example::

        model = fcvit_jax.create_model("fcvit_tiny", num_classes=10)
        images = jnp.zeros((1, 224, 224, 3))
        variables = model.init(jax.random.key(0), images)
        logits = model.apply(variables, images)                                   # (1, 10) float32
        maps = model.apply(variables, images, method="features")                  # four maps, (1, 56, 56, 32) first
        logits, updates = model.apply(                                            # in training
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
        )

    Every context's token-global similarity, (N, H, W, context_heads) float32, is sown in the collection
    "intermediates".

    Attributes:
      depths: blocks of each stage.
      dims: channels of each stage.
      mlp_ratios: hidden over outer channels of the channel mixers of each stage.
      num_classes: outputs; 0: the pooled features come out instead.
      kernel_sizes: depthwise kernels of the token mixer's steps, odd; one entry: a single step.
      use_context: add the global context in the token mixer.
      weighted_context: weight the context by the similarity of each position.
      competition: the context's bottleneck is the maximum of two linear maps.
      context_heads: similarities per position; must divide `dims`.
      context_reduction: the context's bottleneck has C // context_reduction channels.
      mix_reduction: the token mixer's bottleneck has C // mix_reduction channels; 1: no bottleneck.
      mix_min_dim: and at least so many.
      mlp_kernel_size: depthwise kernel of the channel mixer, odd; None: none.
      spatial_attention: gate the end of the token mixer.
      channel_attention: add channel attention at the end of the channel mixer.
      layer_scale_init: start of the layer scales; None: no layer scales.
      dropout_rate: in the channel mixer.
      drop_path_rate: of the last block; rises linearly from 0 at the first.
      bn_group_size: images that share batch statistics in training; None or 0: the whole batch.
      remat: recompute each block in the backward pass: less memory, more time, the same numbers.
      dtype: compute dtype; statistics, pooling and head are float32.
      param_dtype: dtype of the parameters.
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The logits.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: batch statistics, dropout and drop-path as in training.

        Returns:
          (N, num_classes) float32; with num_classes=0 the pooled features, (N, dims[-1]) float32.
        """
        x = self.features(images, train)[-1]
        x = group_norm(dtype=jnp.float32, param_dtype=self.param_dtype, name="norm")(x).mean((1, 2))
        if self.num_classes == 0:
            return x
        return nn.Dense(
            self.num_classes, kernel_init=normal(0.02), dtype=jnp.float32, param_dtype=self.param_dtype, name="head"
        )(x)


class Backbone(_Stages):
    """FCViT, the feature pyramid: the four stage outputs, each through a norm of its own; attributes as in `FCViT`."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """The pyramid.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: batch statistics, dropout and drop-path as in training.

        Returns:
          Four arrays (N, ceil(H / s), ceil(W / s), dims[i]) of `dtype`, with s = 4, 8, 16 and 32.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = self.features(images, train)
        return tuple(group_norm(name=f"norm_{i}", **dtypes)(x) for i, x in enumerate(maps))


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # no dtype at all
        return False


def _options(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of a variant, by our name or by the original's (fcvit_b12, ...), with `overrides`; lists as tuples."""
    ours = name.replace("fcvit_b", "fcvit_s")
    if ours not in VARIANTS:
        raise UserError(f"Unknown model {name!r}: choose from {', '.join(VARIANTS)}.")
    # JSON and command lines give lists, with which a module could not be hashed.
    options = VARIANTS[ours] | {key: tuple(x) if isinstance(x, list) else x for key, x in overrides.items()}
    for key in ("dropout_rate", "drop_path_rate"):
        if not 0 <= options.get(key, 0) < 1:
            raise UserError(f"model.{key}={options[key]} must be at least 0 and less than 1.")
    for key in ("dtype", "param_dtype"):
        if not _is_floating(options.get(key, jnp.float32)):
            raise UserError(f"model.{key}={options[key]!r} is no floating-point dtype: choose float32 or bfloat16.")
    for size in (*options.get("kernel_sizes", ()), options.get("mlp_kernel_size")):
        if size is not None and size % 2 == 0:
            raise UserError(f"model.kernel_sizes and model.mlp_kernel_size must be odd, which {size} is not.")
    if len({len(options[key]) for key in ("depths", "dims", "mlp_ratios")}) > 1:
        raise UserError("model.depths, model.dims and model.mlp_ratios must have one entry for each stage.")
    return options


def create_model(name: str, num_classes: int = 1000, **overrides) -> FCViT:
    """Makes a variant of FCViT.

    Example::

        model = create_model("fcvit_s12", num_classes=10, drop_path_rate=0.1, bn_group_size=128)

    Args:
      name: a key of `VARIANTS`; the original's names (fcvit_b12, ...) are accepted too.
      num_classes: outputs; 0: no head.
      **overrides: attributes of `FCViT`.

    Raises:
      UserError: the name is unknown, or a value cannot be: a rate of 1, an even kernel, a dtype that is not floating.
    """
    return FCViT(num_classes=num_classes, **_options(name, overrides))


def create_backbone(name: str, **overrides) -> Backbone:
    """Makes the feature pyramid of a variant; arguments as in `create_model`, without classes.

    Example::

        backbone = create_backbone("fcvit_s12")
        variables = backbone.init(jax.random.key(0), images)             # images (N, H, W, 3)
        c2, c3, c4, c5 = backbone.apply(variables, images)               # strides 4, 8, 16, 32

    Raises:
      UserError: the name is unknown, or a value cannot be: a rate of 1, an even kernel, a dtype that is not floating.
    """
    return Backbone(**_options(name, overrides))
