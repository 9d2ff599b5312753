"""What every command prints and how it fails: one JSON document or lines for a person.

Exit status 0 is success, 2 wrong usage or bad input, 1 a failure at run time, 130 Ctrl-C,
143 SIGTERM. A traceback means a bug in abft-mlx and is left to show.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from abft_mlx import runtime
from abft_mlx.errors import AbftError, DataError, RunError, StoppedError, UsageError
from abft_mlx.stopping import Stop

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from abft_mlx.ranks import Ranks

LONGEST_MESSAGE = 3000
WAYS_OUT = (
    "lower training.micro_batch_tokens and training.shared_demonstrations, or take a 4-bit copy of "
    "the model"
)
# Of a list of more than eight numbers, all but the first three and the last.
_NUMBERS = re.compile(r"((?:\d+, ){3})(?:\d+, ){5,}(?=\d)")
# Bad input when a path that the user named cannot be used; anything else failed at run time.
_USER_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS,
    errno.ENAMETOOLONG,
}  # fmt: skip


class Shell:
    """Where a command prints: results to standard output, progress to standard error.

    With ``as_json`` standard output carries exactly one JSON document, and everything for a
    person, stray prints of libraries included, goes to standard error.
    """

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.stdout: TextIO = sys.stdout

    @contextlib.contextmanager
    def speaking(self) -> Iterator[Shell]:
        """Keep standard output clean for the document while the command works."""
        with contextlib.redirect_stdout(sys.stderr if self.as_json else sys.stdout):
            yield self

    def console(self) -> Console:
        """Where this command writes for a person."""
        from rich.console import Console

        return Console(file=sys.stderr if self.as_json else self.stdout, highlight=False)

    def say(self, *texts: str) -> None:
        """Print lines about what happens; nothing when quiet."""
        if not self.quiet:
            self.tell(*texts)

    def tell(self, *texts: str) -> None:
        """Print lines that a quiet command prints, too."""
        for text in texts:
            self.console().print(text, markup=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or another drawing of rich's."""
        self.console().print(renderable)

    def document(self, content: dict[str, Any]) -> None:
        """Print the JSON document of a command that was called with --json."""
        if self.as_json:
            print(dump(content), file=self.stdout, flush=True)


def table(*headings: str, left: int = 1) -> Table:
    """An empty table without lines; the columns after the first ``left`` are right-aligned."""
    from rich.table import Table

    empty = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        empty.add_column(heading, justify="left" if number < left else "right", overflow="fold")
    return empty


def plain(value: Any) -> Any:
    """The same as strict JSON holds it: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump(content: dict[str, Any]) -> str:
    """One line of strict JSON."""
    text = json.dumps(plain(content), allow_nan=False, ensure_ascii=False)
    # Half of a surrogate pair, as a command line may hold, is written as JSON's own escape.
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(message: str) -> str:
    """A message as a terminal may show it: one line, no control characters, no endless values."""
    line = _NUMBERS.sub(r"\1… ", " ".join(message.split()))
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[: LONGEST_MESSAGE - 302]} … {line[-299:]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


class Command(TyperCommand):
    """A command whose usage line shows arguments as they are typed, without braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the usage line."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


class Commands(TyperGroup):
    """The group of commands: its help in parts, and one line for every expected failure."""

    parts: Mapping[str, list[str]] = {}
    _as_json = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands under a heading for each part."""
        del ctx
        for title, names in self.parts.items():
            limit = formatter.width - 12
            rows = [(f"{n:<8}", self.commands[n].get_short_help_str(limit)) for n in names]
            with formatter.section(title):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note whether JSON is wanted, since a command's own options may fail to parse."""
        self._as_json = "--json" in args
        with self._one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with self._one_line(), Stop().watching():
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn every failure that is no bug into a line, a JSON document and an exit status."""
        problems: Sequence[str] = ()
        try:
            yield
            return
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            status = error.exit_status if isinstance(error, StoppedError) else 130
            message, kind = str(error) or "interrupted", "Interrupted"
        except AbftError as error:
            problems = error.problems if isinstance(error, DataError) else ()
            message, status, kind = str(error), error.exit_status, type(error).__name__
        except Exception as error:
            kind = type(error).__name__
            if isinstance(error, OSError) and error.errno is not None:
                message = ": ".join(filter(None, (error.filename, error.strerror)))
                status = 2 if error.errno in _USER_ERRNOS and error.filename else 1
            elif runtime.out_of_memory(error):
                message = f"out of memory: {str(error) or 'the machine has no more'}; {WAYS_OUT}"
                status, kind = 1, RunError.__name__
            elif hasattr(error, "format_message") and kind != "NoArgsIsHelpError":
                # Typer vendors Click: its usage errors are known by what they can do.
                message = error.format_message().rstrip(".").replace("Value error, ", "")
                cause: Any = error.__cause__
                if hasattr(cause, "errors"):  # pydantic's line does not name the value
                    value = cause.errors()[0]["input"]
                    message = message.replace("Invalid value", f"Invalid value {value!r}", 1)
                context = getattr(error, "ctx", None)
                message += f"; see {context.command_path if context else 'abft-mlx'} --help"
                status, kind = 2, UsageError.__name__
            else:
                raise
        message = one_line(message)
        print(f"error: {message}", file=sys.stderr)
        lines = DataError(message, problems).shown()
        # A message that already holds the only kind of problem needs no list.
        for line in lines if len(lines) > 1 else ():
            print(f"  {one_line(line)}", file=sys.stderr)
        if self._as_json:
            error_facts = {"kind": kind, "message": message, "problems": list(problems)}
            print(dump({"error": error_facts}), flush=True)
        raise typer.Exit(status)


def join_ranks(*, resumable: bool) -> Ranks:
    """The processes of ``mlx.launch`` that a command runs in.

    Args:
        resumable: a command that ends early can go on; says what to do when a rank is gone.
    """
    from abft_mlx import ranks

    return ranks.join(ranks.RESUME if resumable else ranks.AGAIN)


def alone(command: str) -> None:
    """Refuse to run a command that several processes would each do whole."""
    size = join_ranks(resumable=False).size
    if size > 1:
        raise UsageError(
            f"mlx.launch runs {size} processes and {command} is for one; start it without "
            "mlx.launch (finetune, eval and study share their work)"
        )
