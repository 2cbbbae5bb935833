"""The graph of an ONNX model while it is built from a function of JAX."""

from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.errors import UserError


class Value(NamedTuple):
    """An array while a graph is built.

    Attributes:
      data: its values, if they are known; otherwise the name of a tensor of the graph.
      shape: of the data, 1 along axes that are only broadcast.
    """

    data: np.ndarray | str
    shape: tuple[Any, ...]

    @property
    def known(self) -> bool:
        return not isinstance(self.data, str)


class Graph:
    """The nodes and the constants of an ONNX graph that is being built.

    Attributes:
      nodes, initializers: as ONNX takes them.

    Args:
      onnx: the package.
      batch: the first axis of the images, a number or symbolic.
    """

    def __init__(self, onnx: Any, batch: Any):
        self._onnx, self._batch, self._batch_name = onnx, batch, None
        self.nodes, self.initializers = [], []

    def add(self, op: str, inputs: list[Any], outputs: int = 1, name: str | None = None, **attributes) -> list[str]:
        """Adds a node and returns the names of its outputs.

        Args:
          op: ONNX's operation.
          inputs: values, names of tensors, or numbers and arrays.
          outputs: how many outputs the node has.
          name: of the only output.
          **attributes: of the node.
        """
        names = [name] if name else [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self._onnx.helper.make_node(op, [self._name(x) for x in inputs], names, **attributes))
        return names

    def _name(self, x: Any) -> str:
        x = x.data if isinstance(x, Value) else x
        if isinstance(x, str):
            return x
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(x).reshape(np.shape(x)), name))
        return name

    def dtype(self, dtype: Any) -> int:
        """ONNX's number of a dtype."""
        return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def expanded(self, value: Value, shape: tuple[Any, ...]) -> Value:
        """The value in its full shape, which it may not have while it is only broadcast."""
        if value.shape == tuple(shape):
            return value
        if value.known and all(isinstance(size, int) for size in shape):
            return Value(np.broadcast_to(value.data, shape), tuple(shape))
        return Value(self.add("Expand", [value, self.shape_of(shape)])[0], tuple(shape))

    def shape_of(self, shape: tuple[Any, ...]) -> Any:
        """A shape as a tensor of ONNX: constant, but for the batch size."""
        if all(isinstance(size, int) for size in shape):
            return np.array(shape, np.int64)
        parts = [np.array([size]) if isinstance(size, int) else self._batch_size(size) for size in shape]
        return self.add("Concat", parts, axis=0)[0]

    def _batch_size(self, size: Any) -> str:
        if size != self._batch:
            raise UserError(f"A shape depends on the batch size by {size}, which the export to ONNX does not know.")
        if self._batch_name is None:
            (self._batch_name,) = self.add("Shape", ["images"], start=0, end=1)
        return self._batch_name
