"""The feature pyramid network: the neck between a backbone and a head that wants equal channels at every stride."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.errors import UserError
from fcvit_jax.networks import fcvit
from fcvit_jax.networks.dense_conv import Conv
from fcvit_jax.networks.fcvit import create_backbone
from fcvit_jax.networks.layers import Conv1x1, masked, valid_cells


def upsample_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """Doubles a map by repeating each position, and cuts it to a height and a width.

    For x of half the size, rounded up, position j of the result is position floor(j * n_in / n_out) of x, as in
    PyTorch's "nearest"; `jax.image.resize` takes other positions where the size is odd.

    Args:
      x: (N, ceil(height / 2), ceil(width / 2), C).
      height, width: of the result, in pixels.

    Returns:
      (N, height, width, C).

    Raises:
      UserError: x has another size.
    """
    if x.shape[1:3] != (-(-height // 2), -(-width // 2)):
        raise UserError(
            f"FPN: a map of {height}x{width} must be followed by one of half its size, rounded up, not by one of "
            f"{x.shape[1]}x{x.shape[2]}."
        )
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


class FPN(nn.Module):
    """A feature pyramid network (Lin et al., 2017): deep features are added to shallow ones from the top down.

    Each map goes through a 1x1 convolution; from the deepest on, each result is doubled in size and added to the next;
    every sum goes through a 3x3 convolution. There are no norms and no activations.

    Example::

        neck = FPN(256)
        variables = neck.init(jax.random.key(0), maps)            # maps: four, as a `Backbone` gives them
        q1, q2, q3, q4 = neck.apply(variables, maps)              # 256 channels each, the sizes of the maps

    Attributes:
      channels: of every result.
      kernel_init: draws the kernels; None: normal distributions of standard deviation sqrt(2 / (k * k * channels)).
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    channels: int = 256
    kernel_init: Callable[..., jax.Array] | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], sizes: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The maps with equal channels.

        Args:
          maps: (N, H_i, W_i, C_i) float, from the largest to the smallest; each half the size of the one before it,
            rounded up.
          sizes: (N, 2) int, height and width of each image in cells of the first map, of which the image has the top
            left: results are then those of the image alone, and 0 beyond it. None: the images fill the maps.

        Returns:
          As many arrays, (N, H_i, W_i, channels) of `dtype`.

        Raises:
          UserError: the sizes of the maps are others.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = self.kernel_init
        sums = [Conv1x1(self.channels, kernel_init=init, name=f"lateral_{i}", **dtypes)(x) for i, x in enumerate(maps)]
        for i in reversed(range(1, len(sums))):
            sums[i - 1] += upsample_nearest(sums[i], *sums[i - 1].shape[1:3])
        init = init or normal((2 / (9 * self.channels)) ** 0.5)
        results = []
        for i, x in enumerate(sums):
            valid = valid_cells(sizes, x, 2**i)
            conv = Conv(self.channels, (3, 3), padding=1, kernel_init=init, name=f"output_{i}", **dtypes)
            results.append(masked(conv(masked(x, valid)), valid))
        return tuple(results)


class OverBackbone:
    """What a network with an attribute `backbone` says of itself, since its backbone does."""

    @property
    def mean(self) -> Sequence[float]:
        """Of the pixels that the backbone takes, as in `normalize`."""
        return self.backbone.mean

    @property
    def std(self) -> Sequence[float]:
        """As `mean`."""
        return self.backbone.std

    @property
    def dtype(self) -> Any:
        """In which the backbone, the neck and the heads compute."""
        return self.backbone.dtype

    @property
    def bn_group_size(self) -> int | None:
        """Images that share the backbone's batch statistics."""
        return self.backbone.bn_group_size


def fields_around_backbone(network: type[nn.Module], name: str) -> set[str]:
    """The fields of a network with a backbone, and those of the backbone of a name, which its `create_...` takes.

    Raises:
      UserError: there is no such backbone.
    """
    own, backbone = ({field.name for field in dataclasses.fields(x)} for x in (network, create_backbone(name)))
    return (own | backbone) - {"parent", "name", "backbone", "share_blocks", "folded"}


def init_around_backbone(model: nn.Module, init_decoder: Callable, key: jax.Array, jit: Callable) -> dict[str, Any]:
    """Draws the initial weights of a network with a pyramid, its backbone's block by block; see `fcvit.init_variables`.

    Args:
      model: the network, with an attribute `backbone`.
      init_decoder: init_decoder(model, key) draws the weights of neck and heads.
      key: random key.
      jit: jit(function, *args) returns a jitted function for arguments of these shapes.

    Returns:
      {"params": ..., "batch_stats": ...}.
    """
    backbone_key, decoder_key = jax.random.split(key)
    variables = fcvit.init_variables(model.backbone, backbone_key, jit)
    decoder = jit(functools.partial(init_decoder, model), decoder_key)(decoder_key)
    return {name: {"backbone": tree, **decoder.get(name, {})} for name, tree in variables.items()}
