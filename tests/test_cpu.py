import os
import resource
import sys

import jax
import jax.numpy as jnp
import pytest

from fcvit_jax.cpu import tune_cpu


def test_the_users_own_vector_width_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true")
    tune_cpu()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_use_fusion_emitters=true --xla_cpu_prefer_vector_width=512"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    tune_cpu()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_prefer_vector_width=256"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is told")
def test_programs_keep_their_memory_from_call_to_call():
    add = jax.jit(lambda x: x + 1)
    x = jnp.ones(2**24)  # 64 MiB
    pages = x.nbytes // resource.getpagesize()
    for _ in range(3):
        jax.block_until_ready(add(x))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        jax.block_until_ready(add(x))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages
