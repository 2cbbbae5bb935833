"""A narrow FCViT on the 1,797 handwritten digits of scikit-learn: real images, nothing to download, minutes on a CPU.

python main.py --config=configs/digits.py --workdir=runs/digits
"""

from fcvit_jax.configs import imagenet


def get_config():
    """The ImageNet recipe without flips, cutmix, strong crops and a long warm-up, which do not suit digits."""
    config = imagenet.get_config()
    config.data.update(dataset="digits", batch_size=64, image_size=32, workers=0)
    config.data.update(crop_scale=(0.5, 1.0), flip=0.0, rand_augment=(), crop_pct=1.0)
    config.mixing.update(mixup_alpha=0.4, cutmix_alpha=0.0, erase_prob=0.1)
    config.optim.update(lr=3e-3, lr_batch_size=0, warmup_epochs=2, cooldown_epochs=0)
    config.train.update(epochs=40, eval_every=5)
    with config.unlocked():
        config.model.update(name="fcvit_tiny", num_classes=10, drop_path_rate=0.0, bn_group_size=64, dtype="float32")
        config.model.update(depths=(1, 1, 1, 1), dims=(16, 32, 64, 64), mlp_ratios=(4, 4, 4, 4))
        config.model.layer_scale_init = 0.1  # a run this short has no time to grow it from 1e-5
    return config
