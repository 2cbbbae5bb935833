"""Semantic FPN (Kirillov et al., 2019): a backbone, a feature pyramid network and a head that classifies pixels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import normal
from jax import lax

from fcvit_jax.errors import check_range
from fcvit_jax.networks.dense_conv import Conv
from fcvit_jax.networks.fcvit import Backbone, create_backbone
from fcvit_jax.networks.fpn import FPN, OverBackbone, fields_around_backbone, init_around_backbone
from fcvit_jax.networks.layers import BatchNorm


def resize_bilinear(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Resizes maps bilinearly, with pixel centres aligned and without antialiasing, also where they shrink.

    Args:
      x: (N, h, w, C) float.
      size: (height, width) of the result, in pixels.

    Returns:
      (N, height, width, C) of the dtype of x; x itself where the size is the same.
    """
    for axis, length in enumerate(size, 1):
        factor, rest = divmod(length, x.shape[axis])
        if not rest and factor <= 8:  # a larger one makes the program long
            x = _enlarge(x, factor, axis)
        else:
            x = jax.image.resize(x, (*x.shape[:axis], length, *x.shape[axis + 1 :]), "linear", antialias=False)
    return x


def _enlarge(x: jax.Array, factor: int, axis: int) -> jax.Array:
    """As `resize_bilinear`, by a whole factor along one axis, without the matrix product of `jax.image.resize`."""
    if factor == 1:
        return x
    length = x.shape[axis]
    part = functools.partial(lax.slice_in_dim, x, axis=axis)
    before = jnp.concatenate([part(0, 1), part(0, length - 1)], axis)
    after = jnp.concatenate([part(1, length), part(length - 1, length)], axis)
    results = []  # for each position as many as the factor, at these distances from its centre
    for offset in (np.arange(factor) + 0.5) / factor - 0.5:
        share = float(abs(offset))
        result = (1 - share) * x + share * (before if offset < 0 else after)
        results.append(jnp.expand_dims(result, axis + 1))
    return jnp.concatenate(results, axis + 1).reshape(*x.shape[:axis], factor * length, *x.shape[axis + 1 :])


class _ConvNormRelu(nn.Module):
    """A 3x3 convolution without a bias, BatchNorm over the whole batch, and ReLU."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = normal((2 / (9 * self.features)) ** 0.5)
        x = Conv(self.features, (3, 3), padding=1, use_bias=False, kernel_init=init, name="conv", **dtypes)(x)
        return nn.relu(BatchNorm(name="norm", **dtypes)(x, train))


class SemanticFPNHead(nn.Module):
    """Brings every map to the size of the largest by convolutions and doublings, adds them up and classifies the sum.

    Attributes:
      num_classes: outputs per position.
      channels: of the convolutions.
      dropout_rate: of whole channels of the sum, in training; rng "dropout".
      dtype: compute dtype; the classifier is float32.
      param_dtype: dtype of the parameters.
    """

    num_classes: int = 150
    channels: int = 128
    dropout_rate: float = 0.1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        """The logits, (N, H, W, num_classes) float32, of maps (N, H_i, W_i, C), the largest (N, H, W, C) first."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        total = None
        for i, x in enumerate(maps):
            for j in range(max(i, 1)):
                x = _ConvNormRelu(self.channels, name=f"level_{i}_step_{j}", **dtypes)(x, train)
                if i:
                    x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
            # Doubled maps may be larger than the first, where its sides are odd.
            total = x if total is None else total + resize_bilinear(x, total.shape[1:3])
        total = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(total)

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -(self.channels**-0.5), self.channels**-0.5)

        dtypes = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        return nn.Dense(self.num_classes, kernel_init=uniform, bias_init=uniform, name="classifier", **dtypes)(total)


