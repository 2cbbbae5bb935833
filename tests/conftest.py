"""Eight simulated CPU devices, set up before anything imports jax, and absl flags that Grain's workers can read."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()

import pytest  # noqa: E402
from imagenet_mini import build  # noqa: E402

from fcvit_jax import digits  # noqa: E402


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A TFDS data_dir with the digits."""
    data_dir = str(tmp_path_factory.mktemp("digits"))
    digits.prepare(data_dir)
    return data_dir


@pytest.fixture(scope="session")
def imagenet_mini_dirs(tmp_path_factory):
    """TFDS data_dirs with a miniature imagenet2012, in the folders array_record and tfrecord."""
    folder = tmp_path_factory.mktemp("imagenet")
    build(folder)
    return folder


@pytest.fixture(scope="session")
def imagenet_mini(imagenet_mini_dirs):
    """A TFDS data_dir with a miniature imagenet2012 as array_record: 40 training and 21 validation images."""
    return str(imagenet_mini_dirs / "array_record")
