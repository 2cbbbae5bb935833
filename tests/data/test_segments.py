"""Outlines: the masks are pycocotools' bit for bit, and runs that do not fit their image are refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask

from fcvit_jax.data import segments
from fcvit_jax.errors import UserError

GOLDEN = Path(__file__).parent / "detection_data.npz"
HEIGHT, WIDTH = 90, 100


def build(*segmentations, size=(HEIGHT, WIDTH)):
    builder = segments.Builder()
    found = [builder.add(segmentation, *size) for segmentation in segmentations]
    built = builder.build()
    assert [index in built for index in range(len(found))] == found
    return built


def as_list(rle):
    return {"size": rle["size"], "counts": segments._run_lengths(rle["counts"])}


def test_goldens():
    golden = np.load(GOLDEN)
    size = golden["seg/size"].tolist()
    given = json.loads(str(golden["seg/json"]))
    built = build(*given, size=size)
    found = segments.decode([built.rle(index, *size) for index in range(len(given))], *size)
    expected = np.unpackbits(golden["seg/masks"], axis=-1, count=size[1])
    assert found.dtype == bool and 0 < expected.mean() < 1
    np.testing.assert_array_equal(found, expected)


def test_polygons_cover_the_same_pixels_after_packing():
    rng = np.random.default_rng(0)
    for scale, dtype in ((1, np.int16), (100, np.int32)):
        given = [
            [(rng.uniform(-20, 120, 2 * rng.integers(3, 9)) * scale).round(digits).tolist() for _ in range(parts)]
            for digits in range(4)
            for parts in (1, 2, 3)
            for _ in range(10)
        ]
        size = HEIGHT * scale, WIDTH * scale
        built = pickle.loads(pickle.dumps(build(*given, size=size)))
        assert built.points.dtype == dtype
        for index, polygons in enumerate(given):
            assert built.rle(index, *size) == mask.merge(mask.frPyObjects(polygons, *size))


def test_every_rounding_of_a_corner():
    """Around each fifth of a pixel, on both sides of zero, where pycocotools cuts towards zero."""
    for x in np.concatenate([np.arange(-1, 1, 0.02), [-0.1, -0.3, -0.5, 0.1, 0.3, 0.5]]).tolist():
        polygon = [x, 0, 9.7, 0, 9.7, 9, x, 9]
        built = build([polygon])
        (expected,) = mask.frPyObjects([polygon], HEIGHT, WIDTH)
        fifths = int(5 * x + 0.5)
        assert built.points[0] == fifths and int(5 * segments._corners(built.points)[0] + 0.5) == fifths
        assert built.rle(0, HEIGHT, WIDTH) == expected


def test_runs_may_be_a_list_a_string_or_bytes():
    rng = np.random.default_rng(0)
    for blur in (1, 3, 9):
        pixels = np.kron(rng.random((HEIGHT // blur, WIDTH // blur)) < 0.5, np.ones((blur, blur)))
        pixels = np.pad(pixels, [(0, HEIGHT - pixels.shape[0]), (0, WIDTH - pixels.shape[1])]).astype(bool)
        (rle,) = segments.encode(pixels[None])
        text = {"size": rle["size"], "counts": rle["counts"].decode()}
        built = build(rle, text, as_list(rle))
        assert [built.rle(index, HEIGHT, WIDTH) for index in range(3)] == [rle] * 3
        np.testing.assert_array_equal(segments.decode([rle], HEIGHT, WIDTH)[0], pixels)


def test_what_is_no_outline():
    built = build(None, [], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4], [1, 1, 9, 1, 9, 9]], [1, 1, 9, 1, 9, 9])
    assert [index in built for index in range(6)] == [False] * 4 + [True] * 2
    assert built.rle(4, HEIGHT, WIDTH) == built.rle(5, HEIGHT, WIDTH)
    assert segments.decode([], 4, 5).shape == (0, 4, 5) and segments.encode(np.zeros((0, 4, 5), bool)) == []


def test_bounds():
    assert segments.bounds([[1, 2, 11.5, 4, 3, 8], [20, 1, 21, 1, 21, 3]]) == (1, 1, 20, 7)
    assert segments.bounds([]) is None and segments.bounds([[1, 2, 3, 4]]) is None
    pixels = np.zeros((1, 9, 9), bool)
    pixels[0, 2:5, 3:8] = True
    assert segments.bounds(segments.encode(pixels)[0]) == (3, 2, 5, 3)


@pytest.mark.parametrize(
    "segmentation, words",
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "x1, y1, x2, y2"),
        ([[1, 2, 3, 4, 5, float("nan")]], "no pixels"),
        ([[1, 2, 3, 4, 5, 1e9]], "no pixels"),
        ({"size": [WIDTH, HEIGHT], "counts": [9000]}, r"\[100, 90\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [8999]}, "add up to 9000"),
        ({"size": [HEIGHT, WIDTH], "counts": [9001, -1]}, "add up"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "add up"),
        ({"size": [HEIGHT, WIDTH]}, "add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "0150"}, "add up"),
        ({"counts": [9000]}, "size"),
    ],
)
def test_what_is_refused(segmentation, words):
    with pytest.raises(UserError, match=words):
        segments.Builder().add(segmentation, HEIGHT, WIDTH)
