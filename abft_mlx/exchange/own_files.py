"""The files of a run folder that may leave it: an allow-list, and no link among them."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from abft_mlx import files
from abft_mlx.adapters import CONFIG, FACTORS, WEIGHTS
from abft_mlx.errors import UsageError

CARD = "README.md"
NEEDED = (WEIGHTS, CONFIG, "recipe.yaml", "run.json")
ALLOWED = (*NEEDED, FACTORS, "metrics.jsonl", CARD)


def read(run: Path) -> dict[str, bytes]:
    """Those that a run folder has, each read once and never through a link.

    The folder itself may be one: its path is the user's word.

    Raises:
        UsageError: no folder, a file that is missing, a link or no plain file.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such run folder; give the one that abft-mlx finetune wrote")
    found = {}
    for name in ALLOWED:
        path = run / name
        try:
            found[name] = files.read_own(path)
        except FileNotFoundError:
            if name in NEEDED:
                raise UsageError(
                    f"{run} has no {name}; give a folder that abft-mlx finetune wrote"
                ) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise UsageError(
                    f"{path} is a link, and links are not followed; put the file there"
                ) from None
            raise UsageError(
                f"{path}: cannot be read ({error.strerror}); put the file there"
            ) from None
    return found


def text(found: Mapping[str, bytes], name: str, run: Path) -> str:
    """The text of a file that was read.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return found[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{run / name}: cannot be read ({error}); it is no UTF-8") from None
