"""Parts of a network that are not trained: no update, no decay, no state; statistics as in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, tiny_variables

from fcvit_jax import networks, optim
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import UserError
from fcvit_jax.freezing import freeze, frozen
from fcvit_jax.networks.fcvit import create_model
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.run.state import abstract_state, create_state
from fcvit_jax.run.step import train_step
from fcvit_jax.tasks import classification, segmentation

PARAMS = {
    "backbone": {"stages_0_block_0": {"scale": np.ones(3, np.float32)}, "norm": {"scale": np.ones(3, np.float32)}},
    "block_1": {"kernel": np.ones((3, 2), np.float32)},
    "block_10": {"kernel": np.ones((3, 2), np.float32)},
}
GRADS = jax.tree.map(lambda x: np.full_like(x, 0.5), PARAMS)


@pytest.mark.parametrize(
    "paths, names",
    [
        (["block_1"], ["block_1/kernel"]),
        (["backbone"], ["backbone/stages_0_block_0/scale", "backbone/norm/scale"]),
        (["backbone/stages_0", "block_10/kernel"], ["backbone/stages_0_block_0/scale", "block_10/kernel"]),
        (["stages_0", "back", "norm", "kernel"], []),
        ([], []),
    ],
)
def test_a_path_has_what_is_beneath_it(paths, names):
    found = jax.tree.leaves_with_path(frozen(PARAMS, paths))
    found = [jax.tree_util.keystr(path, simple=True, separator="/") for path, is_frozen in found if is_frozen]
    assert sorted(found) == sorted(names)


@pytest.mark.parametrize("task", [classification, segmentation], ids=lambda task: task.__name__.rpartition(".")[2])
def test_what_is_frozen_has_no_update_no_decay_and_no_state(task):
    usual = {"lr_batch_size": 0, "warmup_epochs": 0} if task is classification else {}
    make = lambda **options: task.make_optimizer(10, 4, 512, 40, lr=0.1, weight_decay=0.5, **usual, **options)[0]  # noqa: E731
    tx, plain = make(freeze=("block_1", "backbone/stages_0")), make()
    state, of_plain = tx.init(PARAMS), plain.init(PARAMS)
    expected, _ = plain.update(GRADS, of_plain, PARAMS)
    updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    for path in (("block_1", "kernel"), ("backbone", "stages_0_block_0", "scale")):
        assert not np.asarray(
            optax.tree.get(updates, path[-1], filtering=lambda p, _, path=path: p[-2].key == path[-2])
        ).any()
    np.testing.assert_allclose(updates["block_10"]["kernel"], expected["block_10"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(updates["backbone"]["norm"]["scale"], expected["backbone"]["norm"]["scale"], rtol=1e-6)
    held, of_all = (sum(np.size(x) for x in jax.tree.leaves(s) if np.ndim(x)) for s in (state, of_plain))
    assert (held, of_all) == (2 * (6 + 3), 2 * (6 + 6 + 3 + 3))


def test_without_paths_the_state_is_as_ever():
    tx = optax.adam(0.1)
    assert freeze(tx, ()) is tx


@pytest.mark.parametrize(
    "paths, message",
    [
        (("head",), "nothing under 'head'; the network has backbone, block_1, block_10"),
        (("backbone", "backbone/stages_1"), "'backbone/stages_1'; backbone has stages_0_block_0, norm"),
        (("backbone/norm/bias/x",), "backbone/norm has scale"),
        (("back",), "nothing under 'back'"),
        (("backbone", "block"), "leaves nothing to train"),
        ("stem", "must be a tuple of paths"),
        ((3,), "must be a tuple of paths"),
    ],
)
def test_paths_that_fit_nothing_are_refused(paths, message):
    with pytest.raises(UserError, match=f"optim.freeze.*{message}"):
        freeze(optax.adam(0.1), paths).init(PARAMS)


def test_a_step_leaves_what_is_frozen_as_it_is_and_its_statistics_are_those_of_evaluation():
    """The loss and the gradients are those of a network with `freeze_bn`, where all of its statistics are frozen."""
    freeze, mesh = ("stem", "downsample", "stages_0"), make_mesh(data=1)
    model, variables = create_model(**TINY | {"bn_group_size": 4}), tiny_variables()
    tx, schedule = optim.make_optimizer(1, 10, 1024, lr=0.1, warmup_epochs=0, weight_decay=0.5, freeze=freeze)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
        "target": np.eye(3, dtype=np.float32)[[0, 1, 2, 0]],
    }

    def prepare(key, batch):
        return {**batch, "image": normalize(batch["image"])}

    fixed = dict(model=model, tx=tx, schedule=schedule, prepare=prepare, loss=classification.loss, mesh=mesh)
    abstract = abstract_state(networks.init_variables, model, tx, mesh, ema=True)
    state = create_state(variables, tx, abstract)
    new, said = train_step(state, batch, jax.random.key(0), **fixed, ema_decay=0.7, freeze=freeze)

    reference = create_model(**TINY | {"bn_group_size": 4, "freeze_bn": True})

    @jax.jit
    def expected(params):
        def loss(params):
            images = prepare(None, batch)["image"]
            logits, _ = reference.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy(logits, batch["target"]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        is_frozen = frozen(params, freeze)
        return value, optax.tree.norm(jax.tree.map(lambda f, g: jnp.where(f, 0, g), is_frozen, grads))

    np.testing.assert_allclose((said["loss"], said["grad_norm"]), expected(variables["params"]), rtol=1e-4)
    for tree in (new.variables, new.ema):
        for name, before in variables.items():
            flat = zip(*(jax.tree.leaves(x) for x in (frozen(before, freeze), before, tree[name])), strict=True)
            assert [np.array_equal(a, b) for is_frozen, a, b in flat] == jax.tree.leaves(frozen(before, freeze))
