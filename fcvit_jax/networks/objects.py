"""What is in images, as a detector is trained on it, and what it finds in them."""

from typing import NamedTuple

import jax


class Objects(NamedTuple):
    """What is in the images of a batch, padded to G objects each.

    Attributes:
      boxes: (N, G, 4) float32, in pixels of the image as the network gets it.
      labels: (N, G) int32, classes from 0.
      valid: (N, G) bool; False: the place is unused.
      masks: (N, G, h, w) bool or uint8, as they are or as they were before resizing; None for boxes alone.
      rows: (N, H) int32, the row of the masks that each row of the canvas shows, -1: none; None: they are the same.
      columns: (N, W) int32, likewise.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    masks: jax.Array | None = None
    rows: jax.Array | None = None
    columns: jax.Array | None = None


class Detections(NamedTuple):
    """What was found in the images of a batch, the best first.

    Attributes:
      boxes: (N, D, 4) float32, in pixels of the original image.
      scores: (N, D) float32, from 0 to 1.
      labels: (N, D) int32, classes from 0.
      valid: (N, D) bool; False: the place is unused.
      masks: (N, D, 28, 28) float32, probabilities within each box, for `masks.paste_masks`; None without a mask branch.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    valid: jax.Array
    masks: jax.Array | None
