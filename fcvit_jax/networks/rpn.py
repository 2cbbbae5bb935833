"""The region proposal network (Ren et al., 2015): where objects may be, and what it is trained on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal

from fcvit_jax.networks import boxes as box_lib
from fcvit_jax.networks.boxes import RATIOS, STRIDES, Samples
from fcvit_jax.networks.dense_conv import Conv


class RPN(nn.Module):
    """The head that looks at every cell of every map of a pyramid: is there an object, and which box has it?

    Attributes:
      channels: of the hidden layer.
      dtype: compute dtype of the hidden layer.
      param_dtype: dtype of the parameters.
    """

    channels: int = 256
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """For each map (N, h, w, C): logits (N, h, w, 3) and deltas (N, h, w, 12) of its anchors, float32.

        Channel 4 * a + i of the deltas is number i of dx, dy, dw, dh of the cell's anchor a.
        """
        options = {"kernel_init": normal(0.01), "param_dtype": self.param_dtype}
        hidden = Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name="conv", **options)
        # Scores of bfloat16 would tie by the hundred.
        logits = Conv(len(RATIOS), (1, 1), dtype=jnp.float32, name="logits", **options)
        deltas = Conv(4 * len(RATIOS), (1, 1), dtype=jnp.float32, name="deltas", **options)
        hiddens = [nn.relu(hidden(x)) for x in maps]
        return tuple((logits(x), deltas(x)) for x in hiddens)


Levels = Sequence[tuple[jax.Array, jax.Array]]  # what `RPN` gives


def flatten(levels: Levels) -> tuple[jax.Array, jax.Array]:
    """The logits (N, A) and deltas (N, A, 4) of all levels, in the order of `anchors`."""
    number = len(levels[0][0])
    logits = [logits.reshape(number, -1) for logits, _ in levels]
    deltas = [deltas.reshape(number, -1, 4) for _, deltas in levels]
    return jnp.concatenate(logits, 1), jnp.concatenate(deltas, 1)


def _canvas(levels: Levels) -> tuple[int, int]:
    """Its height and width in pixels, rounded up to whole cells of the finest map."""
    height, width = levels[0][0].shape[1:3]
    return height * STRIDES[0], width * STRIDES[0]


def anchors(levels: Levels) -> jax.Array:
    """The anchors of the canvas that the levels belong to, (A, 4); see `boxes.anchors`."""
    return box_lib.anchors(*_canvas(levels))


def inside(levels: Levels, sizes: jax.Array) -> jax.Array:
    """Which anchors belong to images of sizes (N, 2), in pixels, and not to the padding: (N, A) bool."""
    return jax.vmap(lambda size: box_lib.inside(*_canvas(levels), size))(sizes)


class Proposals(NamedTuple):
    """Boxes in which there may be an object, the best first.

    Attributes:
      boxes: (N, number, 4) float32, in pixels.
      scores: (N, number) float32, from 0 to 1.
      valid: (N, number) bool; False: the place is unused.
    """

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


def propose(
    levels: Levels,
    sizes: jax.Array,
    *,
    pre: int,
    number: int,
    threshold: float = 0.7,
    padded: jax.Array | None = None,
) -> Proposals:
    """The best boxes of an `RPN`'s results, after non-maximum suppression on each level; without gradients.

    Args:
      levels: for each map, logits (N, h, w, 3) and deltas (N, h, w, 12).
      sizes: (N, 2) int, height and width in pixels of the images, to which boxes are clipped.
      pre: boxes of each level that take part.
      number: proposals of an image.
      threshold: the highest intersection over union of two proposals of one level.
      padded: (N, 2) int, height and width in pixels beyond which anchors are not looked at; None: those of the canvas.

    Returns:
      `number` proposals per image, boxes without width or height left out.
    """
    most = min(pre, max(logits[0].size for logits, _ in levels))
    nms = jax.vmap(box_lib.nms, (0, 0, None, 0))

    def of_level(logits, deltas, anchors, valid, size):
        """The best boxes of a level of an image: (most, 4), their scores, and which there are."""
        scores = jnp.where(valid, jax.nn.sigmoid(logits), -1)
        scores, best = jax.lax.top_k(scores, min(most, len(scores)))
        found = box_lib.decode(anchors[best], deltas[best], image_size=size)
        valid = (scores >= 0) & (found[:, 2:] > found[:, :2]).all(-1)
        padding = most - len(scores)
        return jnp.pad(found, ((0, padding), (0, 0))), jnp.pad(scores, (0, padding)), jnp.pad(valid, (0, padding))

    all_anchors = anchors(levels)

    def of_image(levels, valid, size):
        found, start = [], 0
        for logits, deltas in levels:
            part = slice(start, start + logits.size)
            found.append(of_level(logits.reshape(-1), deltas.reshape(-1, 4), all_anchors[part], valid[part], size))
            start += logits.size
        found, scores, valid = (jnp.stack(x) for x in zip(*found, strict=True))
        kept = nms(found, scores, threshold, valid).reshape(-1)
        scores = jnp.where(kept, scores.reshape(-1), -1)
        scores = jnp.pad(scores, (0, max(number - len(scores), 0)), constant_values=-1)
        scores, best = jax.lax.top_k(scores, number)
        found = jnp.take(found.reshape(-1, 4), best, axis=0, mode="clip")
        valid = scores >= 0
        return Proposals(jnp.where(valid[:, None], found, 0), jnp.where(valid, scores, 0), valid)

    valid = jnp.ones((len(sizes), len(all_anchors)), bool) if padded is None else inside(levels, padded)
    return jax.vmap(of_image)(jax.lax.stop_gradient(tuple(levels)), valid, sizes)


def sample_anchors(
    key: jax.Array,
    anchors: jax.Array,
    valid_anchors: jax.Array,
    objects: jax.Array,
    valid_objects: jax.Array,
    number: int = 256,
) -> Samples:
    """Draws the anchors of one image that take part in the losses, at most half of them positive.

    Args:
      key: random key.
      anchors: (A, 4) float32.
      valid_anchors: (A,) bool, which are within the image.
      objects: (G, 4) float32, boxes.
      valid_objects: (G,) bool, which there are.
      number: anchors to draw.

    Returns:
      The samples, of length `number`; `index` is that of the anchor.
    """
    assigned = box_lib.assign(box_lib.iou(objects, anchors), 0.7, 0.3, 0.3, valid_objects, valid_anchors)
    return box_lib.sample(key, assigned, number, number // 2)


def losses(
    logits: jax.Array, deltas: jax.Array, anchors: jax.Array, samples: Samples, objects: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums over the sampled anchors of one image, and the number by which both are to be divided.

    Args:
      logits: (A,) float32.
      deltas: (A, 4) float32.
      anchors: (A, 4) float32.
      samples: of length S.
      objects: (G, 4) float32, boxes.

    Returns:
      The sums of the binary cross-entropy and of the absolute differences of deltas, and the number of samples, where
      a kind of which there are none counts as one; () float32.
    """
    positive, chosen = samples.positive & samples.valid, logits[samples.index]
    # The cross-entropy of logits; a logit's sigmoid could round to 0 or 1.
    entropy = jax.nn.softplus(jnp.where(positive, -chosen, chosen))
    box_loss = box_losses(deltas[samples.index], anchors[samples.index], objects[samples.object], positive)
    number = jnp.maximum(positive.sum(), 1) + jnp.maximum((samples.valid & ~positive).sum(), 1)
    return jnp.where(samples.valid, entropy, 0).sum(), box_loss, number.astype(jnp.float32)


def box_losses(
    deltas: jax.Array, boxes: jax.Array, targets: jax.Array, positive: jax.Array, stds: Sequence[float] = (1, 1, 1, 1)
) -> jax.Array:
    """The sum, over the positive boxes and four numbers, of |deltas - encode(boxes, targets)|; () float32.

    Args:
      deltas, boxes, targets: (S, 4) float32.
      positive: (S,) bool; the others may have any values.
      stds: as in `boxes.encode`.
    """
    # A box of padding may have no width: its logarithm must not come near the gradient.
    unit = jnp.array([0, 0, 1, 1], jnp.float32)
    boxes, targets = (jnp.where(positive[:, None], x, unit) for x in (boxes, targets))
    wanted = jax.lax.stop_gradient(box_lib.encode(boxes, targets, stds))
    return jnp.where(positive[:, None], jnp.abs(deltas - wanted), 0).sum()
