"""What tasks and users ask of any classifier, and training with frozen batch statistics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, tiny_variables

from fcvit_jax import networks
from fcvit_jax.errors import UserError
from fcvit_jax.networks import convnext, fcvit, vit
from fcvit_jax.networks.fcvit import create_backbone, create_model

IMAGES = np.random.default_rng(0).normal(size=(8, 40, 32, 3)).astype(np.float32)


def apply(key, **options):
    """Logits and new variables in training mode."""
    model, variables = create_model(**TINY | options), tiny_variables()
    logits, updates = jax.jit(
        lambda variables: model.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    )(variables)
    return logits, variables | updates


def test_frozen_statistics_are_used_and_kept():
    key = jax.random.key(0)
    logits, new = apply(key, freeze_bn=True)
    chex.assert_trees_all_equal(new, tiny_variables())
    expected = jax.jit(create_model(**TINY).apply)(tiny_variables(), IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    batch, moved = apply(key, freeze_bn=False, bn_group_size=0)
    assert np.abs(batch - logits).max() > 1e-2
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), moved, tiny_variables())
    assert min(jax.tree.leaves(differences["batch_stats"])) > 0 == max(jax.tree.leaves(differences["params"]))


def test_frozen_statistics_leave_drop_path_on():
    one, two = (apply(jax.random.key(seed), freeze_bn=True, drop_path_rate=0.5)[0] for seed in (0, 1))
    kept = jax.jit(create_model(**TINY).apply)(tiny_variables(), IMAGES)
    changed = [np.abs(x - kept).max(axis=1) > 1e-2 for x in (one, two)]
    assert changed[0].any() and changed[1].any() and not np.array_equal(*changed)


@pytest.mark.parametrize("create", [create_model, create_backbone])
def test_channels_and_strides_of_the_maps_can_be_read_off(create):
    model = create("fcvit_tiny", dims=(8, 16, 24, 40), depths=(0, 0, 0, 0))
    images = jnp.zeros((1, 96, 64, 3))
    maps, _ = jax.eval_shape(lambda key: model.init_with_output(key, images, method="features"), jax.random.key(0))
    assert model.feature_info == tuple({"channels": x.shape[3], "stride": 96 // x.shape[1]} for x in maps) and [
        x.shape[2] for x in maps
    ] == [16, 8, 4, 2]


def test_every_variant_has_its_settings_in_one_place():
    for family in (fcvit, vit, convnext):
        assert family.SETTINGS.keys() == family.VARIANTS.keys()
        for name, expected in family.SETTINGS.items():
            assert networks.settings(name) == expected
            assert expected.keys() == {"image_size", "crop_pct", "drop_path_rate"}
    assert networks.settings("fcvit_b48") == {"image_size": 224, "crop_pct": 0.95, "drop_path_rate": 0.2}
    with pytest.raises(UserError, match="fcvit_s36"):
        networks.settings("fcvit_s36")
