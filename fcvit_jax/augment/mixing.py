"""The transforms of a batch on the device before the network: mixup or cutmix, normalisation, random erasing.

The `draw_*` functions draw the random decisions, and other functions apply them, so that tests can give decisions of
their own. Decisions depend only on the key and on an image's place in the global batch, not on the devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.errors import UserError, check_range
from fcvit_jax.networks.normalize import MEAN, STD, normalize

ERASE_TRIES = 10
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)


class MixDraws(NamedTuple):
    """What is decided for each group of a batch.

    Attributes:
      use_cutmix: bool, (groups,); False: mixup.
      lam: float32, (groups,), in [0, 1]: the share that an image keeps of itself. With 1, mixup changes nothing.
      center: int32, (groups, 2): row and column of the centre of the cutmix box; mixup ignores it.
    """

    use_cutmix: jax.Array
    lam: jax.Array
    center: jax.Array


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Makes one-hot targets whose share `smoothing` is spread evenly over all classes, the right one included.

    Args:
      labels: int, (N,).
      num_classes: length of a row.
      smoothing: share of a row's mass, from 0 to 1.

    Returns:
      float32, (N, num_classes); each row sums to 1.
    """
    off = smoothing / num_classes
    return jnp.where(labels[:, None] == jnp.arange(num_classes), jnp.float32(1 - smoothing + off), jnp.float32(off))


def check_groups(batch_size: int, group_size: int) -> int:
    """The number of groups that mixing makes of a batch; a batch smaller than `group_size` is one group.

    Raises:
      UserError: the batch is not a whole number of groups, or an image would have no partner.
    """
    size = min(group_size, batch_size)
    if batch_size % size:
        raise UserError(
            f"Mixing: {batch_size} images are not a whole number of groups of mixing.group_size={group_size}: "
            f"choose a data.batch_size that is a multiple of it, or another mixing.group_size."
        )
    if size % 2:
        raise UserError(f"Mixing: a group of {size} images leaves one without a partner; make its size even.")
    return batch_size // size


def symmetric_beta(uniform: jax.Array, alpha: jax.Array) -> jax.Array:
    """Turns pairs of uniform numbers into exact draws from Beta(alpha, alpha), without a rejection loop.

    Bailey's polar method gives a Student t variable T with 2 alpha degrees of freedom, and T / sqrt(2 alpha + T^2) is
    distributed as 2 Beta(alpha, alpha) - 1 (Devroye, "Random variate generation in one line of code", 1996).

    Args:
      uniform: float32, (..., 2), in [0, 1).
      alpha: float, broadcast against (...), positive.

    Returns:
      float32, (...), in [0, 1].
    """
    power = uniform[..., 0] ** (1 / alpha)
    cosine = jnp.cos(2 * jnp.pi * uniform[..., 1])
    beta = 0.5 + 0.5 * cosine * jnp.sqrt((1 - power) / (power + (1 - power) * cosine**2))
    return beta.clip(0, 1)  # rounding may leave the interval, and the caller takes sqrt(1 - lam)


def draw_mix(
    key: jax.Array,
    num_groups: int,
    height: int,
    width: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    mix_prob: float,
    switch_prob: float,
) -> MixDraws:
    """Decides for each group of a batch how it is mixed; arguments as in `make`, with at least one positive alpha."""
    if not mixup_alpha or not cutmix_alpha:
        switch_prob = float(mixup_alpha == 0)
    uniform = jax.random.uniform(key, (num_groups, 6))
    mixed = uniform[:, 0] < mix_prob
    use_cutmix = mixed & (uniform[:, 1] < switch_prob)
    lam = symmetric_beta(uniform[:, 2:4], jnp.where(use_cutmix, cutmix_alpha, mixup_alpha or 1.0))
    center = jnp.int32(uniform[:, 4:] * np.float32((height, width)))
    return MixDraws(use_cutmix, jnp.where(mixed, lam, 1.0), center)


def cutmix_boxes(draws: MixDraws, height: int, width: int) -> jax.Array:
    """The boxes that cutmix replaces, clipped: int32, (groups, 4), as (top, bottom, left, right), ends exclusive."""
    limits = np.array((height, width))
    half = jnp.int32(limits * jnp.sqrt(1 - draws.lam)[:, None]) // 2
    start, end = jnp.clip(draws.center - half, 0, limits), jnp.clip(draws.center + half, 0, limits)
    return jnp.stack((start, end), axis=-1).reshape(-1, 4)


def inside(boxes: jax.Array, height: int, width: int) -> jax.Array:
    """Whether a pixel lies in its box: bool, (N, height, width, 1), for `boxes` as `cutmix_boxes` gives them."""
    top, bottom, left, right = boxes.T[..., None]
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (top <= rows) & (rows < bottom)
    in_columns = (left <= columns) & (columns < right)
    return in_rows[:, :, None, None] & in_columns[:, None, :, None]


