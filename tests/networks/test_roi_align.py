"""RoIAlign and the crops and drawings of masks, against MMDetection's numbers and plain loops over samples."""

from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fcvit_jax.networks import roi_align as roi_align_module
from fcvit_jax.networks.masks import crop_masks, paste_masks
from fcvit_jax.networks.roi_align import levels, pyramid_roi_align, roi_align

DATA = Path(__file__).parents[1] / "data" / "detection"
ROIS, MASKS = (np.load(DATA / f"{name}.npz") for name in ("roi_align", "masks"))
FEATURES = np.moveaxis(ROIS["features_nchw"], 1, -1).astype(np.float32)

align = jax.jit(roi_align, static_argnames=("stride", "size", "sampling_ratio", "chunk"))
crop = jax.jit(crop_masks, static_argnames="chunk")
pyramid = jax.jit(pyramid_roi_align, static_argnames=("size", "chunk"))


def of_image(rois, i):
    return rois[:, 0] == i, rois[rois[:, 0] == i, 1:]


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("size", [7, 14])
def test_roi_align(size, ratio):
    """Several boxes at once, a number that does not divide theirs: nothing depends on it."""
    for i, chunk in enumerate((5, 40)):
        rows, boxes = of_image(ROIS["rois"], i)
        expected = np.moveaxis(ROIS[f"out{size}_sr{ratio}"][rows], 1, -1)
        ours = align(FEATURES[i], boxes, stride=4, size=size, sampling_ratio=ratio, chunk=chunk)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_several_images_by_vmap():
    boxes = np.stack([ROIS["rois"][:6, 1:], ROIS["rois"][6:12, 1:]])
    both = jax.vmap(lambda features, boxes: align(features, boxes, stride=4, size=7))(FEATURES[:2], boxes)
    alone = [align(features, own, stride=4, size=7) for features, own in zip(FEATURES[:2], boxes, strict=True)]
    np.testing.assert_allclose(both, np.stack(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [0, 2])
def test_gradient_of_roi_align(ratio):
    rows, boxes = of_image(ROIS["rois"], 0)
    cotangent = np.moveaxis(ROIS["cotangent7"][rows], 1, -1).astype(np.float32)

    def total(features, boxes):
        return (align(features, boxes, stride=4, size=7, sampling_ratio=ratio, chunk=5) * cotangent).sum()

    ours, of_boxes = jax.jit(jax.grad(total, (0, 1)))(FEATURES[0], boxes)
    np.testing.assert_allclose(ours, np.moveaxis(ROIS[f"grad7_sr{ratio}"][0], 0, -1), rtol=0, atol=2e-5)
    assert not of_boxes.any()


def test_levels():
    np.testing.assert_array_equal(levels(ROIS["level_boxes"]), ROIS["levels"])
    np.testing.assert_array_equal(levels(ROIS["ml/rois"][:, 1:]), ROIS["ml/levels"])


@pytest.mark.parametrize("size", [7, 14])
def test_pyramid_on_its_own_and_on_a_larger_canvas(size):
    """What is beyond the image, large here, is not looked at."""
    maps = [np.moveaxis(ROIS[f"ml/feat{i}"], 1, -1).astype(np.float32) for i in range(4)]
    larger = [np.pad(x, ((0, 0), (0, 8 >> i), (0, 16 >> i), (0, 0)), constant_values=1e3) for i, x in enumerate(maps)]
    of_images = [of_image(ROIS["ml/rois"], i) for i in range(2)]
    most = max(len(boxes) for _, boxes in of_images)
    boxes, used = np.zeros((2, most, 4), np.float32), np.zeros((2, most), bool)
    for i, (_, x) in enumerate(of_images):
        boxes[i, -len(x) :], used[i, -len(x) :] = x, True
    own = pyramid(maps, boxes, size=size, used=used)
    padded = pyramid(larger, boxes, size=size, used=used, image_size=jnp.array([[256, 320]] * 2), chunk=5)
    for ours in (own, padded):
        assert not np.asarray(ours)[~used].any()
        for i, (rows, x) in enumerate(of_images):
            expected = np.moveaxis(ROIS[f"ml/out{size}"][rows], 1, -1)
            np.testing.assert_allclose(ours[i, -len(x) :], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 40])
def test_a_band_of_a_wide_map_is_enough_where_no_box_reaches_further(monkeypatch, chunk):
    """The same results and gradients: of 16 columns of 80 for one box at a time, of all for all boxes at once."""
    maps = [np.moveaxis(ROIS[f"ml/feat{i}"], 1, -1).astype(np.float32) for i in range(4)]
    sides = 4 * np.arange(1, 29) + 0.5  # up to a width of 28 cells, all on the finest map
    left = np.linspace(0, 320 - sides, 3).T.reshape(-1)  # at both edges and in between
    sides = np.repeat(sides, 3)
    boxes = np.stack([left, 50 + 0 * left, left + sides, 50 + sides], 1).astype(np.float32)
    boxes, used = np.stack([boxes, boxes]), np.arange(len(boxes)) < np.array([[len(boxes)], [0]])

    def run(band):
        monkeypatch.setattr(roi_align_module, "BAND", band)

        def total(maps):
            pooled = pyramid_roi_align(maps, boxes, size=7, used=used, chunk=chunk)
            return jnp.sin(pooled).sum(), pooled

        return jax.jit(jax.grad(total, has_aux=True))(maps)

    for narrow, whole in zip(*(jax.tree.leaves(run(band)) for band in (16, 96)), strict=True):
        np.testing.assert_allclose(narrow, whole, rtol=0, atol=2e-5)


