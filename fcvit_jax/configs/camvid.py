"""A narrow Semantic FPN on CamVid's 367 photographs of streets, 11 classes: a quarter of an hour on two CPU cores.

    python main.py --config=configs/camvid.py --workdir=runs/camvid --config.data.dataset=ade:PATH \
        --config.init_from=runs/cifar10/best

PATH is a folder laid out like ADE20K's, whose masks have 0 where a pixel is unlabelled and 1 to 11 for the classes.
Without `init_from` the run starts from new weights. `--mode=eval --config.data.eval_split=test` evaluates the test
images.
"""

from ml_collections import config_dict

from fcvit_jax.configs import ade20k, cifar10


def get_config():
    """ADE20K's recipe with the network of configs/cifar10.py, and crops of 256 pixels from images of 480 x 360."""
    config = ade20k.get_config("fcvit_tiny")
    config.data.update(dataset="ade:camvid11", batch_size=8, crop_size=256, long=480, short=360, scale=(0.75, 1.5))
    config.optim.update(lr=2e-3)
    config.train.update(epochs=60, steps=config_dict.placeholder(int), eval_every=10)
    config.model.update(num_classes=11, neck_channels=64, head_channels=64)
    config.checkpoint.save_every = 200
    with config.unlocked():
        config.model.update(cifar10.NETWORK)
    return config
