"""How a tensor of ours and the same tensor of a PyTorch network lie in memory, in the words of a layout.

A layout names the axes of our tensor and of theirs, "HWIO->OIHW", where 1 is an axis of length 1 that only they have.
Axes in brackets at the end, "HWIO->O(IHW)", are one axis there.
"""

from collections.abc import Sequence

import numpy as np


def to_theirs(x: np.ndarray, layout: str) -> np.ndarray:
    """Lays out a tensor of ours as PyTorch's."""
    ours, theirs = layout.split("->")
    theirs, _, joined = theirs.rstrip(")").partition("(")
    x = np.transpose(x, [ours.index(axis) for axis in theirs + joined if axis != "1"])
    if joined:
        return x.reshape(*x.shape[: len(theirs)], -1)
    return np.expand_dims(x, [i for i, axis in enumerate(theirs) if axis == "1"])


def to_ours(x: np.ndarray, layout: str, shape: Sequence[int] = ()) -> np.ndarray:
    """The inverse of `to_theirs`; shape: that of our tensor, needed where axes are one there."""
    ours, theirs = layout.split("->")
    theirs, _, joined = theirs.rstrip(")").partition("(")
    if joined:
        x = x.reshape(*x.shape[: len(theirs)], *(shape[ours.index(axis)] for axis in joined))
    theirs += joined
    x = np.squeeze(x, tuple(i for i, axis in enumerate(theirs) if axis == "1"))
    return np.transpose(x, [theirs.replace("1", "").index(axis) for axis in ours])


def their_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that a tensor of ours has there."""
    return to_theirs(np.broadcast_to(np.False_, shape), layout).shape
