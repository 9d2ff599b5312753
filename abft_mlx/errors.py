"""The one tree of exceptions that abft-mlx raises on purpose.

::

    AbftError                     exit status 1: something failed at run time
    ├── RunError                  a run could not go on (non-finite loss, no memory, no network)
    └── UsageError                exit status 2: what was asked for cannot be done as given
        ├── RecipeError           a recipe, or a value of it
        ├── DataError             a data file or data set; carries every problem found
        ├── PromptError           a template, label word or text that makes no usable prompt
        ├── ModelError            a model that cannot be found, opened or used
        │   └── UnsupportedArchitectureError
        ├── AdapterError          an adapter that does not fit
        ├── OutputError           a folder or file that cannot be written
        └── NotFittedError        a Classifier that was asked before it knows its classes

A run that a signal ends raises StoppedError, which is a KeyboardInterrupt and no failure.

Messages are one line for a person: the value seen, where it was seen, and the way out.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

# Parts of a list that a message shows.
SHOWN = 5


def first_few(parts: Sequence[str], between: str = ", ") -> str:
    """A list for a message, cut at five.

    Args:
        parts: any number of texts.
        between: what stands between two.
    """
    more = len(parts) - SHOWN
    return between.join(parts[:SHOWN]) + (f" and {more} more" if more > 0 else "")


class AbftError(Exception):
    """Base of every error that abft-mlx raises on purpose."""

    exit_status = 1


class RunError(AbftError):
    """A run could not go on."""


class UsageError(AbftError):
    """What was asked for cannot be done as given."""

    exit_status = 2


class RecipeError(UsageError):
    """A recipe, or one of its values, cannot be used."""


class DataError(UsageError):
    """A data file or data set cannot be used.

    Attributes:
        problems: every problem found, one line each; the message holds the first of them.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    def shown(self, limit: int = SHOWN) -> list[str]:
        """Lines for a person: the first problem of each kind, and how many more there are.

        Problems are of a kind if they differ only in numbers, such as those of rows.

        Args:
            limit: kinds to show.
        """
        kinds: dict[str, list[str]] = {}
        for problem in self.problems:
            kinds.setdefault(re.sub(r"0x[0-9a-f]+|\d+", "0", problem), []).append(problem)
        lines = []
        for some in [*kinds.values()][:limit]:
            more = f" ({len(some) - 1} more of this kind)" if len(some) > 1 else ""
            lines.append(some[0] + more)
        hidden = sum(map(len, [*kinds.values()][limit:]))
        return [*lines, f"and {hidden} more problems"] if hidden else lines


class PromptError(UsageError):
    """A template, label word or text makes no usable prompt."""


class ModelError(UsageError):
    """A model cannot be found, opened or used."""


class UnsupportedArchitectureError(ModelError):
    """No port knows where this architecture keeps its attention."""


class AdapterError(UsageError):
    """An adapter does not fit the model, or cannot be read."""


class OutputError(UsageError):
    """A folder or file cannot be written, or would be overwritten."""


class NotFittedError(UsageError, AttributeError):
    """A classifier was asked before it knows its classes; by its bases ``hasattr`` is False."""


class StoppedError(KeyboardInterrupt):
    """A signal asked a run to end.

    Args:
        signal_number: of SIGINT or SIGTERM.

    Attributes:
        exit_status: 130 or 143, as a shell has it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted" if signal_number == signal.SIGINT else "terminated")
        self.exit_status = 128 + signal_number
