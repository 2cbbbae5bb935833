"""Boxes of object detection: anchors, coder, overlaps, suppression, and who is trained on what; usable by themselves.

Boxes are (..., 4) float32: x1, y1, x2, y2 in pixels, width = x2 - x1. All functions are pure, have static shapes, and
work under `jax.jit` and `jax.vmap`. Boolean arrays say what is padding. The behaviour is that of MMDetection 2.19.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)  # height / width
SCALE = 8  # the side of a square anchor is SCALE times the stride
MAX_LOG_RATIO = abs(math.log(16 / 1000))  # of a size that is decoded to its box's


def map_sizes(height: int, width: int, strides: Sequence[int] = STRIDES) -> list[tuple[int, int]]:
    """Height and width, in cells, of the map of each stride over a canvas of height x width pixels."""
    return [(-(-height // s), -(-width // s)) for s in strides]


def padded_size(sizes: jax.Array) -> jax.Array:
    """Heights and widths, rounded up to multiples of 32 pixels: what the original pads an image to."""
    return -(-sizes // 32) * 32


def anchors(height: int, width: int, strides: Sequence[int] = STRIDES) -> jax.Array:
    """The anchors of a canvas: three boxes around the top left corner of every cell of every map.

    Example::

        boxes = anchors(800, 1344)                                         # (268569, 4)

    Args:
      height: of the canvas, in pixels.
      width: of the canvas, in pixels.
      strides: pixels per cell of each map.

    Returns:
      (A, 4) float32 in the order map, row, column, ratio (0.5, 1, 2).
    """
    levels = []
    for stride, (rows, columns) in zip(strides, map_sizes(height, width, strides), strict=True):
        root = np.sqrt(np.array(RATIOS, np.float32))
        # Float32 in this order: which anchors overlap an object equally well depends on the last bit.
        w, h = np.float32(stride) * (1 / root) * SCALE, np.float32(stride) * root * SCALE
        base = np.stack([-0.5 * w, -0.5 * h, 0.5 * w, 0.5 * h], -1)
        x, y = jnp.arange(columns, dtype=jnp.float32) * stride, jnp.arange(rows, dtype=jnp.float32) * stride
        x, y = jnp.broadcast_to(x, (rows, columns)), jnp.broadcast_to(y[:, None], (rows, columns))
        levels.append((jnp.stack([x, y, x, y], -1)[:, :, None] + base).reshape(-1, 4))
    return jnp.concatenate(levels)


def inside(height: int, width: int, size: jax.Array, strides: Sequence[int] = STRIDES) -> jax.Array:
    """Which anchors belong to cells of the image, and not of the padding around it.

    Args:
      height: of the canvas, in pixels.
      width: of the canvas, in pixels.
      size: (2,) int, height and width in pixels of the image on the canvas (at its top left).
      strides: pixels per cell of each map.

    Returns:
      (A,) bool, in the order of `anchors`.
    """
    levels = []
    for stride, (rows, columns) in zip(strides, map_sizes(height, width, strides), strict=True):
        cells = -(-size // stride)
        valid = (jnp.arange(rows) < cells[0])[:, None] & (jnp.arange(columns) < cells[1])
        levels.append(jnp.repeat(valid.reshape(-1), len(RATIOS)))
    return jnp.concatenate(levels)


def encode(boxes: jax.Array, targets: jax.Array, stds: Sequence[float] = (1, 1, 1, 1)) -> jax.Array:
    """How targets lie relative to boxes: the inverse of `decode`.

    Args:
      boxes: (..., 4), of positive width and height; otherwise the result is not finite.
      targets: (..., 4), likewise.
      stds: what the results (dx, dy, dw, dh) are divided by.

    Returns:
      (..., 4) float32: (dx, dy) the distance of the centres in widths and heights of the box, (dw, dh) the logarithms
      of the ratios of the sizes.
    """
    size, target_size = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    centre, target_centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5, (targets[..., :2] + targets[..., 2:]) * 0.5
    deltas = jnp.concatenate([(target_centre - centre) / size, jnp.log(target_size / size)], -1)
    return deltas / jnp.array(stds, jnp.float32)


def decode(
    boxes: jax.Array,
    deltas: jax.Array,
    stds: Sequence[float] = (1, 1, 1, 1),
    image_size: Sequence[int] | jax.Array | None = None,
) -> jax.Array:
    """Moves and resizes boxes by what a network predicts.

    Args:
      boxes: (..., 4).
      deltas: (..., 4): (dx, dy) in widths and heights of the box, (dw, dh) logarithms of the ratio of the sizes, which
        are clipped to +-log(1000 / 16).
      stds: what the deltas are multiplied by first.
      image_size: (2,) height and width in pixels, to which the result is clipped; None: it is not clipped.

    Returns:
      (..., 4) float32.
    """
    deltas = deltas * jnp.array(stds, jnp.float32)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + size * deltas[..., :2]
    half = size * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)) * 0.5
    decoded = jnp.concatenate([centre - half, centre + half], -1)
    return decoded if image_size is None else clip(decoded, image_size)


def clip(boxes: jax.Array, image_size: Sequence[int] | jax.Array) -> jax.Array:
    """The part of boxes (..., 4) within an image; image_size: (2,) height and width in pixels."""
    height, width = image_size[0], image_size[1]
    return jnp.clip(boxes, 0, jnp.array([width, height, width, height], boxes.dtype))


def _rounded(product: jax.Array) -> jax.Array:
    """Keeps a compiler from fusing the product into a sum that follows, which would round once in place of twice."""
    return jnp.minimum(product, jnp.finfo(product.dtype).max)


def areas(boxes: jax.Array) -> jax.Array:
    """Areas (...) in square pixels of boxes (..., 4)."""
    return _rounded((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))


def _intersection_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = a[..., :, None, :], b[..., None, :, :]
    sides = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0)
    intersection = _rounded(sides[..., 0] * sides[..., 1])
    return intersection, areas(a) + areas(b) - intersection


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of every box with every other.

    Every product is rounded by itself, whatever the computation is compiled into: ties depend on the last bit.

    Args:
      a: (..., A, 4) float32.
      b: (..., B, 4) float32.

    Returns:
      (..., A, B) float32; 0 for two boxes without area.
    """
    intersection, union = _intersection_and_union(a, b)
    return intersection / jnp.maximum(union, 1e-6)


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    threshold: float,
    valid: jax.Array | None = None,
    groups: jax.Array | None = None,
) -> jax.Array:
    """Non-maximum suppression: exactly the boxes that the greedy algorithm keeps.

    From the best score down (equal scores: from the lower index), a box is kept unless its overlap with a kept one is
    above the threshold. This is the only fixed point of "kept: not suppressed by a kept box of a better score", and is
    found by iterating that rule for all boxes at once, as often as the longest chain of suppressions is long. Takes
    memory for N x N booleans.

    Example::

        kept = nms(boxes, scores, 0.5)                                     # (N,) bool
        kept = jax.vmap(nms, (0, 0, None))(boxes, scores, 0.5)             # boxes (images, N, 4), scores (images, N)

    Args:
      boxes: (N, 4) float32.
      scores: (N,) float.
      threshold: the highest intersection over union that does not suppress.
      valid: (N,) bool; the others are not kept and suppress nothing. None: all are valid.
      groups: (N,) int; boxes suppress only boxes of the same group. None: all are of one group.

    Returns:
      (N,) bool, in the order of the boxes: which are kept.
    """
    index = jnp.arange(len(scores))
    better = (scores[:, None] > scores) | ((scores[:, None] == scores) & (index[:, None] < index))
    intersection, union = _intersection_and_union(boxes, boxes)
    suppresses = better & (intersection / union > threshold)  # two boxes without area: 0 / 0 > threshold is False
    if groups is not None:
        suppresses &= groups[:, None] == groups
    valid = jnp.ones(len(scores), bool) if valid is None else valid

    def step(state):
        kept, _ = state
        new = valid & ~(suppresses & kept[:, None]).any(0)
        return new, (new != kept).any()

    return jax.lax.while_loop(lambda state: state[1], step, (valid, valid.any()))[0]


