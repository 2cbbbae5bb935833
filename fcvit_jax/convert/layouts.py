"""How a tensor of ours and the same tensor of a PyTorch network lie in memory, in the words of a layout.

A layout names the axes of our tensor and of theirs, "HWIO->OIHW", where 1 is an axis of length 1 that only they have.
"""

import numpy as np


def to_theirs(x: np.ndarray, layout: str) -> np.ndarray:
    """Lays out a tensor of ours as PyTorch's."""
    ours, theirs = layout.split("->")
    x = np.transpose(x, [ours.index(axis) for axis in theirs if axis != "1"])
    return np.expand_dims(x, [i for i, axis in enumerate(theirs) if axis == "1"])


def to_ours(x: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of `to_theirs`."""
    ours, theirs = layout.split("->")
    x = np.squeeze(x, tuple(i for i, axis in enumerate(theirs) if axis == "1"))
    return np.transpose(x, [theirs.replace("1", "").index(axis) for axis in ours])


def their_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that a tensor of ours has there."""
    return to_theirs(np.broadcast_to(0, shape), layout).shape
