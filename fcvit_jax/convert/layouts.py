"""How tensors are renamed, and how one of ours and the same one of a PyTorch network lie in memory.

A layout names the axes of our tensor and of theirs, "HWIO->OIHW", where 1 is an axis of length 1 that only they have.
Axes in brackets at the end, "HWIO->O(IHW)", are one axis there.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

Rows = Iterable[tuple[str, str]]


def rename(name: str, rows: Rows) -> str:
    """A name after every row's pattern is replaced by the row's other part, one row after the other."""
    for pattern, replacement in rows:
        name = re.sub(pattern, replacement, name)
    return name


def rename_paths(paths: Iterable[str], rows: Rows) -> dict[str, str]:
    """The new name of every one of our paths, without their collection ("params/")."""
    return {path: rename(path.partition("/")[2], rows) for path in paths}


def find_layout(path: str, rows: Rows) -> str:
    """The layout of the first row whose pattern is found in a path."""
    return next(layout for pattern, layout in rows if re.search(pattern, path))


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
