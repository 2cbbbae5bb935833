"""Evaluation of a classifier: sums over the examples that count, against NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.networks.normalize import MEAN, STD
from fcvit_jax.tasks import classification


@dataclasses.dataclass(frozen=True)
class FirstPixel:
    """A network whose logits are its variables plus the normalised first pixel, one class for each channel."""

    def clone(self, **_):
        return self

    mean, std = MEAN, STD

    def apply(self, variables, images):
        return variables["logits"] + images[:, 0, 0] @ variables["kernel"]


def expected(logits, label, mask):
    order = np.argsort(-logits, axis=1, kind="stable")  # of equal logits the first class leads, as in argmax
    rank = np.argmax(order == label[:, None], axis=1)
    exp = np.exp(logits - logits.max(1, keepdims=True))
    loss = -np.log(exp[np.arange(len(label)), label] / exp.sum(1))
    return {
        "loss": loss[mask].sum(),
        "top1": (rank < 1)[mask].sum(),
        "top5": (rank < 5)[mask].sum(),
        "count": mask.sum(),
    }


@pytest.mark.parametrize("classes", [3, 12])
def test_sums_equal_numpys(classes):
    rng = np.random.default_rng(classes)
    images = rng.integers(0, 256, (64, 4, 4, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    kernel = rng.normal(size=(3, classes))
    own = rng.integers(-2, 3, (64, classes))
    batch = {"image": images, "label": rng.integers(0, classes, 64), "mask": rng.random(64) < 0.7}
    for weights, logits in ((kernel, own + (images[:, 0, 0] - mean) / std @ kernel), (0 * kernel, own * 1.0)):
        variables = {"logits": jnp.float32(own), "kernel": jnp.float32(weights)}  # the second: with many ties
        sums = classification.eval_step(FirstPixel(), variables, batch)
        for name, value in expected(logits, batch["label"], batch["mask"]).items():
            np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)


def test_a_logit_that_is_no_number_ranks_first():
    batch = {"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.array([1, 0]), "mask": np.ones(2, bool)}
    logits = jnp.array([[np.nan, 5.0], [np.nan, 5.0]])
    sums = classification.eval_step(FirstPixel(), {"logits": logits, "kernel": jnp.zeros((3, 2))}, batch)
    assert (sums["top1"], sums["top5"]) == (0, 2)


def test_means_are_over_all_batches():
    rng = np.random.default_rng(0)
    variables = {"logits": jnp.zeros((8, 3)), "kernel": jnp.eye(3)}
    batches = [
        {
            "image": rng.integers(0, 256, (8, 4, 4, 3), np.uint8),
            "label": rng.integers(0, 3, 8).astype(np.int32),
            "mask": np.arange(8) < kept,
        }
        for kept in (8, 8, 3)
    ]
    outputs = [classification.eval_step(FirstPixel(), variables, batch) for batch in batches]
    result = classification.finish(outputs, None)
    assert result["count"] == 19
    for name in ("loss", "top1", "top5"):
        assert result[name] == pytest.approx(sum(float(x[name]) for x in outputs) / 19)
