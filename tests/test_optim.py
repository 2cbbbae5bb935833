import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcvit_jax.networks.fcvit
from fcvit_jax import optim
from fcvit_jax.errors import UserError
from fcvit_jax.networks import create_model

DATA = pathlib.Path(__file__).parent / "data"


def test_rate_of_every_epoch_equals_the_originals():
    golden = np.load(DATA / "lr_schedule.npz")["lr"]
    first = np.arange(len(golden)) * 1251
    schedule = jax.jit(jax.vmap(optim.make_schedule()))
    np.testing.assert_allclose(schedule(first), golden, rtol=1e-6)
    np.testing.assert_allclose(schedule(first + 1250), golden, rtol=1e-6)
    assert schedule(np.array([310 * 1251 + 5.0]))[0] == np.float32(1e-6)  # of a float step too


def test_rate_of_every_step_keeps_its_digits_to_the_end():
    schedule = jax.jit(jax.vmap(optim.make_schedule(per_step=True)))
    step, warmup, end = np.arange(310 * 1251), 5 * 1251, 300 * 1251
    cosine = 1e-6 + (1e-3 - 1e-6) * np.sin(np.pi / 2 * (end - step) / (end - warmup)) ** 2
    expected = np.where(step < warmup, 1e-6 + (1e-3 - 1e-6) * step / warmup, np.where(step < end, cosine, 1e-6))
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)
    reference = optax.warmup_cosine_decay_schedule(1e-6, 1e-3, warmup, end, 1e-6)
    np.testing.assert_allclose(schedule(step), jax.vmap(reference)(step), rtol=1e-4)


@pytest.mark.parametrize("per_step", [False, True])
def test_rate_without_warmup(per_step):
    schedule = optim.make_schedule(0.1, 10, 4, 0, min_lr=0.0, per_step=per_step)
    np.testing.assert_allclose([schedule(s) for s in (0, 20, 40, 1000)], [0.1, 0.05, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("per_step", [False, True])
def test_rate_of_a_run_that_is_all_warmup(per_step):
    schedule = optim.make_schedule(0.1, 10, 2, 2, warmup_lr=0.0, per_step=per_step)
    np.testing.assert_allclose([schedule(s) for s in (0, 10, 20)], [0, 0.05, 1e-6], rtol=1e-6)


def test_without_cooldown_the_last_rate_stays():
    schedule = optim.make_schedule(0.1, 10, 4, 0, min_lr=0.0, cooldown_epochs=0)
    assert schedule(1000) == schedule(39) == pytest.approx(0.05 * (1 + math.cos(0.75 * math.pi)))


def test_the_rate_of_segmentation_equals_the_originals_and_keeps_its_digits_to_the_end():
    with np.load(DATA / "segmentation_schedule_and_geometry.npz") as file:
        steps, golden = file["lr_iteration"], file["lr"]
    schedule = optim.make_poly_schedule()
    np.testing.assert_allclose(jax.jit(schedule)(jnp.asarray(steps)), golden, rtol=1e-6)
    np.testing.assert_allclose(schedule(39_999), 2e-4 * (1 / 40_000) ** 0.9, rtol=1e-6)
    assert schedule(40_000) == schedule(50_000) == 0
    np.testing.assert_allclose(optim.make_poly_schedule(1.0, 8, power=2.0)(2), 0.5625)


@pytest.mark.parametrize("options", [{"base_lr": -1.0}, {"steps": 0}, {"power": -0.5}])
def test_a_nonsensical_rate_of_segmentation_is_refused_by_name(options):
    with pytest.raises(UserError, match=f"optim.{next(iter(options))}="):
        optim.make_poly_schedule(**options)


def test_the_rate_of_detection_equals_the_originals():
    with np.load(DATA / "detection_schedule.npz") as file:
        arrays = dict(file)
    for length in (3665, 30):  # of an epoch; the second is shorter than the warm-up
        steps, golden = arrays[f"lr{length}_iters"], arrays[f"lr{length}_lr"]
        schedule = optim.make_step_schedule(steps_per_epoch=length)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.asarray(steps)), golden, rtol=1e-6)
    np.testing.assert_allclose(optim.make_step_schedule()(249), 9.97e-5, rtol=1e-5)
    schedule = optim.make_step_schedule(1.0, 10, (), warmup_steps=0)
    assert schedule(0) == schedule(10**6) == 1


