"""The peak of memory while MLX evaluates a graph, by replaying what it allocates and frees."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from abft_mlx.footprint import buffers
from abft_mlx.footprint.graph import Graph, Operation, evaluation_order

# MLX hands work to the device's thread ahead of it: ten tasks of ten pieces each. A buffer goes
# only when that thread has come past the last piece that reads it.
AHEAD = 100


def peak_bytes(
    graph: Graph, *, dying: Sequence[int] = (), ahead: int = AHEAD, stages: Sequence[int] = ()
) -> int:
    """Peak bytes that evaluating a graph takes beside its arguments, results included.

    Args:
        graph: what is evaluated at once.
        dying: numbers of the arguments that nobody else holds; they count, too, until they have
            been read for the last time.
        ahead: pieces of work by which allocation runs ahead of computation.
        stages: how many of the results are evaluated together, one call after another. What comes
            after the stages is kept; of a stage's results, what nobody reads any more is not.
    """
    names = {graph.given[number].name for number in dying}
    return _Replay(graph, names, ahead, stages).peak


class _Replay:
    def __init__(
        self, graph: Graph, dying: set[str], ahead: int, stages: Sequence[int] = ()
    ) -> None:
        self.dispatched = 0
        self.ahead = ahead
        self.pending: deque[tuple[int, list[buffers.Buffer], int]] = deque()
        self.stored = {
            one.name: buffers.fresh(one, exists=one.name not in dying) for one in graph.given
        }
        self.kept = set(graph.results[sum(stages) :]) | set(self.stored) - dying
        for name in dying:
            self.stored[name].buffer.holders = 1
        self.now = self.peak = sum(self.stored[name].buffer.size_bytes for name in dying)
        order = evaluation_order(graph, stages)
        self.readers = Counter(name for one in order for name in one.inputs)
        for one in order:
            self._run(one)

    def _run(self, operation: Operation) -> None:
        names = operation.inputs
        inputs = [self.stored[name] for name in names]

        def may_take(number: int) -> bool:
            name = names[number]
            return (
                name not in self.kept
                and self.readers[name] == 1
                and self.stored[name].buffer.holders == 1
            )

        effect = buffers.run(operation, inputs, may_take)
        sources = {id(one.buffer) for one in inputs}
        self._grow(effect.copies_bytes)
        for value, one in zip(operation.outputs, effect.outputs, strict=True):
            if id(one.buffer) not in sources and one.buffer.holders == 0:
                self._grow(one.buffer.size_bytes)
            one.buffer.holders += 1
            self.stored[value.name] = one
        made = {id(one.buffer) for one in effect.outputs}
        held = list({id(one.buffer): one.buffer for one in inputs}.values())
        held = [one for one in held if id(one) not in made]
        for buffer in held:
            buffer.holders += 1
        # The last piece of an operation's work lets go of its inputs.
        self.dispatched += effect.dispatches + 1
        self.pending.append((self.dispatched, held, effect.copies_bytes))
        for name in names:
            self.readers[name] -= 1
            if self.readers[name] == 0 and name not in self.kept:
                self._let_go(self.stored.pop(name).buffer)
        for value in operation.outputs:
            if self.readers[value.name] == 0 and value.name not in self.kept:
                self._let_go(self.stored.pop(value.name).buffer)
        while self.pending and self.pending[0][0] <= self.dispatched - self.ahead:
            _, held, copies = self.pending.popleft()
            self.now -= copies
            for buffer in held:
                self._let_go(buffer)

    def _grow(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _let_go(self, buffer: buffers.Buffer) -> None:
        buffer.holders -= 1
        if buffer.holders == 0:
            self.now -= buffer.size_bytes
