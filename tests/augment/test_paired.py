"""The transforms of segmentation equal the original's bit for bit, and OpenCV's pixels its integer arithmetic."""

import io
import sys
from pathlib import Path

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import opencv_integers
import pytest
from hypothesis import given, settings
from PIL import Image

from fcvit_jax.augment import decode, paired
from fcvit_jax.errors import UserError

DATA = Path(__file__).parent.parent / "data"
SIDES = st.integers(1, 70)
at_random = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def golden(name):
    return np.load(DATA / f"segmentation_{name}.npz")


class Replay:
    """A source of randomness that gives stored draws."""

    def __init__(self, random=(), uniform=(), integers=()):
        self.draws = {"random": list(random), "uniform": list(uniform), "integers": list(integers)}

    def random(self):
        return self.draws["random"].pop(0)

    def uniform(self, low, high):
        x = self.draws["uniform"].pop(0)
        assert low <= x < high
        return x

    def integers(self, low, high, endpoint=False):
        x = self.draws["integers"].pop(0)
        assert low <= x < high + endpoint
        return x


def colours(row):
    """Stored draws of colours as arguments of `distort`; NaN: not applied."""
    names = ("brightness", "contrast", "saturation", "hue")
    drawn = {name: float(row[name]) for name in names if not np.isnan(row[name])}
    if "hue" in drawn:
        drawn["hue"] = int(drawn["hue"])
    return drawn | {"contrast_last": bool(row["contrast_last"])}


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    return (np.asarray(coarse) + rng.integers(-12, 13, (height, width, 3))).clip(0, 255).astype(np.uint8)


# Sizes


def test_sizes_equal_the_originals():
    with golden("schedule_and_geometry") as file:
        rows, aligned = file["train_w_h_u_scalelong_scaleshort_neww_newh"], file["align_w_h_midw_midh_neww_newh"]
    for width, height, u, long, short, new_width, new_height in rows.tolist():
        assert paired.draw_scale(Replay([u])) == (long, short)
        assert paired.rescaled_size(width, height, long, short) == (new_width, new_height)
    for width, height, mid_width, mid_height, new_width, new_height in aligned.tolist():
        assert paired.rescaled_size(width, height, 2048, 512) == (mid_width, mid_height)
        shape = paired.eval_transform(np.zeros((height, width, 3), np.uint8)).shape
        assert shape == (new_height, new_width, 3)
    assert paired.rescaled_size(1, 9000, 2048, 512) == (1, 2048)  # not 0


# Pixels


