"""RoIAlign with static shapes, exact for boxes of any size, as two small matrices per box.

The original averages ceil(length / size) samples per bin and axis, a number that depends on the box. But whether a
sample counts, where it lies and how it is interpolated all separate into an x and a y part, so that the result is
`rows @ map @ columns.T` for each channel, and the sums over samples that make the two matrices have a closed form.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fcvit_jax.networks.chunks import in_chunks

BAND = 96  # columns of a wide map of which most chunks of boxes need no more


def axis_weights(
    low: jax.Array,
    high: jax.Array,
    *,
    stride: int,
    size: int,
    cells: int,
    valid_cells: int | jax.Array,
    sampling_ratio: int = 0,
) -> jax.Array:
    """What every cell of a map contributes to every bin of a box, along one axis.

    Args:
      low: (...) float32, where boxes begin, in pixels.
      high: (...) float32, where they end.
      stride: pixels per cell.
      size: bins per box.
      cells: cells of the map along this axis.
      valid_cells: () or (...) int32, how many of them belong to the image; the rest is ignored.
      sampling_ratio: samples per bin; 0: ceil(length of a bin in cells), as in the original.

    Returns:
      (..., size, cells) float32. Without samples (length 0, or outside the image), a bin has zeros.
    """
    low, high = (x[..., None, None].astype(jnp.float32) / stride - 0.5 for x in (low, high))
    last = jnp.asarray(valid_cells, jnp.float32)[..., None, None]  # position after the last cell's centre
    length = (high - low) / size
    count = jnp.maximum(jnp.ceil(length), 0) if sampling_ratio == 0 else jnp.float32(sampling_ratio)
    # A tiny step in place of 0: all samples of a fixed number are then at the same position.
    step = jnp.maximum(length / jnp.maximum(count, 1), 1e-20)
    first = low + jnp.arange(size, dtype=jnp.float32)[:, None] * length + 0.5 * step

    # The samples of a bin are an arithmetic series; before[j]: how many lie before position j - 1.
    position = jnp.arange(-1, cells + 1, dtype=jnp.float32)
    before = jnp.ceil((position - first) / step)
    # The end is the last position that counts, not the first that does not.
    before = jnp.where(position >= last, jnp.floor((last - first) / step) + 1, before)
    before = jnp.clip(before, 0, count)
    number = before[..., 1:] - before[..., :-1]  # of samples between neighbouring positions
    mean = first + step * (before[..., 1:] + before[..., :-1] - 1) / 2  # their mean position

    # Bilinear weights: a cell's falls linearly to 0 at both neighbours, except that what is beyond the first or the
    # last cell by less than 1 is the border's. Clipped, as without samples in between the mean is anywhere.
    fraction = jnp.clip(mean - position[:-1], 0, 1)
    rising = number[..., :-1] * jnp.where(position[1:-1] == 0, 1, fraction[..., :-1])
    falling = number[..., 1:] * jnp.where(position[1:-1] == last - 1, 1, 1 - fraction[..., 1:])
    weights = jnp.where(position[1:-1] < last, rising + falling, 0)
    return weights / jnp.maximum(count, 1)


def levels(boxes: jax.Array, num_levels: int = 4, finest_size: float = 56) -> jax.Array:
    """From which map of a pyramid the features of a box are taken: the larger, the coarser.

    Args:
      boxes: (..., 4) float32, in pixels.
      num_levels: maps to choose from.
      finest_size: the finest map takes boxes with sqrt(area) below twice this many pixels, the next one below four
        times, and so on.

    Returns:
      (...) int32, 0 for the finest map.
    """
    size = jnp.sqrt(jnp.maximum((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]), 0))
    level = jnp.floor(jnp.log2(size / finest_size + 1e-6))
    return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def _within(band: int, pool: Callable[..., jax.Array], x: jax.Array, columns: jax.Array) -> jax.Array:
    """pool(x, columns) of maps (N, H, W, C) and weights (N, R, size, W); if it suffices, of `band` columns of each."""
    used = (columns != 0).any((1, 2))
    first = used.argmax(1)
    end = x.shape[2] - used[:, ::-1].argmax(1)

    def cut(array: jax.Array, axis: int) -> jax.Array:
        """The band of each image, from an axis of the images."""
        return jax.vmap(lambda own, start: jax.lax.dynamic_slice_in_dim(own, start, band, axis))(array, first)

    fits = (~used.any(1) | (end - first <= band)).all()
    return jax.lax.cond(fits, lambda: pool(cut(x, 1), cut(columns, 2)), lambda: pool(x, columns))


def _align(
    maps: Sequence[jax.Array],
    boxes: jax.Array,
    on_map: jax.Array,
    valid_cells: Sequence[Sequence[int | jax.Array]],
    strides: Sequence[int],
    size: int,
    sampling_ratio: int,
    chunk: int,
    band: int = 2**20,
) -> jax.Array:
    """RoIAlign of boxes (N, R, 4) on those of the maps (N, H, W, C) that `on_map` (N, R, maps) says.

    A map is looked at only for chunks in which it has a box; and if it is more than twice as wide as `band`, only so
    many columns of it for chunks whose boxes reach no further.
    """
    # float32 maps are pooled in float32 on TPUs too, whose products have bfloat16 factors by default.
    precision = jax.lax.Precision.HIGHEST if maps[0].dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    weights = functools.partial(axis_weights, size=size, sampling_ratio=sampling_ratio)

    def of_chunk(boxes: jax.Array, on_map: jax.Array) -> jax.Array:
        pooled = jnp.zeros((*boxes.shape[:2], size, size, maps[0].shape[-1]), jnp.float32)
        for i, (x, stride, (height, width)) in enumerate(zip(maps, strides, valid_cells, strict=True)):

            def add(pooled, i=i, x=x, stride=stride, height=height, width=width):
                rows = weights(boxes[..., 1], boxes[..., 3], stride=stride, cells=x.shape[1], valid_cells=height)
                columns = weights(boxes[..., 0], boxes[..., 2], stride=stride, cells=x.shape[2], valid_cells=width)
                rows, columns = (jnp.where(on_map[..., i, None, None], w, 0).astype(x.dtype) for w in (rows, columns))

                def pool(x, columns):
                    partial = product("nrph,nhwc->nrpwc", rows, x).astype(x.dtype)
                    # Repeated for every p, since XLA on CPUs would transpose `partial` and its gradient otherwise.
                    columns = jnp.broadcast_to(columns[:, :, None], (*rows.shape[:-1], *columns.shape[2:]))
                    return product("nrpqw,nrpwc->nrpqc", columns, partial)

                return pooled + (pool(x, columns) if x.shape[2] < 2 * band else _within(band, pool, x, columns))

            pooled = jax.lax.cond(on_map[..., i].any(), add, lambda pooled: pooled, pooled)
        return pooled.astype(maps[0].dtype)

    return in_chunks(of_chunk, chunk, jax.lax.stop_gradient(boxes), on_map)


def roi_align(
    features: jax.Array,
    boxes: jax.Array,
    *,
    stride: int,
    size: int,
    sampling_ratio: int = 0,
    map_size: Sequence[int] | jax.Array | None = None,
    chunk: int = 32,
) -> jax.Array:
    """The mean of a map, bilinearly interpolated, in each of size x size bins of every box.

    As RoIAlign of torchvision and mmcv with `aligned=True`, exactly, for boxes of any size and position. Gradients flow
    to the features, and none to the boxes. float32 is computed in full; bfloat16 with weights of bfloat16 and sums of
    float32.

    Example::

        pooled = roi_align(features, boxes, stride=4, size=7)              # (H, W, C), (R, 4) -> (R, 7, 7, C)
        pooled = jax.vmap(functools.partial(roi_align, stride=4, size=7))(features, boxes)           # of several images

    Args:
      features: (H, W, C) float32 or bfloat16.
      boxes: (R, 4) float32, in pixels of the image.
      stride: pixels per cell of the map.
      size: bins of a box along each side.
      sampling_ratio: samples per bin along each side; 0: ceil(bin's length in cells), different for every box.
      map_size: (2,) int, height and width in cells of the part of the map, from its top left, that is the image's; the
        rest is ignored. None: all of it.
      chunk: boxes that are computed at once: chunk * size * W * C numbers are in memory.

    Returns:
      (R, size, size, C), of the features' dtype.
    """
    map_size = features.shape[:2] if map_size is None else map_size
    everywhere = jnp.ones((1, len(boxes), 1), bool)
    return _align([features[None]], boxes[None], everywhere, [map_size], [stride], size, sampling_ratio, chunk)[0]


def pyramid_roi_align(
    maps: Sequence[jax.Array],
    boxes: jax.Array,
    *,
    size: int,
    strides: Sequence[int] = (4, 8, 16, 32),
    finest_size: float = 56,
    image_size: jax.Array | None = None,
    used: jax.Array | None = None,
    chunk: int = 32,
) -> jax.Array:
    """`roi_align` of every box of several images on the map that suits its size, as `levels` says.

    Args:
      maps: (N, H_i, W_i, C) each, from fine to coarse.
      boxes: (N, R, 4) float32, in pixels of the images.
      size: bins of a box along each side.
      strides: pixels per cell of each map.
      finest_size: as in `levels`.
      image_size: (N, 2) int, height and width in pixels of the images that the maps are of, where they are of a larger
        canvas; None: they are of the images.
      used: (N, R) bool; the other places have no box, and take no time if they are many. None: all are used.
      chunk: as in `roi_align`, boxes of each image.

    Returns:
      (N, R, size, size, C), of the maps' dtype; zeros in places that are not used.
    """
    valid_cells = [
        x.shape[1:3] if image_size is None else jnp.moveaxis(-(-image_size // s), -1, 0)[..., None]
        for x, s in zip(maps, strides, strict=True)
    ]
    level = levels(boxes, len(maps), finest_size)
    if used is not None:
        level = jnp.where(used, level, len(maps))
    # In this order most chunks have boxes of one level, which reach over few columns of its map.
    wide = boxes[..., 2] - boxes[..., 0] > strides[0] * BAND / 2
    order = jnp.lexsort((boxes[..., 0], wide, level), 1)
    level, boxes = jnp.take_along_axis(level, order, 1), jnp.take_along_axis(boxes, order[..., None], 1)
    on_map = level[..., None] == jnp.arange(len(maps))
    pooled = _align(maps, boxes, on_map, valid_cells, strides, size, 0, chunk, BAND)
    return jnp.take_along_axis(pooled, jnp.argsort(order, axis=1)[..., None, None, None], 1)
