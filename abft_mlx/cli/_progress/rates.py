"""How fast work went lately, and how long what is left of it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abft_mlx.trainer import Update

Clock = Callable[[], float]
# Reports that come faster count as one, so that the window is of seconds.
_SPACED_SECONDS = 0.5
_WINDOW = 20
_RECENT_UPDATES = 8


class CountRate:
    """The rate of work that is counted, over the last reports.

    Args:
        clock: seconds.
        begun: when the work began, by that clock.

    Attributes:
        done: of the last report.
        total: likewise; 0 where nobody knows.
    """

    def __init__(self, clock: Clock, begun: float) -> None:
        self._clock = clock
        self.begun = begun
        self.done, self.total = 0, 0
        self._seen: deque[tuple[float, float]] = deque([(begun, 0.0)], maxlen=_WINDOW)

    def add(self, done: int, total: int | None) -> None:
        """Note a report: so much of so much."""
        self.done, self.total = done, total or 0
        now = self._clock()
        if len(self._seen) > 1 and now - self._seen[-2][0] < _SPACED_SECONDS:
            self._seen.pop()
        self._seen.append((now, float(done)))

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return 0 < self.total <= self.done

    @property
    def seconds_left(self) -> float | None:
        """From now on, at the rate of late; None where it is not known, or how much there is."""
        (begun, before), (now, done) = self._seen[0], self._seen[-1]
        if done <= before or now <= begun or not self.total:
            return None
        seconds = max(self.total - done, 0.0) * (now - begun) / (done - before)
        return max(seconds - (self._clock() - now), 0.0)


class Stage:
    """What goes on now, and how far it is.

    Args:
        clock: seconds.

    Attributes:
        what: its name; empty between stages.
        unit: what is counted.
        begun: when it began.
        rate: of what is counted; None while nothing was.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.what, self.unit = "", ""
        self.begun = clock()
        self.rate: CountRate | None = None
        self._last: CountRate | None = None

    def begin(self, what: str, unit: str) -> None:
        """Another stage, or none where it has no name."""
        self.what, self.unit, self.begun = what, unit, self._clock()
        self._last, self.rate = self.rate or self._last, None

    def count(self, done: int, total: int | None) -> bool:
        """Note a report, and say whether it is the first of a stage or of a measurement.

        Measurements in turn may be counted together: then the rate goes on from stage to stage.
        """
        before = self.rate or self._last
        first = self.rate is None
        if before is None or done < before.done or (total or 0) != before.total:
            first = True
            before = CountRate(self._clock, self.begun)
        before.add(done, total)
        self.rate, self.begun = before, self._clock()
        return first


class UpdateRate:
    """The rate of updates, as they were timed, and of the validations between them.

    Args:
        total: updates of the run.
        validate_every: updates between validations; 0 if there are none.
        clock: seconds.
    """

    def __init__(self, total: int, validate_every: int, clock: Clock) -> None:
        self.total = total
        self._every = validate_every
        self._clock = clock
        self._last = clock()
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_UPDATES)
        self._validation_seconds: float | None = None

    def add(self, update: Update) -> None:
        """Note an update; after a validation it comes that much later."""
        now = self._clock()
        self._recent.append((update.tokens, update.seconds))
        if update.validation_accuracy is not None:
            self._validation_seconds = max(now - self._last - update.seconds, 0.0)
        self._last = now

    @property
    def tokens_per_second(self) -> float:
        """Of the last few updates."""
        return sum(t for t, _ in self._recent) / max(sum(s for _, s in self._recent), 1e-9)

    def seconds_left(self, step: int) -> float:
        """From now on, after a step; with validations once it is known what one takes."""
        mean = sum(s for _, s in self._recent) / len(self._recent)
        seconds = mean * max(self.total - step, 0)
        if self._every and self._validation_seconds is not None and step < self.total:
            validations = -(-self.total // self._every) - step // self._every
            seconds += validations * self._validation_seconds
        return max(seconds - (self._clock() - self._last), 0.0)
