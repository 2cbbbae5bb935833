"""FCViT, the network: its variants and two ways to use it; docs/model.md says exactly what is computed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.errors import UserError, check_range
from fcvit_jax.networks.blocks import Block, ChannelMixer, TokenMixer, drop_path_factors
from fcvit_jax.networks.layers import Downsample, group_norm, masked, valid_cells
from fcvit_jax.networks.normalize import MEAN, STD

VARIANTS = {
    "fcvit_tiny": {"depths": (3, 3, 5, 2), "dims": (32, 64, 160, 320), "mlp_ratios": (8, 8, 4, 4)},
    "fcvit_s12": {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512), "mlp_ratios": (8, 8, 4, 4)},
    "fcvit_s24": {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512), "mlp_ratios": (8, 8, 4, 4)},
    "fcvit_s48": {"depths": (8, 8, 24, 8), "dims": (64, 128, 320, 512), "mlp_ratios": (8, 8, 4, 4)},
}
# How the original trains and evaluates each variant.
SETTINGS = {
    "fcvit_tiny": {"image_size": 224, "crop_pct": 0.9, "drop_path_rate": 0.1},
    "fcvit_s12": {"image_size": 224, "crop_pct": 0.9, "drop_path_rate": 0.1},
    "fcvit_s24": {"image_size": 224, "crop_pct": 0.95, "drop_path_rate": 0.1},
    "fcvit_s48": {"image_size": 224, "crop_pct": 0.95, "drop_path_rate": 0.2},
}


def _shared(block: type[nn.Module]) -> type[nn.Module]:
    """Blocks of equal shapes as one function, which JAX traces once: for fcvit_s48 that takes half the time."""
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
    freeze_bn: bool = False
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
    def features(self, images: jax.Array, train: bool = False, sizes: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The four stage outputs.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: batch statistics, dropout and drop-path as in training.
          sizes: (N, 2) int, height and width in pixels of each image, which lies at the top left of a larger canvas:
            results are then those of the image alone, and 0 beyond it. (Batch statistics in training are of the whole
            canvas all the same.) None: the images fill the canvas.

        Returns:
          Four arrays (N, ceil(H / s), ceil(W / s), dims[i]) of `dtype`, with s = 4, 8, 16 and 32.

        Raises:
          UserError: the images are no such array, or have their channels first.
        """
        channels_first = images.shape[1:2] == (3,) != images.shape[3:]
        if images.ndim != 4 or channels_first or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"Images must be (N, H, W, 3) floats, as fcvit_jax.normalize makes of uint8, not "
                f"{images.dtype} {images.shape}."
            )
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
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        if self.share_blocks:
            block = _shared(block)
        downsample = functools.partial(Downsample, bn_group_size=self.bn_group_size, **dtypes)
        drop_path = [None] * sum(self.depths)
        if train and self.drop_path_rate > 0:
            rates = np.linspace(0, self.drop_path_rate, len(drop_path))
            drop_path = drop_path_factors(self.make_rng("dropout"), rates, images.shape[0])
        x, maps, train_bn = masked(images, valid_cells(sizes, images, 1)), [], train and not self.freeze_bn
        for s, (depth, dim, ratio) in enumerate(zip(self.depths, self.dims, self.mlp_ratios, strict=True)):
            if s == 0:
                x = downsample(dim, kernel_size=7, stride=4, name="stem")(x, train_bn)
            else:
                x = downsample(dim, kernel_size=3, stride=2, name=f"downsample_{s}")(x, train_bn)
            channel_mixer = functools.partial(
                ChannelMixer,
                ratio=ratio,
                kernel_size=self.mlp_kernel_size,
                channel_attention=self.channel_attention,
                dropout_rate=self.dropout_rate,
                **dtypes,
            )
            valid = valid_cells(sizes, x, 4 * 2**s)
            for i in range(depth):
                x = block(
                    token_mixer=token_mixer,
                    channel_mixer=channel_mixer,
                    layer_scale_init=self.layer_scale_init,
                    name=f"stages_{s}_block_{i}",
                    **dtypes,
                )(x, train, drop_path[sum(self.depths[:s]) + i], valid)
            x = masked(x, valid)
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
      mlp_ratios: ratio of hidden to outer channels in the channel mixers of each stage.
      num_classes: outputs; 0: the pooled features come out instead.
      kernel_sizes: depthwise kernels of the token mixer's steps, odd; one entry: a single step.
      use_context: add the global context in the token mixer.
      weighted_context: weight the context by the similarity of each position.
      competition: the context's bottleneck is the maximum of two linear maps.
      context_heads: similarities per position; must divide `dims`.
      context_reduction: the context's bottleneck has C // context_reduction channels.
      mix_reduction: the token mixer's bottleneck has C // mix_reduction channels; 1: no bottleneck.
      mix_min_dim: the fewest channels of that bottleneck.
      mlp_kernel_size: depthwise kernel of the channel mixer, odd; None: none.
      spatial_attention: gate the end of the token mixer.
      channel_attention: add channel attention at the end of the channel mixer.
      layer_scale_init: start of the layer scales; None: no layer scales.
      dropout_rate: in the channel mixer.
      drop_path_rate: of the last block; rises linearly from 0 at the first.
      bn_group_size: images that share batch statistics in training; None or 0: the whole batch.
      freeze_bn: keep and use the running statistics of batch normalisation in training too, for small batches.
      remat: recompute each block in the backward pass: less memory, more time, the same numbers but for rounding.
      share_blocks: trace the equal blocks of a stage once, as training does: compiles faster, names all by the first in
        profiles, and draws other weights and dropout masks from the same key. Not for use under a `jax.checkpoint` of
        your own.
      dtype: compute dtype; statistics, pooling and head are float32.
      param_dtype: dtype of the parameters.
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, sizes: jax.Array | None = None) -> jax.Array:
        """The logits.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: batch statistics, dropout and drop-path as in training.
          sizes: as in `features`.

        Returns:
          (N, num_classes) float32; with num_classes=0 the pooled features, (N, dims[-1]) float32.
        """
        x = self.features(images, train, sizes)[-1]
        valid = valid_cells(sizes, x, 32)
        x = group_norm(x, valid, dtype=jnp.float32, param_dtype=self.param_dtype, name="norm")
        x = x.mean((1, 2), where=valid)
        if self.num_classes == 0:
            return x
        return nn.Dense(
            self.num_classes, kernel_init=normal(0.02), dtype=jnp.float32, param_dtype=self.param_dtype, name="head"
        )(x)


