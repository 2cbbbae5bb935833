"""FCViT's blocks and their parts: the global context, the token mixer and the channel mixer."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.errors import UserError
from fcvit_jax.networks.layers import Conv1x1, DepthwiseConv, gelu, group_norm, masked


def standardize(x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Zero mean and unit standard deviation over all axes but the first; the gradient stays finite where x is constant.

    Args:
      x: float32, (N, ...). Bessel's correction is applied, and 1e-5 added to the standard deviation.
      valid: bool, of a shape that broadcasts to that of x: what the statistics are of; None: all.
    """
    axes = tuple(range(1, x.ndim))
    centred = x - jnp.mean(x, axes, keepdims=True, where=valid)
    if valid is None:
        number = max(math.prod(x.shape[1:]) - 1, 1)
    else:
        number = jnp.maximum(jnp.broadcast_to(valid, x.shape).sum(axes, keepdims=True) - 1, 1)
    variance = jnp.square(centred).sum(axes, keepdims=True, where=valid) / number
    # Two wheres: sqrt has an infinite slope at 0, and infinity times the outer where's 0 would be NaN.
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    return centred / (std + 1e-5)


class GlobalContext(nn.Module):
    """The query-irrelevant attention: every position's similarity to the image's mean, times the transformed mean.

    Attributes:
      heads: groups of channels, each with its own similarity; must divide the channels.
      reduction: the bottleneck that transforms the mean has C // reduction channels, at least one.
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
    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """The context, (N, H, W, C) of `dtype`; the same everywhere if `weighted` is off.

        Args:
          x: (N, H, W, C).
          valid: (N, H, W, 1) bool, the positions that the statistics are of; None: all.
        """
        n, height, width, channels = x.shape
        mean = jnp.mean(x, (1, 2), dtype=jnp.float32, where=valid)
        linear = functools.partial(nn.Dense, kernel_init=normal(0.02), dtype=self.dtype, param_dtype=self.param_dtype)
        if not (bottleneck := channels // self.reduction):
            raise UserError(f"context_reduction={self.reduction} leaves none of the {channels} channels of a stage.")
        if self.competition:
            hidden = linear(2 * bottleneck, name="reduce")(mean)
            hidden = jnp.maximum(*jnp.split(hidden, 2, axis=-1))
        else:
            hidden = gelu(linear(bottleneck, name="reduce")(mean))
        context = linear(channels, name="expand")(hidden)
        if not self.weighted:
            return jnp.broadcast_to(context[:, None, None, :], x.shape)

        if channels % self.heads:
            raise UserError(f"context_heads={self.heads} does not divide the {channels} channels of a stage.")
        head_dim = channels // self.heads
        # Products with (C, heads) block-diagonal matrices keep channels last, where a reshape to (heads, d) transposes.
        in_head = jnp.repeat(jnp.eye(self.heads, dtype=jnp.float32), head_dim, axis=0)
        tokens = x.reshape(n, height * width, channels)
        query = (mean[:, :, None] * (in_head * head_dim**-0.5)).astype(x.dtype)
        similarity = jnp.einsum("npc,nch->nph", tokens, query, preferred_element_type=jnp.float32)
        of_tokens = None if valid is None else valid.reshape(n, height * width, 1)
        similarity = masked(standardize(similarity, of_tokens), of_tokens)
        self.sow("intermediates", "similarity", similarity.reshape(n, height, width, self.heads))
        scale = self.param("scale", nn.initializers.ones, (self.heads,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.heads,), self.param_dtype)
        similarity = (similarity * scale + bias).astype(self.dtype)
        value = context[:, None, :] * in_head.T.astype(self.dtype)
        return jnp.einsum("nph,nhc->npc", similarity, value).reshape(x.shape)


class SpatialAttention(nn.Module):
    """Multiplies by a sigmoid gate per position and channel: a 3x3 depthwise convolution and a bottleneck of C // 8."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        channels, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if not (bottleneck := channels // 8):
            raise UserError(f"spatial_attention needs stages of at least 8 channels, not {channels}.")
        gate = DepthwiseConv(3, name="depthwise", **dtypes)(masked(x, valid))
        gate = Conv1x1(bottleneck, with_gelu=True, name="reduce", **dtypes)(gate)
        return x * nn.sigmoid(Conv1x1(channels, name="expand", **dtypes)(gate))


