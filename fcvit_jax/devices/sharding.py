"""The mesh of devices, and the shardings of batches and of the training state."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fcvit_jax.errors import UserError

# Elements of the smallest tensor that is split. Gathering smaller tensors costs more than splitting them saves.
MIN_SHARDED_SIZE = 1024


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """Makes the mesh. Batches are split over both axes, the training state over `fsdp`.

    Args:
      data: size of the first axis; -1: all devices that `fsdp` leaves.
      fsdp: size of the second axis.

    Raises:
      UserError: the sizes do not fit the devices.
    """
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(f"mesh.data={data}, mesh.fsdp={fsdp}: give at least 1, or data=-1 for all devices.")
    # In this order the rows of a process are consecutive in the global batch, for any number of processes.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    all_devices = data == -1 or jax.process_count() > 1
    if data == -1:
        data = max(len(devices) // fsdp, 1)
    used = data * fsdp
    if used > len(devices) or (all_devices and used != len(devices)):
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} needs {used} devices, but there are {len(devices)}: "
            f"set mesh.data=-1 to use them all, and mesh.fsdp to a divisor of {len(devices)}."
        )
    return Mesh(np.array(devices[:used]).reshape(data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding that splits a batch over all devices, along the given axis."""
    return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes the global batch from this process's rows (b, ...) of it."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every tensor of a state: the largest dimension that `fsdp` divides is split.

    A tensor without such a dimension, or of fewer than 1,024 elements, is kept whole on every device.

    Args:
      tree: a pytree of arrays or of `jax.ShapeDtypeStruct`.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(x) -> NamedSharding:
        divisible = [d for d in range(x.ndim) if x.shape[d] % fsdp == 0]
        if fsdp == 1 or x.size < MIN_SHARDED_SIZE or not divisible:
            return NamedSharding(mesh, P())
        largest = max(divisible, key=lambda d: x.shape[d])
        return NamedSharding(mesh, P(*[None] * largest, "fsdp"))

    return jax.tree.map(sharding, tree)


def bytes_per_device(tree: Any) -> int:
    """The bytes that a sharded pytree (of arrays or `jax.ShapeDtypeStruct`) takes on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
