"""DeiT-S, the Vision Transformer, on ImageNet-1k with FCViT's recipe: DeiT's but for repeated augmentation.

python main.py --config=configs/deit_small.py --workdir=runs/deit --config.data.data_dir=/data/tensorflow_datasets
"""

from fcvit_jax.configs import imagenet


def get_config():
    """The ImageNet recipe with this network's drop-path rate and evaluation crop."""
    return imagenet.get_config("deit_small_patch16_224")
