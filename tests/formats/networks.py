"""Small networks of every kind that is exported, with weights that none of their parts hides."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import METADATA, TINY, tiny_variables

from fcvit_jax import create_model, create_segmenter
from fcvit_jax.networks.fcvit import abstract_variables
from fcvit_jax.tasks import classification, segmentation

NAMES = ("fcvit", "deit", "convnext", "segmenter")

# Functions of images that no format but JAX's own can hold, and what is said of each.
UNKNOWN = (
    (lambda x: jnp.sort(x, axis=1), "the operation sort"),
    (lambda x: (x, x), "Detectors cannot"),
    (lambda x: jnp.arange(256.0)[x], "computed indices"),
    (lambda x: jnp.mean(x, 0), "the operation dim_as_value"),
)


def program(name):
    """The function to export, and the shape of its images."""
    if name == "fcvit":
        return classification.make_program(create_model(**TINY), tiny_variables(), METADATA)
    if name == "deit":  # whose positions are resized, from 2 x 2 to 3 x 3 patches
        model = create_model("deit_tiny_distilled_patch16_224", num_classes=3, dim=32, depth=2, heads=2, image_size=32)
        return classification.make_program(model, _variables(model), {"image_size": 48})
    if name == "convnext":
        model = create_model("convnext_tiny", num_classes=3, depths=(1, 0, 0, 1), dims=(8, 16, 16, 32))
        return classification.make_program(model, _variables(model), {"image_size": 64})
    fields = {"depths": (1, 0, 0, 1), "dims": (16, 16, 16, 32), "neck_channels": 8, "head_channels": 8}
    model = create_segmenter("fcvit_tiny", num_classes=3, **fields)
    size = {"long": 96, "short": 32}
    return segmentation.make_program(model, _variables(model), size, size=(40, 56))


def images_of(shape, count):
    return np.random.default_rng(count).integers(0, 256, (count, *shape.shape[1:]), np.uint8)


def _variables(model):
    """Scales and variances near 1, all else of the size that keeps signals of the same size."""
    rng = np.random.default_rng(0)

    def values(path, leaf):
        name = path[-1].key
        if "scale" in name or name == "var":
            return np.exp(rng.normal(0, 0.3, leaf.shape)).astype(np.float32)
        inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        return rng.normal(0, max(inputs, 1) ** -0.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, abstract_variables(model))
