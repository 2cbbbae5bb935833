"""The outlines of many objects in little memory: COCO's polygons and run-length masks.

The masks are made by pycocotools, whose rules decide which pixels a polygon covers. It first rounds corners to fifths
of a pixel; these are kept, as integers, so that nothing changes and the 860,000 objects of COCO take some 100 MB.
"""

import array
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fcvit_jax.errors import UserError

FIFTHS = 5.0  # pycocotools' scale of polygons
LIMIT = 400_000_000  # of a corner in fifths, for 32 bits
NO_POLYGONS = "its segmentation must be lists of x1, y1, x2, y2, ... in pixels"
RLE = dict[str, Any]  # {"size": [height, width], "counts": bytes}, pycocotools' compressed form


@dataclasses.dataclass(frozen=True)
class Segments:
    """Outlines by index; made by `Builder`.

    Attributes:
      points: x and y of all corners of all polygons in fifths of a pixel, int16, or int32 where a corner needs it.
      part_starts: int64, where each polygon begins in `points`; and its end.
      starts: int64, where the polygons of each object begin in `part_starts`; and their end.
      runs: masks that are given as runs, by the object's index.
    """

    points: np.ndarray
    part_starts: np.ndarray
    starts: np.ndarray
    runs: dict[int, RLE]

    def __contains__(self, index: int) -> bool:
        """Whether an object has an outline."""
        return index in self.runs or self.starts[index] < self.starts[index + 1]

    def rle(self, index: int, height: int, width: int) -> RLE:
        """The mask of one object as compressed runs.

        Args:
          index: of an object that has an outline.
          height, width: of the image.
        """
        from pycocotools import mask

        if index in self.runs:
            return self.runs[index]
        parts = range(self.starts[index], self.starts[index + 1])
        polygons = [self.points[self.part_starts[part] : self.part_starts[part + 1]] for part in parts]
        return mask.merge(mask.frPyObjects([_corners(points) for points in polygons], height, width))


def _corners(fifths: np.ndarray) -> list[float]:
    """Corners that pycocotools rounds to these fifths: it cuts 5 x + 0.5 off towards zero."""
    return ((fifths - (fifths < 0)) / FIFTHS).tolist()


def decode(rles: Sequence[RLE], height: int, width: int) -> np.ndarray:
    """Masks of pixels from masks of runs: bool (n, height, width)."""
    from pycocotools import mask

    if not rles:
        return np.zeros((0, height, width), bool)
    return np.ascontiguousarray(mask.decode(list(rles)).transpose(2, 0, 1)).astype(bool)


def encode(masks: np.ndarray) -> list[RLE]:
    """Masks of runs from masks of pixels, bool (n, height, width)."""
    from pycocotools import mask

    return mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))) if len(masks) else []


def as_text(rle: RLE) -> dict[str, Any]:
    """A mask of runs as JSON can hold it, and as COCO's results have it."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


class Builder:
    """Collects the outlines of objects one after the other."""

    def __init__(self):
        self._points = array.array("i")
        self._part_starts = array.array("q", [0])
        self._starts = array.array("q", [0])
        self._runs = {}

    def add(self, segmentation: Any, height: int, width: int) -> bool:
        """Adds the next object.

        Args:
          segmentation: as in COCO's files: a list of polygons [x1, y1, x2, y2, ...]; or runs, {"size": [height, width],
            "counts": ...}, whose counts are a list or compressed to a string; None or an empty list for none. Polygons
            of fewer than three corners are left out. A single polygon may stand without the list around it.
          height, width: of its image.

        Returns:
          Whether it has an outline.

        Raises:
          UserError: the segmentation is none of these, or its runs are not those of an image of that size.
        """
        index, parts = len(self._starts) - 1, len(self._part_starts)
        if isinstance(segmentation, dict):
            self._runs[index] = _checked_runs(segmentation, height, width)
        else:
            for polygon in _polygons(segmentation):
                fifths = np.trunc(polygon * FIFTHS + 0.5)
                if not np.abs(fifths).max() < LIMIT:  # NaN is not below it either
                    raise UserError("its polygons have corners that are no pixels")
                self._points.frombytes(fifths.astype(np.int32).tobytes())
                self._part_starts.append(len(self._points))
        self._starts.append(len(self._part_starts) - 1)
        return index in self._runs or len(self._part_starts) > parts

    def build(self) -> Segments:
        """All objects so far."""
        points = np.array(self._points, np.int32)
        if not len(points) or np.abs(points).max() < 2**15:
            points = points.astype(np.int16)
        return Segments(
            points=points,
            part_starts=np.array(self._part_starts, np.int64),
            starts=np.array(self._starts, np.int64),
            runs=self._runs,
        )


def bounds(segmentation: Any) -> tuple[float, float, float, float] | None:
    """The box around a segmentation as `Builder.add` takes it: x, y, width, height; None if it has no outline."""
    if isinstance(segmentation, dict):
        from pycocotools import mask

        size = segmentation.get("size")
        if not isinstance(size, list) or len(size) != 2:
            raise UserError(f"its run-length mask has the size {size}, not [height, width]")
        return tuple(mask.toBbox(_checked_runs(segmentation, *size)).tolist())
    polygons = _polygons(segmentation)
    if not polygons:
        return None
    corners = np.concatenate(polygons).reshape(-1, 2)
    low, high = corners.min(0), corners.max(0)
    return (*low.tolist(), *(high - low).tolist())


def _polygons(segmentation: Any) -> list[np.ndarray]:
    """The polygons of at least three corners."""
    if not segmentation:
        return []
    if not isinstance(segmentation, list):
        raise UserError(NO_POLYGONS)
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    try:
        polygons = [np.array(polygon, float) for polygon in polygons]
    except (TypeError, ValueError) as error:
        raise UserError(NO_POLYGONS) from error
    if any(polygon.ndim != 1 for polygon in polygons):
        raise UserError(NO_POLYGONS)
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if any(len(polygon) % 2 for polygon in polygons):
        raise UserError(NO_POLYGONS)
    return polygons


def _checked_runs(segmentation: dict[str, Any], height: int, width: int) -> RLE:
    """Compressed runs. pycocotools reads and writes memory that is not its own where their sum is wrong."""
    from pycocotools import mask

    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise UserError(f"its run-length mask has the size {size}, but its image [{height}, {width}] (height, width)")
    if isinstance(counts, str | bytes):
        counts = counts.encode() if isinstance(counts, str) else counts
        lengths = _run_lengths(counts)
    else:
        lengths = counts or []
    if sum(lengths) != height * width or min(lengths) < 0:
        raise UserError(f"its run-length mask is damaged: the runs must add up to {height * width} pixels")
    if isinstance(counts, bytes):
        return {"size": size, "counts": counts}
    return mask.frPyObjects({"size": size, "counts": counts}, height, width)


def _run_lengths(counts: bytes) -> list[int]:
    """Undoes COCO's compression: five bits a byte, low ones first; from the fourth run on, the difference to the last
    run but one."""
    lengths, value, shift = [], 0, 0
    for byte in counts:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more follow
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value, shift = 0, 0
    return lengths
