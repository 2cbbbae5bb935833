"""Eight simulated CPU devices, set up before anything imports jax, and absl flags that Grain's workers can read."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()
