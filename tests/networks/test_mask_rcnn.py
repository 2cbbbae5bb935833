"""Mask R-CNN against MMDetection: features, proposals, losses, gradients, detections, masks; and how it starts."""

import functools

import detection_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_golden import DATA, DETECTOR, IMAGES, META, PADDED, PLACES, SCALE_FACTORS, SIZES, bits, nhwc
from equality import assert_close
from flax import traverse_util

import fcvit_jax
from fcvit_jax.errors import UserError
from fcvit_jax.networks import boxes, rpn
from fcvit_jax.networks.masks import paste_masks
from fcvit_jax.networks.objects import Objects


@pytest.fixture(scope="module")
def variables():
    return golden.tree("sd/")


@pytest.fixture(scope="module")
def objects():
    return golden.batch_of_objects()


@pytest.fixture(scope="module")
def run_training():
    """run(variables, images, objects, samples of anchors, samples of rois) -> losses, what else, and gradients."""

    def forward(model, images, objects, of_anchors, of_rois):
        maps = model.neck(images, train=True)
        levels = model.rpn_head(maps)
        found = rpn.propose(levels, SIZES, pre=META["pre"][0], number=META["post"][0])
        losses = model.sampled_losses(maps, levels, found, objects, of_anchors, of_rois)
        return losses, (maps, levels, found)

    @jax.jit
    def run(variables, images, *args):
        def loss(params, images):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            (losses, other), _ = DETECTOR.apply(state, images, *args, method=forward, mutable=["batch_stats"])
            return losses["loss"], (losses, other)

        grads, (losses, other) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], images)
        return losses, other, grads

    return run


@pytest.fixture(scope="module")
def trained(run_training, variables, objects):
    return run_training(variables, IMAGES, objects, *golden.recorded_samples())


def test_features_and_proposals_in_training(trained):
    _, (maps, levels, found), _ = trained
    for i in range(5):
        assert_close(maps[i], nhwc(f"train/fpn{i}"), f"map {i}")
        assert_close(levels[i][0], nhwc(f"train/rpn_cls{i}"), f"logits {i}")
    for i in range(2):
        expected = DATA[f"train/proposals{i}"]
        assert found.valid[i].sum() == len(expected)
        np.testing.assert_allclose(found.boxes[i], expected[:, :4], rtol=0, atol=1e-3)
        np.testing.assert_allclose(found.scores[i], expected[:, 4], rtol=0, atol=1e-5)


def test_assignment_of_anchors_and_proposals(trained):
    _, (_, levels, found), _ = trained
    anchors, inside = jax.jit(lambda levels: (rpn.anchors(levels), rpn.inside(levels, PADDED)))(levels)
    iou, assign = jax.jit(boxes.iou), jax.jit(boxes.assign)
    for i in range(2):
        objects = DATA[f"gt_boxes{i}"]
        ours = assign(iou(objects, anchors), 0.7, 0.3, 0.3, valid_boxes=inside[i])
        np.testing.assert_array_equal(np.where(inside[i], ours, -2), DATA[f"train/rpn_assigned{i}"])
        ours = assign(iou(objects, found.boxes[i]), 0.5, 0.5, 0.5)
        np.testing.assert_array_equal(ours, DATA[f"train/rcnn_assigned{i}"])


