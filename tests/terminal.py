"""A pseudo-terminal for whole commands, and what stands on its screen in the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTROL = re.compile(r"\x1b\[[0-9;?]*([A-Za-z])")


@dataclass(frozen=True)
class Shown:
    """What a command did.

    Attributes:
        status: its exit status.
        stdout: through a pipe.
        terminal: all that was written to standard error, a terminal.
    """

    status: int
    stdout: str
    terminal: str

    @property
    def text(self) -> str:
        """The same without control sequences: every frame that was drawn."""
        return CONTROL.sub("", self.terminal.replace("\r\n", "\n")).replace("\r", "\n")

    @property
    def screen(self) -> list[str]:
        """The lines that stay: what a terminal shows when everything was obeyed."""
        lines, row, column = [""], 0, 0
        place = 0
        while place < len(self.terminal):
            found = CONTROL.match(self.terminal, place)
            if found is not None:
                count = int(re.sub(r"\D", "", found[0][2:-1]) or 1)
                if found[1] == "A":
                    row = max(row - count, 0)
                elif found[1] == "K":
                    lines[row] = ""
                place = found.end()
                continue
            one = self.terminal[place]
            place += 1
            if one == "\r":
                column = 0
            elif one == "\n":
                row += 1
                if row == len(lines):
                    lines.append("")
            else:
                lines[row] = lines[row][:column].ljust(column) + one + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines if line.strip()]


def run(*arguments: object, columns: int = 100, **more: str) -> Shown:
    """Run abft-mlx with standard error on a pseudo-terminal and standard output in a pipe.

    Args:
        arguments: of the command.
        columns: of the terminal.
        more: of the environment.
    """
    reader, writer = os.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(reader, 65536)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            chunks.append(chunk)

    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    environment |= {"PYTHONPATH": str(ROOT), **more}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=writer,
        env=environment,
    ) as process:
        os.close(writer)
        reading = threading.Thread(target=read)
        reading.start()
        assert process.stdout is not None
        stdout = process.stdout.read().decode()
        status = process.wait()
    reading.join()
    os.close(reader)
    return Shown(status, stdout, b"".join(chunks).decode(errors="replace"))
