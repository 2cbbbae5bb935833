import io
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from scipy import stats

from fcvit_jax import augment
from fcvit_jax.augment import images
from fcvit_jax.errors import UserError

DATA = Path(__file__).parent.parent / "data"


def picture(width, height, seed=0):
    """Smooth shapes with some noise: like a photograph, hard to hit by chance."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encode(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, height):
    """A PNG that ends where its pixels should begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\xff\xffIDAT"


# RandAugment


def test_ops_match_the_original():
    golden = np.load(DATA / "randaugment_ops.npz")
    image, outputs = Image.fromarray(golden["synth"]), golden["out_synth"]
    assert set(golden["op"]) == set(augment.OPS)
    rows = zip(*(golden[key].tolist() for key in ("op", "magnitude", "sign", "resample", "out_index")), strict=True)
    for name, level, sign, resample, out_index in rows:
        out = augment.apply_op(image, name, level, sign, resample)
        np.testing.assert_array_equal(out, outputs[out_index], f"{name} {level} {sign} {resample}")


def test_op_arguments_match_the_original():
    golden = np.load(DATA / "randaugment_ops.npz")
    rows = zip(*(golden[key].tolist() for key in ("op", "magnitude", "sign", "arg")), strict=True)
    for name, level, sign, argument in rows:
        op = augment.OPS[name]
        assert op.signed == (sign != 0)
        if not np.isnan(argument):
            assert op.argument(level * (sign or 1)) == argument


@pytest.mark.parametrize("level, bits", [(0, 4), (2.49, 4), (2.5, 3), (7.49, 2), (7.5, 1), (9.999, 1), (10, 0)])
def test_posterize_keeps_fewer_bits_at_higher_levels_and_none_at_ten(level, bits):
    image = picture(32, 24)
    expected = np.asarray(image) & (0xFF00 >> bits & 0xFF)
    np.testing.assert_array_equal(augment.apply_op(image, "PosterizeIncreasing", level), expected)


def test_unknown_ops_and_resamples_are_named():
    with pytest.raises(ValueError, match="'Posterize'.*PosterizeIncreasing"):
        augment.apply_op(picture(4, 4), "Posterize", 5.0)
    with pytest.raises(ValueError, match="'nearest'.*bilinear"):
        augment.apply_op(picture(4, 4), "Rotate", 5.0, resample="nearest")


def test_an_op_that_is_added_changes_no_recipe(monkeypatch):
    def draw():
        rng = np.random.default_rng(0)
        return [augment.draw_ops(rng) for _ in range(100)]

    before = draw()
    monkeypatch.setitem(augment.OPS, "Darken", augment.OPS["Invert"])
    assert draw() == before
    assert augment.apply_op(picture(4, 4), "Darken", 5.0).size == (4, 4)


def test_randaugment_draws_are_distributed_as_in_the_recipe():
    rng = np.random.default_rng(0)
    images = [augment.draw_ops(rng) for _ in range(20_000)]
    ops = [op for image in images for op in image]
    names, levels, signs, resamples = zip(*ops, strict=True)

    def fits(observed, probabilities):
        return stats.chisquare(observed, np.array(probabilities) * np.sum(observed)).pvalue > 0.01

    def counts(values, keys):
        found = Counter(values)
        assert set(found) == set(keys)
        return [found[key] for key in keys]

    assert fits(counts(map(len, images), (0, 1, 2)), (0.25, 0.5, 0.25))
    assert fits(counts(names, augment.INCREASING), [1 / 15] * 15)
    pairs = [tuple(name for name, *_ in image) for image in images if len(image) == 2]
    assert fits(np.unique(pairs, axis=0, return_counts=True)[1], [1 / 225] * 225)  # both orders, and twice the same op
    edges = [8.0, 8.5, 9.0, 9.5]
    below_ten = np.histogram(levels, [0.0, *edges, np.nextafter(10.0, 0.0)])[0]
    at_ten = np.sum(np.equal(levels, 10.0))
    assert max(levels) == 10.0
    expected = np.diff([0.0, *stats.norm.cdf([*edges, 10.0], 9.0, 0.5), 1.0])
    assert expected[-1] == pytest.approx(0.02275, abs=1e-6)
    assert fits([*below_ten, at_ten], expected)
    joint = counts(zip(signs, resamples, strict=True), [(s, r) for s in (1, -1) for r in ("bilinear", "bicubic")])
    assert fits(joint, [0.25] * 4)
    # Nothing is shared by the ops of an image: all combinations of these six decisions are equally frequent.
    halves = [
        [(level > 9.0, sign > 0, resample == "bicubic") for _, level, sign, resample in image]
        for image in images
        if len(image) == 2
    ]
    cells = np.reshape(halves, (-1, 6)) @ 2 ** np.arange(6)
    assert fits(np.bincount(cells, minlength=64), [1 / 64] * 64)


