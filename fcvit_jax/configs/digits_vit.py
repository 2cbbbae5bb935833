"""A narrow ViT on the handwritten digits, to be compared with the FCViT of configs/digits.py.

python main.py --config=configs/digits_vit.py --workdir=runs/digits_vit
"""

from ml_collections import ConfigDict

from fcvit_jax.configs import digits


def get_config():
    """The recipe of configs/digits.py; patches of 4 x 4 pixels make 64 tokens."""
    config = digits.get_config()
    with config.unlocked():
        config.model = ConfigDict({"name": "deit_tiny_patch16_224", "num_classes": 10})
        config.model.update(dim=64, depth=4, heads=4, patch_size=4, image_size=32, drop_path_rate=0.0, dtype="float32")
    return config
