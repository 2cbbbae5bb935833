"""fcvit_s12 on ImageNet-1k; the original reports 80.9 % top-1 with this recipe.

python main.py --config=configs/fcvit_s12.py --workdir=runs/s12 --config.data.data_dir=/data/tensorflow_datasets
"""

from fcvit_jax.configs import imagenet


def get_config():
    """The ImageNet recipe with this variant's drop-path rate and evaluation crop."""
    return imagenet.get_config("fcvit_s12")
