"""A builder of ONNX graphs: values with arithmetic, constants that are stored once, and sizes that are known only when the graph runs.

Images and features are `[N, C, H, W]`, as usual in ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# The oldest operator sets with the operators that are used: 18 has reductions over axes that are inputs, and 19 has DeformConv. GridSample
# has other names for its modes from 20 on, which not all runtimes know.
_OPSET, _OPSET_DEFORM, _IR_VERSION = 18, 19, 9

_FLOAT = onnx.TensorProto.FLOAT

INPUT = "hazy"
SHAPE = ("N", 3, "H", "W")


class Tensor:
    """A value of a graph. Arithmetic adds nodes; the other operand may be a number or an array, which takes this value's type."""

    def __init__(self, graph: Graph, name: str, dtype: Any):
        self.graph, self.name, self.dtype = graph, name, np.dtype(dtype)

    def node(self, kind: str, *inputs: Any, dtype: Any = None, **attributes: Any) -> Tensor:
        """Add a node whose first input is this value and return its output, of this value's type unless `dtype` is given."""
        return self.graph.node(kind, self, *inputs, dtypes=[dtype], **attributes)[0]

    def __add__(self, other: Any) -> Tensor:
        return self.node("Add", other)

    def __sub__(self, other: Any) -> Tensor:
        return self.node("Sub", other)

    def __mul__(self, other: Any) -> Tensor:
        return self.node("Mul", other)

    def __truediv__(self, other: Any) -> Tensor:
        return self.node("Div", other)

    def __rsub__(self, other: Any) -> Tensor:
        return self.graph.constant(other, self.dtype).node("Sub", self)

    def __rtruediv__(self, other: Any) -> Tensor:
        return self.graph.constant(other, self.dtype).node("Div", self)

    def __neg__(self) -> Tensor:
        return self.node("Neg")

    __radd__, __rmul__ = __add__, __mul__

    def to(self, dtype: Any) -> Tensor:
        """Convert to another type."""
        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else self.node("Cast", to=helper.np_dtype_to_tensor_dtype(dtype), dtype=dtype)

    def size(self, axis: int) -> Tensor:
        """Return the size of an axis, an int64 `[1]`."""
        return self.node("Shape", start=axis, end=axis + 1, dtype=np.int64)

    def reshape(self, *shape: int | Tensor) -> Tensor:
        """Return the values in another shape; 0 keeps the size of that axis, and -1 is what remains."""
        if all(isinstance(size, int) for size in shape):
            return self.node("Reshape", np.array(shape, np.int64))
        sizes = [size if isinstance(size, Tensor) else self.graph.constant(size, np.int64) for size in shape]
        return self.node("Reshape", concat(sizes, 0))

    def slice(self, starts: Sequence[int] | Tensor, ends: Sequence[int] | Tensor, axes: Sequence[int]) -> Tensor:
        """Return the part from `starts` to `ends` of the given axes."""
        return self.node("Slice", _int64(starts), _int64(ends), _int64(axes))


def _int64(values: Sequence[int] | Tensor) -> Any:
    return values if isinstance(values, Tensor) else np.array(values, np.int64)


def concat(values: Sequence[Tensor], axis: int = 1) -> Tensor:
    """Concatenate along an axis; by default, along the channels."""
    return values[0].node("Concat", *values[1:], axis=axis)


class Graph:
    """An ONNX graph with one input, float32 `[N, 3, H, W]` with any N, H and W, and one output.

    Args:
      dtype: float32 or float16, the type of the arithmetic.
      grid_sample: write deformable convolutions with GridSample instead of DeformConv, which fewer runtimes have.
    """

    def __init__(self, dtype: Any = np.float32, *, grid_sample: bool = False):
        self.dtype, self.grid_sample = np.dtype(dtype), grid_sample
        self.input = Tensor(self, INPUT, np.float32)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self._known: dict[Any, list[Tensor]] = {}

    def constant(self, value: Any, dtype: Any) -> Tensor:
        """Return a constant; equal constants, such as the weights of a layer that is applied several times, are stored once."""
        array = np.ascontiguousarray(np.atleast_1d(np.asarray(value, dtype)))
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return Tensor(self, self._constants[key].name, array.dtype)

    def node(self, kind: str, *inputs: Any, dtypes: Sequence[Any] = (None,), **attributes: Any) -> list[Tensor]:
        """Add a node and return its outputs.

        Args:
          kind: the ONNX operator.
          inputs: tensors; numbers and arrays, of which all but integer arrays take the type of the first input; None for no input.
          dtypes: the types of the outputs; None is that of the first input.
          attributes: the attributes of the operator.
        """
        first = inputs[0].dtype
        names = []
        for value in inputs:
            if value is None:
                names.append("")
            elif isinstance(value, Tensor):
                names.append(value.name)
            else:
                integers = isinstance(value, np.ndarray) and value.dtype == np.int64
                names.append(self.constant(value, np.int64 if integers else first).name)
        # The same computation of a size occurs in many layers.
        key = (kind, tuple(names), tuple(sorted((name, str(value)) for name, value in attributes.items())))
        if key not in self._known:
            number = len(self._nodes)
            outputs = [f"{kind}_{number}" + (f"_{i}" if i else "") for i in range(len(dtypes))]
            self._nodes.append(helper.make_node(kind, names, outputs, f"node_{number}", **attributes))
            self._known[key] = [Tensor(self, name, dtype or first) for name, dtype in zip(outputs, dtypes)]
        return self._known[key]

    def model(self, output: Tensor, metadata: dict[str, str], name: str, shape: Sequence[str | int]) -> onnx.ModelProto:
        """Return the graph as a model after checking it; its output is `output` as float32, with this name and shape."""
        self._nodes.append(helper.make_node("Identity", [output.to(np.float32).name], [name], "node_output"))
        values = [helper.make_tensor_value_info(*value) for value in ((INPUT, _FLOAT, SHAPE), (name, _FLOAT, shape))]
        graph = helper.make_graph(self._nodes, "aecr_jax", values[:1], values[1:], list(self._constants.values()))
        opset = _OPSET_DEFORM if any(node.op_type == "DeformConv" for node in self._nodes) else _OPSET
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION, producer_name="aecr-jax")
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model
