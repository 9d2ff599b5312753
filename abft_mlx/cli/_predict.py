"""``abft-mlx predict``: labels for texts from a file or standard input, streamed as JSON Lines."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from abft_mlx.cli import _options, _progress, _ranks
from abft_mlx.cli._options import (
    Adapter,
    Data,
    EvaluationSeed,
    LabelColumn,
    Labels,
    Model,
    Overwrite,
    Quiet,
    Set,
)
from abft_mlx.cli._shell import Shell, dump
from abft_mlx.errors import OutputError, UsageError

if TYPE_CHECKING:
    from abft_mlx.adapters import Source
    from abft_mlx.data import Queries
    from abft_mlx.prediction import Opened, Prediction

_STANDARD_INPUT = "-"
# What a lone argument must end in to be a file of texts and not a recipe or a run.
_TEXTS = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


def predict(
    run_or_recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN_OR_RECIPE",
            help="A run folder, with its adapter; or a recipe. May be left out where --adapter "
            "RUN, or --model with --data or --demonstrations, says it all.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="The texts: a .txt file with one in each line; a .csv, .jsonl or .parquet file "
            "with a column of them; or - for lines of standard input.",
            show_default="-",
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    adapter: Adapter = None,
    demonstrations: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Labelled texts, all of which are shown in every prompt, in order; without it "
            "they are drawn from the data as eval's first ones.",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="The column of texts in FILE; in --data, too, and without a recipe in "
            "--demonstrations.",
            show_default="the recipe's",
        ),
    ] = None,
    label_column: LabelColumn = None,
    labels: Labels = None,
    seed: EvaluationSeed = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="evaluation.batch_tokens: tokens in a forward pass, cached ones included.",
            show_default="16384",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the lines go.", show_default="standard output"),
    ] = None,
    settings: Set = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="With --output: one JSON document on standard output that says what was done. "
            "Without: the lines stay as they are, and an error becomes the last of them.",
        ),
    ] = False,
) -> None:
    """Label texts: one JSON object a line, in order, as they come.

    Each is {"text", "label", "probabilities": {label: probability}}. Everything for people is on
    standard error.
    """
    named, file = _arguments(run_or_recipe, file)
    if named is not None and adapter is None and _is_run(named):
        adapter = named
    shell = Shell(as_json=as_json or output is None, quiet=quiet)
    source = _options.find_adapter(adapter, shell)
    if named is None and source is not None and (source.folder / "recipe.yaml").is_file():
        named = str(source.folder)
    changes = _options.overrides(
        model=model,
        data=data or (demonstrations if named is None else None),
        text_column=text_column if data is not None or named is None else None,
        label_column=label_column,
        labels=labels,
        settings=settings,
        evaluation=seed,
    )
    if batch_tokens is not None:
        changes.append(_options.override("evaluation.batch_tokens", batch_tokens))
    if named is None and (model is None or (data is None and demonstrations is None)):
        missing = "--model" if model is None else "--data or --demonstrations"
        raise UsageError(
            f"{missing} is missing: without a recipe or a run folder, --model is needed, and "
            "--data or --demonstrations to show labelled texts"
        )
    with shell.speaking():
        opened = (named, changes, source, demonstrations)
        document = _run(shell, *opened, file, text_column, output, overwrite)
    if output is not None:
        shell.document(document)


def _arguments(first: str | None, second: str | None) -> tuple[str | None, str]:
    """The run or recipe, and the texts: a lone argument may be either."""
    if first is None or second is not None:
        return first, second or _STANDARD_INPUT
    if first == _STANDARD_INPUT or first.lower().endswith(_TEXTS):
        return None, first
    return first, _STANDARD_INPUT


def _is_run(named: str) -> bool:
    """Whether a recipe's name is a run folder: its adapter is meant, too, and missed if absent."""
    from abft_mlx import recipe

    return Path(named).is_dir() and recipe.find(named) == Path(named) / "recipe.yaml"


