"""A narrow FCViT on CIFAR-10's 50,000 photographs, enlarged to 64 x 64: about an hour on two CPU cores.

python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.dataset=folder:PATH
"""

from fcvit_jax.configs import imagenet

NETWORK = {
    "depths": (1, 1, 2, 1),
    "dims": (32, 64, 128, 256),
    "mlp_ratios": (4, 4, 4, 4),
    "layer_scale_init": 0.1,  # a run this short has no time to grow it from 1e-5
}


def get_config():
    """The ImageNet recipe without mixing, erasing and RandAugment, which do not suit 20 epochs of small photographs."""
    config = imagenet.get_config()
    # Class folders, such as PATH/train/airplane/0000.jpg; or TFDS's cifar10, with data.eval_split=test.
    config.data.update(dataset="folder:cifar10", batch_size=128, image_size=64)
    config.data.update(crop_scale=(0.4, 1.0), rand_augment=(), crop_pct=1.0)
    config.mixing.update(mixup_alpha=0.0, cutmix_alpha=0.0, erase_prob=0.0)
    config.optim.update(lr=2e-3, lr_batch_size=0, warmup_epochs=1, cooldown_epochs=0, per_step=True)
    config.train.update(epochs=20, log_every=50)
    with config.unlocked():
        config.model.update(name="fcvit_tiny", num_classes=10, drop_path_rate=0.0, dtype="float32")
        config.model.update(NETWORK)
    return config
