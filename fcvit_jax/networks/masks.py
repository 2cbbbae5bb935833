"""Masks of objects: what the mask branch is trained to give for a box, and its masks as pixels of the image."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.networks.boxes import clip
from fcvit_jax.networks.roi_align import axis_weights


def crop_masks(
    masks: jax.Array,
    boxes: jax.Array,
    objects: jax.Array,
    *,
    rows: jax.Array | None = None,
    columns: jax.Array | None = None,
    image_size: Sequence[int] | jax.Array | None = None,
    size: int = 28,
    chunk: int = 32,
) -> jax.Array:
    """How much of every cell of a box its object covers: RoIAlign of the object's mask.

    The masks may be stored as they were before resizing (to the nearest pixel), flipping and padding: `rows` and
    `columns` say which pixel of the stored mask each pixel of the image shows. The result is the same.

    Example::

        targets = crop_masks(masks, boxes, objects) >= 0.5                 # masks (G, H, W), boxes (R, 4), objects (R,)

    Args:
      masks: (G, h, w) bool or numbers 0 and 1.
      boxes: (R, 4) float32, in pixels of the image, to which they are clipped.
      objects: (R,) int, which mask belongs to which box.
      rows: (H,) int, the row of the stored masks that each row of the image shows; -1: none. None: they are the same.
      columns: (W,) int, likewise.
      image_size: (2,) int, height and width in pixels of the image, where rows and columns go beyond it; None: they do
        not.
      size: cells of a box along each side.
      chunk: boxes that are computed at once: chunk * h * w numbers are in memory.

    Returns:
      (R, size, size) float32, from 0 to 1.
    """
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    masks = jnp.asarray(masks)
    rows = jnp.arange(masks.shape[1]) if rows is None else rows
    columns = jnp.arange(masks.shape[2]) if columns is None else columns
    height, width = (len(rows), len(columns)) if image_size is None else image_size
    boxes = clip(boxes, (height, width))

    def weights(low, high, valid, shown, stored):
        """Of the image's rows (columns), added up for each row (column) of the stored masks."""
        of_image = axis_weights(low, high, stride=1, size=size, cells=len(shown), valid_cells=valid)
        return product("pH,Hh->ph", of_image, (shown[:, None] == jnp.arange(stored)).astype(jnp.float32))

    def crop(args):
        box, index = args
        y = weights(box[1], box[3], height, rows, masks.shape[1])
        x = weights(box[0], box[2], width, columns, masks.shape[2])
        return product("ph,hw,qw->pq", y, masks[index].astype(jnp.float32), x)

    return jax.lax.map(crop, (boxes, objects), batch_size=chunk)


def paste_masks(masks: np.ndarray, boxes: np.ndarray, image_size: Sequence[int], threshold: float = 0.5) -> np.ndarray:
    """Draws the masks of boxes at the size of the image; on the host, with NumPy.

    Example::

        pixels = paste_masks(masks, boxes, (480, 640))                     # (D, 28, 28), (D, 4) -> (D, 480, 640) bool

    Args:
      masks: (D, size, size) float, from 0 to 1: probabilities within each box.
      boxes: (D, 4) float32, in pixels of the image.
      image_size: (height, width) in pixels.
      threshold: the least probability, bilinearly interpolated, of a pixel of the object.

    Returns:
      (D, height, width) bool; all False for a box without width or height.
    """

    def weights(low, high, number, cells):
        """The pixels (of `number`) with centres in the box, and (pixels, cells): what each cell contributes to them."""
        first, end = max(int(np.floor(low)), 0), min(int(np.ceil(high)), number)
        centres = np.arange(first, max(end, first), dtype=np.float32) + np.float32(0.5)
        position = (centres - low) / (high - low) * np.float32(cells) - np.float32(0.5)
        return slice(first, max(end, first)), np.maximum(1 - np.abs(position[:, None] - np.arange(cells)), 0)

    pixels = np.zeros((len(masks), *image_size), bool)
    for mask, (x1, y1, x2, y2), canvas in zip(np.float32(masks), np.float32(boxes), pixels, strict=True):
        if x2 > x1 and y2 > y1:
            rows, y = weights(y1, y2, image_size[0], mask.shape[0])
            columns, x = weights(x1, x2, image_size[1], mask.shape[1])
            canvas[rows, columns] = y @ mask @ x.T >= threshold
    return pixels