class Backbone(_Stages):
    """FCViT, the feature pyramid: the four stage outputs, each through a norm of its own; attributes as in `FCViT`.

    Layer scales start smaller, as they do in the original's segmentation and detection.
    """

    layer_scale_init: float | None = 1e-6

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, sizes: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The pyramid.

        Args:
          images: (N, H, W, 3), float, normalised; any H and W from 32 up.
          train: batch statistics, dropout and drop-path as in training.
          sizes: as in `features`; results are 0 beyond them.

        Returns:
          Four arrays (N, ceil(H / s), ceil(W / s), dims[i]) of `dtype`, with s = 4, 8, 16 and 32.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = []
        for i, x in enumerate(self.features(images, train, sizes)):
            valid = valid_cells(sizes, x, 4 * 2**i)
            maps.append(masked(group_norm(x, valid, name=f"norm_{i}", **dtypes), valid))
        return tuple(maps)


def with_fields(model: nn.Module, **fields) -> nn.Module:
    """The same network with other values of fields that every network here has; of its backbone, if it is built on one.

    Example::

        with_fields(segmenter, share_blocks=True, param_dtype=jnp.float32)
    """
    return model.clone(backbone=model.backbone.clone(**fields)) if hasattr(model, "backbone") else model.clone(**fields)


def abstract_variables(model: nn.Module) -> dict[str, Any]:
    """The model's variables as `jax.ShapeDtypeStruct`: {"params": ..., "batch_stats": ...}."""
    model = with_fields(model, share_blocks=True)  # traced in 0.4 s for fcvit_s48, which would take 3 s
    side = getattr(model, "patch_size", 32)  # a ViT takes multiples of its patches alone
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3))))


def _is_supported(dtype: Any) -> bool:
    try:
        return jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16)
    except TypeError:  # no dtype at all
        return False


def variant(name: str) -> str:
    """Our name of a variant: the key of `VARIANTS` for it, or for the name that the original gives it (fcvit_b12, ...).

    Raises:
      UserError: there is no such variant.
    """
    ours = name.replace("fcvit_b", "fcvit_s")
    if ours not in VARIANTS:
        raise UserError(f"Unknown model {name!r}: choose from {', '.join(VARIANTS)}.")
    return ours


