"""Which arrays of a graph share a buffer and how large each buffer is, primitive by primitive.

Shapes and strides are kept as NumPy views of a single byte, so that NumPy's own rules say where a
view needs no copy; no array's memory is ever touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from abft_mlx.footprint.graph import Operation, Value

# A dying input gives its buffer to the result unless it is larger by more than this.
DONATION_SLACK_BYTES = 16384

# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "ArcTan", "ArcTan2", "AsType", "BitwiseBinary", "Ceil", "Cos", "Divide", "Equal",
    "Erf", "ErfInv", "Exp", "Expm1", "Floor", "Greater", "GreaterEqual", "Less", "LessEqual", "Log",
    "Log1p", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply",
    "Negative", "NotEqual", "Power", "Remainder", "Round", "Select", "Sigmoid", "Sign", "Sin",
    "Softmax", "Sqrt", "Square", "Subtract", "Tan", "Tanh",
))
# fmt: on
VIEWS = frozenset(("Broadcast", "BroadcastAxes", "Transpose", "Slice"))
RESHAPES = frozenset(("Flatten", "Unflatten", "Reshape", "ExpandDims", "Squeeze"))
SAME = frozenset(("StopGradient", "Copy", "CustomTransforms", "Checkpoint"))
UPDATES = frozenset(("SliceUpdate", "Scatter", "ScatterAxis", "DynamicSliceUpdate"))
PRODUCTS = frozenset(("Matmul", "AddMM"))


@dataclass(eq=False)
class Buffer:
    """Memory that one or more arrays share.

    Attributes:
        size_bytes: 0 for what existed before, which is never freed.
        holders: arrays and pending operations that keep it.
    """

    size_bytes: int
    holders: int = 0


@dataclass
class Stored:
    """An array's layout.

    Attributes:
        view: stands for its shape and its strides, in numbers.
        items: numbers in the buffer; fewer than the shape holds after a broadcast.
        dense: the buffer has no gaps, in whatever order.
        itemsize: bytes of one number.
        buffer: where it lies.
    """

    view: np.ndarray
    items: int
    dense: bool
    itemsize: int
    buffer: Buffer

    @property
    def full_bytes(self) -> int:
        """Bytes of the array written out."""
        return self.view.size * self.itemsize


def fresh(value: Value, *, exists: bool = False) -> Stored:
    """An array in a row-contiguous buffer of its own.

    Args:
        value: which.
        exists: whether it was there before, so that it counts as no bytes and never goes.
    """
    items = math.prod(value.shape)
    buffer = Buffer(0 if exists else items * value.itemsize, holders=1 if exists else 0)
    return Stored(_rows(value.shape), items, True, value.itemsize, buffer)


def _rows(shape: tuple[int, ...]) -> np.ndarray:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return _view(shape, tuple(strides))


def _view(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, strides)


@dataclass(frozen=True)
class Effect:
    """What running an operation does.

    Attributes:
        outputs: layouts of its results.
        copies_bytes: copies of its inputs that live as long as it runs.
        dispatches: pieces of work handed to the device; a mere view is none.
    """

    outputs: list[Stored]
    copies_bytes: int = 0
    dispatches: int = 0


def run(operation: Operation, inputs: list[Stored], may_take: Callable[[int], bool]) -> Effect:
    """Lay out an operation's results.

    Args:
        operation: what runs.
        inputs: layouts of its inputs.
        may_take: whether the input of this number dies here, so that its buffer may be taken.
    """
    name, outputs = operation.name, operation.outputs
    if name == "Depends":
        pairs = zip(outputs, inputs, strict=False)
        return Effect([_shared(one, source, operation) for one, source in pairs])
    if name in SAME or name == "Split":
        return Effect([_shared(one, inputs[0], operation) for one in outputs])
    value = outputs[0]
    if name in VIEWS:
        return Effect([_shared(value, inputs[0], operation)])
    if name in RESHAPES:
        one = _reshaped(value, inputs[0])
        return Effect([one], dispatches=int(one.buffer is not inputs[0].buffer))
    if name in ELEMENTWISE:
        return Effect([_elementwise(value, inputs, may_take)], dispatches=1)
    if name in UPDATES:
        first = inputs[0]
        if may_take(0) and _row_contiguous(first) and _fits(first, value):
            same = Stored(first.view, first.items, True, value.itemsize, first.buffer)
            return Effect([same], dispatches=1)
        return Effect([fresh(value)], dispatches=2)
    copied: list[Stored] = []
    dispatches = 1
    if name in PRODUCTS:
        copied = [one for one in inputs[:2] if not _is_matrix(one)]
        dispatches += name == "AddMM"
    elif name == "QuantizedMatmul":
        copied = [one for one in inputs if not _row_contiguous(one)]
    elif name == "Concatenate":
        dispatches = len(inputs)
    size = sum(one.full_bytes for one in copied)
    return Effect([fresh(one) for one in outputs], size, dispatches + len(copied))


def _shared(value: Value, source: Stored, operation: Operation) -> Stored:
    view = source.view
    name, arguments = operation.name, operation.arguments
    items, dense = source.items, source.dense
    if name in ("Broadcast", "BroadcastAxes"):
        view = np.broadcast_to(view, value.shape)
    elif name == "Transpose":
        view = view.transpose(arguments[0])
    elif name == "Slice":
        starts, stops, steps = arguments
        view = view[tuple(slice(a, b, c) for a, b, c in zip(starts, stops, steps, strict=True))]
        dense = view.size == source.view.size and dense
    elif name == "Split":
        # Only the shape and the strides matter, not where in the buffer a part begins.
        view = _view(value.shape, view.strides)
        dense = False
    return Stored(view, items, dense, value.itemsize, source.buffer)


def _reshaped(value: Value, source: Stored) -> Stored:
    try:
        view = source.view.reshape(value.shape, copy=False)
    except ValueError:
        return fresh(value)
    return Stored(view, source.items, source.dense, value.itemsize, source.buffer)


def _row_contiguous(one: Stored) -> bool:
    return one.view.flags.c_contiguous and one.items >= one.view.size


def _column_contiguous(one: Stored) -> bool:
    return one.view.flags.f_contiguous and one.items >= one.view.size


def _is_matrix(one: Stored) -> bool:
    """Whether the last two axes can be given to BLAS as they lie."""
    if one.view.ndim < 2:
        return True
    rows, columns = one.view.shape[-2:]
    row_stride, column_stride = one.view.strides[-2:]
    return (row_stride == columns and column_stride == 1) or (
        row_stride == 1 and column_stride == rows
    )


def _fits(source: Stored, value: Value) -> bool:
    size = math.prod(value.shape) * value.itemsize
    return (
        source.itemsize == value.itemsize
        and source.buffer.size_bytes <= size + DONATION_SLACK_BYTES
    )


def _elementwise(value: Value, inputs: list[Stored], may_take: Callable[[int], bool]) -> Stored:
    def taken(number: int) -> Stored:
        one = inputs[number]
        return Stored(one.view, one.items, one.dense, value.itemsize, one.buffer)

    def like(one: Stored) -> Stored:
        return Stored(
            one.view, one.items, one.dense, value.itemsize, Buffer(one.items * value.itemsize)
        )

    def takable(number: int) -> bool:
        return may_take(number) and _fits(inputs[number], value)

    arrays = [number for number, one in enumerate(inputs) if one.items > 1 and one.view.ndim]
    if not arrays:
        return like(inputs[0])
    # Scalars beside one array: the result lies as that array does.
    if len(arrays) == 1 and inputs[arrays[0]].dense:
        number = arrays[0]
        return taken(number) if takable(number) else like(inputs[number])
    same = all(_row_contiguous(inputs[n]) for n in arrays) or all(
        _column_contiguous(inputs[n]) for n in arrays
    )
    for number in arrays:
        one = inputs[number]
        whole = one.view.size == math.prod(value.shape)
        if takable(number) and whole and (same or _row_contiguous(one)):
            return taken(number)
    return like(inputs[arrays[0]]) if same else fresh(value)
