"""What is said of a document from elsewhere that holds other things than it should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abft_mlx.errors import OutputError

_MISREAD = (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError)


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Say of a document in which a part is missing, or is of another kind, that it is so.

    The documents of runs and studies nest deeply, and every figure asks for other parts of them:
    what one of them cannot take is told from where it was met, and kept as the cause.

    Raises:
        OutputError: a part is not what it should be.
    """
    try:
        yield
    except _MISREAD as error:
        found = " ".join(repr(error).split())
        raise OutputError(
            f"{source}: holds a part that cannot be read ({found:.300}); make it again or take it "
            "away"
        ) from error
