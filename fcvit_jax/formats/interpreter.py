"""A traced function, operation by operation: what the formats that are not JAX's are made from."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from fcvit_jax.depthwise import primitives
from fcvit_jax.errors import UserError

# Operations that only hold others: jitted functions, recomputation in a backward pass, derivatives of their own.
_CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def trace(function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct], named: str) -> ClosedJaxpr:
    """Traces a function of images, as `make_program` of a task makes it.

    Args:
      function: of arrays of these shapes.
      shapes: of its arguments.
      named: what it is to be written as.

    Raises:
      UserError: it takes or returns several arrays, as a detector's does.
    """
    closed = jax.make_jaxpr(function)(*shapes) if len(shapes) == 1 else None
    if closed is None or len(closed.out_avals) != 1:
        raise UserError(
            f"Detectors cannot be written as {named}, only classifiers and segmenters: take the format jax."
        )
    return closed


def run(
    closed: ClosedJaxpr,
    args: list[Any],
    known: Callable[[np.ndarray], Any],
    apply: Callable[[JaxprEqn, list[Any]], list[Any]],
) -> list[Any]:
    """Applies a traced function to values of any kind.

    Operations that only hold others are entered. Our own operations are replaced by those of JAX that they stand for on
    any platform.

    Args:
      closed: the function, as `jax.make_jaxpr` traces it.
      args: its arguments.
      known: makes a value of a constant.
      apply: computes the results of one operation of JAX from its arguments.

    Returns:
      The function's results.
    """
    jaxpr = closed.jaxpr
    constants = [known(np.asarray(x)) for x in closed.consts]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *args], strict=True))

    def value_of(atom: Any) -> Any:
        return known(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [value_of(x) for x in eqn.invars]
        inner = _inner(eqn)
        results = apply(eqn, inputs) if inner is None else run(inner, inputs, known, apply)
        values |= zip(eqn.outvars, results, strict=True)
    return [value_of(x) for x in jaxpr.outvars]


def evaluate(eqn: JaxprEqn, args: list[np.ndarray]) -> list[np.ndarray]:
    """What JAX computes for an operation whose arguments are all known."""
    results = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return [np.asarray(x) for x in (results if eqn.primitive.multiple_results else [results])]


def _inner(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The operations that an operation stands for, if it does."""
    if eqn.primitive.name in _CALLS:
        inner = eqn.params[_CALLS[eqn.primitive.name]]
        return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
    if eqn.primitive in primitives.COMPUTE:
        params = eqn.params | ({"impl": "lax"} if "impl" in eqn.params else {})
        function = partial(primitives.COMPUTE[eqn.primitive], **params)
        return jax.make_jaxpr(function)(*(x.aval for x in eqn.invars))
    return None