@pytest.mark.parametrize(
    "options", [{"base_lr": -1.0}, {"warmup_steps": -1}, {"decay_epochs": (11, 8)}, {"decay_epochs": (0,)}]
)
def test_a_nonsensical_rate_of_detection_is_refused_by_name(options):
    with pytest.raises(UserError, match=f"optim.{next(iter(options))}="):
        optim.make_step_schedule(**options)


def test_ten_steps_of_adamw_equal_the_originals():
    golden = np.load(DATA / "adamw.npz")
    names = [*golden["decay_names"], *golden["no_decay_names"]]
    # Without warm-up, the first epoch is at the full rate.
    tx, _ = optim.make_optimizer(10, 300, 8, lr_batch_size=None, warmup_epochs=0)
    params = {name: jnp.asarray(golden[f"param__{name}"][0]) for name in names}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(10):
        updates, state = update({name: golden[f"grad__{name}"][step] for name in names}, state, params)
        params = optax.apply_updates(params, updates)
        for name in names:
            np.testing.assert_allclose(params[name], golden[f"param__{name}"][step + 1], rtol=0, atol=2e-6)
    for name in names:
        moments = optax.tree.get(state, "mu")[name], optax.tree.get(state, "nu")[name]
        np.testing.assert_allclose(moments[0], golden[f"exp_avg__{name}"], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(moments[1], golden[f"exp_avg_sq__{name}"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "decayed", "spared"), [("fcvit_tiny", 4_740_960, 43_792), ("fcvit_s12", 14_620_864, 80_968)]
)
def test_decay_spares_what_the_original_spares(name, decayed, spared):
    model = fcvit_jax.networks.fcvit.create_model(name)
    params = fcvit_jax.networks.fcvit.abstract_variables(model)["params"]
    mask = jax.tree.leaves(optim.decay_mask(params))
    sizes = [p.size for p in jax.tree.leaves(params)]
    assert sum(s for s, m in zip(sizes, mask, strict=True) if m) == decayed
    assert sum(s for s, m in zip(sizes, mask, strict=True) if not m) == spared


def test_decay_spares_the_tokens_and_positions_of_a_vit():
    """As timm's parameter groups for this network: two-dimensional weights decay, but for the position embedding."""
    model = create_model("deit_tiny_distilled_patch16_224")
    params = fcvit_jax.networks.fcvit.abstract_variables(model)["params"]
    spared = [(path[0].key, p.size) for (path, p), decays in masked(params) if not decays and p.ndim > 1]
    assert spared == [("pos_embed", 198 * 192)]
    decayed = sum(p.size for (_, p), decays in masked(params) if decays)
    blocks = 12 * 12 * 192**2  # qkv, proj and the two layers of the MLP
    assert decayed == blocks + 16 * 16 * 3 * 192 + 2 * 192 * 1000
    assert not any(decays for (path, _), decays in masked(params) if path[0].key in ("cls_token", "dist_token"))


def masked(params):
    return zip(jax.tree.leaves_with_path(params), jax.tree.leaves(optim.decay_mask(params)), strict=True)


PARAMS = {"norm": {"scale": np.ones(3, np.float32)}, "head": {"kernel": np.ones((3, 2), np.float32)}}
GRADS = {"norm": {"scale": np.full(3, 3.0, np.float32)}, "head": {"kernel": np.full((3, 2), -4.0, np.float32)}}


def first_update(**options):
    tx, schedule = optim.make_optimizer(10, 4, 512, warmup_epochs=0, **options)
    state = tx.init(PARAMS)
    return *tx.update(GRADS, state, PARAMS), schedule(0)


def test_rate_grows_with_the_batch():
    assert first_update()[2] == np.float32(0.5e-3)
    assert first_update(lr_batch_size=128)[2] == np.float32(4e-3)
    for switched_off in (None, 0):
        assert first_update(lr_batch_size=switched_off)[2] == np.float32(1e-3)
    with pytest.raises(UserError, match="warmup_lr=1e-06 is above the learning rate, 6.25e-07 for 32 images"):
        optim.make_optimizer(10, 4, 32, lr=2e-5)


def test_every_update_is_at_the_rate_of_its_step():
    options = dict(lr=0.1, warmup_epochs=2, warmup_lr=0.02, min_lr=0.01, cooldown_epochs=1, weight_decay=0.0)
    tx, schedule = optim.make_optimizer(2, 4, 1024, **options)
    rates = np.repeat([0.02, 0.06, 0.055, 0.01 + 0.045 * (1 - math.sqrt(0.5)), 0.01, 0.01], 2)
    state = tx.init(PARAMS)
    for step, rate in enumerate(rates):
        updates, state = tx.update(GRADS, state, PARAMS)
        # The gradients stay the same, so that an update is the rate and nothing else.
        np.testing.assert_allclose(updates["norm"]["scale"], np.full(3, -rate), rtol=1e-4)
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5)


