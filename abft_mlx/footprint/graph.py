"""The graph of an MLX function, read without computing anything, and the order MLX evaluates it in.

``mx.export_function`` hands over the primitives that a function would run, with their shapes. Its
arguments may be lazy arrays of any size: nothing of them is ever allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from abft_mlx.errors import ModelError

# MLX goes through a graph in breadth, at most so many arrays wide (its default).
WIDTH = 20


@dataclass(frozen=True)
class Value:
    """One array of a graph.

    Attributes:
        name: unique within the graph.
        shape: its shape.
        itemsize: bytes of one number.
        dtype: its type, as MLX names it.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Operation:
    """One primitive.

    Attributes:
        name: MLX's name of it.
        arguments: its settings, as MLX exports them.
        inputs: names of the arrays it reads.
        outputs: the arrays it makes.
    """

    name: str
    arguments: list[Any]
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Graph:
    """What a function would compute.

    Attributes:
        operations: in some order in which they can run.
        given: arrays that exist before: arguments and constants.
        results: names of what the function returns.
    """

    operations: tuple[Operation, ...]
    given: tuple[Value, ...]
    results: tuple[str, ...]


def trace(function: Callable[..., Sequence[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of ``function(*arguments)``, on MLX's CPU backend whatever device is in use.

    The CPU backend spells out attention, norms and rotations as plain products and sums, so the
    graph is the same on every machine.

    Args:
        function: takes arrays and returns a list of arrays; what it reads of other arrays counts
            as a constant.
        arguments: lazy arrays of the right shapes and types; they are not evaluated.

    Raises:
        ModelError: MLX cannot export one of the primitives.
    """
    operations: list[Operation] = []
    given: list[Value] = []
    results: list[str] = []

    def read(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "primitive":
            operations.append(
                Operation(
                    event["name"],
                    list(event["arguments"]),
                    tuple(name for name, _, _ in event["inputs"]),
                    tuple(_value(*one) for one in event["outputs"]),
                )
            )
        elif kind == "inputs":
            given.extend(_value(*one) for one in event["inputs"])
        elif kind == "constants":
            given.extend(_value(name, one.shape, one.dtype) for name, one in event["constants"])
        elif kind == "outputs":
            results.extend(name for name, _, _ in event["outputs"])

    # Dropout leaves a placeholder of this graph as MLX's random state: draw what replaces it first.
    seed = int(mx.random.randint(0, 2**31 - 1).item())
    try:
        with mx.stream(mx.cpu):
            mx.export_function(read, function, *arguments)
    except RuntimeError as error:
        raise ModelError(
            f"MLX cannot describe what this model computes ({error}), so its memory cannot be "
            "estimated; measure a short run with --set training.updates=1"
        ) from error
    finally:
        mx.random.seed(seed)
    return Graph(tuple(operations), tuple(given), tuple(results))


def _value(name: str, shape: Sequence[int], dtype: mx.Dtype) -> Value:
    return Value(name, tuple(shape), dtype.size, str(dtype).removeprefix("mlx.core."))


def evaluation_order(graph: Graph, stages: Sequence[int] = ()) -> list[Operation]:
    """The operations in the order in which ``mx.eval`` of the results runs them.

    MLX walks the graph from the results down, level by level but never more than WIDTH arrays
    wide, and takes an operation once all that read it have been taken; then it runs what it took
    from last to first.

    Args:
        graph: what is evaluated.
        stages: how many of the results are evaluated together, one call of ``mx.eval`` after
            another; none for all at once.
    """
    maker = {value.name: one for one in graph.operations for value in one.outputs}
    order: list[Operation] = []
    start = 0
    for size in (*stages, len(graph.results) - sum(stages)):
        stage = _stage_order(graph.results[start : start + size], maker)
        order += stage
        start += size
        for one in stage:
            for value in one.outputs:
                maker.pop(value.name)
    return order


def _stage_order(results: tuple[str, ...], maker: dict[str, Operation]) -> list[Operation]:
    """The order of one call of ``mx.eval``; what ``maker`` lacks is there already."""
    readers: dict[int, int] = {}
    stack = [maker[name] for name in results if name in maker]
    for one in stack:
        readers[id(one)] = readers.get(id(one), 0) + 1
    seen = set()
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for name in one.inputs:
            if name in maker:
                read = maker[name]
                readers[id(read)] = readers.get(id(read), 0) + 1
                stack.append(read)
    top = Operation("", [], results, ())
    taken = [top]
    postponed: list[tuple[Operation, int]] = []
    position = 0
    while readers and (position < len(taken) or postponed):
        start = 0
        if position >= len(taken):
            one, start = postponed.pop()
        else:
            one = taken[position]
            position += 1
        for number in range(start, len(one.inputs)):
            read_by = maker.get(one.inputs[number])
            if read_by is None:
                continue
            if len(taken) - position >= WIDTH:
                postponed.append((one, number))
                break
            readers[id(read_by)] -= 1
            if readers[id(read_by)] == 0:
                del readers[id(read_by)]
                taken.append(read_by)
    return taken[:0:-1]