def assign(
    iou: jax.Array,
    positive: float,
    negative: float,
    minimum: float,
    valid_objects: jax.Array | None = None,
    valid_boxes: jax.Array | None = None,
) -> jax.Array:
    """Which object every box is trained to find, if any.

    A box belongs to the object that it overlaps most, from an overlap of `positive` up. Every object also takes all the
    boxes that overlap it best, from `minimum` up, even from other objects; of several such objects the last gets it.

    Args:
      iou: (objects, boxes) float32, intersection over union.
      positive: overlap from which on a box belongs to an object.
      negative: overlap below which a box is background; between the two it is neither.
      minimum: overlap from which on the best boxes of an object belong to it.
      valid_objects: (objects,) bool; the others get no box. None: all are valid.
      valid_boxes: (boxes,) bool; the others are neither, and nobody's best. None: all are valid.

    Returns:
      (boxes,) int32: object + 1; 0: background; -1: neither.
    """
    number, boxes = iou.shape
    if number == 0:
        assigned = jnp.zeros(boxes, jnp.int32)
    else:
        valid = jnp.ones(iou.shape, bool)
        valid = valid if valid_objects is None else valid & valid_objects[:, None]
        valid = valid if valid_boxes is None else valid & valid_boxes
        iou = jnp.where(valid, iou, -1)
        highest = iou.max(0)
        assigned = jnp.where(highest < negative, 0, -1)
        one_based = jnp.arange(1, number + 1)[:, None]
        # The first that is highest: on CPUs argmax takes several times as long.
        assigned = jnp.where(highest >= positive, jnp.where(iou == highest, one_based, number).min(0), assigned)
        best = iou.max(1, keepdims=True)
        taken = valid & (iou == best) & (best >= minimum)
        taker = jnp.where(taken, one_based, 0).max(0)
        assigned = jnp.where(taker > 0, taker, assigned).astype(jnp.int32)
    return assigned if valid_boxes is None else jnp.where(valid_boxes, assigned, -1)