def test_losses(trained):
    expected = {
        "rpn_class_loss": DATA["train/loss/loss_rpn_cls"].sum(),
        "rpn_box_loss": DATA["train/loss/loss_rpn_bbox"].sum(),
        "class_loss": DATA["train/loss/loss_cls"],
        "box_loss": DATA["train/loss/loss_bbox"],
        "mask_loss": DATA["train/loss/loss_mask"],
        "loss": DATA["train/loss/total"],
        "class_accuracy": DATA["train/loss/acc"] / 100,
    }
    assert set(trained[0]) == set(expected)
    for name, value in trained[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def test_gradients(trained):
    grads, of_images = trained[2]
    expected = traverse_util.flatten_dict(golden.tree("grad/")["params"], sep="/")
    ours = traverse_util.flatten_dict(grads, sep="/")
    assert set(ours) == set(expected)
    largest = max(np.abs(x).max() for x in expected.values())
    for path, right in expected.items():
        # A bias in front of BatchNorm has no gradient but rounding.
        atol = 1e-4 * np.abs(right).max() + 1e-7 * largest
        np.testing.assert_allclose(ours[path], right, rtol=0, atol=atol, err_msg=path)
    assert_close(of_images, nhwc("grad_images_nchw"), "gradient of the images", 1e-4)


def test_nothing_is_nan_without_objects_or_samples(run_training, variables, objects):
    empty = objects._replace(valid=np.zeros_like(objects.valid))
    of_anchors, of_rois = golden.recorded_samples()
    nothing = [x._replace(positive=0 * x.positive > 0, valid=0 * x.valid > 0) for x in (of_anchors, of_rois)]
    negatives = [x._replace(positive=0 * x.positive > 0) for x in (of_anchors, of_rois)]
    for samples in (nothing, negatives):
        losses, _, grads = run_training(variables, IMAGES, empty, *samples)
        assert losses["rpn_box_loss"] == losses["box_loss"] == losses["mask_loss"] == 0
        assert np.isfinite([*losses.values()]).all()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert losses["class_loss"] > 0


# Without blocks it compiles fast. So many samples are taken that nothing is left to chance.
PLAIN = {"depths": (0, 0, 0, 0), "dims": (8, 8, 8, 8), "neck_channels": 8, "box_channels": 8}
ALL = {"train_nms_pre": 40, "train_proposals": 40, "rpn_samples": 2048, "roi_samples": 256, "roi_chunk": 256}


@pytest.fixture(scope="module")
def small_batch():
    """Two images of 64x64 and 40x64 with three and two objects, a place of which is unused, another has no width."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1, (2, 64, 64, 3)).astype(np.float32)
    corners = [[(3, 5, 30, 40), (20, 8, 60, 62), (2, 30, 25, 60), (9, 9, 9, 20)], [(5, 4, 33, 30), (30, 2, 50, 39)]]
    corners[1] += [(7, 3, 40, 30), (3, 9, 30, 9)]
    valid = np.array([[True, True, True, False], [True, True, False, False]])
    masks = rng.integers(0, 2, (2, 4, 64, 64)) > 0
    objects = Objects(np.array(corners, np.float32), np.array([[1, 0, 2, 2], [2, 1, 0, 0]]), valid, masks)
    return images, objects, np.array([[64, 64], [40, 64]])


def losses_of(variables, images, objects, sizes, key, **fields):
    detector = fcvit_jax.create_detector("fcvit_tiny", 3, **PLAIN, **fields)
    return detector.apply(variables, images, objects, sizes, key, method="losses", train=False)


@pytest.fixture(scope="module")
def plain_variables():
    detector = fcvit_jax.create_detector("fcvit_tiny", 3, **PLAIN)
    variables = jax.jit(detector.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    # Scores that are almost equal, as at the start, would not show what is averaged.
    return jax.tree.map(lambda x: 2 * x, variables)


@pytest.mark.parametrize("group", [1, None])
def test_losses_are_averages_over_groups_of_images(small_batch, plain_variables, group):
    losses = jax.jit(functools.partial(losses_of, plain_variables, bn_group_size=group, **ALL))

    def of_images(*index):
        return losses(*jax.tree.map(lambda x: x[np.array(index)], small_batch), jax.random.key(1))

    found = [of_images(0, 0), of_images(1, 1), of_images(0, 1)]
    for name in found[0]:
        a, b, both = (float(x[name]) for x in found)
        if group == 1:
            np.testing.assert_allclose(both, (a + b) / 2, rtol=1e-5, err_msg=name)
        elif name == "mask_loss":  # a mean over positives, of which the images have not as many
            assert min(a, b) < both < max(a, b) and abs(both - (a + b) / 2) > 1e-4 * both


def test_drawn_losses(small_batch, plain_variables):
    """Another key draws others; what is in unused places changes nothing; an object without width is none."""
    images, objects, sizes = small_batch
    losses = jax.jit(functools.partial(losses_of, plain_variables, **ALL | {"rpn_samples": 32, "roi_samples": 8}))
    first, again, other = (losses(images, objects, sizes, jax.random.key(i)) for i in (1, 1, 2))
    assert first == again
    assert all(first[name] != other[name] for name in ("rpn_class_loss", "class_loss"))
    assert np.isfinite([*first.values()]).all() and first["rpn_box_loss"] > 0 and first["box_loss"] > 0
    unused = ~objects.valid[..., None]
    garbage = objects._replace(
        boxes=np.where(unused, np.array([0, 0, 64, 64]), objects.boxes),
        labels=np.where(unused[..., 0], 1, objects.labels),
        masks=objects.masks | unused[..., None],
    )
    assert losses(images, garbage, sizes, jax.random.key(1)) == first
    flat = objects._replace(valid=np.array([[True, True, True, True], [True, True, False, True]]))
    assert losses(images, flat, sizes, jax.random.key(1)) == first
    nothing = losses(images, objects._replace(valid=np.zeros((2, 4), bool)), sizes, jax.random.key(1))
    assert np.isfinite([*nothing.values()]).all()
    assert nothing["rpn_box_loss"] == nothing["box_loss"] == nothing["mask_loss"] == 0


def test_samples_are_of_the_images_and_their_objects(trained, objects):
    """All that can be drawn: anchors within the padded images, and boxes that are there."""
    _, (_, levels, found), _ = trained
    model = DETECTOR.clone(rpn_samples=8192, roi_samples=1024)
    no_width = objects.boxes[0, 1].copy()
    no_width[2] = no_width[0]
    boxes_of = np.stack(
        [np.concatenate([objects.boxes[0, :1], no_width[None], objects.boxes[0, 2:]]), objects.boxes[1]]
    )
    found = found._replace(valid=found.valid.at[:, -1].set(False))
    draw = jax.jit(lambda *args: model.apply({}, *args, method="draw_samples"))
    of_anchors, of_rois = draw(levels, found, objects._replace(boxes=boxes_of), SIZES, jax.random.key(0))
    inside = jax.jit(rpn.inside)(levels, PADDED)
    for i in range(2):
        drawn = np.zeros(inside.shape[1], bool)
        drawn[of_anchors.index[i][of_anchors.valid[i]]] = True
        assert not drawn[~inside[i]].any() and drawn.sum() > 0.7 * inside[i].sum()  # some are neither
        drawn = np.zeros(PLACES + found.valid.shape[1], bool)
        drawn[of_rois.index[i][of_rois.valid[i]]] = True
        there = objects.valid[i] & (np.arange(PLACES) != 1 if i == 0 else True)
        np.testing.assert_array_equal(drawn, np.concatenate([there, found.valid[i]]))


def test_a_batch_without_masks(small_batch, plain_variables):
    images, objects, sizes = small_batch
    batch = images, objects._replace(masks=None), sizes, jax.random.key(1)
    with pytest.raises(UserError, match="masks=False"):
        jax.eval_shape(functools.partial(losses_of, **ALL), plain_variables, *batch)
    losses = jax.eval_shape(functools.partial(losses_of, masks=False, **ALL), plain_variables, *batch)
    assert "mask_loss" not in losses and "box_loss" in losses


@pytest.mark.parametrize("mask_padding", [True, False])
def test_losses_ignore_padding_unless_asked_not_to(plain_variables, small_batch, mask_padding):
    images, objects, sizes = small_batch
    canvas = np.random.default_rng(3).normal(0, 1, (2, 96, 128, 3)).astype(np.float32)
    canvas[:, :64, :64] = images
    losses = jax.jit(functools.partial(losses_of, mask_padding=mask_padding, **ALL))
    alone, padded = (losses(plain_variables, x, objects, sizes, jax.random.key(1)) for x in (images, canvas))
    for name, value in alone.items():
        equal = padded[name] == pytest.approx(float(value), rel=1e-5)
        assert equal if mask_padding else not equal or name == "class_accuracy", name


def test_evaluation(variables):
    """Both images on the same canvas, padding and all."""

    def forward(model, images):
        maps = model.neck(images)
        levels = model.rpn_head(maps)
        found = rpn.propose(levels, SIZES, pre=META["pre"][1], number=META["post"][1])
        return maps, found, model.detect(maps, SIZES, SCALE_FACTORS)

    maps, proposals, found = jax.jit(functools.partial(DETECTOR.apply, method=forward))(variables, IMAGES)
    for i in range(5):
        assert_close(maps[i], nhwc(f"eval/fpn{i}"), f"map {i}")
    for i, image in enumerate(META["images"]):
        np.testing.assert_allclose(proposals.boxes[i], DATA[f"eval/proposals{i}"][:, :4], rtol=0, atol=1e-3)
        assert_detects(jax.tree.map(lambda x, i=i: x[i], found), f"eval/{{}}{i}", image["ori_shape"])


def test_every_image_is_evaluated_as_if_it_were_alone(variables):
    """On a shared canvas, whatever is beyond the image's own padding."""
    images = IMAGES.copy()
    images[1, PADDED[1, 0] :] = images[1, :, PADDED[1, 1] :] = 7
    found = jax.jit(DETECTOR.apply)(variables, images, SIZES, SCALE_FACTORS)
    # The first image's own canvas is the shared one.
    for i, name in enumerate(("eval/{}0", "eval_alone1/{}0")):
        assert_detects(jax.tree.map(lambda x, i=i: x[i], found), name, META["images"][i]["ori_shape"])


def assert_detects(found, name, size):
    """Compares what was found in one image, and its masks at the size of the original one."""
    expected = DATA[name.format("dets")]
    assert found.valid.sum() == len(expected) and found.valid[: len(expected)].all()
    np.testing.assert_array_equal(found.labels, DATA[name.format("labels")])
    np.testing.assert_allclose(found.boxes, expected[:, :4], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.scores, expected[:, 4], rtol=0, atol=1e-5)
    pasted = paste_masks(np.asarray(found.masks), np.asarray(found.boxes), size)
    assert (pasted != bits(name.format("masks"), size[1])).mean() < 1e-3


def test_the_neck_starts_uniformly():
    detector = fcvit_jax.create_detector("fcvit_tiny", neck_channels=64, depths=(0, 0, 0, 0), dims=(32, 64, 64, 64))

    def init(key):
        return detector.init(key, jnp.zeros((1, 32, 32, 3)), method="neck")["params"]["neck"]

    neck = jax.jit(init)(jax.random.key(0))
    for name, x in neck.items():
        area = 9 if name.startswith("output") else 1
        fans = area * (sum(x["kernel"].shape[-2:]))
        bound = (6 / fans) ** 0.5
        largest = np.abs(x["kernel"]).max()
        assert 0.99 * bound < largest <= bound and not np.asarray(x["bias"]).any()
        np.testing.assert_allclose(np.std(x["kernel"]), bound / 3**0.5, rtol=0.05)


@pytest.mark.parametrize(
    "name, backbone, total", [("fcvit_b12", 14189856, 34357264), ("fcvit_b24", 26448256, 46615664)]
)
def test_numbers_of_parameters(name, backbone, total):
    detector = fcvit_jax.create_detector(name, share_blocks=True)
    params = jax.eval_shape(detector.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    counts = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in params.items()}
    heads = {"neck": 2623488, "rpn": 593935, "box_head": 14306705, "mask_head": 2643280}
    assert counts == {"backbone": backbone, **heads} and sum(counts.values()) == total


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"box_channels": 0}, "box_channels=0"),
        ({"proposals": 0}, "proposals=0"),
        ({"roi_samples": 3}, "roi_samples=3"),
        ({"nms_threshold": -1}, "nms_threshold=-1"),
        ({"context_heads": 0}, "context_heads=0"),
    ],
)
def test_values_that_are_not_allowed(fields, message):
    with pytest.raises(UserError, match=f"model.{message}"):
        fcvit_jax.create_detector("fcvit_tiny", **fields)


def test_masks_where_there_are_none():
    detector = DETECTOR.clone(masks=False)
    with pytest.raises(UserError, match="no mask branch"):
        detector.apply({"params": {}}, jnp.zeros((1, 14, 14, 16)), method="mask_head")
