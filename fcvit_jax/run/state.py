"""What a run carries from step to step, and what is saved."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fcvit_jax.devices.sharding import state_shardings
from fcvit_jax.networks.fcvit import FCViT


@flax.struct.dataclass
class TrainState:
    """The training state; randomness needs no place in it, since keys come from the seed and the step.

    Attributes:
      step: updates done so far, () int32.
      params: parameters of the model.
      batch_stats: running statistics of its BatchNorm layers.
      opt_state: state of the optimiser.
      ema: {"params": ..., "batch_stats": ...}, the exponential moving averages, float32, or None where EMA is off.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that evaluation uses: the averages where EMA is on."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


@functools.partial(jax.jit, static_argnums=0)  # traced once, for the shapes and to be compiled
def _init_first_blocks(model: FCViT, key: jax.Array) -> dict[str, Any]:
    """As `model.init`, but with no more than one block in each stage."""
    model = model.clone(depths=tuple(min(depth, 1) for depth in model.depths))
    return model.init(key, jnp.zeros((1, 32, 32, 3)))


def _join(model: FCViT, draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The model's variables: draw i of `_init_first_blocks` gives block i of each stage, draw 0 also all the rest."""
    params = {name: x for name, x in draws[0]["params"].items() if not name.startswith("stages")}
    for s, depth in enumerate(model.depths):
        for i in range(depth):
            params[f"stages_{s}_block_{i}"] = draws[i]["params"][f"stages_{s}_block_0"]
    return {"params": params, "batch_stats": draws[0]["batch_stats"]}


def init_variables(model: FCViT, mesh: Mesh, seed: int) -> dict[str, Any]:
    """Draws the initial weights, each shard on the device where it belongs.

    Args:
      model: the network.
      mesh: the devices.
      seed: of the random draws.

    Returns:
      {"params": ..., "batch_stats": ...}.
    """
    key = jax.random.key(seed)
    keys = [key, *(jax.random.fold_in(key, i) for i in range(1, max(model.depths)))]
    shardings = state_shardings(_init_first_blocks.eval_shape(model, key), mesh)
    # One program, run once for each block of a stage: compiling the draws of all blocks takes XLA as long as compiling
    # the training step. On a CPU, optimising the program takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    init = jax.jit(_init_first_blocks, static_argnums=0, out_shardings=shardings, compiler_options=options)
    return _join(model, [init(model, key) for key in keys])


def _start(tx: optax.GradientTransformation, ema: bool, variables: dict[str, Any]) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), variables) if ema else None,
    )


def abstract_state(model: FCViT, tx: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> TrainState:
    """The shapes, dtypes and shardings of the training state, as a `TrainState` of `jax.ShapeDtypeStruct`."""
    draw = _init_first_blocks.eval_shape(model, jax.random.key(0))
    variables = _join(model, [draw] * max(1, *model.depths))
    shapes = jax.eval_shape(functools.partial(_start, tx, ema), variables)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(shapes, mesh)
    )


def create_state(variables: dict[str, Any], tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """Makes the training state that a run begins with.

    Args:
      variables: {"params": ..., "batch_stats": ...} of JAX or NumPy arrays, the same on every host.
      tx: the optimiser.
      abstract: the state's shapes, dtypes and shardings, as `abstract_state` gives them.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    variables = jax.device_put(variables, {"params": shardings.params, "batch_stats": shardings.batch_stats})
    start = functools.partial(_start, tx, abstract.ema is not None)
    return jax.jit(start, out_shardings=shardings)(variables)
