"""Vision Transformers: ViT, DeiT, distilled DeiT, and with layer scales as DINOv2 has them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.errors import UserError, check_range
from fcvit_jax.networks.blocks import drop_path_factors
from fcvit_jax.networks.checks import check_counts, check_dtypes, check_images, check_switches
from fcvit_jax.networks.dense_conv import Conv
from fcvit_jax.networks.layers import gelu, layer_norm
from fcvit_jax.networks.normalize import MEAN, STD
from fcvit_jax.sizes import ImageSize, check_size, height_width

_TINY = {"dim": 192, "depth": 12, "heads": 3}
_SMALL = {"dim": 384, "depth": 12, "heads": 6}
_BASE = {"dim": 768, "depth": 12, "heads": 12}
_LARGE = {"dim": 1024, "depth": 24, "heads": 16}
_LARGER_IMAGES = {"image_size": 384}
_DISTILLED = {"distilled": True}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

# What differs from the defaults of `ViT`, by timm's name of the network.
VARIANTS = {
    "vit_tiny_patch16_224": _TINY | _HALF,
    "vit_small_patch16_224": _SMALL | _HALF,
    "vit_base_patch16_224": _BASE | _HALF,
    "vit_large_patch16_224": _LARGE | _HALF,
    "vit_base_patch16_384": _BASE | _HALF | _LARGER_IMAGES,
    "vit_small_patch32_224": _SMALL | _HALF | {"patch_size": 32},
    "vit_base_patch32_224": _BASE | _HALF | {"patch_size": 32},
    "vit_small_patch14_dinov2": _SMALL | {"patch_size": 14, "image_size": 518, "layer_scale_init": 1e-5},
    "deit_tiny_patch16_224": _TINY,
    "deit_small_patch16_224": _SMALL,
    "deit_base_patch16_224": _BASE,
    "deit_base_patch16_384": _BASE | _LARGER_IMAGES,
    "deit_tiny_distilled_patch16_224": _TINY | _DISTILLED,
    "deit_small_distilled_patch16_224": _SMALL | _DISTILLED,
    "deit_base_distilled_patch16_224": _BASE | _DISTILLED,
    "deit_base_distilled_patch16_384": _BASE | _DISTILLED | _LARGER_IMAGES,
}

_VIT = {"image_size": 224, "crop_pct": 0.9, "drop_path_rate": 0.0}
_DEIT = {"image_size": 224, "crop_pct": 0.9, "drop_path_rate": 0.1}
_AT_384 = {"image_size": 384, "crop_pct": 1.0}

# How the published weights were trained and want their images.
SETTINGS = {
    "vit_tiny_patch16_224": _VIT,
    "vit_small_patch16_224": _VIT,
    "vit_base_patch16_224": _VIT,
    "vit_large_patch16_224": _VIT,
    "vit_base_patch16_384": _VIT | _AT_384,
    "vit_small_patch32_224": _VIT,
    "vit_base_patch32_224": _VIT,
    "vit_small_patch14_dinov2": {"image_size": 518, "crop_pct": 1.0, "drop_path_rate": 0.0},
    "deit_tiny_patch16_224": _DEIT,
    "deit_small_patch16_224": _DEIT,
    "deit_base_patch16_224": _DEIT,
    "deit_base_patch16_384": _DEIT | _AT_384,
    "deit_tiny_distilled_patch16_224": _DEIT,
    "deit_small_distilled_patch16_224": _DEIT,
    "deit_base_distilled_patch16_224": _DEIT,
    "deit_base_distilled_patch16_384": _DEIT | _AT_384,
}


def resize_positions(
    positions: jax.Array, prefix: int, grid: tuple[int, int], stored: tuple[int, int] | None = None
) -> jax.Array:
    """Resizes the patches' part of a position embedding, bicubic with antialiasing, as timm does.

    Args:
      positions: (prefix + patches, C), float; the patches row by row.
      prefix: tokens in front of the patches, whose positions are kept.
      grid: rows and columns of patches that are wanted.
      stored: rows and columns of the patches that `positions` has; None: as many of either.

    Returns:
      (prefix + rows * columns, C), the same dtype.
    """
    stored = stored or (math.isqrt(positions.shape[0] - prefix),) * 2
    if grid == stored:
        return positions
    channels = positions.shape[1]
    patches = positions[prefix:].reshape(*stored, channels).astype(jnp.float32)
    patches = jax.image.resize(patches, (*grid, channels), "cubic", antialias=True)
    return jnp.concatenate([positions[:prefix], patches.reshape(-1, channels).astype(positions.dtype)])


class Block(nn.Module):
    """Two residual branches, each behind a norm, a layer scale and drop-path: self-attention and an MLP.

    The attention, (N, heads, T, T) float32, rows being queries, is sown in the collection "intermediates".

    Attributes:
      heads: of the attention; must divide the channels.
      mlp_ratio: the MLP's hidden layer has mlp_ratio * C channels.
      layer_scale_init: start of the learned scale per channel; None: no scale.
      dtype: compute dtype; the norms' statistics and the softmax are float32.
      param_dtype: dtype of the parameters.
    """

    heads: int
    mlp_ratio: int = 4
    layer_scale_init: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, drop_path: jax.Array | None = None) -> jax.Array:
        """x: (N, T, C); drop_path: (2, N) float32 as `drop_path_factors` draws them, None: both branches stay."""
        n, tokens, channels = x.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = functools.partial(nn.Dense, kernel_init=normal(0.02), **dtypes)

        def branch_end(y: jax.Array, branch: int) -> jax.Array:
            if self.layer_scale_init is not None:
                init = nn.initializers.constant(self.layer_scale_init)
                scale = self.param(f"layer_scale{branch + 1}", init, (channels,), self.param_dtype)
                y = y * scale.astype(self.dtype)
            return y if drop_path is None else (y * drop_path[branch, :, None, None]).astype(self.dtype)

        y = linear(3 * channels, name="qkv")(layer_norm(name="norm1", **dtypes)(x))
        head_dim = channels // self.heads
        # Heads in front, (3, N, heads, T, head_dim): half the time on CPUs of what takes the layout as it comes, such
        # as `jax.nn.dot_product_attention`.
        q, k, v = y.reshape(n, tokens, 3, self.heads, head_dim).transpose(2, 0, 3, 1, 4)
        logits = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
        attention = jax.nn.softmax(logits * head_dim**-0.5)
        # Does nothing, and keeps nothing, where the collection is not mutable.
        self.sow("intermediates", "attention", attention)
        y = (attention.astype(self.dtype) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + branch_end(linear(channels, name="proj")(y), 0)

        y = linear(self.mlp_ratio * channels, name="fc1")(layer_norm(name="norm2", **dtypes)(x))
        return x + branch_end(linear(channels, name="fc2")(gelu(y)), 1)


class ViT(nn.Module):
    """A Vision Transformer, the classifier (arXiv 2010.11929; distilled: DeiT, arXiv 2012.12877).

    Example::

        model = create_vit("deit_small_patch16_224", num_classes=10)
        images = jnp.zeros((1, 224, 224, 3))
        variables = model.init(jax.random.key(0), images)
        logits = model.apply(variables, images)                                   # (1, 10) float32
        _, state = model.apply(variables, images, mutable=["intermediates"])
        state["intermediates"]["block_11"]["attention"][0]                        # (1, 6, 197, 197) float32

    The tokens are the class token, the distillation token if `distilled`, then the patches row by row. Every block's
    attention, (N, heads, T, T) float32, rows being queries, is sown in the collection "intermediates".

    Attributes:
      dim: channels of a token.
      depth: blocks.
      heads: of every block's attention; must divide `dim`.
      patch_size: side of a patch in pixels.
      image_size: side, or (height, width), of the images whose grid of patches the stored positions have; for images
        of other sizes they are resized. Multiples of `patch_size`.
      mlp_ratio: the MLPs' hidden layers have mlp_ratio * dim channels.
      distilled: a second token with a classifier of its own, for distillation.
      layer_scale_init: start of the layer scales; None: no layer scales.
      num_classes: outputs; 0: the class token comes out instead (distilled: the mean of both tokens).
      drop_path_rate: of the last block; rises linearly from 0 at the first.
      mean, std: of the pixels that it takes, as in `fcvit_jax.normalize`.
      remat: recompute each block in the backward pass: less memory, more time, the same numbers but for rounding.
      share_blocks: trace the blocks once, as they are equal: compiles faster, names all by the first in profiles, and
        draws other weights from the same key.
      dtype: compute dtype; norms' statistics, softmax and heads are float32.
      param_dtype: dtype of the parameters.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    patch_size: int = 16
    image_size: ImageSize = 224
    mlp_ratio: int = 4
    distilled: bool = False
    layer_scale_init: float | None = None
    num_classes: int = 1000
    drop_path_rate: float = 0.0
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    remat: bool = False
    share_blocks: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return 2 if self.distilled else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches that have a stored position."""
        height, width = height_width(self.image_size)
        return height // self.patch_size, width // self.patch_size

    def setup(self):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patch = (self.patch_size, self.patch_size)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.patch_embed = Conv(self.dim, patch, patch, "VALID", kernel_init=init, **dtypes)
        self.cls_token = self.param("cls_token", normal(0.02), (self.dim,), self.param_dtype)
        if self.distilled:
            self.dist_token = self.param("dist_token", normal(0.02), (self.dim,), self.param_dtype)
        rows = self.prefix + math.prod(self.grid)
        self.pos_embed = self.param("pos_embed", normal(0.02), (rows, self.dim), self.param_dtype)
        block = nn.remat(Block) if self.remat else Block
        block = nn.jit(block) if self.share_blocks else block
        fields = {"mlp_ratio": self.mlp_ratio, "layer_scale_init": self.layer_scale_init, **dtypes}
        self.block = [block(heads=self.heads, **fields) for _ in range(self.depth)]
        self.norm = layer_norm(dtype=jnp.float32, param_dtype=self.param_dtype)
        if self.num_classes:
            head = functools.partial(nn.Dense, self.num_classes, kernel_init=normal(0.02), dtype=jnp.float32)
            self.head = head(param_dtype=self.param_dtype)
            if self.distilled:
                self.head_dist = head(param_dtype=self.param_dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The logits.

        Args:
          images: (N, H, W, 3), float, normalised; H and W multiples of `patch_size`.
          train: drop-path as in training.

        Returns:
          (N, num_classes) float32, distilled the mean over both classifiers; with num_classes=0 (N, dim) float32.
        """
        return sum(self.all_logits(images, train)) / self.prefix

    def all_logits(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """The logits of each classifier, apart: what distillation trains; arguments as in `__call__`.

        Returns:
          (N, num_classes) float32 from the class token and, if `distilled`, likewise from the distillation token; with
          num_classes=0 the tokens themselves, (N, dim) float32.
        """
        x = self.features(images, train)
        if self.num_classes == 0:
            return tuple(x[:, i] for i in range(self.prefix))
        logits = self.head(x[:, 0])
        return (logits, self.head_dist(x[:, 1])) if self.distilled else (logits,)

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The tokens after the last norm; arguments as in `__call__`.

        Returns:
          (N, T, dim) float32; T counts `prefix` tokens and H * W / patch_size**2 patches.

        Raises:
          UserError: the images are no (N, H, W, 3) floats, or a side is no multiple of `patch_size`.
        """
        check_images(images)
        n, height, width, _ = images.shape
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise UserError(
                f"Images of {height} x {width} pixels cannot be cut into patches of {self.patch_size} x "
                f"{self.patch_size}: resize or crop them to multiples of {self.patch_size}."
            )
        x = self.patch_embed(images)
        prefix = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        prefix = jnp.broadcast_to(jnp.stack(prefix).astype(self.dtype), (n, self.prefix, self.dim))
        positions = resize_positions(self.pos_embed, self.prefix, x.shape[1:3], self.grid)
        x = jnp.concatenate([prefix, x.reshape(n, -1, self.dim)], axis=1) + positions.astype(self.dtype)
        drop_path = [None] * self.depth
        if train and self.drop_path_rate > 0:
            rates = np.linspace(0, self.drop_path_rate, self.depth)
            drop_path = drop_path_factors(self.make_rng("dropout"), rates, n)
        for block, factors in zip(self.block, drop_path, strict=True):
            x = block(x, factors)
        return self.norm(x)


def init_variables(model: ViT, key: jax.Array, jit: Callable = lambda function, *args: jax.jit(function)) -> dict:
    """Draws the initial weights; arguments and reasons as in `fcvit.init_variables`.

    Returns:
      {"params": ...}.
    """
    draw = jit(functools.partial(_init_first_block, model), key)
    draws = [draw(key)["params"], *(draw(jax.random.fold_in(key, i))["params"] for i in range(1, model.depth))]
    return {"params": draws[0] | {f"block_{i}": params["block_0"] for i, params in enumerate(draws)}}


def _init_first_block(model: ViT, key: jax.Array) -> dict[str, Any]:
    """As `model.init`, but with one block."""
    return model.clone(depth=1).init(key, jnp.zeros((1, model.patch_size, model.patch_size, 3)))


def create_vit(name: str, num_classes: int = 1000, **fields) -> ViT:
    """Makes a variant of ViT.

    Example::

        model = create_vit("vit_base_patch16_224", num_classes=0)
        model = create_vit("deit_tiny_patch16_224", dim=144, depth=6, patch_size=8, image_size=64)

    Args:
      name: a key of `VARIANTS`.
      num_classes: outputs; 0: no head.
      **fields: attributes of `ViT`.

    Raises:
      UserError: the name is unknown, or a value is not allowed, such as heads that do not divide `dim`.
    """
    if name not in VARIANTS:
        raise UserError(f"Unknown model {name!r}: choose from {', '.join(VARIANTS)}.")
    # JSON and command lines give lists, with which a module could not be hashed.
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
    model = ViT(**VARIANTS[name] | {"num_classes": num_classes, **fields})
    counts = ("dim", "depth", "heads", "patch_size", "mlp_ratio")
    check_counts(1, **{key: getattr(model, key) for key in counts})
    check_range("model", 1, below=1000, depth=model.depth)  # each block is traced
    check_size("model", image_size=model.image_size)
    check_counts(0, num_classes=model.num_classes)
    check_range("model", 0, below=1, drop_path_rate=model.drop_path_rate)
    check_dtypes(model)
    check_switches(model)
    if model.dim % model.heads:
        raise UserError(f"model.heads={model.heads} does not divide model.dim={model.dim}.")
    if any(side % model.patch_size for side in height_width(model.image_size)):
        raise UserError(f"model.image_size={model.image_size} is no multiple of model.patch_size={model.patch_size}.")
    return model
