"""Networks as TensorFlow SavedModels: the function to export is traced, and TensorFlow's operations replace JAX's.

Not by `jax.experimental.jax2tf`, which JAX 0.12 still has: what it writes holds StableHLO as a whole, and TensorFlow
2.21 cannot read that of JAX 0.10 (the error function) nor that of JAX 0.12 (batches of any size). A graph of
TensorFlow's own operations needs no compiler of one version, and its tools can go on with it.
"""

import os
import string
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from fcvit_jax.errors import UserError
from fcvit_jax.formats import interpreter

# What JAX calls otherwise than `tf.math` does.
_NAMES = {"div": "divide", "gt": "greater", "max": "maximum", "min": "minimum", "mul": "multiply", "sub": "subtract"}
_SAME = ("abs", "add", "erf", "exp", "rsqrt", "sqrt", "square")
_CHANNELS_LAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # of images, kernels and results of a convolution


def convert(
    function: Callable[..., Any], images: jax.ShapeDtypeStruct, *others: jax.ShapeDtypeStruct
) -> dict[str, bytes]:
    """Converts a function of images, with the weights in it.

    Args:
      function: of one array to one array, as `make_program` of a task makes it.
      images: shape and dtype of its argument, whose first axis may be symbolic: then the model takes any batch size.
      *others: of further arguments, which only a detector's function has.

    Returns:
      The files of a SavedModel by name. Its signature "serving_default" goes from "images" to "output".

    Raises:
      UserError: the package tensorflow is not installed, or the function needs an operation that is not known here.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # what it logs when it is imported
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError('To write a SavedModel: pip install "fcvit-jax[tf]", or tensorflow.') from error
    closed = interpreter.trace(function, (images, *others), "SavedModels")

    def call(images: Any) -> dict[str, Any]:
        apply = partial(_apply, Operations(tf, tf.shape(images)[0]))
        (result,) = interpreter.run(closed, [images], lambda x: x, apply)
        return {"output": tf.identity(result)}

    shape = [size if isinstance(size, int) else None for size in images.shape]
    tf.config.set_visible_devices([], "GPU")  # whose memory it would take
    module = tf.Module()
    module.call = tf.function(call, input_signature=[tf.TensorSpec(shape, images.dtype, "images")], autograph=False)
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures=module.call)
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _apply(operations: "Operations", eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    static = all(isinstance(size, int) for var in eqn.outvars for size in var.aval.shape)
    if all(isinstance(x, np.ndarray) for x in args) and static and name != "dim_as_value":
        return interpreter.evaluate(eqn, args)
    if name in _NAMES or name in _SAME:
        return [getattr(operations.tf.math, _NAMES.get(name, name))(*args)]
    if not hasattr(operations, name):
        raise UserError(f"The network uses the operation {name}, which the format tf does not know: take format jax.")
    results = getattr(operations, name)(eqn, *args)
    return results if eqn.primitive.multiple_results else [results]


class Operations:
    """The operations of JAX that evaluation of our networks uses, under their names, by TensorFlow.

    Each takes the equation of JAX and its arguments, and returns its result.

    Args:
      tf: the package.
      batch: the batch size, a tensor.
    """

    def __init__(self, tf: Any, batch: Any):
        self.tf, self._batch = tf, batch

    def _shape(self, eqn: JaxprEqn) -> list[Any]:
        """The shape of the result."""
        return [size if isinstance(size, int) else self._batch for size in eqn.outvars[0].aval.shape]

    def stop_gradient(self, eqn, x):
        return x

    def convert_element_type(self, eqn, x):
        return self.tf.cast(x, np.dtype(eqn.params["new_dtype"]))

    def select_n(self, eqn, which, if_false, if_true):
        return self.tf.where(which, if_true, if_false)

    def broadcast_in_dim(self, eqn, x):
        shape, kept = self._shape(eqn), eqn.params["broadcast_dimensions"]
        sizes = eqn.invars[0].aval.shape
        grown = [1] * len(shape)
        for size, axis in zip(sizes, kept, strict=True):
            grown[axis] = size if isinstance(size, int) else self._batch
        return self.tf.broadcast_to(self.tf.reshape(x, grown), shape)

    def reshape(self, eqn, x):
        sizes = [size if isinstance(size, int) else -1 for size in eqn.params["new_sizes"]]
        return self.tf.reshape(x, sizes)

    def transpose(self, eqn, x):
        return self.tf.transpose(x, eqn.params["permutation"])

    def squeeze(self, eqn, x):
        return self.tf.squeeze(x, eqn.params["dimensions"])

    def concatenate(self, eqn, *parts):
        return self.tf.concat(parts, eqn.params["dimension"])

    def slice(self, eqn, x):
        sizes = eqn.invars[0].aval.shape
        starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
        steps = eqn.params["strides"] or (1,) * len(sizes)
        ends = [None if limit == size else limit for limit, size in zip(limits, sizes, strict=True)]
        return x[tuple(map(slice, starts, ends, steps))]

    def split(self, eqn, x):
        return self.tf.split(x, [int(size) for size in eqn.params["sizes"]], eqn.params["axis"])

    def unstack(self, eqn, x):
        return self.tf.unstack(x, axis=eqn.params["axis"])

    def gather(self, eqn, x, indices):
        """Takes one known index along some axes, which go away, such as the class token of `x[:, 0]`."""
        numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
        axes = numbers.start_index_map
        sizes = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        known = isinstance(indices, np.ndarray) and indices.ndim == 1 and not numbers.operand_batching_dims
        if not known or axes != numbers.collapsed_slice_dims or eqn.params["slice_sizes"] != sizes:
            raise UserError("The network takes elements by computed indices, which the format tf does not know.")
        at = dict(zip(axes, indices.tolist(), strict=True))
        return x[tuple(at.get(axis, slice(None)) for axis in range(len(shape)))]

    def reduce_sum(self, eqn, x):
        return self.tf.reduce_sum(x, eqn.params["axes"])

    def reduce_max(self, eqn, x):
        return self.tf.reduce_max(x, eqn.params["axes"])

    def dot_general(self, eqn, x, y):
        (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
        letters = iter(string.ascii_lowercase)
        x_names, y_names = ([next(letters) for _ in var.aval.shape] for var in eqn.invars)
        for i, j in zip((*x_batch, *x_sum), (*y_batch, *y_sum), strict=True):
            y_names[j] = x_names[i]
        free = [name for axis, name in enumerate(x_names) if axis not in (*x_batch, *x_sum)]
        free += [name for axis, name in enumerate(y_names) if axis not in (*y_batch, *y_sum)]
        result = [x_names[axis] for axis in x_batch] + free
        return self.tf.einsum(f"{''.join(x_names)},{''.join(y_names)}->{''.join(result)}", x, y)

    def conv_general_dilated(self, eqn, x, kernel):
        params, (channels, outputs) = eqn.params, (x.shape[3], kernel.shape[3])
        plain = {*params["lhs_dilation"], *params["rhs_dilation"], params["batch_group_count"]} == {1}
        if tuple(map(tuple, params["dimension_numbers"])) != _CHANNELS_LAST or not plain:
            raise UserError("The network has a convolution of a kind that the format tf does not know.")
        x = self.tf.pad(x, [(0, 0), *params["padding"], (0, 0)])
        strides = (1, *params["window_strides"], 1)
        if params["feature_group_count"] == 1:
            return self.tf.nn.conv2d(x, kernel, strides, "VALID")
        if not params["feature_group_count"] == channels == outputs:
            raise UserError("The network has a grouped convolution, which the format tf does not know.")
        return self.tf.nn.depthwise_conv2d(x, self.tf.transpose(kernel, (0, 1, 3, 2)), strides, "VALID")