@at_random
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 999))
def test_resizing_is_opencvs_integer_arithmetic(width, height, new_width, new_height, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    for size in ((new_width, new_height), (-(-width // 2), -(-height // 2)), (2 * width, 2 * height)):
        np.testing.assert_array_equal(paired.resize(image, size), opencv_integers.resize(image, size))
        labels = image[..., 0]
        expected = opencv_integers.resize_labels(labels, size)
        np.testing.assert_array_equal(paired.resize_labels(labels, size), expected)


@at_random
@given(
    arrays.arrays(np.uint8, st.tuples(SIDES, SIDES, st.just(3))),
    st.fixed_dictionaries(
        {
            "brightness": st.none() | st.floats(-32, 32, exclude_max=True),
            "contrast": st.none() | st.floats(0.5, 1.5, exclude_max=True),
            "saturation": st.none() | st.floats(0.5, 1.5, exclude_max=True),
            "hue": st.none() | st.integers(-18, 17),
            "contrast_last": st.booleans(),
        }
    ),
)
def test_colours_are_opencvs_integer_arithmetic_at_any_width(image, drawn):
    """OpenCV itself rounds where a row ends; the result must not depend on where a pixel stands."""
    before = image.copy()
    out = paired.distort(image, **drawn)
    np.testing.assert_array_equal(out, opencv_integers.distort(image, **drawn))
    np.testing.assert_array_equal(image, before)
    assert out.dtype == np.uint8


def test_every_colour_and_back():
    """A coarse grid of colours of each channel, every hue at every saturation, at a width that is no multiple of 32."""
    steps = np.concatenate([np.arange(0, 256, 5), [1, 2, 254]])
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).astype(np.uint8)
    image = grid.reshape(-1, 27, 3) if grid.size % 81 == 0 else grid.reshape(1, -1, 3)
    for change in ({"saturation": 1.0}, {"hue": 0}, {"saturation": 1.37}, {"hue": -7}):
        np.testing.assert_array_equal(paired.distort(image, **change), opencv_integers.distort(image, **change))
    assert not np.array_equal(paired.distort(image, saturation=1.0), image)  # the way to HSV and back is no identity


@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_distortion_equals_the_originals(kind):
    with golden("photometric") as file:
        rows = {name: file[name] for name in ("brightness", "contrast", "saturation", "hue", "contrast_last")}
        image, outputs = file[f"image_{kind}"], file[f"out_{kind}"]
        np.testing.assert_array_equal(opencv_integers.rgb_to_hsv(image), file[f"hsv_{kind}"])
    assert len(outputs) == 21
    for i, expected in enumerate(outputs):
        drawn = colours({name: x[i] for name, x in rows.items()})
        np.testing.assert_array_equal(paired.distort(image, **drawn), expected, err_msg=str(drawn))
        np.testing.assert_array_equal(opencv_integers.distort(image, **drawn), expected, err_msg=str(drawn))


# Crops


@pytest.mark.parametrize("case", range(9))
def test_crops_equal_the_originals(case):
    with golden("crop") as file:
        labels, (height, width) = file[f"case{case}/labels"], file[f"case{case}/crop_hw"].tolist()
        offsets, used = file[f"case{case}/offsets_yx"], int(file[f"case{case}/draws_used"])
        top, bottom, left, right = file[f"case{case}/box_y1y2x1x2"].tolist()
    rng = Replay(integers=offsets.ravel().tolist())
    assert paired.crop_offsets(rng, labels, height, width) == (top, left)
    assert (bottom - top, right - left) == (height, width)
    assert len(rng.draws["integers"]) == 2 * (11 - used)


def test_every_offset_is_drawn():
    labels = np.arange(20, dtype=np.uint8).reshape(4, 5)
    rng = np.random.default_rng(0)
    drawn = {paired.crop_offsets(rng, labels, 3, 3) for _ in range(200)}
    assert drawn == {(top, left) for top in range(2) for left in range(3)}


# Whole transforms


@pytest.mark.parametrize("case", range(3))
def test_training_examples_equal_the_originals(case):
    with golden("pipeline") as file:
        crop, (long, short) = int(file["crop"][0]), file["img_scale"].tolist()
        row = {key.split("/")[1]: file[key] for key in file if key.startswith(f"train{case}/")}
    image, raw = np.asarray(decode(row["jpeg"].tobytes())), paired.decode_labels(row["png"].tobytes())
    np.testing.assert_array_equal(image, row["decoded"])
    labels = paired.ignore_zero(raw)
    np.testing.assert_array_equal(labels, row["labels"])
    size = row["resized_labels"].shape[::-1]
    np.testing.assert_array_equal(paired.resize(image, size), row["resized"])
    np.testing.assert_array_equal(paired.resize_labels(labels, size), row["resized_labels"])

    drawn = colours(row)
    coins = [0.2 if name in drawn else 0.7 for name in ("brightness", "contrast", "saturation", "hue")]
    coins.insert(1, 0.2 if drawn["contrast_last"] else 0.7)
    rng = Replay(
        random=[float(row["u"]), float(row["flip_u"]), *coins],
        uniform=[drawn[name] for name in ("brightness", "contrast", "saturation") if name in drawn],
        integers=[
            *row["offsets_yx"][: int(row["draws_used"])].ravel().tolist(),
            *(drawn[name] for name in ("hue",) if name in drawn),
        ],
    )
    image, labels, size = paired.train_transform(image, labels, rng, crop_size=crop, long=long, short=short)
    assert not any(rng.draws.values())
    height, width = row["distorted"].shape[:2]
    np.testing.assert_array_equal(size, [height, width])
    np.testing.assert_array_equal(image[:height, :width], row["distorted"])
    assert not image[height:].any() and not image[:, width:].any()
    np.testing.assert_array_equal(labels, row["image_labels"])
    assert (image.dtype, labels.dtype, size.dtype) == (np.uint8, np.uint8, np.int32)


@pytest.mark.parametrize("case", range(3))
def test_evaluation_examples_equal_the_originals(case):
    with golden("pipeline") as file:
        image = np.asarray(decode(file[f"test{case}/jpeg"].tobytes()))
        long, short = file["test_img_scale"].tolist()
        np.testing.assert_array_equal(paired.eval_transform(image, long, short), file[f"test{case}/aligned"])


def test_a_training_example_is_a_function_of_the_seed_alone():
    image, labels = picture(90, 70), np.random.default_rng(1).integers(0, 5, (70, 90)).astype(np.uint8)
    sizes = {"crop_size": 48, "long": 256, "short": 64}
    first, again, other = (
        paired.train_transform(image, labels, np.random.default_rng(seed), **sizes) for seed in (0, 0, 1)
    )
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(first[0], other[0])


def test_image_and_labels_stay_together():
    """Labels that are the image's own grey follow it through crop, flip and padding."""
    grey = np.arange(60 * 80, dtype=np.int64).reshape(60, 80) % 251
    image = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        out, labels, (height, width) = paired.train_transform(
            image, image[..., 0], rng, crop_size=64, long=80, short=60, scale=(1.0, 1.0), distortion=False
        )
        np.testing.assert_array_equal(out[:height, :width, 0], labels[:height, :width])
        assert (height, width) == (60, 64)
        assert (labels[height:] == 255).all() and (labels[:, width:] == 255).all()


def test_draws_of_colours_have_the_originals_chances():
    rng = np.random.default_rng(0)
    rows = [paired.draw_distortion(rng) for _ in range(4000)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        drawn = np.array([row[name] for row in rows if row[name] is not None])
        assert abs(len(drawn) / len(rows) - 0.5) < 0.03, name
        assert low <= drawn.min() < low + 0.02 * (high - low) and high >= drawn.max() > high - 0.02 * (high - low), name
        assert abs(drawn.mean() - (low + high) / 2) < 0.05 * (high - low), name
    assert abs(np.mean([row["contrast_last"] for row in rows]) - 0.5) < 0.03
    both = np.mean([row["saturation"] is not None and row["hue"] is not None for row in rows])
    assert abs(both - 0.25) < 0.03


# Mistakes


def png(array, mode=None):
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, "PNG")
    return file.getvalue()


def test_labels_are_read_as_they_are_in_the_file():
    labels = np.array([[0, 1, 150, 255]], np.uint8)
    np.testing.assert_array_equal(paired.decode_labels(png(labels)), labels)
    palette = Image.frombytes("P", (4, 1), labels.tobytes())
    palette.putpalette([7] * 768)
    file = io.BytesIO()
    palette.save(file, "PNG")
    np.testing.assert_array_equal(paired.decode_labels(file.getvalue()), labels)
    np.testing.assert_array_equal(paired.ignore_zero(labels), [[255, 0, 149, 255]])
    assert paired.ignore_zero(labels).dtype == np.uint8


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (png(np.zeros((2, 2, 3), np.uint8)), "labels must have one channel of 8 bits, not Pillow's mode RGB"),
        (png(np.zeros((2, 2), np.uint16)), "labels must have one channel of 8 bits"),
        (b"hello", "no image or a broken one: 5 bytes beginning with b'hello'"),
        (png(picture(64, 64)[..., 0])[:200], "no image or a broken one: 200 bytes"),
    ],
    ids=["colours", "16 bits", "text", "truncated"],
)
def test_files_that_are_no_labels_are_refused(encoded, message):
    with pytest.raises(UserError, match=message):
        paired.decode_labels(encoded)


def test_images_and_labels_that_do_not_belong_together_are_refused():
    rng, image = np.random.default_rng(0), np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(UserError, match=r"image of \(4, 6\) pixels has labels of \(6, 4\)"):
        paired.train_transform(image, np.zeros((6, 4), np.uint8), rng)
    for wrong in ((image.astype(float), np.zeros((4, 6), np.uint8)), (image, np.zeros((4, 6), int))):
        with pytest.raises(UserError, match="must be .* uint8"):
            paired.train_transform(*wrong, rng)


def test_a_missing_opencv_is_said(monkeypatch):
    paired._opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        paired.resize(np.zeros((4, 4, 3), np.uint8), (2, 2))