class Samples(NamedTuple):
    """The boxes of one image that take part in a loss; positives come first, then negatives, then unused places.

    Attributes:
      index: (number,) int32, of the box; arbitrary in unused places.
      object: (number,) int32, of the object that the box is trained to find; 0 for negatives and in unused places.
      positive: (number,) bool.
      valid: (number,) bool; False: the place is unused.
    """

    index: jax.Array
    object: jax.Array
    positive: jax.Array
    valid: jax.Array


def sample(key: jax.Array, assigned: jax.Array, number: int, max_positives: int) -> Samples:
    """Draws boxes for a loss, uniformly and without replacement; negatives fill up what positives leave.

    Args:
      key: random key.
      assigned: (boxes,) int32, as `assign` returns: positive above 0, negative at 0, never drawn below.
      number: boxes to draw; where there are fewer, all are taken.
      max_positives: the most positives among them.

    Returns:
      Samples of length `number`.
    """
    # top_k needs at least as many boxes as it gives.
    assigned = jnp.pad(assigned, (0, max(number - len(assigned), 0)), constant_values=-1)
    priority = jax.random.uniform(key, assigned.shape)  # XLA for CPUs sorts integers in full
    _, positives = jax.lax.top_k(jnp.where(assigned > 0, priority, -1), max_positives)
    _, negatives = jax.lax.top_k(jnp.where(assigned == 0, priority, -1), number)
    num_positives = jnp.minimum((assigned > 0).sum(), max_positives)
    num_negatives = jnp.minimum((assigned == 0).sum(), number - num_positives)
    place = jnp.arange(number)
    positive = place < num_positives
    index = jnp.concatenate([positives, negatives])[jnp.where(positive, place, max_positives + place - num_positives)]
    found = jnp.where(positive, assigned[index] - 1, 0)
    return Samples(index, found, positive, place < num_positives + num_negatives)
