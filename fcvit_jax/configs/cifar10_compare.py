"""FCViT beside other networks of 1.50 to 1.54 million parameters, on CIFAR-10 under one recipe: configs/cifar10.py's.

The networks are fcvit, without_context, convnext and vit:

    python main.py --config=configs/cifar10_compare.py:vit --workdir=runs/vit --config.data.dataset=folder:PATH
    python -m fcvit_jax.visualize curves runs/fcvit runs/without_context runs/convnext runs/vit --output curves.png
"""

from ml_collections import ConfigDict

from fcvit_jax.configs import cifar10
from fcvit_jax.errors import UserError

_COMMON = {"num_classes": 10, "drop_path_rate": 0.0, "dtype": "float32"}
_FCVIT = cifar10.get_config().model.to_dict()
_CONVNEXT = {"name": "convnext_tiny", "depths": (2, 2, 5, 1), "dims": (32, 64, 128, 256), "layer_scale_init": 0.1}
_VIT = {"name": "deit_tiny_patch16_224", "dim": 144, "depth": 6, "heads": 3, "patch_size": 8, "image_size": 64}
NETWORKS = {
    "fcvit": _FCVIT,  # 1,539,002 parameters
    "without_context": _FCVIT | {"use_context": False, "dims": (32, 64, 128, 264)},  # 1,506,828
    "convnext": _CONVNEXT | _COMMON,  # 1,502,314
    "vit": _VIT | _COMMON,  # 1,543,258; 65 tokens of 64 x 64 pixels
}


def get_config(network: str = "fcvit"):
    """The recipe of configs/cifar10.py with one of `NETWORKS`."""
    if network not in NETWORKS:
        raise UserError(f"{network!r} is none of the networks compared: choose from {', '.join(NETWORKS)}.")
    config = cifar10.get_config()
    with config.unlocked():
        config.model = ConfigDict(NETWORKS[network])
    return config
