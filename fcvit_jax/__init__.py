"""FCViT in JAX/Flax: the model, its training on TPUs and GPUs, and the way to and from the PyTorch original."""

import importlib
import importlib.util
import os

from fcvit_jax.errors import show_log
from fcvit_jax.networks import create_model
from fcvit_jax.networks.fcvit import VARIANTS, FCViT, create_backbone
from fcvit_jax.networks.mask_rcnn import create_detector
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.networks.semantic_fpn import create_segmenter

# How Orbax and TFDS reach a bucket must not depend on whether TensorFlow is installed. etils looks once, at first.
os.environ.setdefault("EPATH_USE_TF", "0")

__version__ = "0.2.0"

__all__ = [
    "VARIANTS",
    "FCViT",
    "create_backbone",
    "create_detector",
    "create_model",
    "create_segmenter",
    "load_pretrained",
    "normalize",
    "show_log",
    "train_and_evaluate",
]

# Imported when first used: the networks alone need neither Orbax nor Grain nor TFDS.
_LAZY = {"load_pretrained": "convert", "train_and_evaluate": "train"}
# Modules under the names that they had before they moved into folders.
_MOVED = {
    "blocks": "networks.blocks",
    "checkpoint": "run.checkpoint",
    "config": "run.config",
    "cpu": "devices.cpu",
    "digits": "data.digits",
    "hosts": "devices.hosts",
    "layers": "networks.layers",
    "metrics": "run.record",
    "mixing": "augment.mixing",
    "model": "networks.fcvit",
    "original": "convert.fcvit",
    "sharding": "devices.sharding",
    "sources": "data.sources",
    "state": "run.state",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"fcvit_jax.{_LAZY[name]}"), name)
    if name in _MOVED or importlib.util.find_spec(f"fcvit_jax.{name}"):
        return importlib.import_module(f"fcvit_jax.{_MOVED.get(name, name)}")
    raise AttributeError(f"module 'fcvit_jax' has no attribute {name!r}")
