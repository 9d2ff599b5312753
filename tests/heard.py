"""Events that write down what they hear."""

from __future__ import annotations

from abft_mlx.events import Events, Update


class Heard(Events):
    """Keeps stages, progress and updates."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.counts: list[tuple[int, int]] = []
        self.updates: list[Update] = []

    def stage(self, what: str) -> None:
        self.stages.append(what)

    def progress(self, done: int, total: int) -> None:
        self.counts.append((done, total))

    def update(self, update: Update) -> None:
        self.updates.append(update)
