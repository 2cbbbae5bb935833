"""The mesh and the rule by which a state is split."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.data_parallel import collectives
from benchmarks.measure import Step
from fcvit_jax.depthwise import depthwise_conv
from fcvit_jax.devices.sharding import bytes_per_device, global_batch, make_mesh, state_shardings
from fcvit_jax.errors import UserError
from fcvit_jax.networks import layers
from fcvit_jax.networks.fcvit import VARIANTS


def test_meshes_that_do_not_fit_are_refused():
    assert make_mesh().shape == {"data": 8, "fsdp": 1}
    assert make_mesh(fsdp=4).shape == {"data": 2, "fsdp": 4}
    assert make_mesh(data=3).size == 3
    with pytest.raises(UserError, match="needs 16 devices, but there are 8: set mesh.data=-1"):
        make_mesh(data=16)
    for sizes in ({"fsdp": 0}, {"data": 0}, {"data": -2}):
        with pytest.raises(UserError, match="give at least 1"):
            make_mesh(**sizes)


def test_the_largest_dimension_that_fsdp_divides_is_split():
    mesh = make_mesh(data=2, fsdp=4)
    shapes = {"wide": (3, 100, 400), "odd": (402, 100), "none": (81, 81), "small": (1023,), "least": (1024,)}
    specs = {"wide": P(None, None, "fsdp"), "odd": P(None, "fsdp"), "none": P(), "small": P(), "least": P("fsdp")}
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    shardings = state_shardings(state, mesh)
    assert {name: sharding.spec for name, sharding in shardings.items()} == specs
    assert {s.spec for s in state_shardings(state, make_mesh()).values()} == {P()}

    state = {name: jax.device_put(jnp.zeros(shape), shardings[name]) for name, shape in shapes.items()}
    held = sum(x.addressable_shards[0].data.nbytes for x in state.values())
    assert bytes_per_device(state) == held == 4 * (3 * 100 * 100 + 402 * 25 + 81 * 81 + 1023 + 256)


def test_every_device_has_its_rows_of_the_batch():
    batch = {"label": np.arange(16, dtype=np.int32)}
    rows = global_batch(batch, make_mesh(data=2, fsdp=4))["label"]
    np.testing.assert_array_equal(rows, batch["label"])
    assert [shard.data.tolist() for shard in rows.addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]


@pytest.fixture
def narrow(monkeypatch):
    """The name of a variant with a single block and a single 11x11 convolution."""
    sizes = {"depths": (1, 0, 0, 0), "dims": (32, 64, 64, 64), "mlp_ratios": (4, 4, 4, 4), "kernel_sizes": (11,)}
    monkeypatch.setitem(VARIANTS, "narrow", sizes)
    return "narrow"


@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize("impl", [None, "toeplitz"])  # as on CPUs and as on TPUs
def test_what_a_step_sends(impl, narrow, monkeypatch):
    """One reduction of the gradients; with `fsdp` tensors of the state as well, but nothing much larger."""
    monkeypatch.setattr(layers, "depthwise_conv", partial(depthwise_conv, impl=impl))
    jax.clear_caches()  # of what was traced with the other implementation
    sent = {}
    for fsdp in (1, 4):
        step = Step(narrow, 16, 64, "float32", make_mesh(data=4 // fsdp, fsdp=fsdp), group_size=4)
        lowered = step.lower()
        sent[fsdp] = collectives(lowered.compile().as_text())
        state = step.abstract_state()
        # XLA for GPUs reduces the gradients together only if no weight can be updated while another is still in use.
        barriers = re.findall(r":(\d+) = stablehlo.optimization_barrier", lowered.as_text())
        assert str(len(jax.tree.leaves(state.variables["params"]))) in barriers
    jax.clear_caches()

    params, statistics = (
        sum(4 * x.size for x in jax.tree.leaves(tree))
        for tree in (state.variables["params"], state.variables["batch_stats"])
    )
    assert {op["op"] for op in sent[1]} == {"all-reduce"} and not any(op["in_loop"] for op in sent[1])
    assert sum(op["bytes"] for op in sent[1]) <= params + statistics + 4  # and the loss
    assert sum(op["bytes"] for op in sent[4]) < 6 * params


@pytest.mark.usefixtures("shared_programs")
def test_a_batch_in_parts_is_the_same_step_and_every_device_has_its_share_of_each(narrow):
    """Of a part of four images, which are one BatchNorm group, each of four devices has one."""
    step = Step(narrow, 16, 64, "float32", make_mesh(data=4), group_size=4)
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 256, shape, dtype) for name, (shape, dtype) in step.batch_shapes.items()}
    state = jax.tree.map(lambda x: rng.normal(0.5, 0.1, x.shape).astype(x.dtype), step.abstract_state())
    results = {}
    for accumulate in (1, 4):
        step.static["accumulate"] = accumulate
        compiled = step.lower().compile()
        # The draws of mixing may be gathered, images may not.
        assert all(op["bytes"] < 1000 for op in collectives(compiled.as_text()) if op["op"] == "all-gather")
        start = jax.device_put(state, state_shardings(state, step.mesh))
        new, metrics = compiled(start, global_batch(batch, step.mesh), jax.random.key(0))
        results[accumulate] = metrics, new.variables["batch_stats"], optax.tree.get(new.opt_state, "mu")
    chex.assert_trees_all_close(results[4], results[1], rtol=1e-4, atol=1e-6)
