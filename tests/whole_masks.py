"""Masks resized whole, which training never does: its examples hold them smaller, and say which pixels are shown."""

from fcvit_jax.augment.objects import source_indices


def resize_masks(masks, new):
    """Masks (n, H, W) at a size (width, height): each pixel is that whose top left corner is nearest before it."""
    rows, columns = (source_indices(old, side) for old, side in zip(masks.shape[1:], reversed(new), strict=True))
    return masks[:, rows[:, None], columns]
