"""FCViT: its variants, the classifier and the feature pyramid. docs/model.md defines exactly what is computed."""

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
from fcvit_jax.networks.checks import check_counts, check_dtypes, check_images, check_switches, check_tuples
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
    """The block as a function that JAX traces once for all blocks of equal shapes: halves the time for fcvit_s48."""
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
    folded: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    mean: ClassVar[Sequence[float]] = MEAN  # of pixels, for `normalize`
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
          UserError: the images are no such array, or have their channels first; or a folded network is trained.
        """
        check_images(images)
        if self.folded and train:
            raise UserError("A folded network cannot be trained: train the network that it was made of.")
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
            folded=self.folded,
            **dtypes,
        )
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        if self.share_blocks:
            block = _shared(block)
        downsample = functools.partial(Downsample, bn_group_size=self.bn_group_size, folded=self.folded, **dtypes)
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
                    folded=self.folded,
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

    Every global context sows its similarity, (N, H, W, context_heads) float32, in the collection "intermediates".

    Attributes:
      depths: blocks of each stage.
      dims: channels of each stage.
      mlp_ratios: ratio of hidden to outer channels in the channel mixers of each stage.
      num_classes: outputs; 0: no head, the pooled features are returned.
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
      drop_path_rate: of the last block; the rate rises linearly from 0 at the first block.
      bn_group_size: images that share batch statistics in training; None or 0: the whole batch.
      freeze_bn: use the running statistics of batch normalisation in training too, and do not update them. For
        fine-tuning with small batches.
      remat: recompute each block in the backward pass. This takes less memory and more time; results differ only by
        rounding.
      share_blocks: trace the equal blocks of a stage once, as training does. Compiling is faster. Profiles show all
        blocks under the name of the first, and the same key draws other weights and dropout masks. Do not use it inside
        a `jax.checkpoint` of your own.
      folded: the variables are those that `networks.folded.fold` makes, for evaluation alone.
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
        affine = dict.fromkeys(("use_scale", "use_bias"), not self.folded or self.num_classes == 0)
        x = group_norm(x, valid, dtype=jnp.float32, param_dtype=self.param_dtype, name="norm", **affine)
        x = x.mean((1, 2), where=valid)
        if self.num_classes == 0:
            return x
        return nn.Dense(
            self.num_classes, kernel_init=normal(0.02), dtype=jnp.float32, param_dtype=self.param_dtype, name="head"
        )(x)


class Backbone(_Stages):
    """The feature pyramid: the four stage outputs, each normalised by its own norm.

    The attributes are those of `FCViT`. Layer scales start smaller, as in the original's segmentation and detection.
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
    """Returns the network with other values of some fields: of its backbone's fields, if it has a backbone.

    Example::

        with_fields(segmenter, share_blocks=True, param_dtype=jnp.float32)
    """
    return model.clone(backbone=model.backbone.clone(**fields)) if hasattr(model, "backbone") else model.clone(**fields)


def abstract_variables(model: nn.Module) -> dict[str, Any]:
    """The model's variables as `jax.ShapeDtypeStruct`: {"params": ..., "batch_stats": ...}."""
    model = with_fields(model, share_blocks=True)  # traces fcvit_s48 in 0.4 s instead of 3 s
    side = getattr(model, "patch_size", 32)  # a ViT's images must be multiples of its patches
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3))))


def variant(name: str) -> str:
    """The key of `VARIANTS` for a name, which may be the original's, such as fcvit_b12.

    Raises:
      UserError: there is no such variant.
    """
    ours = name.replace("fcvit_b", "fcvit_s")
    if ours not in VARIANTS:
        raise UserError(f"Unknown model {name!r}: choose from {', '.join(VARIANTS)}.")
    return ours


def _init_first_blocks(model: FCViT, key: jax.Array) -> dict[str, Any]:
    """Like `model.init`, with at most one block in each stage."""
    model = model.clone(depths=tuple(min(depth, 1) for depth in model.depths))
    return model.init(key, jnp.zeros((1, 32, 32, 3)))


def init_variables(model: FCViT, key: jax.Array, jit: Callable = lambda function, *args: jax.jit(function)) -> dict:
    """Draws the initial weights of a classifier.

    One program with one block per stage runs once for each block of the deepest stage: compiling the draws of all
    blocks would take as long as compiling the training step. The weights differ from those of `model.init`.

    Args:
      model: the network.
      key: random key.
      jit: jit(function, *args) returns a jitted function for arguments of these shapes.

    Returns:
      {"params": ..., "batch_stats": ...}.
    """
    draw = jit(functools.partial(_init_first_blocks, model), key)
    # Block i of every stage comes from draw i, all other parameters from draw 0.
    draws = [draw(key), *(draw(jax.random.fold_in(key, i)) for i in range(1, max(model.depths)))]
    params = {name: x for name, x in draws[0]["params"].items() if not name.startswith("stages")}
    for s, depth in enumerate(model.depths):
        for i in range(depth):
            params[f"stages_{s}_block_{i}"] = draws[i]["params"][f"stages_{s}_block_0"]
    return {"params": params, "batch_stats": draws[0]["batch_stats"]}


def _create(module: type[nn.Module], name: str, overrides: dict[str, Any]) -> Any:
    """Makes a module of a variant and checks its fields."""
    # JSON and command lines give lists. A module must be hashable, so they become tuples.
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in overrides.items()}
    model = module(**VARIANTS[variant(name)] | fields)
    check_range("model", 0, below=1, dropout_rate=model.dropout_rate, drop_path_rate=model.drop_path_rate)
    counts = ("context_heads", "context_reduction", "mix_reduction", "mix_min_dim")
    check_counts(1, **{key: getattr(model, key) for key in counts})
    check_tuples(0, depths=model.depths)
    check_tuples(1, **{key: getattr(model, key) for key in ("dims", "mlp_ratios", "kernel_sizes")})
    check_dtypes(model)
    check_switches(model)
    if model.bn_group_size is not None:
        check_counts(0, bn_group_size=model.bn_group_size)
    if model.mlp_kernel_size is not None:
        check_counts(1, mlp_kernel_size=model.mlp_kernel_size)
    for size in (*model.kernel_sizes, model.mlp_kernel_size):
        if size is not None and size % 2 == 0:
            raise UserError(f"model.kernel_sizes and model.mlp_kernel_size must be odd, which {size} is not.")
    if len({len(sizes) for sizes in (model.depths, model.dims, model.mlp_ratios)}) > 1:
        raise UserError("model.depths, model.dims and model.mlp_ratios must have one entry for each stage.")
    return model


def create_model(name: str, num_classes: int = 1000, **overrides) -> FCViT:
    """Makes an FCViT classifier; arguments and errors as in `fcvit_jax.create_model`."""
    check_counts(0, num_classes=num_classes)
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
