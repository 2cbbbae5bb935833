"""From pixels to what the networks take."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, in RGB order, for pixels in [0, 1]
STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> jax.Array:
    """Scales pixels to zero mean and unit variance per channel over the data that a network was trained on.

    Example::

        logits = model.apply(variables, fcvit_jax.normalize(images, model.mean, model.std))

    Args:
      images: (..., 3), RGB in [0, 255], uint8 or float.
      mean, std: of each channel, for pixels in [0, 1]; by default ImageNet's. A network has its own as attributes.

    Returns:
      float32, of the same shape.
    """
    mean = np.float32(255 * np.array(mean))
    std = np.float32(255 * np.array(std))
    return (jnp.asarray(images, jnp.float32) - mean) / std


def normalize_inside(
    images: jax.Array, sizes: jax.Array, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> jax.Array:
    """As `normalize`, of images at the top left of a canvas, which is 0 around them.

    Args:
      images: (N, H, W, 3).
      sizes: (N, 2) int32, height and width of each image in pixels.
      mean, std: as in `normalize`.
    """
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])
    sizes = sizes[:, None, None, :]
    inside = (rows < sizes[..., 0]) & (columns < sizes[..., 1])
    return jnp.where(inside[..., None], normalize(images, mean, std), 0)
