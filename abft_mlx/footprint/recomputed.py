"""What a backward pass computes again, in a graph that MLX can describe.

MLX exports no custom gradients. So a traced step computes nothing again (:mod:`abft_mlx.recompute`)
but marks where it would: :func:`marked` takes a function's arguments and its result, and with them
their gradients, through pairs of reshapes that nothing else makes. :func:`spelled_out` then writes
into the graph what the markers stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import mlx.core as mx

from abft_mlx import activations
from abft_mlx.errors import ModelError
from abft_mlx.footprint.graph import Graph, Operation, Value, trace

# Axes of length 1 that are put in and taken out again at once.
ARGUMENT = (0, 1)
RESULT = (0, 1, 2)


def marked(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Stands for :func:`abft_mlx.recompute.again` in a function that is traced."""
    own, plain = list(activations.own_gradients()), activations.plain_function(function)

    def call(*arrays: mx.array) -> mx.array:
        run: Callable[..., mx.array] = function
        axes: tuple[int, ...] = RESULT
        if plain in own and arrays[0].dtype == mx.float32:
            run = activations.quick(function, exportable=True)
            axes = _own(own.index(plain))
        return _through(run(*(_through(one, ARGUMENT) for one in arrays)), axes)

    return call


def _own(number: int) -> tuple[int, ...]:
    """Axes of the result of a function that does not leave its gradient to MLX."""
    return (*RESULT, *range(len(RESULT), len(RESULT) + number + 1))


def _through(array: mx.array, axes: tuple[int, ...]) -> mx.array:
    return mx.expand_dims(array, axes).squeeze(axes)


def spelled_out(graph: Graph) -> Graph:
    """The graph with every marked function computed a second time, for its gradient.

    Raises:
        ModelError: a function's gradient comes from elsewhere than its result's.
    """
    return _Rewriting(graph).result()


