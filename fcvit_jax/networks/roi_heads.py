"""The second stage of Mask R-CNN (He et al., 2017): what is in a proposal, its exact box and its mask."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.networks import boxes as box_lib
from fcvit_jax.networks.boxes import Samples
from fcvit_jax.networks.dense_conv import Conv
from fcvit_jax.networks.rpn import box_losses

STDS = (0.1, 0.1, 0.2, 0.2)  # of the box head's deltas


class BoxHead(nn.Module):
    """Two hidden layers, then the classes and a box for each of them.

    Attributes:
      num_classes: without the background.
      channels: of the hidden layers.
      dtype: compute dtype of the hidden layers.
      param_dtype: dtype of the parameters.
    """

    num_classes: int = 80
    channels: int = 1024
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(R, h, w, C) -> float32 logits (R, num_classes + 1), background last, and deltas (R, 4 * num_classes)."""
        dtypes, x = {"dtype": self.dtype, "param_dtype": self.param_dtype}, features
        for i in range(2):
            axes = tuple(range(1, x.ndim))  # the first kernel is (h, w, C, channels)
            init = normal((2 / (math.prod(x.shape[1:]) + self.channels)) ** 0.5)
            x = nn.relu(nn.DenseGeneral(self.channels, axes, kernel_init=init, name=f"hidden_{i}", **dtypes)(x))
        dtypes = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        logits = nn.Dense(self.num_classes + 1, kernel_init=normal(0.01), name="logits", **dtypes)(x)
        return logits, nn.Dense(4 * self.num_classes, kernel_init=normal(0.001), name="deltas", **dtypes)(x)


class Doubling(nn.Module):
    """A transposed convolution of 2x2 with stride 2: position (i, j) gives the four results at (2i + a, 2j + b)."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        number, height, width, channels = x.shape
        init = normal((2 / (4 * channels)) ** 0.5)
        kernel = self.param("kernel", init, (2, 2, channels, self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("nijc,abcd->niajbd", x, kernel)
        return y.reshape(number, 2 * height, 2 * width, self.features) + bias


class MaskHead(nn.Module):
    """Four convolutions, a doubling, and a mask for each class.

    Attributes:
      num_classes: without the background.
      channels: of the hidden layers.
      dtype: compute dtype of the hidden layers.
      param_dtype: dtype of the parameters.
    """

    num_classes: int = 80
    channels: int = 256
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """(R, h, w, C) -> logits (R, 2h, 2w, num_classes), float32.

        With labels (R,) int: (R, 2h, 2w), of each box's class alone. That makes no weights.
        """
        dtypes, x = {"dtype": self.dtype, "param_dtype": self.param_dtype}, features
        init = normal((2 / (9 * self.channels)) ** 0.5)
        for i in range(4):
            x = nn.relu(Conv(self.channels, (3, 3), padding=1, kernel_init=init, name=f"conv_{i}", **dtypes)(x))
        x = nn.relu(Doubling(self.channels, name="doubling", **dtypes)(x))
        init = normal((2 / self.num_classes) ** 0.5)
        dtypes = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        logits = nn.Dense(self.num_classes, kernel_init=init, name="logits", **dtypes)
        if labels is None:
            return logits(x)
        kernel, bias = (jnp.asarray(logits.variables["params"][name], jnp.float32) for name in ("kernel", "bias"))
        return jnp.einsum("rhwc,cr->rhw", x.astype(jnp.float32), kernel[:, labels]) + bias[labels, None, None]


def sample_rois(
    key: jax.Array,
    proposals: jax.Array,
    valid_proposals: jax.Array,
    objects: jax.Array,
    valid_objects: jax.Array,
    number: int = 512,
) -> Samples:
    """Draws the boxes of one image that take part in the losses: from its objects' own and the proposals.

    Args:
      key: random key.
      proposals: (P, 4) float32.
      valid_proposals: (P,) bool, which there are.
      objects: (G, 4) float32, boxes.
      valid_objects: (G,) bool, which there are.
      number: boxes to draw, at most a quarter of them positive.

    Returns:
      The samples, of length `number`; `index` is a row of the objects followed by the proposals.
    """
    overlaps = box_lib.iou(objects, proposals)
    assigned = box_lib.assign(overlaps, 0.5, 0.5, 0.5, valid_objects, valid_proposals)
    of_objects = jnp.where(valid_objects, jnp.arange(1, len(objects) + 1), -1)
    return box_lib.sample(key, jnp.concatenate([of_objects, assigned]), number, number // 4)


class RoILosses(NamedTuple):
    """Sums over the samples of one image; each () float32.

    Attributes:
      class_loss: softmax cross-entropy.
      box_loss: absolute differences of the deltas of the right class, over positives.
      correct: samples whose class was found.
      number: of samples.
    """

    class_loss: jax.Array
    box_loss: jax.Array
    correct: jax.Array
    number: jax.Array


def roi_losses(
    logits: jax.Array, deltas: jax.Array, rois: jax.Array, samples: Samples, objects: jax.Array, labels: jax.Array
) -> RoILosses:
    """The losses of the box head for the samples of one image, not yet divided.

    Args:
      logits: (S, classes + 1) float32.
      deltas: (S, 4 * classes) float32.
      rois: (S, 4) float32, the boxes that were drawn.
      samples: of length S.
      objects: (G, 4) float32, boxes.
      labels: (G,) int, their classes.
    """
    background = logits.shape[-1] - 1
    positive = samples.positive & samples.valid
    wanted = jnp.where(positive, labels[samples.object], background)
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, None], 1)[:, 0]
    of_label = jnp.minimum(wanted, background - 1)[:, None, None]
    deltas = jnp.take_along_axis(deltas.reshape(len(deltas), -1, 4), of_label, 1)[:, 0]
    return RoILosses(
        jnp.where(samples.valid, entropy, 0).sum(),
        box_losses(deltas, rois, objects[samples.object], positive, STDS),
        (samples.valid & (logits.argmax(-1) == wanted)).sum(dtype=jnp.float32),
        samples.valid.sum(dtype=jnp.float32),
    )


def mask_loss(logits: jax.Array, targets: jax.Array, positive: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the binary cross-entropy over the masks of one image, and over how many numbers; () float32.

    Args:
      logits: (P, h, w) float32, of the classes that are there.
      targets: (P, h, w) bool.
      positive: (P,) bool, which there are.
    """
    entropy = jax.nn.softplus(jnp.where(targets, -logits, logits))
    positive = jnp.broadcast_to(positive[:, None, None], entropy.shape)
    return jnp.where(positive, entropy, 0).sum(), positive.sum(dtype=jnp.float32)


