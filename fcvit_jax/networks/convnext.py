"""ConvNeXt (arXiv 2201.03545): the convolutional network that FCViT is compared with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.errors import UserError, check_range
from fcvit_jax.networks.blocks import drop_path_factors
from fcvit_jax.networks.checks import check_counts, check_dtypes, check_images, check_switches, check_tuples
from fcvit_jax.networks.dense_conv import Conv
from fcvit_jax.networks.layers import Conv1x1, DepthwiseConv, layer_norm
from fcvit_jax.networks.normalize import MEAN, STD

VARIANTS = {
    "convnext_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "convnext_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "convnext_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
}

# How the weights published for ImageNet-1k were trained and want their images.
SETTINGS = {
    "convnext_tiny": {"image_size": 224, "crop_pct": 0.875, "drop_path_rate": 0.1},
    "convnext_small": {"image_size": 224, "crop_pct": 0.875, "drop_path_rate": 0.4},
    "convnext_base": {"image_size": 224, "crop_pct": 0.875, "drop_path_rate": 0.5},
}


class Block(nn.Module):
    """The residual branch of ConvNeXt: depthwise 7x7, norm, expand, GELU, reduce, layer scale and drop-path.

    Attributes:
      layer_scale_init: start of the learned scale per channel; None: no scale.
      dtype: compute dtype; the norm's statistics are float32.
      param_dtype: dtype of the parameters.
    """

    layer_scale_init: float | None = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, drop_path: jax.Array | None = None) -> jax.Array:
        """x: (N, H, W, C); drop_path: (N,) float32, 0 or 1 / (1 - rate) for each image, None: the branch stays."""
        channels, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = DepthwiseConv(7, kernel_init=normal(0.02), name="depthwise", **dtypes)(x)
        y = layer_norm(name="norm", **dtypes)(y)
        y = Conv1x1(4 * channels, with_gelu=True, kernel_init=normal(0.02), name="expand", **dtypes)(y)
        y = Conv1x1(channels, kernel_init=normal(0.02), name="reduce", **dtypes)(y)
        if self.layer_scale_init is not None:
            init = nn.initializers.constant(self.layer_scale_init)
            y = y * self.param("layer_scale", init, (channels,), self.param_dtype).astype(self.dtype)
        return x + (y if drop_path is None else (y * drop_path[:, None, None, None]).astype(self.dtype))


class _Stages(nn.Module):
    """The stem and the four stages; a class of its own, since only one method of a class can be compact."""

    depths: Sequence[int] = (3, 3, 9, 3)
    dims: Sequence[int] = (96, 192, 384, 768)
    num_classes: int = 1000
    layer_scale_init: float | None = 1e-6
    drop_path_rate: float = 0.0
    remat: bool = False
    share_blocks: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    mean: ClassVar[Sequence[float]] = MEAN  # of the pixels that it takes, as in `normalize`
    std: ClassVar[Sequence[float]] = STD

    @property
    def feature_info(self) -> tuple[dict[str, int], ...]:
        """The "channels" and the "stride" in pixels of every map that `features` returns."""
        return tuple({"channels": dim, "stride": 4 * 2**s} for s, dim in enumerate(self.dims))

    @nn.compact
    def features(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """The four stage outputs.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: drop-path as in training.

        Returns:
          Four arrays (N, H // s, W // s, dims[i]) of `dtype`, with s = 4, 8, 16 and 32.

        Raises:
          UserError: the images are no such array, have their channels first, or are smaller than 32 x 32.
        """
        check_images(images)
        if min(images.shape[1:3]) < 32:
            raise UserError(f"Images of {images.shape[1]} x {images.shape[2]} pixels are too small: 32 x 32 at least.")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = nn.remat(Block) if self.remat else Block
        block = nn.jit(block) if self.share_blocks else block
        drop_path = [None] * sum(self.depths)
        if train and self.drop_path_rate > 0:
            rates = np.linspace(0, self.drop_path_rate, len(drop_path))
            drop_path = drop_path_factors(self.make_rng("dropout"), rates, images.shape[0])[:, 0]
        drop_path = iter(drop_path)

        def conv(dim: int, stride: int, name: str) -> nn.Conv:
            window = (stride, stride)
            return Conv(dim, window, window, "VALID", kernel_init=normal(0.02), name=name, **dtypes)

        x, maps = images, []
        for s, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            if s == 0:
                x = layer_norm(name="stem_norm", **dtypes)(conv(dim, 4, "stem_conv")(x))
            else:
                x = conv(dim, 2, f"downsample_{s}_conv")(layer_norm(name=f"downsample_{s}_norm", **dtypes)(x))
            for i in range(depth):
                name = f"stages_{s}_block_{i}"
                x = block(layer_scale_init=self.layer_scale_init, name=name, **dtypes)(x, next(drop_path))
            maps.append(x)
        return tuple(maps)


class ConvNeXt(_Stages):
    """ConvNeXt, the classifier.

    Example::

        model = create_convnext("convnext_tiny", num_classes=10)
        images = jnp.zeros((1, 224, 224, 3))
        variables = model.init(jax.random.key(0), images)
        logits = model.apply(variables, images)                                   # (1, 10) float32
        maps = model.apply(variables, images, method="features")                  # four maps, (1, 56, 56, 96) first

    Attributes:
      depths: blocks of each of the four stages.
      dims: channels of each stage.
      num_classes: outputs; 0: the pooled features come out instead.
      layer_scale_init: start of the layer scales; None: no layer scales.
      drop_path_rate: of the last block; rises linearly from 0 at the first.
      remat: recompute each block in the backward pass: less memory, more time, the same numbers but for rounding.
      share_blocks: trace the equal blocks of a stage once: compiles faster, names all by the first in profiles, and
        draws other weights from the same key.
      dtype: compute dtype; norms' statistics, pooling and head are float32.
      param_dtype: dtype of the parameters.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The logits.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: drop-path as in training.

        Returns:
          (N, num_classes) float32; with num_classes=0 the pooled features, (N, dims[-1]) float32.
        """
        x = self.features(images, train)[-1].mean((1, 2), dtype=jnp.float32)
        x = layer_norm(dtype=jnp.float32, param_dtype=self.param_dtype, name="norm")(x)
        if self.num_classes == 0:
            return x
        head = functools.partial(nn.Dense, kernel_init=normal(0.02), dtype=jnp.float32, param_dtype=self.param_dtype)
        return head(self.num_classes, name="head")(x)


def init_variables(model: ConvNeXt, key: jax.Array, jit: Callable = lambda function, *args: jax.jit(function)) -> dict:
    """Draws the initial weights; arguments and reasons as in `fcvit.init_variables`.

    Returns:
      {"params": ...}.
    """
    draw = jit(functools.partial(_init_first_blocks, model), key)
    draws = [draw(key)["params"], *(draw(jax.random.fold_in(key, i))["params"] for i in range(1, max(model.depths)))]
    params = {name: x for name, x in draws[0].items() if not name.startswith("stages")}
    for s, depth in enumerate(model.depths):
        for i in range(depth):
            params[f"stages_{s}_block_{i}"] = draws[i][f"stages_{s}_block_0"]
    return {"params": params}


def _init_first_blocks(model: ConvNeXt, key: jax.Array) -> dict[str, Any]:
    """As `model.init`, but with no more than one block in each stage."""
    model = model.clone(depths=tuple(min(depth, 1) for depth in model.depths))
    return model.init(key, jnp.zeros((1, 32, 32, 3)))


def create_convnext(name: str, num_classes: int = 1000, **fields) -> ConvNeXt:
    """Makes a variant of ConvNeXt.

    Example::

        model = create_convnext("convnext_tiny", num_classes=10, depths=(2, 2, 5, 1), dims=(32, 64, 128, 256))

    Args:
      name: a key of `VARIANTS`.
      num_classes: outputs; 0: no head.
      **fields: attributes of `ConvNeXt`.

    Raises:
      UserError: the name is unknown, or a value is not allowed, such as depths of other than four stages.
    """
    if name not in VARIANTS:
        raise UserError(f"Unknown model {name!r}: choose from {', '.join(VARIANTS)}.")
    # JSON and command lines give lists, with which a module could not be hashed.
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
    model = ConvNeXt(**VARIANTS[name] | {"num_classes": num_classes, **fields})
    check_tuples(0, depths=model.depths)
    check_tuples(1, dims=model.dims)
    if len(model.depths) != 4 or len(model.dims) != 4:
        raise UserError(f"model.depths={model.depths} and model.dims={model.dims} must have an entry for each stage.")
    check_counts(0, num_classes=model.num_classes)
    check_range("model", 0, below=1, drop_path_rate=model.drop_path_rate)
    check_dtypes(model)
    check_switches(model)
    return model