def _init_first_blocks(model: FCViT, key: jax.Array) -> dict[str, Any]:
    """As `model.init`, but with no more than one block in each stage."""
    model = model.clone(depths=tuple(min(depth, 1) for depth in model.depths))
    return model.init(key, jnp.zeros((1, 32, 32, 3)))


def init_variables(model: FCViT, key: jax.Array, jit: Callable = lambda function, *args: jax.jit(function)) -> dict:
    """Draws the initial weights of a classifier.

    They are not those of `model.init`, but drawn by one program that is run once for each block of a stage: compiling
    the draws of all blocks takes XLA as long as compiling the training step.

    Args:
      model: the network.
      key: random key.
      jit: jit(function, *args) makes a compiled function for such arguments.

    Returns:
      {"params": ..., "batch_stats": ...}.
    """
    draw = jit(functools.partial(_init_first_blocks, model), key)
    # Draw i gives block i of every stage, and draw 0 all the rest as well.
    draws = [draw(key), *(draw(jax.random.fold_in(key, i)) for i in range(1, max(model.depths)))]
    params = {name: x for name, x in draws[0]["params"].items() if not name.startswith("stages")}
    for s, depth in enumerate(model.depths):
        for i in range(depth):
            params[f"stages_{s}_block_{i}"] = draws[i]["params"][f"stages_{s}_block_0"]
    return {"params": params, "batch_stats": draws[0]["batch_stats"]}


def _create(module: type[nn.Module], name: str, overrides: dict[str, Any]) -> Any:
    """Makes a module of a variant and checks its fields."""
    # JSON and command lines give lists, with which a module could not be hashed.
    model = module(
        **VARIANTS[variant(name)] | {key: tuple(x) if isinstance(x, list) else x for key, x in overrides.items()}
    )
    rates = ("dropout_rate", "drop_path_rate")
    counts = ("context_heads", "context_reduction", "mix_reduction", "mix_min_dim")
    check_range("model", 0, below=1, **{key: getattr(model, key) for key in rates})
    check_range("model", 1, **{key: getattr(model, key) for key in counts})
    check_range("model", 0, bn_group_size=model.bn_group_size or 0)
    check_range("model", 1, mlp_kernel_size=model.mlp_kernel_size or 1)
    for key, low in (("depths", 0), ("dims", 1), ("mlp_ratios", 1), ("kernel_sizes", 1)):
        sizes = getattr(model, key)
        if not isinstance(sizes, tuple) or not sizes:
            raise UserError(f"model.{key}={sizes!r} must be a tuple of numbers.")
        for size in sizes:
            check_range("model", low, **{key: size})
    for key in ("dtype", "param_dtype"):
        if not _is_supported(getattr(model, key)):
            raise UserError(f"model.{key}={getattr(model, key)!r} is not supported: choose float32 or bfloat16.")
    for size in (*model.kernel_sizes, model.mlp_kernel_size):
        if size is not None and size % 2 == 0:
            raise UserError(f"model.kernel_sizes and model.mlp_kernel_size must be odd, which {size} is not.")
    if len({len(sizes) for sizes in (model.depths, model.dims, model.mlp_ratios)}) > 1:
        raise UserError("model.depths, model.dims and model.mlp_ratios must have one entry for each stage.")
    return model


def create_model(name: str, num_classes: int = 1000, **overrides) -> FCViT:
    """Makes a variant of FCViT.

    Example::

        model = create_model("fcvit_s12", num_classes=10, drop_path_rate=0.1, bn_group_size=128)

    Args:
      name: a key of `VARIANTS`; the original's names (fcvit_b12, ...) are accepted too.
      num_classes: outputs; 0: no head.
      **overrides: attributes of `FCViT`.

    Raises:
      UserError: the name is unknown, or a value is not allowed, such as a rate of 1, an even kernel or dtype float16.
    """
    check_range("model", 0, num_classes=num_classes)
    return _create(FCViT, name, {"num_classes": num_classes, **overrides})


def create_backbone(name: str, **overrides) -> Backbone:
    """Makes the feature pyramid of a variant; arguments as in `create_model`, without classes.

    Example::

        backbone = create_backbone("fcvit_s12")
        variables = backbone.init(jax.random.key(0), images)             # images (N, H, W, 3)
        c2, c3, c4, c5 = backbone.apply(variables, images)               # strides 4, 8, 16, 32

    Raises:
      UserError: the name is unknown, or a value is not allowed, such as a rate of 1, an even kernel or dtype float16.
    """
    return _create(Backbone, name, overrides)
