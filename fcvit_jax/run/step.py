"""The training step: one update of the weights, the same for every task."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from fcvit_jax import freezing, optim
from fcvit_jax.devices.cpu import compiler_options
from fcvit_jax.devices.sharding import MIN_SHARDED_SIZE, batch_sharding, state_shardings
from fcvit_jax.run.state import TrainState

Batch = Mapping[str, jax.Array]


@functools.partial(
    jax.jit,
    static_argnames=(
        *("model", "tx", "schedule", "prepare", "loss", "mesh", "ema_decay", "ema_warmup", "freeze"),
        *("accumulate", "group_size"),
    ),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    prepare: Callable[[jax.Array, Batch], Batch],
    loss: Callable,
    mesh: Mesh,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    freeze: tuple[str, ...] = (),
    accumulate: int = 1,
    group_size: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the weights.

    Args:
      state: the training state; its buffers are reused.
      batch: arrays (N, ...) by name, sharded over the mesh.
      key: the run's random key; the step is folded in here.
      model: the network.
      tx: the optimiser.
      schedule: its learning rate, step -> rate, to be reported.
      prepare: the function that the task's `make_prepare` makes.
      loss: the task's `loss`.
      mesh: the devices.
      ema_decay: decay of the moving averages, where the state holds them.
      ema_warmup: whether it begins smaller, see `optim.update_ema`.
      freeze: paths under which nothing changes, see `freezing.frozen`; those of the optimiser. Batch statistics there
        are the running ones, as in evaluation.
      accumulate: parts of the batch that go through the network one after the other, to save memory.
      group_size: examples that must stay together in a part, since they share batch statistics; None or 0: any.

    Returns:
      The new state, and float32 scalars: "loss", what else the task's loss reports, "grad_norm" (before clipping), and
      "lr".
    """
    prepare_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
    batch = prepare(prepare_key, batch)
    params = state.variables["params"]
    if mesh.size > 1:
        # Without this barrier, XLA on GPUs fuses each weight's update into the backward pass, which forces one
        # all-reduce per layer instead of one for all gradients.
        params = jax.lax.optimization_barrier(params)

    def loss_fn(params: Any, batch: Batch, key: jax.Array):
        variables = state.variables | {"params": freezing.stop_gradients(params, freeze)}
        with freezing.frozen_statistics(freeze):
            return loss(model, variables, batch, key)

    def one_part(batch: Batch, key: jax.Array):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for the depthwise convolutions
            return jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)

    if accumulate == 1:
        (value, (updated, scalars)), grads = one_part(batch, loss_key)
    else:
        (value, (updated, scalars)), grads = _mean_over_parts(
            one_part, batch, jax.random.split(loss_key, accumulate), group_size or 1, mesh
        )

    # Sharded like the state that they update; otherwise fsdp would gather them once more, for their norm.
    grads = jax.lax.with_sharding_constraint(grads, state_shardings(grads, mesh))
    updates, opt_state = tx.update(grads, state.opt_state, state.variables["params"])
    variables = state.variables | updated | {"params": optax.apply_updates(state.variables["params"], updates)}
    variables = freezing.keep(state.variables, variables, freeze)
    ema = state.ema
    if ema is not None:
        ema = optim.update_ema(ema, variables, ema_decay, state.step if ema_warmup else None)
        ema = freezing.keep(state.ema, ema, freeze)  # not even rounded
    new = TrainState(step=state.step + 1, variables=variables, opt_state=opt_state, ema=ema)
    new = jax.lax.with_sharding_constraint(new, state_shardings(new, mesh))
    return new, {"loss": value, **scalars, "grad_norm": _global_norm(grads), "lr": schedule(state.step)}


def _mean_over_parts(one_part: Callable, batch: Batch, keys: jax.Array, group_size: int, mesh: Mesh) -> Any:
    """The mean of what `one_part` returns for each of as many parts of a batch as there are keys."""
    parts = len(keys)
    # Each part takes whole groups, and of every device's own rows where it has enough of them.
    batch = jax.tree.map(
        lambda x: x.reshape(-1, parts, group_size, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:]),
        dict(batch),
    )
    # Without this constraint XLA splits the axis of the parts over the devices, and each computes every part in full.
    batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh, axis=1))
    first = jax.tree.map(lambda x: x[0], (batch, keys))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one_part, *first))
    sums, _ = jax.lax.scan(
        lambda sums, part: (jax.tree.map(jnp.add, sums, one_part(*part)), None), zeros, (batch, keys)
    )
    # All parts start from the same running statistics, so that their mean is what one large batch gives.
    return jax.tree.map(lambda x: x / parts, sums)


def _global_norm(grads: Any) -> jax.Array:
    """The root of the sum of all squares, () float32."""
    leaves = [g.astype(jnp.float32) for g in jax.tree.leaves(grads)]
    # Those that fsdp does not split are joined first, since XLA takes long to compile hundreds of sums.
    small = jnp.concatenate([jnp.zeros(1), *(g.ravel() for g in leaves if g.size < MIN_SHARDED_SIZE)])
    large = [g for g in leaves if g.size >= MIN_SHARDED_SIZE]
    return jnp.sqrt(jnp.stack([jnp.square(g).sum() for g in (small, *large)]).sum())


class CompiledStep:
    """The training step, compiled ahead of time for every shape that batches have.

    Args:
      state: shapes, dtypes and shardings of the training state.
      batches: shapes and dtypes of the batches, one entry for each shape.
      key: the run's random key.
      mesh: the devices.
      **fixed: the other arguments of `train_step`.
    """

    def __init__(
        self, state: TrainState, batches: Sequence[Mapping[str, jax.ShapeDtypeStruct]], key: jax.Array, **fixed: Any
    ):
        self._key = key
        self._programs = {}
        rows, options = batch_sharding(fixed["mesh"]), compiler_options(fixed["mesh"])
        for batch in batches:
            batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in batch.items()}
            self._programs[_shapes(batch)] = train_step.lower(state, batch, key, **fixed).compile(options)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Runs the step: as `train_step`."""
        return self._programs[_shapes(batch)](state, batch, self._key)


def _shapes(batch: Mapping[str, Any]) -> tuple:
    return tuple(sorted((name, x.shape) for name, x in batch.items()))
