"""FCViT in JAX/Flax: the model, its training on TPUs and GPUs, and the way to and from the PyTorch original."""

import importlib
import importlib.util

from fcvit_jax.model import VARIANTS, FCViT, create_backbone, create_model

__all__ = [
    "VARIANTS",
    "FCViT",
    "create_backbone",
    "create_model",
    "load_pretrained",
    "train_and_evaluate",
]

# Imported when first used: the model alone needs neither Orbax nor Grain nor TFDS.
_LAZY = {"load_pretrained": "convert", "train_and_evaluate": "train"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"fcvit_jax.{_LAZY[name]}"), name)
    if importlib.util.find_spec(f"fcvit_jax.{name}"):
        return importlib.import_module(f"fcvit_jax.{name}")
    raise AttributeError(f"module 'fcvit_jax' has no attribute {name!r}")
