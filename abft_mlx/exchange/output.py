"""The folder of an export: whole or absent, and never one that something else lives in."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from abft_mlx.errors import OutputError
from abft_mlx.files import write_failure

# What an export may leave in its folder, and --overwrite may therefore clear away.
OWN_FILES = (
    "adapters.safetensors",
    "lora.safetensors",
    "head_weights.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "README.md",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "*.py",
)


def check(output: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """See whether an export may be written, before any long work.

    Args:
        output: the folder to be.
        sources: the folders that are read, which must not be it, in it or around it.
        overwrite: replace an earlier export.

    Raises:
        OutputError: it may not; one line with the way out.
    """
    where = output.resolve()
    for source in (one.resolve() for one in sources):
        if where == source or where in source.parents:
            raise OutputError(
                f"{output}: contains {source.name}, which is exported; choose another --output"
            )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is a file; name a folder with --output")
    try:
        found = sorted(one.name for one in output.iterdir())
    except OSError as error:
        raise write_failure(output, error) from error
    foreign = [
        name
        for name in found
        if not any(fnmatch.fnmatch(name, one) for one in OWN_FILES + TOKENIZER_FILES)
    ]
    if foreign:
        raise OutputError(
            f"{output}: contains {foreign[0]}, which is not a file of an export; choose another "
            "--output"
        )
    if found and not overwrite:
        raise OutputError(
            f"{output}: contains an export already; use --overwrite to replace it, or another "
            "--output"
        )


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give a new folder beside the output; it takes the output's place when the block ends well.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    replaced = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            output.rename(replaced)
        temporary.rename(output)
    except OSError as error:
        raise write_failure(output, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """File name to bytes, of all files in a folder."""
    return {one.name: one.stat().st_size for one in sorted(folder.iterdir())}