def _run(
    shell: Shell,
    named: str | None,
    changes: list[str],
    adapter: Source | None,
    demonstrations: str | None,
    file: str,
    text_column: str | None,
    output: Path | None,
    overwrite: bool,
) -> dict[str, Any]:
    _ranks.alone("predict")
    from abft_mlx import prediction, runtime
    from abft_mlx.data import Queries

    runtime.use_wired_memory()
    recipe = _options.open_recipe(named, changes)
    piped = file == _STANDARD_INPUT
    # Before the model is opened: a missing file shall not cost a download.
    section = recipe.data.model_copy(update={"text": text_column} if text_column else {})
    queries = Queries(
        "standard input" if piped else file, section, sys.stdin.buffer if piped else None
    )
    if output is not None and output.exists() and not overwrite:
        raise OutputError(f"{output} exists; give --overwrite to replace it, or another --output")
    with _progress.board(shell) as board:
        board.stage(f"opening {recipe.model}")
        opened = prediction.prepare(recipe, adapter, demonstrations)
    _introduce(shell, opened)
    if piped and sys.stdin.isatty():
        shell.say("reading standard input, a text in each line; Ctrl-D ends it")
    start = time.perf_counter()
    # Lines of answers on the same terminal show how far it is.
    live = output is not None or not shell.stdout.isatty()
    with _lines(shell, output) as stream, _progress.board(shell, live=live) as board:
        board.stage("labelling", "texts")
        counted = functools.partial(board.count, total=queries.known)
        count = _write(stream, opened.predictor.predict(queries), counted)
    seconds = time.perf_counter() - start
    _conclude(shell, opened, queries, count, seconds)
    return _document(opened, adapter, queries, count, seconds, output)


@contextlib.contextmanager
def _lines(shell: Shell, output: Path | None) -> Iterator[TextIO]:
    """Where the objects go. A file grows as they come, so that a failure loses none of them."""
    if output is None:
        yield shell.stdout
        return
    try:
        stream = output.open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror})") from None
    with stream:
        yield stream


def _write(
    stream: TextIO, answers: Iterable[list[Prediction]], counted: Callable[[int], None]
) -> int:
    count = 0
    for some in answers:
        for one in some:
            # The digits behind these hang on which texts shared a batch.
            shares = {name: round(share, 6) for name, share in one.probabilities.items()}
            line = {"text": one.text, "label": one.label, "probabilities": shares}
            stream.write(dump(line) + "\n")
        stream.flush()
        count += len(some)
        counted(count)
    return count


def _introduce(shell: Shell, opened: Opened) -> None:
    """Say what every prompt shows."""
    shown = opened.shown()
    shell.say(f"{len(shown)} demonstrations in every prompt, from {opened.source}:")
    for one in shown:
        text = one["text"] if len(one["text"]) <= 60 else f"{one['text'][:57]}..."
        shell.say(f"  {text!r} -> {one['label']}")
    cached = len(opened.predictor.prefix)
    shell.say(
        f"their {cached} tokens are computed once"
        if cached
        else "mlx-lm's cache does not suit this architecture: every prompt is computed whole"
    )


def _conclude(shell: Shell, opened: Opened, queries: Queries, count: int, seconds: float) -> None:
    if queries.dropped:
        shell.tell(f"texts left out because they are empty: {queries.dropped}")
    if opened.predictor.builder.shortened:
        limit = opened.recipe.prompt.max_text_tokens
        shell.say(f"texts shortened to {limit} tokens: {opened.predictor.builder.shortened}")
    shell.say(f"{count:,} texts in {_progress.duration(seconds)}")


def _document(
    opened: Opened,
    adapter: Source | None,
    queries: Queries,
    count: int,
    seconds: float,
    output: Path | None,
) -> dict[str, Any]:
    space = opened.predictor.builder.space
    return {
        "schema": 1,
        "model": opened.recipe.model,
        "adapter": None if adapter is None else str(adapter),
        "labels": list(space.names),
        "label_words": list(space.words),
        "k": len(opened.predictor.demonstrations),
        "demonstrations": opened.shown(),
        "cached_tokens": len(opened.predictor.prefix),
        "texts": count,
        "empty_texts_dropped": queries.dropped,
        "seconds": seconds,
        "output": str(output),
    }
