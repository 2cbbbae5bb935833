"""Eight simulated CPU devices and quick compilation, set up before anything imports jax; and absl flags for Grain."""

import ctypes
import gc
import os
import secrets
import signal
import socket
from importlib.metadata import version

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, has it ignored
os.environ["JAX_PLATFORMS"] = "cpu"
# Small programs run in no time and compile for long: half as long without LLVM's optimiser, and half of that by XLA's
# older emitters, which JAX 0.10 still has. Processes that the tests start do the same.
OLDER = version("jax").startswith("0.10.")
QUICKLY = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * OLDER
# Compiler options: as by default.
WELL = {"xla_backend_optimization_level": 3} | ({"xla_cpu_use_fusion_emitters": True} if OLDER else {})
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY} --xla_force_host_platform_device_count=8"

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()

import emulator  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from imagenet_mini import build  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from fcvit_jax.data import digits  # noqa: E402
from fcvit_jax.devices.cpu import tune_cpu  # noqa: E402
from fcvit_jax.errors import log, show_log  # noqa: E402

show_log()
log.propagate = True  # for caplog
tune_cpu()  # as main.py does, whose runs are compared with ours bit for bit
# A sixth of the time went into looking for garbage while programs are traced. Each file's is collected after it.
gc.freeze()
gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(items):
    """The longest test first: at the end it would leave other processes with nothing to do."""
    items.sort(key=lambda item: item.path.name != "test_tutorial.py")


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    """Drops a file's compiled programs after it, and returns their memory, which `tune_cpu` has the C library keep."""
    yield
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def free_port():
    """A port of this machine that nothing uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def emulator_url():
    """The address of an emulator of Google Cloud Storage, which all tests share: each takes a folder of its own."""
    with emulator.started(free_port()) as url:
        yield url


@pytest.fixture
def bucket(emulator_url, monkeypatch, request):
    """A folder gs://bucket/TEST of this test alone."""
    emulator.use(monkeypatch, emulator_url)
    return f"gs://{emulator.BUCKET}/{request.node.name.partition('[')[0]}-{secrets.token_hex(4)}"


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


@pytest.fixture(scope="module")
def shared_programs(tmp_path_factory):
    """Compiled programs are kept for all tests and for processes that they start."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has a folder of its own in it
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
    compilation_cache.reset_cache()
