"""A miniature ImageNet: generated tar files of a few JPEGs, prepared by TFDS's own `imagenet2012` builder."""

import io
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image

WNIDS = {"n01440764": 0, "n01443537": 1, "n02119022": 277, "n15075141": 999}
NUM_TRAIN, NUM_EVAL, NUM_TEST = 40, 21, 2


def jpeg(rng, width=None, height=None):
    """A smooth random image, of random size where none is given, as JPEG bytes."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    size = width or int(rng.integers(40, 80)), height or int(rng.integers(40, 80))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    return file.getvalue()


def prepare_code(data_dir, file_format):
    """Python code that prepares imagenet2012 from the tar files in DATA_DIR/downloads/manual; it needs TensorFlow."""
    return (
        "import tensorflow_datasets as tfds; tfds.builder('imagenet2012',"
        f" data_dir='{data_dir}', file_format='{file_format}').download_and_prepare()"
    )


def build(folder):
    """Prepares it as array_record in `folder`/array_record and as tfrecord in `folder`/tfrecord, in a process apart."""
    rng = np.random.default_rng(0)
    train = {
        f"{wnid}.tar": _tar({f"{wnid}_{i}.JPEG": jpeg(rng) for i in range(NUM_TRAIN // len(WNIDS))}) for wnid in WNIDS
    }
    tars = {
        "train": _tar(train),
        "val": _tar({f"ILSVRC2012_val_{i + 1:08}.JPEG": jpeg(rng) for i in range(NUM_EVAL)}),
        "test": _tar({f"ILSVRC2012_test_{i + 1:08}.JPEG": jpeg(rng) for i in range(NUM_TEST)}),
    }
    code = []
    for file_format in ("array_record", "tfrecord"):
        manual = folder / file_format / "downloads" / "manual"
        manual.mkdir(parents=True)
        for name, content in tars.items():
            (manual / f"ILSVRC2012_img_{name}.tar").write_bytes(content)
        code.append(prepare_code(folder / file_format, file_format))
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def _tar(files):
    tar_file = io.BytesIO()
    with tarfile.open(fileobj=tar_file, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return tar_file.getvalue()
