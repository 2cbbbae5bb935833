"""fcvit_tiny on ImageNet-1k; the original reports 74.9 % top-1 with this recipe.

python main.py --config=configs/fcvit_tiny.py --workdir=runs/tiny --config.data.data_dir=/data/tensorflow_datasets
"""

from fcvit_jax.configs import imagenet


def get_config():
    """The ImageNet recipe with this variant's drop-path rate and evaluation crop."""
    return imagenet.get_config("fcvit_tiny")