def test_bfloat16_maps_are_pooled_to_their_own_precision():
    boxes = ROIS["rois"][ROIS["rois"][:, 0] == 0, 1:]
    exact = align(FEATURES[0], boxes, stride=4, size=7)
    ours = align(FEATURES[0].astype(jnp.bfloat16), boxes, stride=4, size=7)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=0, atol=0.03)


def plain_roi_align(features, box, stride, size):
    """Sample after sample, in float64."""
    height, width, channels = features.shape
    x1, y1, x2, y2 = (float(x) / stride - 0.5 for x in box)

    def samples(low, high, cell):
        # The number of samples is the reference's, which rounds to float32.
        number = max(int(np.ceil((np.float32(high) - np.float32(low)) / np.float32(size))), 0)
        length = (high - low) / size
        return [low + cell * length + (i + 0.5) * length / number for i in range(number)]

    def interpolate(y, x):
        if not (-1 <= y <= height and -1 <= x <= width):
            return 0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        rows, columns = (np.maximum(1 - abs(v - np.arange(n)), 0) for v, n in ((y, height), (x, width)))
        return np.einsum("h,w,hwc", rows, columns, features)

    pooled = np.zeros((size, size, channels))
    for p in range(size):
        for q in range(size):
            values = [interpolate(y, x) for y in samples(y1, y2, p) for x in samples(x1, x2, q)]
            pooled[p, q] = sum(values) / max(len(values), 1)
    return pooled


side = st.integers(-40, 120)
length = st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 160), st.floats(0, 1))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(side, side, length, length), min_size=4, max_size=4))
def test_roi_align_is_the_mean_over_samples(boxes):
    """Positions of 1/3 of a cell, so that no sample is where rounding decides whether it counts."""
    boxes = np.array([(x / 3, y / 3, x / 3 + w, y / 3 + h) for x, y, w, h in boxes], np.float32)
    features = FEATURES[1][:9, :11]
    ours = align(features, boxes, stride=4, size=3)
    for i, box in enumerate(boxes):
        np.testing.assert_allclose(ours[i], plain_roi_align(features, box, 4, 3), rtol=0, atol=3e-5, err_msg=str(box))


def bits(name, width):
    return np.unpackbits(MASKS[name], axis=-1)[..., :width].astype(bool)


def test_crops_of_masks():
    masks = bits("masks", MASKS["mask_shape"][2])
    ours = crop(masks, MASKS["proposals"], MASKS["gt_index"], chunk=7)
    np.testing.assert_allclose(ours, MASKS["soft"], rtol=0, atol=1e-5)
    clear = MASKS["soft"] != 0.5
    expected = bits("targets", 784).reshape(-1, 28, 28)
    assert clear.mean() > 0.999
    np.testing.assert_array_equal((ours >= 0.5)[clear], expected[clear])


def test_crops_of_stored_masks_equal_those_of_resized_flipped_and_padded_ones():
    stored = bits("masks", MASKS["mask_shape"][2])[:, :40, :50]
    rows, columns = np.arange(57) * 40 // 57, (np.arange(83) * 50 // 83)[::-1]
    image = np.zeros((3, 64, 96), bool)
    image[:, :57, :83] = stored[:, rows][:, :, columns]
    expected = crop(image, MASKS["proposals"], MASKS["gt_index"])
    rows, columns = np.pad(rows, (0, 39), constant_values=-1), np.pad(columns, (0, 45), constant_values=-1)
    options = {"rows": rows, "columns": columns, "image_size": jnp.array([64, 96])}
    ours = crop(stored, MASKS["proposals"], MASKS["gt_index"], **options)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_pasting():
    size = MASKS["paste/size"]
    ours = paste_masks(MASKS["paste/prob"], MASKS["paste/boxes"], size)
    np.testing.assert_array_equal(ours, bits("paste/masks", size[1]))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.tuples(*[st.floats(-20, 40, width=32)] * 2), st.tuples(*[st.floats(0, 50, width=32)] * 2), st.integers(0, 99))
def test_pasting_is_interpolation_at_the_centres_of_pixels(corner, size, seed):
    """Pixel after pixel; not where the value is so close to the threshold that rounding decides."""
    mask = np.random.default_rng(seed).uniform(0, 1, (5, 5)).astype(np.float32)
    x1, y1 = corner
    box = np.array([x1, y1, x1 + size[0], y1 + size[1]], np.float32)
    ours = paste_masks(mask[None], box[None], (17, 23))[0]
    if box[2] <= box[0] or box[3] <= box[1]:
        assert not ours.any()
        return
    for y in range(17):
        for x in range(23):
            u = (x + 0.5 - box[0]) / (box[2] - box[0]) * 5 - 0.5
            v = (y + 0.5 - box[1]) / (box[3] - box[1]) * 5 - 0.5
            weights = [np.maximum(1 - abs(t - np.arange(5)), 0) for t in (v, u)]
            value = weights[0] @ mask @ weights[1]
            if abs(value - 0.5) > 1e-3:
                assert ours[y, x] == (value >= 0.5), (x, y)
