"""What a run carries from step to step, and what is saved."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fcvit_jax.model import FCViT
from fcvit_jax.sharding import state_shardings


@flax.struct.dataclass
class TrainState:
    """The training state; randomness needs no place in it, since keys are folded from the seed and the step.

    Attributes:
      step: updates done so far, () int32.
      params: parameters of the model.
      batch_stats: running statistics of its BatchNorm layers.
      opt_state: state of the optimiser.
      ema: {"params": ..., "batch_stats": ...}, the exponential moving averages, or None where EMA is off.
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


def _init(model: FCViT, tx: optax.GradientTransformation, ema: bool, image_size: int, seed: int) -> TrainState:
    variables = model.init(jax.random.key(seed), jnp.zeros((1, image_size, image_size, 3)))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(jnp.copy, variables) if ema else None,
    )


def abstract_state(
    model: FCViT, tx: optax.GradientTransformation, mesh: Mesh, *, ema: bool, image_size: int
) -> TrainState:
    """The shapes, dtypes and shardings of the training state, as a `TrainState` of `jax.ShapeDtypeStruct`."""
    shapes = jax.eval_shape(lambda: _init(model, tx, ema, image_size, 0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(shapes, mesh)
    )


def create_state(
    model: FCViT, tx: optax.GradientTransformation, mesh: Mesh, *, ema: bool, image_size: int, seed: int
) -> TrainState:
    """Initialises the training state, each shard on the device where it belongs.

    Args:
      model: the network.
      tx: the optimiser.
      mesh: the devices.
      ema: keep exponential moving averages.
      image_size: height and width of the images in pixels.
      seed: of the initial weights.
    """
    abstract = abstract_state(model, tx, mesh, ema=ema, image_size=image_size)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # It runs once: on a CPU, optimising hundreds of random draws takes longer than making them.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    init = jax.jit(lambda: _init(model, tx, ema, image_size, seed), out_shardings=shardings, compiler_options=options)
    return init()
