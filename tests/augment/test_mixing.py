import math
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fcvit_jax.augment import mixing
from fcvit_jax.errors import UserError

DATA = pathlib.Path(__file__).parent.parent / "data"
DRAW = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_prob": 1.0, "switch_prob": 0.5}


def random_batch(n, height=24, width=20):
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, height, width, 3), np.uint8), rng.integers(0, 10, n)


def test_mixing_equals_the_original_given_its_draws():
    golden = np.load(DATA / "mixup.npz")
    lam = jnp.asarray(golden["lam_drawn"], jnp.float32)
    draws = mixing.MixDraws(jnp.asarray(golden["use_cutmix"]), lam, jnp.asarray(golden["center_yx"]))
    cutmix = golden["use_cutmix"]
    np.testing.assert_array_equal(mixing.cutmix_boxes(draws, 16, 20)[cutmix], golden["box_yl_yh_xl_xh"][cutmix])

    # Each of the 12 draws becomes a group of one batch of 96 images.
    targets = mixing.smooth_one_hot(jnp.tile(golden["labels"], 12), 10, 0.1)
    for images, mixed, tolerance in [
        ("x_float", "out_float_Mixup", 1e-6),
        ("x_uint8", "out_uint8_FastCollateMixup", 0.501),
    ]:
        images = np.tile(np.moveaxis(golden[images], 1, -1), (12, 1, 1, 1))
        got, got_targets = jax.jit(mixing.apply_mix)(images, targets, draws)
        expected = np.moveaxis(golden[mixed], 2, -1).astype(np.float32).reshape(got.shape)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(got_targets, golden["targets"].reshape(96, 10), rtol=0, atol=1e-7)


def test_normalisation_equals_the_originals():
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    expected = np.load(DATA / "mixing.npz")["norm_table"].T
    np.testing.assert_allclose(jax.jit(mixing.normalize)(values), expected, rtol=0, atol=2.5e-7)  # one rounding


def test_erased_rectangles_equal_the_originals_given_its_draws():
    golden = np.load(DATA / "mixing.npz")["erase_seed_applied_top_left_height_width"]
    applied, areas, aspects = [], [], []
    for seed in golden[:, 0].tolist():
        draw = random.Random(seed)
        applied.append(draw.random() <= 0.25)
        areas.append(draw.uniform(0.02, 1 / 3) * 224 * 224)
        aspects.append(math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3))))
    np.testing.assert_array_equal(applied, golden[:, 1])
    _, _, top, left, height, width = golden.T
    # Positions come from another kind of draw there: take the middle of the interval that leads to each.
    position = np.stack(((top + 0.5) / (225 - height), (left + 0.5) / (225 - width)), axis=1)
    areas, aspects = np.float32(areas)[:, None], np.float32(aspects)[:, None]
    boxes = mixing.erasing_boxes(jnp.asarray(applied), areas, aspects, np.float32(position), 224, 224)
    expected = np.stack((top, top + height, left, left + width), axis=1)
    np.testing.assert_array_equal(boxes[golden[:, 1] == 1], expected[golden[:, 1] == 1])
    assert not mixing.inside(boxes, 224, 224)[golden[:, 1] == 0].any()


def test_erasing_takes_the_first_rectangle_smaller_than_the_image():
    # Heights and widths of three tries for an image of 10 x 20: too high, as wide as the image, and what is left.
    height = np.array([[12, 4, 6], [4, 9, 2], [10, 10, 10], [4, 4, 4]], np.float32)
    width = np.array([[3, 20, 7], [5, 19, 2], [3, 3, 3], [4, 4, 4]], np.float32)
    applied = np.array([True, True, True, False])
    position = np.array([[0.999, 0], [0, 0.999], [0.5, 0.5], [0.5, 0.5]], np.float32)
    boxes = mixing.erasing_boxes(applied, height * width, height / width, position, 10, 20)
    np.testing.assert_array_equal(boxes[:2], [[4, 10, 0, 7], [0, 4, 15, 20]])
    erased = mixing.inside(boxes, 10, 20)[..., 0]
    np.testing.assert_array_equal(erased.sum((1, 2)), [42, 20, 0, 0])
    assert erased[0, 4:10, 0:7].all() and erased[1, 0:4, 15:20].all()


