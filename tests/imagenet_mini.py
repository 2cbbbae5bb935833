"""A miniature ImageNet: generated tar files of a few JPEGs, prepared by TFDS's own `imagenet2012` builder.

python tests/imagenet_mini.py DATA_DIR FILE_FORMAT  # array_record or tfrecord; needs tensorflow-cpu
"""

import io
import os
import sys
import tarfile

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02119022", "n15075141")  # labels 0, 1, 277, 999
TRAIN_IMAGES = 10  # of each class
EVAL_IMAGES = 21


def jpeg(rng, size=None):
    """A smooth random colour image of `size` (width, height; None: random), as JPEG bytes."""
    width, height = size or rng.integers(40, 80, 2).tolist()
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    return file.getvalue()


def write_tars(folder):
    """Writes ILSVRC2012_img_train.tar (a tar file for each class in it) and ILSVRC2012_img_val.tar into `folder`."""
    rng = np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    with tarfile.open(os.path.join(folder, "ILSVRC2012_img_train.tar"), "w") as train:
        for wnid in WNIDS:
            images = io.BytesIO()
            with tarfile.open(fileobj=images, mode="w") as tar:
                for number in range(TRAIN_IMAGES):
                    _add(tar, f"{wnid}_{number}.JPEG", jpeg(rng))
            _add(train, f"{wnid}.tar", images.getvalue())
    with tarfile.open(os.path.join(folder, "ILSVRC2012_img_val.tar"), "w") as validation:
        for number in range(1, EVAL_IMAGES + 1):
            _add(validation, f"ILSVRC2012_val_{number:08}.JPEG", jpeg(rng))


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    import tensorflow_datasets as tfds

    data_dir, file_format = sys.argv[1:]
    write_tars(os.path.join(data_dir, "downloads", "manual"))
    tfds.builder("imagenet2012", data_dir=data_dir, file_format=file_format).download_and_prepare()
