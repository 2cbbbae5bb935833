"""The recipe's changes to images: on the host, one image at a time, and on the device, a batch at a time."""

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
from fcvit_jax.augment.randaugment import OPS, apply_op, draw_ops

__all__ = [
    "IMAGE_SUFFIXES",
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
