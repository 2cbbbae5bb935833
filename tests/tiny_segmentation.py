"""A segmentation run of seconds with everything on: crops, colours, BatchNorm groups, averages, evaluation, saves."""

from fcvit_jax.configs import digit_scenes_segmentation
from fcvit_jax.data import scenes

FEW = {"train": 24, "validation": 20}


def get_config(number_of_scenes="all"):
    """With "few", as in --config=tests/tiny_segmentation.py:few, this process, but no worker, has few scenes."""
    if number_of_scenes == "few":
        scenes.NUM_SCENES = FEW
    config = digit_scenes_segmentation.get_config()
    config.data.update(batch_size=8, crop_size=48, long=64, short=64, scale=(0.7, 1.0), flip=0.5, distortion=True)
    config.optim.lr = 0.01
    config.train.update(steps=6, eval_every=1, log_every=1, ema_decay=0.9)  # an epoch has 3 steps
    config.checkpoint.save_every = 2
    config.mesh.data = 1
    config.compilation_cache = False  # the tests share one
    with config.unlocked():
        config.model.update(depths=(1, 0, 0, 0), dims=(8, 8, 16, 16), kernel_sizes=(3,), context_heads=8)
    config.model.update(neck_channels=8, head_channels=8, bn_group_size=4)
    return config