class ChannelAttention(nn.Module):
    """Takes the mean of GELU(x), convolves it twice along the channels, and adds the result to every position."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        def channel_conv(taps: int, name: str) -> nn.Conv:
            def init(key, shape, dtype):
                return jax.random.uniform(key, shape, dtype, -(taps**-0.5), taps**-0.5)

            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return nn.Conv(1, taps, padding=taps // 2, kernel_init=init, bias_init=init, name=name, **dtypes)

        mean = gelu(x).mean((1, 2), dtype=jnp.float32, where=valid)[..., None]
        weights = channel_conv(5, "conv2")(gelu(channel_conv(3, "conv1")(mean)))
        return x + weights[:, None, None, :, 0]


class TokenMixer(nn.Module):
    """Mixes positions. For each kernel size: global context, depthwise convolution, and a bottleneck over channels.

    Attributes:
      kernel_sizes: odd; there is one step for each.
      use_context: add the global context. The next four attributes are those of `GlobalContext`.
      mix_reduction: the bottleneck has max(C // mix_reduction, mix_min_dim) channels; 1: a single 1x1 convolution.
      mix_min_dim: smallest bottleneck.
      spatial_attention: end with `SpatialAttention`.
      folded: depthwise convolutions have no bias, since it is part of the bias after them.
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
    folded: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
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
                )(x, valid)
            depthwise = DepthwiseConv(kernel_size, use_bias=not self.folded, name=f"depthwise{i}", **dtypes)
            x = depthwise(masked(x, valid))
            if self.mix_reduction != 1:
                bottleneck = max(channels // self.mix_reduction, self.mix_min_dim)
                x = Conv1x1(bottleneck, with_gelu=True, name=f"reduce{i}", **dtypes)(x)
            x = Conv1x1(channels, with_gelu=True, name=f"expand{i}", **dtypes)(x)
        if self.spatial_attention:
            x = SpatialAttention(name="spatial_attention", **dtypes)(x, valid)
        return x


class ChannelMixer(nn.Module):
    """Mixes channels: expand, depthwise convolution, GELU, dropout, reduce, dropout.

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
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None = None) -> jax.Array:
        channels, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Conv1x1(self.ratio * channels, with_gelu=self.kernel_size is None, name="expand", **dtypes)(x)
        if self.kernel_size is not None:
            x = DepthwiseConv(self.kernel_size, with_gelu=True, name="depthwise", **dtypes)(masked(x, valid))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = Conv1x1(channels, name="reduce", **dtypes)(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.channel_attention:
            x = ChannelAttention(name="channel_attention", **dtypes)(x, valid)
        return x


def drop_path_factors(key: jax.Array, rates: np.ndarray, batch_size: int) -> jax.Array:
    """Draws drop-path's factor of every branch and example: 0 to leave it out, else 1 / (1 - rate) to keep the mean.

    There is one draw for all blocks: with one draw per branch, fcvit_s48's step took 1.4 times as long to compile.

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
    """Two residual branches, the token mixer and the channel mixer, each with a norm, a layer scale and drop-path.

    Attributes:
      token_mixer: token_mixer(name=...) makes the module of the first branch.
      channel_mixer: channel_mixer(name=...) makes the module of the second branch, a `ChannelMixer`.
      layer_scale_init: start of the learned scale per channel; None: no scale.
      folded: the second norm has no scale and bias, and the second branch no layer scale (but after channel attention),
        since they are part of the channel mixer's weights.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    token_mixer: Callable[..., nn.Module]
    channel_mixer: Callable[..., nn.Module]
    layer_scale_init: float | None = 1e-5
    folded: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, drop_path: jax.Array | None = None, valid: jax.Array | None = None
    ) -> jax.Array:
        """x: (N, H, W, C); drop_path: (2, N) float32 as `drop_path_factors` draws them, None: all branches stay."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def branch_end(y: jax.Array, branch: int, scaled: bool = True) -> jax.Array:
            if scaled and self.layer_scale_init is not None:
                init = nn.initializers.constant(self.layer_scale_init)
                scale = self.param(f"layer_scale{branch + 1}", init, (x.shape[-1],), self.param_dtype)
                y = y * scale.astype(self.dtype)
            return y if drop_path is None else (y * drop_path[branch, :, None, None, None]).astype(self.dtype)

        y = self.token_mixer(name="token_mixer")(group_norm(x, valid, name="norm1", **dtypes), valid)
        x = x + branch_end(y, 0)
        channel_mixer = self.channel_mixer(name="channel_mixer")
        affine = dict.fromkeys(("use_scale", "use_bias"), not self.folded)
        y = channel_mixer(group_norm(x, valid, name="norm2", **affine, **dtypes), train, valid)
        return x + branch_end(y, 1, scaled=not self.folded or channel_mixer.channel_attention)