def test_head_multiplier_scales_the_update_of_the_head_alone():
    plain, _, rate = first_update(weight_decay=0.5)
    faster, _, _ = first_update(weight_decay=0.5, head_lr_multiplier=10.0)
    np.testing.assert_allclose(plain["head"]["kernel"], rate * (1 - 0.5), rtol=1e-4)
    np.testing.assert_allclose(faster["head"]["kernel"], 10 * plain["head"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(faster["norm"]["scale"], plain["norm"]["scale"])
    tx, _ = optim.make_optimizer(10, 4, 512, warmup_epochs=0, head_lr_multiplier=10.0)
    with pytest.raises(UserError, match="head_lr_multiplier"):
        tx.init({"norm": PARAMS["norm"]})


def test_clipping_scales_all_gradients_to_the_norm():
    norm = np.sqrt(3 * 3.0**2 + 6 * 4.0**2)
    for clip_norm, scale in [(None, 1), (0, 1), (2 * norm, 1), (0.5, 0.5 / norm)]:
        first_moment = optax.tree.get(first_update(clip_norm=clip_norm)[1], "mu")
        for moment, grad in zip(jax.tree.leaves(first_moment), jax.tree.leaves(GRADS), strict=True):
            np.testing.assert_allclose(moment, 0.1 * scale * grad, rtol=1e-5)


def test_a_run_may_go_on_with_clipping():
    """As the loop advises after a bad step: what a checkpoint holds must not depend on it."""
    first, second = (
        optim.make_optimizer(10, 4, 512, warmup_epochs=0, clip_norm=norm)[0].init(PARAMS) for norm in (None, 1.0)
    )
    assert jax.tree.structure(first) == jax.tree.structure(second)


def test_state_holds_two_moments_and_counters():
    tx, _ = optim.make_optimizer(10, 4, 512, warmup_epochs=0, clip_norm=1.0, head_lr_multiplier=2.0)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(tx.init(PARAMS)))
    assert shapes == [(), (), (3,), (3,), (3, 2), (3, 2)]


def test_ema_moves_parameters_and_statistics():
    ema = {"params": {"w": jnp.array([1.0, 2.0])}, "batch_stats": {"mean": jnp.array([0.0])}}
    new = {"params": {"w": jnp.array([3.0, 1.0], jnp.bfloat16)}, "batch_stats": {"mean": jnp.array([10.0])}}
    ema = jax.jit(lambda ema, new: optim.update_ema(ema, new, 0.9998))(ema, new)
    np.testing.assert_allclose(ema["params"]["w"], [1.0004, 1.9998], rtol=1e-7)
    np.testing.assert_allclose(ema["batch_stats"]["mean"], [0.002], rtol=1e-6)
    assert ema["params"]["w"].dtype == jnp.float32


def test_ema_with_warmup_begins_with_a_smaller_decay():
    old, new = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 1.0])}
    moved = jax.jit(lambda updates: optim.update_ema(old, new, 0.9998, updates)["w"])
    for updates, decay in ((0, 0.1), (1, 2 / 11), (90, 0.91), (44_979, 44_980 / 44_989), (10**6, 0.9998)):
        expected = decay * old["w"] + (1 - decay) * new["w"]
        np.testing.assert_allclose(moved(jnp.int32(updates)) - old["w"], expected - old["w"], rtol=1e-3)
        np.testing.assert_allclose(moved(jnp.int32(updates)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1e-3},
        {"lr": float("nan")},
        {"weight_decay": -0.05},
        {"b2": 1.0},
        {"lr_batch_size": -1},
        {"clip_norm": -1.0},
        {"head_lr_multiplier": -1.0},
        {"warmup_epochs": 5},
        {"warmup_epochs": -1},
        {"cooldown_epochs": -1},
        {"min_lr": 1.0},
        {"warmup_lr": 1.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nonsense_is_refused_by_name(options):
    with pytest.raises(UserError, match=next(iter(options))):
        optim.make_optimizer(10, 4, 512, **{"warmup_epochs": 0, **options})
