"""What a run carries from step to step, and what is saved."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from fcvit_jax.devices.sharding import state_shardings


@flax.struct.dataclass
class TrainState:
    """The training state; randomness needs no place in it, since keys come from the seed and the step.

    Attributes:
      step: updates done so far, () int32.
      variables: of the network: "params", which the optimiser trains, and the collections that its `loss` updates.
      opt_state: state of the optimiser.
      ema: the exponential moving averages of the variables, float32, or None where EMA is off.
    """

    step: jax.Array
    variables: dict[str, Any]
    opt_state: Any
    ema: Any

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that evaluation uses: the averages where EMA is on."""
        return self.ema or self.variables


def init_variables(init: Callable, model: nn.Module, mesh: Mesh, seed: int) -> dict[str, Any]:
    """Draws the initial variables, each shard on the device where it belongs.

    Args:
      init: the task's `init_variables`.
      model: the network.
      mesh: the devices.
      seed: of the random draws.
    """
    # On a CPU, optimising such a program takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None

    def jit(function: Callable, *args: Any) -> Callable:
        shardings = state_shardings(jax.eval_shape(function, *args), mesh)
        return jax.jit(function, out_shardings=shardings, compiler_options=options)

    return init(model, jax.random.key(seed), jit)


def abstract_state(
    init: Callable, model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, *, ema: bool
) -> TrainState:
    """The shapes, dtypes and shardings of the training state, as a `TrainState` of `jax.ShapeDtypeStruct`.

    Args:
      init: the task's `init_variables`.
      model: the network.
      tx: the optimiser.
      mesh: the devices.
      ema: whether the state holds moving averages.
    """
    variables = jax.eval_shape(functools.partial(init, model), jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(_start, tx, ema), variables)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(shapes, mesh)
    )


def create_state(variables: dict[str, Any], tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """Makes the training state that a run begins with.

    Args:
      variables: of JAX or NumPy arrays, the same on every process.
      tx: the optimiser.
      abstract: the state's shapes, dtypes and shardings, as `abstract_state` gives them.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    variables = jax.device_put(variables, shardings.variables)
    start = functools.partial(_start, tx, abstract.ema is not None)
    return jax.jit(start, out_shardings=shardings)(variables)


def _start(tx: optax.GradientTransformation, ema: bool, variables: dict[str, Any]) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), variables) if ema else None,
    )
