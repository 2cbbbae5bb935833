"""Networks as ONNX models: the function that `export` has is traced, and each operation of JAX becomes nodes of ONNX.

A converter of our own, as the graphs of our networks need some 25 operations: jax2onnx (0.14 and later) excludes the
Orbax that training needs, and gave fcvit_s12 4,889 nodes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from fcvit_jax.errors import UserError
from fcvit_jax.formats import interpreter
from fcvit_jax.formats.onnx_graph import Graph, Value
from fcvit_jax.formats.onnx_operations import ELEMENTWISE, OPERATIONS

OPSET, IR_VERSION = 18, 8  # of 2022: onnxruntime 1.14 and later read them


def convert(function: Callable[..., Any], images: jax.ShapeDtypeStruct, *others: jax.ShapeDtypeStruct) -> bytes:
    """Converts a function of images, with the weights in it.

    Args:
      function: of one array to one array, as `make_program` of a task makes it.
      images: shape and dtype of its argument, whose first axis may be symbolic: then the model takes any batch size.
      *others: of further arguments, which only a detector's function has.

    Returns:
      A serialised ONNX model from "images" to "output".

    Raises:
      UserError: the package onnx is not installed, or ONNX lacks an operation that the function needs.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError('To write ONNX: pip install "fcvit-jax[onnx]", or onnx.') from error
    closed = interpreter.trace(function, (images, *others), "ONNX models")
    graph = Graph(onnx, images.shape[0])
    given = Value("images", images.shape)
    (result,) = interpreter.run(closed, [given], lambda x: Value(x, x.shape), partial(_apply, graph))
    (aval,) = closed.out_avals
    graph.add("Identity", [graph.expanded(result, aval.shape)], name="output")
    make = onnx.helper
    types = [
        make.make_tensor_value_info(name, graph.dtype(x.dtype), [d if isinstance(d, int) else "n" for d in x.shape])
        for name, x in (("images", images), ("output", aval))
    ]
    made = make.make_graph(graph.nodes, "fcvit_jax", types[:1], types[1:], graph.initializers)
    settings = {"opset_imports": [make.make_opsetid("", OPSET)], "ir_version": IR_VERSION}
    return make.make_model(made, producer_name="fcvit_jax", **settings).SerializeToString()


def _apply(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    whole = all(x.shape == tuple(var.aval.shape) for x, var in zip(args, eqn.invars, strict=True))
    static = all(isinstance(size, int) for var in eqn.outvars for size in var.aval.shape)
    known = all(x.known for x in args) and name != "dim_as_value"  # which is the batch size, although it takes nothing
    if known and (name in ELEMENTWISE or (whole and static)):
        return [Value(x, x.shape) for x in interpreter.evaluate(eqn, [x.data for x in args])]
    if name not in OPERATIONS:
        raise UserError(
            f"The network uses the operation {name}, which the export to ONNX does not know: take the format jax."
        )
    return OPERATIONS[name](graph, eqn, args)
