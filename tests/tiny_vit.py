"""A small ViT with the mean of `vit_*`, for tests of the tools; with as many blocks as sort wrongly by their names."""

import jax
import numpy as np

from fcvit_jax.networks.fcvit import abstract_variables
from fcvit_jax.networks.vit import create_vit
from fcvit_jax.run.checkpoint import save_variables

FIELDS = {"name": "vit_tiny_patch16_224", "num_classes": 3, "dim": 64, "depth": 11, "heads": 2}
FIELDS |= {"patch_size": 8, "image_size": 24, "mlp_ratio": 1}
METADATA = {"model": FIELDS, "class_names": ["ant", "bee", "cat"], "image_size": 24, "crop_pct": 0.8}


def model_and_variables():
    """The network and random variables: weights of layers keep the size of what comes in, positions are near 1."""
    model, rng = create_vit(**FIELDS), np.random.default_rng(0)

    def values(path, leaf):
        name = str(path[-1].key)
        size = np.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.5
        return (rng.normal(0, size, leaf.shape) + (name == "scale")).astype(np.float32)

    return model, jax.tree.map_with_path(values, abstract_variables(model))


def save_vit(path):
    """Writes them to a new folder."""
    save_variables(path, model_and_variables()[1], METADATA)
    return path


def pixels_of(images):
    """What the network takes of uint8 images."""
    return (images.astype(np.float32) / 255 - 0.5) / 0.5
