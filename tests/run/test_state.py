"""The training state that a run starts from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fcvit_jax import networks
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.networks.fcvit import create_model
from fcvit_jax.run.state import abstract_state, create_state, init_variables


@pytest.mark.usefixtures("shared_programs")
def test_the_first_state_is_as_the_model_initialises_it_and_blocks_are_drawn_apart():
    quick = {"dims": (16, 16, 16, 32), "kernel_sizes": (3,), "use_context": False}
    model = create_model("fcvit_tiny", num_classes=3, depths=(2, 0, 0, 3), **quick)
    tx, mesh = optax.adam(1e-3), make_mesh(data=2, fsdp=4)
    abstract = abstract_state(networks.init_variables, model, tx, mesh, ema=True)
    state = create_state(init_variables(networks.init_variables, model, mesh, seed=7), tx, abstract)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert jax.tree.map(jnp.shape, state.eval_variables) == jax.tree.map(lambda x: x.shape, variables)

    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    assert int(state.step) == 0 and all((x == 0).all() for x in jax.tree.leaves(state.opt_state))
    chex.assert_trees_all_equal(state.ema, state.variables)

    def drawn(params):
        """All kernels of a block, in units of their standard deviation."""
        kernels = [x for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]
        return np.concatenate([np.ravel(x) / np.std(x) for x in kernels])

    for s, depth in enumerate(model.depths):
        blocks = [drawn(state.variables["params"][f"stages_{s}_block_{i}"]) for i in range(depth)]
        if depth > 1:
            off_diagonal = np.corrcoef(blocks)[~np.eye(depth, dtype=bool)]
            assert abs(off_diagonal).max() < 5 / blocks[0].size ** 0.5
    shallow = model.clone(depths=(1, 0, 0, 1))
    firsts = jax.jit(lambda: shallow.init(jax.random.key(7), jnp.zeros((1, 32, 32, 3)))["params"])()
    chex.assert_trees_all_close(
        {name: state.variables["params"][name] for name in firsts}, firsts, rtol=1e-6, atol=1e-6
    )


def test_averages_are_float32_whatever_the_parameters_are():
    """As each step leaves them, or the second would be compiled anew and a checkpoint could not be read."""
    model = create_model("fcvit_tiny", num_classes=3, depths=(0, 0, 0, 1), param_dtype=jnp.bfloat16)
    state = abstract_state(networks.init_variables, model, optax.adam(1e-3), make_mesh(), ema=True)
    assert {x.dtype for x in jax.tree.leaves(state.variables["params"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
