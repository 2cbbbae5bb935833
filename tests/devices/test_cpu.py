import os
import subprocess
import sys

import pytest

from fcvit_jax.devices import cpu
from fcvit_jax.devices.cpu import compiler_options, tune_cpu
from fcvit_jax.devices.sharding import make_mesh


def test_the_users_own_vector_width_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true")
    tune_cpu()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_use_fusion_emitters=true --xla_cpu_prefer_vector_width=512"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    tune_cpu()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_prefer_vector_width=256"


def test_a_program_for_cpus_has_options_that_this_jax_knows(monkeypatch):
    mesh = make_mesh()
    assert compiler_options(mesh) == dict([cpu._YNNPACK])  # fails once JAX no longer knows it
    assert compiler_options() == compiler_options(mesh)
    assert cpu.jit(lambda x, factor: factor * x, static_argnames="factor")(2, factor=3) == 6
    monkeypatch.setattr(cpu, "_YNNPACK", ("xla_an_option_of_other_versions", "1"))
    assert compiler_options(mesh) == {}


def test_the_users_own_flag_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE")
    assert compiler_options(make_mesh()) == {}


COUNT_FAULTS = """
import resource
from fcvit_jax.devices.cpu import tune_cpu
tune_cpu()
import jax, jax.numpy as jnp
fill = jax.jit(lambda value: jnp.full(2**29 * 5, value, jnp.uint8))  # glibc's largest threshold is below 2 GiB
for value in range(12):
    jax.block_until_ready(fill(value))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for value in range(12):
    jax.block_until_ready(fill(value))
print((faults() - before) * resource.getpagesize() / (12 * 2**29 * 5))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is told")
def test_programs_keep_their_memory_from_call_to_call():
    # In a process of its own, whose heap no other test has filled.
    faulted = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        env=os.environ | {"XLA_FLAGS": ""},  # with XLA's optimiser, without which filling takes long
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout
    assert float(faulted) < 0.5  # of the memory taken; all of it without