def test_mix_decisions_follow_their_distributions():
    draws = mixing.draw_mix(jax.random.key(0), 20_000, 8, 5, **DRAW)
    use_cutmix, lam, center = map(np.asarray, draws)
    assert abs(use_cutmix.mean() - 0.5) < 0.015
    assert scipy.stats.kstest(lam[~use_cutmix], scipy.stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert scipy.stats.kstest(lam[use_cutmix], scipy.stats.uniform.cdf).pvalue > 0.01
    cells = np.bincount(center[:, 0] * 5 + center[:, 1])
    assert len(cells) == 40 and scipy.stats.chisquare(cells).pvalue > 0.01

    rarely = mixing.draw_mix(jax.random.key(1), 20_000, 8, 5, **{**DRAW, "mix_prob": 0.1, "switch_prob": 0.8})
    mixed = np.asarray(rarely.lam) < 1
    assert abs(mixed.mean() - 0.1) < 0.01
    assert abs(rarely.use_cutmix[mixed].mean() - 0.8) < 0.03 and not rarely.use_cutmix[~mixed].any()


@pytest.mark.parametrize("alpha", [0.2, 0.5, 2.0, 30.0])
def test_symmetric_beta_has_the_right_moments(alpha):
    values = np.asarray(mixing.symmetric_beta(jax.random.uniform(jax.random.key(2), (100_000, 2)), alpha), np.float64)
    assert values.min() >= 0 and values.max() <= 1
    moments = [((values - 0.5) ** k).mean() for k in (1, 2, 4)]
    beta = scipy.stats.beta(alpha, alpha)
    np.testing.assert_allclose(moments[0], 0, atol=0.005)
    np.testing.assert_allclose(moments[1:], [beta.expect(lambda x, k=k: (x - 0.5) ** k) for k in (2, 4)], rtol=0.03)


def test_either_mixing_can_be_switched_off():
    no_mixup = mixing.draw_mix(jax.random.key(0), 100, 8, 8, **{**DRAW, "mixup_alpha": 0.0})
    no_cutmix = mixing.draw_mix(jax.random.key(0), 100, 8, 8, **{**DRAW, "cutmix_alpha": 0.0})
    assert no_mixup.use_cutmix.all() and not no_cutmix.use_cutmix.any()
    assert jnp.isfinite(no_mixup.lam).all() and jnp.isfinite(no_cutmix.lam).all()


def test_erasing_decisions_follow_their_distributions():
    boxes = np.asarray(mixing.draw_erasing(jax.random.key(0), 40_000, 224, 200, 0.25))
    height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    erased = height > 0
    assert abs(erased.mean() - 0.25) < 0.008
    top, bottom, left, right = boxes[erased].T
    assert top.min() == left.min() == 0 and bottom.max() == 224 and right.max() == 200
    assert (height[erased] < 224).all() and (width[erased] < 200).all()
    area = height[erased] * width[erased] / (224 * 200)
    aspect = np.log(height[erased] / width[erased]) / math.log(1 / 0.3)
    assert 0.019 < area.min() < 0.022 and 0.32 < area.max() < 0.338
    # A few large and long rectangles are refused, so neither is quite uniform.
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.005
    assert abs(aspect.mean()) < 0.02 and abs(aspect.std() - math.sqrt(1 / 3)) < 0.02
    top_share = top / (224 - height[erased])
    assert abs(top_share.mean() - 0.5) < 0.01 and abs(top_share.std() - math.sqrt(1 / 12)) < 0.01


def test_targets_follow_the_pixels_in_every_group():
    # Images of one brightness each: the mean of a mixed image tells the shares of both partners, whatever the mixing.
    brightness = np.random.default_rng(0).permutation(48)[:, None, None, None] * 5
    images = np.broadcast_to(brightness, (48, 30, 40, 3)).astype(np.uint8)
    mix = jax.jit(mixing.make(48, smoothing=0.0, erase_prob=0.0, group_size=4))
    mixed, targets = mix(jax.random.key(1), images, np.arange(48))
    pixels = np.asarray(mixed) * 255 * np.array(mixing.STD) + 255 * np.array(mixing.MEAN)
    np.testing.assert_allclose(pixels.mean((1, 2, 3)), np.asarray(targets) @ brightness.ravel(), atol=2e-3)
    flat = pixels.std((1, 2, 3)) < 1e-3
    assert 0 < flat.sum() < 48  # both mixup and cutmix took place
    partner = np.arange(48).reshape(12, 4)[:, ::-1].ravel()
    own = np.asarray(targets)[np.arange(48), np.arange(48)]
    np.testing.assert_allclose(own + np.asarray(targets)[np.arange(48), partner], 1, atol=1e-6)
    np.testing.assert_array_equal(own.reshape(12, 4).std(axis=1), 0)
    assert len(np.unique(own)) == 12


def test_erasing_comes_last_and_leaves_the_targets():
    images, labels = random_batch(64)
    (plain, plain_targets), (erased, targets) = (
        jax.jit(mixing.make(10, erase_prob=prob, group_size=8))(jax.random.key(3), images, labels)
        for prob in (0.0, 1.0)
    )
    np.testing.assert_array_equal(targets, plain_targets)
    changed = np.asarray(erased != plain)
    assert 0.1 < changed.mean() < 0.25
    assert scipy.stats.kstest(np.asarray(erased)[changed], scipy.stats.norm.cdf).pvalue > 0.01


def test_without_mixing_only_smoothing_and_normalisation_stay():
    images, labels = random_batch(5)
    mix = mixing.make(10, mixup_alpha=0.0, cutmix_alpha=0.0, erase_prob=0.0)
    got, targets = mix(jax.random.key(0), images, labels)
    np.testing.assert_array_equal(got, mixing.normalize(images))
    np.testing.assert_allclose(targets, 0.01 + 0.9 * np.eye(10)[labels], rtol=1e-6)


def test_result_does_not_depend_on_how_devices_share_the_batch():
    images, labels = random_batch(64)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put((images, labels), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    for group_size in (4, 32):  # two groups on a device; a group over four devices
        mix = jax.jit(mixing.make(10, erase_prob=0.9, group_size=group_size))
        alone = mix(jax.random.key(0), images, labels)
        compiled = mix.lower(jax.random.key(0), *sharded).compile()
        for got, expected in zip(compiled(jax.random.key(0), *sharded), alone, strict=True):
            assert len(got.sharding.device_set) == 8 and not got.sharding.is_fully_replicated
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
        program = compiled.as_text()
        assert "all-gather" not in program and "f32[64,24,20,3]" not in program  # nobody holds the whole batch
        if group_size == 4:
            assert "collective-permute" not in program and "all-to-all" not in program


def test_a_group_does_not_depend_on_those_after_it():
    images, labels = random_batch(64)
    mix = jax.jit(mixing.make(10, group_size=8))
    for few, many in zip(
        mix(jax.random.key(0), images[:16], labels[:16]), mix(jax.random.key(0), images, labels), strict=True
    ):
        np.testing.assert_allclose(few, many[:16], rtol=0, atol=1e-6)


def test_what_is_made_is_what_its_options_say():
    images, labels = random_batch(8)
    draw = {"mixup_alpha": 0.3, "cutmix_alpha": 2.0, "mix_prob": 0.9, "switch_prob": 0.3}
    mix = jax.jit(mixing.make(10, **draw, smoothing=0.25, erase_prob=0.5, group_size=2))
    for seed in range(3):
        key = jax.random.key(seed)
        mix_key, box_key, noise_key = jax.random.split(key, 3)
        draws = mixing.draw_mix(mix_key, 4, 24, 20, **draw)
        mixed, targets = mixing.apply_mix(images, mixing.smooth_one_hot(labels, 10, 0.25), draws)
        erased = mixing.inside(mixing.draw_erasing(box_key, 8, 24, 20, 0.5), 24, 20)
        expected = jnp.where(erased, jax.random.normal(noise_key, images.shape), mixing.normalize(mixed))
        got, got_targets = mix(key, images, labels)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        np.testing.assert_allclose(got_targets, targets, atol=1e-6)


def test_draws_are_independent_of_each_other():
    n = 4000
    draws = mixing.draw_mix(jax.random.key(0), n, 1000, 1000, **DRAW)
    boxes = np.asarray(mixing.draw_erasing(jax.random.key(1), n, 1000, 1000, 1.0), float)
    top, bottom, left, right = boxes.T
    small = (bottom - top < 400) & (right - left < 400)  # where the place is hardly bound to the size
    noise = mixing.make(10, mixup_alpha=0, cutmix_alpha=0, erase_prob=1.0, group_size=n)
    blank = np.zeros((n, 4, 4, 3), np.uint8)
    pixels = np.asarray(noise(jax.random.key(2), blank, np.zeros(n, int))[0]).reshape(-1, 3)
    pixels = pixels[(pixels != mixing.normalize(blank[:1])[0, 0, 0]).all(1)]
    center = np.asarray(draws.center, float)
    pairs = [(draws.lam, center[:, 0]), (draws.lam, center[:, 1]), (*center.T,), (top[small], left[small])]
    for a, b in (*pairs, *(pixels[:, c].T for c in ([0, 1], [0, 2], [1, 2]))):
        assert abs(scipy.stats.spearmanr(a, b)[0]) < 0.08


@pytest.mark.parametrize(("batch", "group_size"), [(96, 64), (7, 128), (9, 3)])
def test_batch_that_does_not_pair_up_is_refused(batch, group_size):
    with pytest.raises(UserError, match="group"):
        jax.eval_shape(mixing.make(10, group_size=group_size), jax.random.key(0), *random_batch(batch))


@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": -1.0},
        {"cutmix_alpha": float("nan")},
        {"erase_prob": 1.5},
        {"smoothing": -0.1},
        {"group_size": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nonsense_is_refused_by_name(options):
    with pytest.raises(UserError, match=next(iter(options))):
        mixing.make(10, **options)