class SemanticFPN(OverBackbone, nn.Module):
    """A segmenter: the class of every position at a quarter of the image's size; made by `create_segmenter`.

    Neck and head have the dtypes of the backbone. The head's batch statistics are over the whole batch, whatever the
    backbone's `bn_group_size` and `freeze_bn` are.

    Attributes:
      backbone: the network that gives the pyramid, as `create_backbone` makes it; images -> maps, each half the size of
        the one before it, rounded up. Has the fields `dtype` and `param_dtype`.
      num_classes: outputs per position.
      neck_channels: of the feature pyramid network.
      head_channels: of the head's convolutions.
      head_dropout_rate: share of the head's channels that are dropped in training.
    """

    backbone: Backbone
    num_classes: int = 150
    neck_channels: int = 256
    head_channels: int = 128
    head_dropout_rate: float = 0.1

    def setup(self) -> None:
        dtypes = {"dtype": self.backbone.dtype, "param_dtype": self.backbone.param_dtype}
        self._neck = FPN(self.neck_channels, name="neck", **dtypes)
        self._head = SemanticFPNHead(
            self.num_classes, self.head_channels, self.head_dropout_rate, name="head", **dtypes
        )

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The logits.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: batch statistics, dropout and drop-path as in training.

        Returns:
          (N, ceil(H / 4), ceil(W / 4), num_classes) float32; `resize_bilinear` brings them to the image's size.

        Raises:
          UserError: the images are no such array, or have their channels first.
        """
        return self.decode(self.backbone(images, train), train)

    def neck(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """The four maps of the feature pyramid network.

        Args:
          images, train: as in `__call__`.

        Returns:
          Four arrays (N, ceil(H / s), ceil(W / s), neck_channels) of the backbone's dtype, with s = 4, 8, 16 and 32.

        Raises:
          UserError: the images are no such array, or have their channels first.
        """
        return self._neck(self.backbone(images, train))

    def decode(self, maps: Sequence[jax.Array], train: bool = False) -> jax.Array:
        """The logits, as `__call__` gives them, of the backbone's maps."""
        return self._head(self._neck(maps), train)


def init_decoder(model: SemanticFPN, key: jax.Array) -> dict[str, Any]:
    """Draws the initial weights of neck and head alone: {"params": {"neck": ..., "head": ...}, "batch_stats": ...}."""
    channels = [info["channels"] for info in model.backbone.feature_info]
    maps = [jnp.zeros((1, 2 ** (len(channels) - i), 2 ** (len(channels) - i), c)) for i, c in enumerate(channels)]
    return model.init(key, maps, method="decode")


def init_variables(
    model: SemanticFPN, key: jax.Array, jit: Callable = lambda function, *args: jax.jit(function)
) -> dict[str, Any]:
    """Draws the initial weights of a segmenter, its backbone's block by block; see `fcvit.init_variables`."""
    return init_around_backbone(model, init_decoder, key, jit)


def create_segmenter(
    name: str,
    num_classes: int = 150,
    *,
    neck_channels: int = 256,
    head_channels: int = 128,
    head_dropout_rate: float = 0.1,
    **overrides,
) -> SemanticFPN:
    """Makes a Semantic FPN over a backbone, with the original's sizes by default.

    Example::

        segmenter = create_segmenter("fcvit_s12", num_classes=150)
        variables = segmenter.init(jax.random.key(0), images)                    # images (N, H, W, 3) float, normalised
        logits = segmenter.apply(variables, images)                              # (N, H / 4, W / 4, 150) float32
        maps = segmenter.apply(variables, images, method="neck")                 # four maps of 256 channels

    Args:
      name: of the backbone, as in `create_backbone`.
      num_classes: outputs per position, at least 1.
      neck_channels: of the feature pyramid network.
      head_channels: of the head's convolutions.
      head_dropout_rate: share of the head's channels that are dropped in training, in [0, 1).
      **overrides: attributes of the backbone, as in `create_backbone`; neck and head take its dtypes.

    Raises:
      UserError: the name is unknown, or a value is not allowed.
    """
    check_range("model", 1, num_classes=num_classes, neck_channels=neck_channels, head_channels=head_channels)
    check_range("model", 0, below=1, head_dropout_rate=head_dropout_rate)
    backbone = create_backbone(name, **overrides)
    return SemanticFPN(backbone, num_classes, neck_channels, head_channels, head_dropout_rate)


def model_fields(name: str) -> set[str]:
    """The arguments of `create_segmenter` for a variant, besides its name.

    Raises:
      UserError: there is no such variant.
    """
    return fields_around_backbone(SemanticFPN, name)