def test_magnitude_and_number_of_ops_are_arguments():
    rng = np.random.default_rng(0)
    images = [augment.draw_ops(rng, 3, 4.0, 0.0) for _ in range(200)]
    assert {level for image in images for _, level, _, _ in image} == {4.0}
    assert {len(image) for image in images} == {0, 1, 2, 3}
    assert {level for _ in range(50) for _, level, _, _ in augment.draw_ops(rng, 2, -5.0, 0.5)} == {0.0}


# Crop, flip, resize


class PythonRandom:
    """The draws of `crop_box` from the generator with which the golden boxes were made."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.uniform = self.random.uniform

    def integers(self, low, high, endpoint):
        assert endpoint
        return self.random.randint(low, high)


def test_crops_match_the_original():
    for width, height, seed, top, left, h, w in np.load(DATA / "crop_boxes.npy").tolist():
        box = augment.crop_box(PythonRandom(seed), width, height)
        assert box == (left, top, left + w, top + h), (width, height, seed)


def test_crops_of_tiny_images_are_inside_and_not_empty():
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]:
        for _ in range(200):
            left, top, right, bottom = augment.crop_box(rng, width, height)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert augment.crop_box(rng, 3, 8, ratio=(10.0, 20.0)) == (0, 3, 3, 4)


@pytest.mark.parametrize(
    "width, height, box",
    [(5, 20, (0, 6, 5, 13)), (20, 5, (6, 0, 13, 5)), (20, 16, (0, 0, 20, 16))],  # 6.67 is rounded to 7, 6.5 down to 6
)
def test_if_no_crop_fits_the_centre_is_taken(width, height, box):
    assert augment.crop_box(np.random.default_rng(0), width, height, scale=(4.0, 4.0)) == box


def test_evaluation_matches_the_original():
    golden = np.load(DATA / "eval_transform.npz")
    for k in range(2):
        encoded = golden[f"jpeg_{k}"].tobytes()
        for crop_pct in (0.9, 0.95):
            suffix = f"{crop_pct * 100:.0f}"
            size, box = augment.eval_geometry(*golden["orig_wh"][k].tolist(), 224, crop_pct)
            assert size == tuple(golden[f"resized_wh_{suffix}"][k])
            assert box[1::-1] == tuple(golden[f"crop_topleft_{suffix}"][k])
            np.testing.assert_array_equal(augment.eval_transform(encoded, 224, crop_pct), golden[f"uint8_{suffix}"][k])


@pytest.mark.parametrize(
    "width, height, crop_pct, size, left_top",
    [
        (500, 375, 0.9, (330, 248), (53, 12)),  # longer side truncated from 330.67
        (375, 500, 0.9, (248, 330), (12, 53)),
        (313, 235, 0.95, (313, 235), (44, 6)),  # as it is; 44.5 -> 44, 5.5 -> 6
        (235, 349, 0.95, (235, 349), (6, 62)),  # 62.5 -> 62
        (235, 359, 0.95, (235, 359), (6, 68)),  # 67.5 -> 68
        (1, 1, 0.9, (248, 248), (12, 12)),
        (224, 300, 1.0, (224, 300), (0, 38)),
    ],
)
def test_evaluation_rounds_as_the_original(width, height, crop_pct, size, left_top):
    left, top = left_top
    assert augment.eval_geometry(width, height, 224, crop_pct) == (size, (left, top, left + 224, top + 224))


@pytest.mark.parametrize("crop_pct", [0.0, 1.1])
def test_impossible_crop_pct_is_refused(crop_pct):
    with pytest.raises(UserError, match="crop_pct"):
        augment.eval_transform(encode(picture(8, 8)), 224, crop_pct)


JPEGS = {
    "4:2:0": dict(subsampling=2),
    "4:2:2": dict(subsampling=1),
    "4:4:4": dict(subsampling=0),
    "4:1:1": dict(subsampling="4:1:1"),
    "restart markers": dict(restart_marker_blocks=3),
    "metadata": dict(exif=b"Exif\0\0" + bytes(range(256)) * 8, comment=b"\xff\xc0 not a frame"),
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
def test_decoding_only_the_rows_of_the_crop_changes_no_pixel(options):
    encoded = encode(picture(53, 70), quality=90, **options)
    whole = np.asarray(augment.decode(encoded))
    for rows in range(1, 70):
        top = np.asarray(augment.decode(images._keep_rows(encoded, rows)))
        assert len(top) == min(rows + 8, 70)  # it does end early
        np.testing.assert_array_equal(top[:rows], whole[:rows])
    assert images._keep_rows(encoded, 62) is encoded


def test_a_progressive_jpeg_without_its_last_scans_gives_the_pixels_of_the_whole():
    encoded = encode(picture(200, 300), subsampling=2, progressive=True)
    encoded = encoded[: encoded.index(b"\xff\xda", encoded.index(b"\xff\xda") + 2)] + b"\xff\xd9"  # the first scan
    top = augment.decode(images._keep_rows(encoded, 100)).crop((0, 0, 200, 100))
    np.testing.assert_array_equal(top, augment.decode(encoded).crop((0, 0, 200, 100)))


def test_training_is_the_composition_of_its_draws():
    encoded = encode(picture(90, 70))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        box = augment.crop_box(rng, 90, 70)
        resample = "bilinear" if rng.random() < 0.5 else "bicubic"
        image = augment.decode(encoded).crop(box).resize((64, 64), images.RESAMPLE[resample])
        if rng.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        for op in augment.draw_ops(rng):
            image = augment.apply_op(image, *op)
        state = np.random.default_rng(seed)
        np.testing.assert_array_equal(augment.train_transform(encoded, state, 64), image)
        assert state.bit_generator.state == rng.bit_generator.state  # nothing else is drawn


def test_filter_and_flip_are_drawn_independently_with_probability_one_half():
    image = picture(20, 20)
    encoded = encode(image, "PNG")
    whole = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rand_augment=None)
    outcomes = {}
    for filter in (Image.BILINEAR, Image.BICUBIC):
        resized = np.asarray(image.resize((16, 16), filter))
        outcomes |= {
            (filter, flip): np.ascontiguousarray(resized[:, ::step]).tobytes() for flip, step in ((0, 1), (1, -1))
        }
    rng = np.random.default_rng(0)
    drawn = Counter(augment.train_transform(encoded, rng, 16, **whole).tobytes() for _ in range(2000))
    assert set(drawn) == set(outcomes.values())
    assert stats.chisquare(list(drawn.values())).pvalue > 0.01
    never = Counter(augment.train_transform(encoded, rng, 16, flip=0, **whole).tobytes() for _ in range(50))
    assert set(never) == {outcomes[Image.BILINEAR, 0], outcomes[Image.BICUBIC, 0]}


def test_training_depends_on_the_bytes_and_the_generator_alone():
    encoded = encode(picture(90, 70))

    def run(seed):
        return augment.train_transform(encoded, np.random.default_rng(seed), 32)

    first = [run(seed) for seed in range(10)]
    random.seed(1)
    np.random.seed(1)
    for seed in reversed(range(10)):
        np.testing.assert_array_equal(run(seed), first[seed])
    assert len({pixels.tobytes() for pixels in first}) == 10
    assert first[0].dtype == np.uint8 and first[0].shape == (32, 32, 3)


# Decoding


def test_every_kind_of_image_becomes_rgb():
    rgb = picture(40, 30)
    pixels = np.asarray(rgb)
    grey = pixels[..., 0]
    alpha = Image.fromarray(pixels[..., 1])
    palette = rgb.quantize(64)
    wide = grey.astype(np.uint16) << 8 | pixels[..., 1]  # the upper byte is grey
    replicated = np.stack([grey] * 3, -1)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    cases = {
        "colour": (encode(rgb, "PNG"), pixels),
        "grey": (encode(Image.fromarray(grey), "PNG"), replicated),
        "grey with alpha": (encode(Image.merge("LA", (Image.fromarray(grey), alpha)), "PNG"), replicated),
        "alpha": (encode(Image.merge("RGBA", (*rgb.split(), alpha)), "PNG"), pixels),
        "palette": (encode(palette, "PNG"), palette.convert("RGB")),
        "transparent palette entry": (encode(palette, "PNG", transparency=3), palette.convert("RGB")),
        "palette with alpha": (encode(palette, "PNG", transparency=bytes(range(64))), palette.convert("RGB")),
        "bits": (encode(Image.fromarray(grey > 128), "PNG"), (replicated > 128) * np.uint8(255)),
        "16-bit grey": (encode(Image.fromarray(wide), "PNG"), replicated),
        "16-bit grey, big-endian": (encode(Image.fromarray(wide.astype(">u2")), "TIFF"), replicated),
        "32-bit grey": (encode(Image.fromarray(wide.astype(np.int32)), "TIFF"), replicated),
        "webp": (encode(rgb, "WEBP", lossless=True), pixels),
        "turned by its EXIF": (encode(rgb, "PNG", exif=turned), pixels),
    }
    for kind, (encoded, expected) in cases.items():
        image = augment.decode(encoded)
        assert image.mode == "RGB", kind
        np.testing.assert_array_equal(image, expected, kind)


def test_cmyk_jpegs_keep_their_colours():
    encoded = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 51)), quality=100)
    assert np.abs(np.asarray(augment.decode(encoded)).astype(int) - [0, 204, 204]).max() <= 2


JPEG = encode(picture(90, 70))
SIZE = JPEG.index(b"\xff\xc0") + 5
HUGE_JPEG = JPEG[:SIZE] + struct.pack(">HH", 20_000, 20_000) + JPEG[SIZE + 4 :]
BAD = {
    "truncated": (JPEG[:-20], "broken JPEG of .* truncated"),
    "cut in the header": (JPEG[:100], "Truncated"),
    "truncated PNG": (png(90, 70), "broken PNG of 41 bytes"),
    "text": (b"not a picture", "format: 13 bytes beginning with b'not a picture'"),
    "empty": (b"", "no bytes"),
    "bomb": (png(20_000, 20_000), "400000000 pixels"),
    "JPEG bomb": (HUGE_JPEG, "400000000 pixels"),
}


@pytest.mark.parametrize("encoded, message", BAD.values(), ids=BAD.keys())
def test_bad_images_are_user_errors_that_tell_the_cause(encoded, message):
    with pytest.raises(UserError, match=message) as caught:
        augment.eval_transform(encoded)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it has to leave a worker process
    for seed in range(20):  # whatever the crop
        with pytest.raises(UserError, match=message):
            augment.train_transform(encoded, np.random.default_rng(seed))


def test_large_images_are_spoken_of_once():
    """Pillow would show its own warning for each, with a line of its source."""
    code = """
import io
from PIL import Image
from fcvit_jax import augment
Image.MAX_IMAGE_PIXELS = 100
file = io.BytesIO()
Image.new("L", (12, 12)).save(file, "PNG")
for _ in range(2):
    augment.eval_transform(file.getvalue(), 8)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stderr.count("more than 100 pixels") == len(done.stderr.splitlines()) == 1


def test_an_image_of_one_pixel_works():
    encoded = encode(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG")
    expected = np.full((224, 224, 3), (10, 20, 30))
    np.testing.assert_array_equal(augment.eval_transform(encoded), expected)
    for seed in range(20):
        pixels = augment.train_transform(encoded, np.random.default_rng(seed), rand_augment=None)
        np.testing.assert_array_equal(pixels, expected)
