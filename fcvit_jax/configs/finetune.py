"""Fine-tuning on another dataset, from weights trained on ImageNet: the original's or ours, with any number of classes.

python main.py --config=configs/finetune.py --workdir=runs/pets --config.init_from=fcvit_b12.pth.tar
"""

from fcvit_jax.configs import imagenet


def get_config():
    """fcvit_s12 on the 37 breeds of Oxford-IIIT Pet; a new head, at ten times the rate of the rest, for 30 epochs."""
    config = imagenet.get_config()
    config.init_from = "fcvit_b12.pth.tar"  # a .pth, .pth.tar, .npz, or the folder of a run; must exist
    config.model.num_classes = 37
    config.data.update(dataset="oxford_iiit_pet", eval_split="test", batch_size=128, crop_scale=(0.35, 1.0))
    config.mixing.update(mixup_alpha=0.1, erase_prob=0.0)
    config.optim.update(lr=1e-4, lr_batch_size=0, head_lr_multiplier=10.0)
    config.optim.update(warmup_epochs=2, cooldown_epochs=0, per_step=True)
    config.train.epochs = 30
    return config
