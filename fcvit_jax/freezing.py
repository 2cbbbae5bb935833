"""Parts of a network that are not trained: `optim.freeze` names them by their paths."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import linen as nn

from fcvit_jax.errors import UserError
from fcvit_jax.networks.layers import BatchNorm


def frozen(tree: Any, paths: Sequence[str]) -> Any:
    """Which arrays are under some paths.

    Example::

        frozen({"stages_0_block_0": {"scale": 1.0}, "head": {"bias": 0.0}}, ["stages_0"])
        # {"stages_0_block_0": {"scale": True}, "head": {"bias": False}}

    Args:
      tree: nested dicts of arrays, such as a network's parameters.
      paths: names joined by "/". The last may be the beginning of a name, up to a "_": "stages_0" has all its blocks,
        and "block_1" not block_10.

    Returns:
      A tree of bool.
    """
    return jax.tree.map_with_path(
        lambda path, _: _is_under(jax.tree_util.keystr(path, simple=True, separator="/"), paths), tree
    )


def _is_under(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith((f"{path}/", f"{path}_")) for path in paths)


def freeze(tx: optax.GradientTransformation, paths: Sequence[str]) -> optax.GradientTransformation:
    """An optimiser that changes nothing under some paths, and keeps no state there.

    Args:
      tx: the optimiser of all other parameters.
      paths: as in `frozen`; without any, `tx` itself is returned.

    Raises:
      UserError: `paths` are not names; `init` raises it if there is nothing under one of them, or nothing beside them.
    """
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths):
        raise UserError(f"optim.freeze={paths!r} must be a tuple of paths, such as ('stem', 'stages_0').")
    if not paths:
        return tx

    def kinds(params: Any) -> Any:
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen(params, paths))

    both = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, kinds)

    def init(params: Any) -> Any:
        for path in paths:
            if not any(jax.tree.leaves(frozen(params, [path]))):
                raise UserError(f"optim.freeze: there is nothing under {path!r}; {_what_is_there(params, path)}.")
        if all(jax.tree.leaves(frozen(params, paths))):
            raise UserError(f"optim.freeze={tuple(paths)} leaves nothing to train.")
        return both.init(params)

    return optax.GradientTransformation(init, both.update)


def _what_is_there(params: Any, path: str) -> str:
    """What could be meant by a path under which there is nothing."""
    above = []
    for name in path.split("/"):
        if not isinstance(params.get(name), dict):
            break
        params = params[name]
        above.append(name)
    return f"{'/'.join(above) or 'the network'} has {', '.join(params)}"


def keep(old: Any, new: Any, paths: Sequence[str]) -> Any:
    """The new variables, in which those under some paths are as they were; collection by collection."""
    return {
        name: jax.tree.map(lambda is_frozen, a, b: a if is_frozen else b, frozen(tree, paths), old[name], tree)
        for name, tree in new.items()
    }


def stop_gradients(params: Any, paths: Sequence[str]) -> Any:
    """The parameters, of which those under some paths are constants: no gradient is computed for them."""
    return jax.tree.map(
        lambda is_frozen, x: jax.lax.stop_gradient(x) if is_frozen else x, frozen(params, paths), params
    )


def frozen_statistics(paths: Sequence[str]) -> contextlib.AbstractContextManager:
    """While inside, every `BatchNorm` under some paths works as in evaluation, with its running statistics."""

    def call(function: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and _is_under("/".join(context.module.path), paths):
            return function(args[0], train=False)
        return function(*args, **kwargs)

    return nn.intercept_methods(call) if paths else contextlib.nullcontext()
