"""The mesh and the rule by which a state is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fcvit_jax.errors import UserError
from fcvit_jax.sharding import bytes_per_device, global_batch, make_mesh, state_shardings


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
