"""An image on a larger canvas, whatever is around it, gives what it gives alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_close

from fcvit_jax.networks import boxes, rpn
from fcvit_jax.networks.blocks import standardize
from fcvit_jax.networks.fcvit import create_backbone, create_model
from fcvit_jax.networks.fpn import FPN

# Everything that looks at more than one position is there, and none of it is scaled down.
SIZES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "mlp_ratios": (2, 2, 1, 1), "kernel_sizes": (5,)}
OPTIONS = {"spatial_attention": True, "channel_attention": True, "layer_scale_init": 1.0, **SIZES}
IMAGES = [(44, 70), (72, 96)]  # the last fills the canvas


def disturbed(variables):
    """Biases and scales as they are after training."""
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    return structure.unflatten([x + 0.2 * rng.uniform(0, 1, x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def batch():
    """Two images on a canvas, and each of them alone."""
    rng = np.random.default_rng(1)
    canvas = rng.normal(0, 1, (2, 72, 96, 3)).astype(np.float32)
    return canvas, np.array(IMAGES), [canvas[i : i + 1, :h, :w] for i, (h, w) in enumerate(IMAGES)]


def assert_as_alone(ours, alone, what):
    """ours: (H, W, C) on the canvas; alone: (h, w, C)."""
    height, width = alone.shape[:2]
    assert_close(ours[:height, :width], alone, what)
    assert not np.asarray(ours[height:]).any() and not np.asarray(ours[:, width:]).any(), what


def test_classifier(batch):
    """Logits, stage outputs and the similarities that are sown."""
    model = create_model("fcvit_tiny", 5, **OPTIONS)
    canvas, sizes, alone = batch
    variables = disturbed(jax.jit(model.init)(jax.random.key(0), canvas))

    @jax.jit
    def run(images, sizes):
        logits, state = model.apply(variables, images, sizes=sizes, mutable=["intermediates"])
        maps = model.apply(variables, images, sizes=sizes, method="features")
        return logits, (maps, jax.tree.leaves(state))

    logits, maps = run(canvas, sizes)
    for i, image in enumerate(alone):
        expected_logits, expected = run(image, None)
        assert_close(logits[i], expected_logits[0], "logits")
        jax.tree.map(lambda x, y, i=i: assert_as_alone(x[i], y[0], "map"), maps, expected)


def test_pyramid_and_neck(batch):
    """Without the weights of positions, the context is the same everywhere."""
    model, neck = create_backbone("fcvit_tiny", weighted_context=False, **OPTIONS), FPN(8)
    canvas, sizes, alone = batch
    variables = disturbed(jax.jit(model.init)(jax.random.key(0), canvas))
    of_neck = jax.jit(lambda key: neck.init(key, model.apply(variables, canvas)))(jax.random.key(1))
    of_neck = disturbed(of_neck)

    @jax.jit
    def run(images, sizes):
        maps = model.apply(variables, images, sizes=sizes)
        return maps, neck.apply(of_neck, maps, None if sizes is None else -(-sizes // 4))

    ours = run(canvas, sizes)
    for i, image in enumerate(alone):
        jax.tree.map(lambda x, y, i=i: assert_as_alone(x[i], y[0], "map"), ours, run(image, None))


def test_proposals():
    """Of anchors of the image alone, however sure the network is of those around it, some of which reach into it."""
    rng = np.random.default_rng(2)
    alone = [[rng.normal(0, 0.3, (1, 64 // s, 64 // s, c)).astype(np.float32) for c in (3, 12)] for s in boxes.STRIDES]
    more = [((0, 0), (0, 32 // s), (0, 64 // s), (0, 0)) for s in boxes.STRIDES]
    canvas = [
        [np.pad(x, p, constant_values=c) for x, c in zip(xs, (9, 0), strict=True)]
        for xs, p in zip(alone, more, strict=True)
    ]
    propose = jax.jit(functools.partial(rpn.propose, pre=100, number=50))
    sizes = np.array([[60, 50]])
    expected = propose(alone, sizes)
    assert expected.valid.sum() > 20
    ours = propose(canvas, sizes, padded=np.array([[64, 64]]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, expected)


def test_gradients_do_not_reach_the_padding(batch):
    """Nor are they disturbed by it."""
    model = create_backbone("fcvit_tiny", **OPTIONS | {"depths": (1, 0, 0, 0)})
    canvas, sizes, alone = batch
    variables = disturbed(jax.jit(model.init)(jax.random.key(0), canvas))

    @functools.partial(jax.jit)
    @jax.grad
    def gradient(images, sizes):
        return sum(jnp.sin(x).sum() for x in model.apply(variables, images, sizes=sizes))

    ours = gradient(canvas, sizes)
    assert_as_alone(ours[0], gradient(alone[0], None)[0], "gradient")


def test_standardize_where_all_valid_values_are_the_same():
    x = jnp.array([[[2.0], [2.0], [7.0]]])
    valid = jnp.array([[[True], [True], [False]]])

    def of_valid(x):
        return jnp.where(valid, standardize(x, valid), 0).sum()

    value, gradient = jax.value_and_grad(of_valid)(x)
    assert value == 0 and np.isfinite(gradient).all()


def test_batch_statistics_in_training_are_of_the_canvas(batch):
    """As in the original's training, where padding takes part."""
    model = create_backbone("fcvit_tiny", **OPTIONS | {"depths": (0, 0, 0, 0)})
    canvas, sizes, _ = batch
    blank = canvas * 0
    for i, (height, width) in enumerate(sizes):
        blank[i, :height, :width] = canvas[i, :height, :width]
    variables = jax.jit(model.init)(jax.random.key(0), canvas)
    run = jax.jit(lambda x, sizes: model.apply(variables, x, True, sizes, mutable=["batch_stats"])[1]["batch_stats"])
    ours, expected = run(canvas, sizes)["stem"], run(blank, None)["stem"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), ours, expected)