def select(
    boxes: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    *,
    score_threshold: float,
    nms_threshold: float,
    number: int,
    few: int = 1024,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best boxes of each image over all classes, after non-maximum suppression within each class.

    Args:
      boxes: (N, R, classes, 4) float32.
      scores: (N, R, classes) float32, from 0 to 1.
      valid: (N, R) bool, which boxes there are.
      score_threshold: what a score must be above.
      nms_threshold: the highest intersection over union of two boxes of a class.
      number: boxes to return.
      few: where no image has more scores above the threshold than this, all classes are looked at together. That is
        faster, and the result is the same.

    Returns:
      index: (N, number) int32, roi * classes + class of each, the best first.
      scores: (N, number) float32, 0 in unused places.
      valid: (N, number) bool; False: the place is unused.
    """
    total, classes = scores[0].size, scores.shape[-1]
    scores = jnp.where(valid[..., None] & (scores > score_threshold), scores, -1)

    def best(scores: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
        """The highest of one image's scores (S,), and where they are; -1 beyond the last."""
        scores, index = jax.lax.top_k(jnp.pad(scores, (0, max(number - len(scores), 0)), constant_values=-1), number)
        return scores, jnp.minimum(index, total - 1)

    def of_few(boxes: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores, index = best(scores.reshape(-1), few)
        kept = box_lib.nms(boxes.reshape(-1, 4)[index], scores, nms_threshold, scores >= 0, index % classes)
        scores, place = best(jnp.where(kept, scores, -1), number)
        return scores, index[jnp.minimum(place, few - 1)]

    def of_many(boxes: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_class(args):
            return box_lib.nms(*args, nms_threshold, args[1] >= 0)

        # 80 classes at once would take 80 R x R booleans for every image.
        kept = jax.lax.map(of_class, (boxes.swapaxes(0, 1), scores.T), batch_size=16).T
        return best(jnp.where(kept, scores, -1).reshape(-1), number)

    are_few = (scores >= 0).sum((1, 2)).max() <= few
    scores, index = jax.lax.cond(are_few, jax.vmap(of_few), jax.vmap(of_many), boxes, scores)
    return index, jnp.maximum(scores, 0), scores >= 0
