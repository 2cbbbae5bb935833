"""How training and evaluation change images: one image at a time on the CPU, and whole batches on the device."""

from fcvit_jax.augment.images import (
    IMAGE_SUFFIXES,
    check_augmentation,
    crop_box,
    decode,
    eval_geometry,
    eval_transform,
    is_image_file,
    train_transform,
)
from fcvit_jax.augment.randaugment import INCREASING, OPS, apply_op, draw_ops

__all__ = [
    "IMAGE_SUFFIXES",
    "INCREASING",
    "OPS",
    "apply_op",
    "check_augmentation",
    "crop_box",
    "decode",
    "draw_ops",
    "eval_geometry",
    "eval_transform",
    "is_image_file",
    "train_transform",
]