class _Rewriting:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.maker = {value.name: one for one in graph.operations for value in one.outputs}
        self.readers: dict[str, list[Operation]] = {}
        for one in graph.operations:
            for name in one.inputs:
                self.readers.setdefault(name, []).append(one)
        self.values = {one.name: one for one in graph.given} | {
            value.name: value for one in graph.operations for value in one.outputs
        }
        self.arguments = {one.outputs[0].name for one in self._marks(ARGUMENT)}
        self.own = {
            one.outputs[0].name: gradient
            for number, gradient in enumerate(activations.own_gradients().values())
            for one in self._marks(_own(number))
        }
        self.results = {one.outputs[0].name for one in self._marks(RESULT)} | self.own.keys()
        self.entries = {self.maker[name].inputs[0] for name in self.arguments}
        self.place = {id(one): number for number, one in enumerate(graph.operations)}
        self.renamed: dict[int, dict[str, str]] = {}
        self.added: list[Operation] = []
        self.given: list[Value] = []

    def _marks(self, axes: tuple[int, ...]) -> Iterable[Operation]:
        """The second reshape of each pair."""
        for one in self.graph.operations:
            if one.name == "Squeeze" and tuple(one.arguments[0]) == axes:
                before = self.maker.get(one.inputs[0])
                if before and (before.name, before.arguments) == ("ExpandDims", one.arguments):
                    yield one

    def result(self) -> Graph:
        for name in sorted(self.results):
            self._again(name)
        operations = [
            replace(one, inputs=tuple(self.renamed.get(id(one), {}).get(n, n) for n in one.inputs))
            for one in self.graph.operations
        ]
        given = (*self.graph.given, *self.given)
        return replace(self.graph, operations=_runnable([*operations, *self.added]), given=given)

    def _again(self, result: str) -> None:
        """Compute again what leads to a result, unless it is the gradient of one."""
        inside = self._inside(result)
        if inside is None:
            return
        made = {value.name for one in inside for value in one.outputs}
        taken = sorted(made & self.arguments)
        numbers = {id(one) for one in inside} | {id(self.maker[self.maker[result].inputs[0]])}
        outside = [
            (name, reader)
            for name in sorted(made)
            for reader in self.readers.get(name, [])
            if id(reader) not in numbers
        ]
        if not outside:
            return
        gradient = self._gradient([one for _, one in outside], made)
        if result in self.own:
            self._differentiate(result, self._before(taken[0]), gradient, outside)
            return
        new = {name: f"{name}, again for {result}" for name in made}
        sources = [self._before(name) for name in taken]
        waiting = tuple(replace(self.values[n], name=new[n]) for n in taken)
        self.added.append(Operation("Depends", [], (*sources, gradient), waiting))
        reshapes = {id(self.maker[name]) for name in taken}
        reshapes |= {id(self.maker[self.maker[name].inputs[0]]) for name in taken}
        for one in inside:
            if id(one) not in reshapes:
                inputs = tuple(new.get(name, name) for name in one.inputs)
                outputs = tuple(replace(value, name=new[value.name]) for value in one.outputs)
                self.added.append(replace(one, inputs=inputs, outputs=outputs))
        for name, reader in outside:
            self.renamed.setdefault(id(reader), {})[name] = new[name]

    def _differentiate(
        self, result: str, argument: str, gradient: str, outside: list[tuple[str, Operation]]
    ) -> None:
        """Put a function's own gradient in the place of MLX's, which nobody reads then."""
        queue = [value.name for _, one in outside for value in one.outputs]
        for name in queue:
            if name in self.arguments:
                break
            queue += [value.name for one in self.readers.get(name, []) for value in one.outputs]
        else:
            raise ModelError("a marked function's gradient is nobody's")

        def own(x: mx.array, cotangent: mx.array) -> list[mx.array]:
            (x,) = mx.depends([x], [cotangent])
            return [self.own[result](x, cotangent)]

        shape = self.values[argument].shape
        graph = trace(own, [mx.zeros(shape), mx.zeros(shape)])
        given = zip(graph.given, (argument, gradient), strict=False)
        names = {value.name: name for value, name in given}
        constants = [value for value in graph.given if value.name not in names]
        made = [value for one in graph.operations for value in one.outputs]
        new = {value.name: f"{value.name} of {result}" for value in (*constants, *made)}
        names |= new
        self.given += [replace(value, name=new[value.name]) for value in constants]
        for one in graph.operations:
            outputs = tuple(replace(value, name=new[value.name]) for value in one.outputs)
            inputs = tuple(names[name] for name in one.inputs)
            self.added.append(replace(one, inputs=inputs, outputs=outputs))
        for one in self.readers.get(name, []):
            self.renamed.setdefault(id(one), {})[name] = new[graph.results[0]]

    def _before(self, marked: str) -> str:
        """What goes into a pair of reshapes."""
        return self.maker[self.maker[marked].inputs[0]].inputs[0]

    def _inside(self, result: str) -> list[Operation] | None:
        """Operations between a function's arguments and its result; None behind a gradient."""
        found: dict[int, Operation] = {}
        stack = [self._before(result)]
        while stack:
            name = stack.pop()
            one = self.maker.get(name)
            if one is None or id(one) in found:
                continue
            if name in self.results:
                return None
            found[id(one)] = one
            if name in self.arguments:
                found[id(self.maker[one.inputs[0]])] = self.maker[one.inputs[0]]
            else:
                stack.extend(one.inputs)
        # What comes from elsewhere alone, such as a mask, is read as it is.
        inside: list[Operation] = []
        made: set[str] = set()
        for number in sorted(self.place[key] for key in found):
            one = self.graph.operations[number]
            if one.outputs[0].name in self.entries or not made.isdisjoint(one.inputs):
                inside.append(one)
                made |= {value.name for value in one.outputs}
        return inside

    def _gradient(self, readers: list[Operation], made: set[str]) -> str:
        """The gradient of a result, on which those of its arguments depend."""
        between, seen = list(readers), set()
        for one in between:
            for value in one.outputs:
                if value.name not in seen and value.name not in self.arguments:
                    seen.add(value.name)
                    between.extend(self.readers.get(value.name, []))
        queue = [name for one in between for name in one.inputs]
        seen = made | self.arguments
        for name in queue:
            if name in self.results:
                return name
            if name in self.maker and name not in seen:
                seen.add(name)
                queue.extend(self.maker[name].inputs)
        raise ModelError("a gradient does not come through a marked function's result")


def _runnable(operations: list[Operation]) -> tuple[Operation, ...]:
    """The same operations, each behind those whose arrays it reads."""
    maker = {value.name: one for one in operations for value in one.outputs}
    done: dict[int, Operation] = {}
    waiting: set[int] = set()
    stack = list(reversed(operations))
    while stack:
        one = stack[-1]
        missing = [maker[name] for name in one.inputs if name in maker]
        missing = [before for before in missing if id(before) not in done]
        if missing and id(one) not in done:
            if id(one) in waiting:
                raise ModelError("a marked function's gradient comes from what is computed again")
            waiting.add(id(one))
            stack.extend(missing)
        else:
            done.setdefault(id(one), stack.pop())
    return tuple(done.values())