def apply_mix(images: jax.Array, targets: jax.Array, draws: MixDraws) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its partner: image i of a group of n with image n - 1 - i.

    Args:
      images: (N, H, W, 3), uint8 or float; groups are contiguous.
      targets: float32, (N, num_classes).
      draws: the decisions for each of the groups.

    Returns:
      Images in float32, not rounded, and targets. The targets of cutmix use the true area of the clipped box.
    """
    num_groups = len(draws.lam)
    height, width = images.shape[1:3]
    boxes = cutmix_boxes(draws, height, width)
    top, bottom, left, right = boxes.T
    area_kept = 1 - (bottom - top) * (right - left) / (height * width)
    lam = jnp.where(draws.use_cutmix, area_kept, draws.lam)
    use_cutmix, pixel_lam = draws.use_cutmix[:, None, None, None], draws.lam[:, None, None, None]
    weight = jnp.where(use_cutmix, ~inside(boxes, height, width), pixel_lam)

    def blend(x, weight):
        groups = x.reshape(num_groups, -1, *x.shape[1:])
        weight = weight[:, None]
        mixed = weight * groups + (1 - weight) * groups[:, ::-1]
        return mixed.reshape(x.shape)

    return blend(images, weight), blend(targets, lam[:, None])


def erasing_boxes(
    applied: jax.Array, area: jax.Array, aspect: jax.Array, position: jax.Array, height: int, width: int
) -> jax.Array:
    """For each image, picks the first candidate rectangle that is smaller than the image, and places it at `position`.

    Args:
      applied: bool, (N,): whether the image is to be erased at all.
      area: float32, (N, tries), in pixels.
      aspect: float32, (N, tries), height over width.
      position: float32, (N, 2), in [0, 1): 0 is the first possible row or column, almost 1 the last.

    Returns:
      Boxes as `cutmix_boxes` gives them: int32, (N, 4). A box is empty where `applied` is False or no try fits.
    """
    size = jnp.round(jnp.sqrt(jnp.stack((area * aspect, area / aspect), axis=-1)))
    limits = np.float32((height, width))
    fits = (size < limits).all(-1) & applied[:, None]
    first = fits & (fits.cumsum(1) == 1)
    size = jnp.where(first[..., None], size, 0).sum(1)
    start = jnp.floor(position * (limits - size + 1))
    return jnp.int32(jnp.stack((start, start + size), axis=-1)).reshape(-1, 4)


def draw_erasing(key: jax.Array, n: int, height: int, width: int, prob: float) -> jax.Array:
    """Draws the rectangle to erase in each of `n` images; with probability 1 - `prob` its box is empty."""
    uniform = jax.random.uniform(key, (n, 3 + 2 * ERASE_TRIES))
    applied, position, area, log_aspect = jnp.split(uniform, (1, 3, 3 + ERASE_TRIES), axis=1)
    low, high = ERASE_AREA
    area = (low + (high - low) * area) * height * width
    low, high = map(math.log, ERASE_ASPECT)
    aspect = jnp.exp(low + (high - low) * log_aspect)
    return erasing_boxes(applied[:, 0] < prob, area, aspect, position, height, width)


def make(
    num_classes: int = 1000,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    mix_prob: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.1,
    erase_prob: float = 0.25,
    group_size: int = 128,
) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Makes the function that prepares a training batch on the device, to be called under `jax.jit`.

    It first applies mixup or cutmix, drawn once per group; pixels are not rounded back to integers. Then it normalises
    the pixels. Last, it fills a rectangle with Gaussian noise, drawn for each image.

    Example::

        mix = jax.jit(mixing.make(num_classes=1000))
        images, targets = mix(jax.random.key(0), images, labels)    # images uint8 (256, 224, 224, 3), labels int (256,)

    Args:
      num_classes: columns of the targets.
      mean, std: as in `normalize`.
      mixup_alpha: lambda of mixup is drawn from Beta(mixup_alpha, mixup_alpha); 0: no mixup.
      cutmix_alpha: likewise for cutmix. If both are 0, nothing is mixed.
      mix_prob: probability that a group is mixed.
      switch_prob: probability that a mixed group gets cutmix, if both alphas are positive.
      smoothing: share of a target that is spread over all classes.
      erase_prob: probability that an image has a rectangle erased.
      group_size: number of consecutive images in the batch that share a decision.

    Returns:
      `mix(key, images, labels)`: from images uint8 (N, H, W, 3) and labels int (N,) to normalised images float32
      (N, H, W, 3) and targets float32 (N, num_classes). While it is traced it raises the UserError of `check_groups`.

    Raises:
      UserError: an argument is out of its range.
    """
    probabilities = {"mix_prob": mix_prob, "switch_prob": switch_prob, "erase_prob": erase_prob, "smoothing": smoothing}
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise UserError(f"mixing.{name}={value} must lie between 0 and 1.")
    check_range("mixing", 0, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
    check_range("mixing", 1, group_size=group_size)
    mixes = mix_prob > 0 and (mixup_alpha > 0 or cutmix_alpha > 0)

    def mix(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        n, height, width, _ = images.shape
        mix_key, box_key, noise_key = jax.random.split(key, 3)
        targets = smooth_one_hot(labels, num_classes, smoothing)
        if mixes:
            draws = draw_mix(
                mix_key,
                check_groups(n, group_size),
                height,
                width,
                mixup_alpha=mixup_alpha,
                cutmix_alpha=cutmix_alpha,
                mix_prob=mix_prob,
                switch_prob=switch_prob,
            )
            images, targets = apply_mix(images, targets, draws)
        images = normalize(images, mean, std)
        if erase_prob:
            boxes = draw_erasing(box_key, n, height, width, erase_prob)
            images = jnp.where(inside(boxes, height, width), jax.random.normal(noise_key, images.shape), images)
        return images, targets

    return mix
