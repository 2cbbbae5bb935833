"""The operations of JAX that evaluation of our networks uses, as nodes of ONNX.

Each function takes the graph, the equation of JAX and the values of its arguments, of which some may be known, and
returns the values of its results.
"""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from fcvit_jax.errors import UserError
from fcvit_jax.formats.onnx_graph import Graph, Value

# Operations whose arguments ONNX broadcasts, so that they need not be expanded before.
_SAME = {
    "abs": "Abs",
    "add": "Add",
    "div": "Div",
    "erf": "Erf",
    "exp": "Exp",
    "gt": "Greater",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "sqrt": "Sqrt",
    "stop_gradient": "Identity",
    "sub": "Sub",
}


def _shape(args: list[Value]) -> tuple[Any, ...]:
    """The shape that arrays of equal rank, or numbers, have together."""
    shapes = [x.shape for x in args if x.shape]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes, strict=True))


def _elementwise(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    return [Value(graph.add(_SAME[eqn.primitive.name], args)[0], _shape(args))]


def _convert(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    dtype = graph.dtype(eqn.params["new_dtype"])
    return [Value(graph.add("Cast", args, to=dtype)[0], args[0].shape)]


def _square(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    return [Value(graph.add("Mul", [args[0], args[0]])[0], args[0].shape)]


def _rsqrt(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    return [Value(graph.add("Reciprocal", graph.add("Sqrt", args))[0], args[0].shape)]


def _select(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    which, if_false, if_true = args
    return [Value(graph.add("Where", [which, if_true, if_false])[0], _shape(args))]


def _broadcast(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    """Adds the new axes alone; `Graph.expanded` does the rest where it is needed."""
    (x,), shape, kept = args, eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = [axis for axis in range(len(shape)) if axis not in kept]
    sizes = dict(zip(kept, x.shape, strict=True))
    result = tuple(sizes.get(axis, 1) for axis in range(len(shape)))
    if x.known:
        return [Value(x.data.reshape(result), result)]
    return [Value(graph.add("Unsqueeze", [x, np.array(new)])[0] if new else x.data, result)]


def _reshape(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    shape = eqn.params["new_sizes"]
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
        raise UserError(f"The export to ONNX does not know an array of shape {shape}.")
    return [Value(graph.add("Reshape", [_whole(graph, eqn, args)[0], np.array(sizes, np.int64)])[0], shape)]


def _transpose(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    order = eqn.params["permutation"]
    return [Value(graph.add("Transpose", args, perm=order)[0], tuple(args[0].shape[axis] for axis in order))]


def _squeeze(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    axes = eqn.params["dimensions"]
    shape = tuple(size for axis, size in enumerate(args[0].shape) if axis not in axes)
    return [Value(graph.add("Squeeze", [args[0], np.array(axes, np.int64)])[0], shape)]


def _whole(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    """The arguments in their full shapes."""
    return [graph.expanded(x, var.aval.shape) for x, var in zip(args, eqn.invars, strict=True)]


def _results(eqn: JaxprEqn, names: Sequence[str]) -> list[Value]:
    """Tensors in the full shapes of the results."""
    return [Value(name, tuple(var.aval.shape)) for name, var in zip(names, eqn.outvars, strict=True)]


def _concatenate(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    return _results(eqn, graph.add("Concat", _whole(graph, eqn, args), axis=eqn.params["dimension"]))


def _slice(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    (x,), params = _whole(graph, eqn, args), eqn.params
    starts, limits = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    axes = [i for i, span in enumerate(zip(starts, limits, steps, strict=True)) if span != (0, x.shape[i], 1)]
    spans = [np.array([values[axis] for axis in axes], np.int64) for values in (starts, limits)]
    steps = np.array([steps[axis] for axis in axes], np.int64)
    return _results(eqn, graph.add("Slice", [x, *spans, np.array(axes, np.int64), steps]))


def _split(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    sizes = np.array(eqn.params["sizes"], np.int64)
    names = graph.add("Split", [*_whole(graph, eqn, args), sizes], len(sizes), axis=eqn.params["axis"])
    return _results(eqn, names)


def _unstack(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    (x,), axis = _whole(graph, eqn, args), eqn.params["axis"]
    return _results(eqn, [graph.add("Gather", [x, np.int64(i)], axis=axis)[0] for i in range(len(eqn.outvars))])


def _gather(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    """Takes one known index along some axes, which go away, such as the class token of `x[:, 0]`."""
    (x, indices), numbers = _whole(graph, eqn, args), eqn.params["dimension_numbers"]
    axes = numbers.start_index_map
    sizes = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    if not indices.known or indices.data.ndim != 1 or axes != numbers.collapsed_slice_dims:
        raise UserError("The network takes elements by computed indices, which the export to ONNX does not know.")
    if eqn.params["slice_sizes"] != sizes or numbers.operand_batching_dims:
        raise UserError("The network takes parts of arrays in a way that the export to ONNX does not know.")
    name = x.data
    for axis, index in sorted(zip(axes, indices.data, strict=True), reverse=True):
        (name,) = graph.add("Gather", [name, np.int64(index)], axis=axis)
    return _results(eqn, [name])


def _reduce(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    op = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax"}[eqn.primitive.name]
    axes = np.array(eqn.params["axes"], np.int64)
    return _results(eqn, graph.add(op, [*_whole(graph, eqn, args), axes], keepdims=0))


def _dot(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    (x, y), ((x_sum, y_sum), (x_batch, y_batch)) = _whole(graph, eqn, args), eqn.params["dimension_numbers"]
    batch, last = tuple(range(len(x_batch))), len(x.shape) - 1
    matrices = len(batch) in (0, last - 1) and len(y.shape) == len(batch) + 2
    if matrices and x_batch == y_batch == batch and (x_sum, y_sum) == ((last,), (len(batch),)):
        return _results(eqn, graph.add("MatMul", [x, y]))
    letters = iter(string.ascii_lowercase)
    x_names, y_names = ([next(letters) for _ in array.shape] for array in (x, y))
    for i, j in zip((*x_batch, *x_sum), (*y_batch, *y_sum), strict=True):
        y_names[j] = x_names[i]
    free = [name for axis, name in enumerate(x_names) if axis not in (*x_batch, *x_sum)]
    free += [name for axis, name in enumerate(y_names) if axis not in (*y_batch, *y_sum)]
    equation = f"{''.join(x_names)},{''.join(y_names)}->{''.join([x_names[i] for i in x_batch] + free)}"
    return _results(eqn, graph.add("Einsum", [x, y], equation=equation))


def _ordered(graph: Graph, x: Value, order: Sequence[int]) -> Value:
    """The value with its axes in another order."""
    shape = tuple(x.shape[axis] for axis in order)
    if x.known:
        return Value(x.data.transpose(order), shape)
    return Value(graph.add("Transpose", [x], perm=list(order))[0], shape)


def _conv(graph: Graph, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
    (x, kernel), params = _whole(graph, eqn, args), eqn.params
    numbers, padding = params["dimension_numbers"], params["padding"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise UserError("The network has a transposed convolution, which the export to ONNX does not know.")
    (name,) = graph.add(
        "Conv",
        [_ordered(graph, x, numbers.lhs_spec), _ordered(graph, kernel, numbers.rhs_spec)],
        strides=params["window_strides"],
        pads=[before for before, _ in padding] + [after for _, after in padding],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return _results(eqn, graph.add("Transpose", [name], perm=np.argsort(numbers.out_spec).tolist()))


ELEMENTWISE = {*_SAME, "convert_element_type", "rsqrt", "select_n", "square"}
OPERATIONS = dict.fromkeys(_SAME, _elementwise) | {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _convert,
    "dot_general": _dot,
    "gather": _gather,
    "reduce_max": _reduce,
    "reduce_sum": _reduce,
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unstack": _unstack,
}
