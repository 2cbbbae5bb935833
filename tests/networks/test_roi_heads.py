"""The heads of Mask R-CNN: how they start, the losses of masks, and the choice of the best boxes of all classes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_close
from flax import traverse_util

from fcvit_jax.networks.roi_heads import BoxHead, MaskHead, mask_loss, sample_rois, select
from fcvit_jax.networks.rpn import RPN, sample_anchors

DATA = Path(__file__).parents[1] / "data" / "detection"
ASSIGN, NMS = np.load(DATA / "assign.npz"), np.load(DATA / "nms.npz")


@pytest.mark.parametrize("case", ["thresholds", "best_for_two_gts", "between", "random0"])
def test_what_is_drawn_is_assigned_as_in_the_original(case):
    """All boxes are drawn: each stage has its own thresholds, and objects are positives of themselves."""
    candidates, objects = ASSIGN[f"{case}/boxes"], ASSIGN[f"{case}/gts"]
    there = [np.ones(len(x), bool) for x in (candidates, objects)]
    for stage, draw, number in (("rpn", sample_anchors, 2), ("rcnn", sample_rois, 4)):
        draw = jax.jit(draw, static_argnums=5)
        total = number * (len(candidates) + len(objects))
        samples = draw(jax.random.key(0), candidates, there[0], objects, there[1], total)
        index, found = (np.asarray(x)[samples.valid] for x in (samples.index, samples.object + samples.positive))
        before = len(objects) if stage == "rcnn" else 0
        ours = np.full(before + len(candidates), -1)
        ours[index] = found
        expected = ASSIGN[f"{case}/{stage}/gt_inds"]
        np.testing.assert_array_equal(ours, np.concatenate([np.arange(1, before + 1), expected]))


@pytest.mark.parametrize("few", [1024, 350, 10])
@pytest.mark.parametrize("number", [100, 20])
def test_selection_over_classes(number, few):
    """Two images, of which the second has no boxes; by all classes together and by each alone."""
    corners, scores = NMS["multiclass/boxes"], NMS["multiclass/scores"]
    valid = np.arange(50) < np.array([[48], [0]])
    padded = [np.pad(x, ((0, 2), *((0, 0),) * (x.ndim - 1)), constant_values=1) for x in (corners, scores[:, :-1])]
    options = {"score_threshold": 0.05, "nms_threshold": 0.5, "number": number + 1000, "few": few}
    both = select(*(np.stack([x, x]) for x in padded), valid, **options)
    index, found, used = (np.asarray(x)[0] for x in both)
    # The best of more are the same as the best of fewer.
    np.testing.assert_array_equal(index[:number], NMS[f"multiclass{number}/inds"])
    np.testing.assert_array_equal(index[:number] % 7, NMS[f"multiclass{number}/labels"])
    np.testing.assert_array_equal(found[:number], NMS[f"multiclass{number}/dets"][:, 4])
    assert used.sum() < 48 * 7 and (found[used] > 0.05).all() and not found[~used].any()
    assert not both[1][1].any() and not both[2][1].any()


def test_loss_of_masks_is_over_positives():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 2, (4, 3, 3)).astype(np.float32), rng.integers(0, 2, (4, 3, 3)) > 0
    positive = np.array([True, False, True, False])
    probability = 1 / (1 + np.exp(-logits[positive].astype(np.float64)))
    expected = -np.log(np.where(targets[positive], probability, 1 - probability)).sum()
    total, number = mask_loss(logits, targets, positive)
    assert number == 18
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_masks_of_the_right_classes_alone():
    head, features = MaskHead(5, 8), np.random.default_rng(0).normal(size=(3, 6, 6, 4)).astype(np.float32)
    variables = jax.jit(head.init)(jax.random.key(0), features)
    variables = jax.tree.map(lambda x: x + 0.1, variables)
    labels = np.array([4, 0, 2])
    every, chosen = head.apply(variables, features), head.apply(variables, features, labels)
    assert_close(chosen, np.stack([every[i, ..., label] for i, label in enumerate(labels)]), "masks")


def assert_std(x, std):
    """Of normal numbers; five standard deviations of the estimate."""
    x = np.asarray(x)
    np.testing.assert_allclose(x.std(), std, rtol=5 / (2 * x.size) ** 0.5)
    assert abs(x.mean()) < 5 * std / x.size**0.5 and np.abs(x).max() > 2.5 * std


def test_initial_weights():
    """Those of the heads, at their real sizes where it costs nothing."""

    def initial(module, *args):
        flat = traverse_util.flatten_dict(jax.jit(module.init)(jax.random.key(0), *args)["params"], sep="/")
        assert all(not np.asarray(x).any() for path, x in flat.items() if path.endswith("bias"))
        return {path.removesuffix("/kernel"): x for path, x in flat.items() if path.endswith("kernel")}

    kernels = initial(RPN(64), [jnp.zeros((1, 2, 2, 64))])
    for x in kernels.values():
        assert_std(x, 0.01)
    kernels = initial(BoxHead(80, 64), jnp.zeros((1, 7, 7, 32)))
    assert kernels["hidden_0"].shape == (7, 7, 32, 64)
    stds = {"hidden_0": (2 / (49 * 32 + 64)) ** 0.5, "hidden_1": (2 / 128) ** 0.5, "logits": 0.01, "deltas": 0.001}
    for name, std in stds.items():
        assert_std(kernels[name], std)
    kernels = initial(MaskHead(80, 32), jnp.zeros((1, 14, 14, 64)))
    for name, x in kernels.items():
        fan_out = {"doubling": 4 * 32, "logits": 80}.get(name, 9 * 32)
        assert_std(x, (2 / fan_out) ** 0.5)
