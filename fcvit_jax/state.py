"""What a run carries from step to step, and what is saved."""

import functools
from collections.abc import Sequence
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


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once, for the shapes and to be compiled
def _init_first_blocks(model: FCViT, image_size: int, key: jax.Array) -> dict[str, Any]:
    """As `model.init`, but with no more than one block in each stage."""
    model = model.clone(depths=tuple(min(depth, 1) for depth in model.depths))
    return model.init(key, jnp.zeros((1, image_size, image_size, 3)))


def _join(model: FCViT, draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The model's variables: draw i of `_init_first_blocks` gives block i of each stage, draw 0 also all the rest."""
    params = {name: x for name, x in draws[0]["params"].items() if not name.startswith("stages")}
    for s, depth in enumerate(model.depths):
        for i in range(depth):
            params[f"stages_{s}_block_{i}"] = draws[i]["params"][f"stages_{s}_block_0"]
    return {"params": params, "batch_stats": draws[0]["batch_stats"]}


def _start(tx: optax.GradientTransformation, ema: bool, variables: dict[str, Any]) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), variables) if ema else None,
    )


def abstract_state(
    model: FCViT, tx: optax.GradientTransformation, mesh: Mesh, *, ema: bool, image_size: int
) -> TrainState:
    """The shapes, dtypes and shardings of the training state, as a `TrainState` of `jax.ShapeDtypeStruct`."""
    draw = _init_first_blocks.eval_shape(model, image_size, jax.random.key(0))
    variables = _join(model, [draw] * max(1, *model.depths))
    shapes = jax.eval_shape(functools.partial(_start, tx, ema), variables)
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
    key = jax.random.key(seed)
    keys = [key, *(jax.random.fold_in(key, i) for i in range(1, max(model.depths)))]
    draw = _init_first_blocks.eval_shape(model, image_size, key)
    abstract = abstract_state(model, tx, mesh, ema=ema, image_size=image_size)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # One program for all draws: XLA takes as long for hundreds of them as for the training step. On a CPU, optimising
    # it takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    jit = functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=options)
    init = jit(_init_first_blocks, out_shardings=state_shardings(draw, mesh))
    start = jit(_start, out_shardings=shardings, donate_argnums=2)
    return start(tx, ema, _join(model, [init(model, image_size, key) for key in keys]))
