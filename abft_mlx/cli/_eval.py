"""``abft-mlx eval``: how good a classifier a model is, without and with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import _options, _progress, _protocols, _ranks, _resolve, _words
from abft_mlx.cli._events import BoardEvents
from abft_mlx.cli._options import (
    Adapter,
    Data,
    Demonstrations,
    EvaluationSeed,
    Json,
    LabelColumn,
    Labels,
    LabelWords,
    Model,
    Overwrite,
    Quiet,
    Set,
    TextColumn,
)
from abft_mlx.cli._protocols import Compat, Methods, Protocols, Transfer
from abft_mlx.cli._shell import Shell, plain
from abft_mlx.errors import OutputError, UsageError

if TYPE_CHECKING:
    from abft_mlx.ranks import Ranks


def evaluate(
    run_or_recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN_OR_RECIPE",
            help="A run folder, which means its model with its adapter; or a recipe, by the name "
            "of one that ships or a .yaml file.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    adapter: Adapter = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    labels: Labels = None,
    label_words: LabelWords = None,
    demonstrations: Demonstrations = None,
    seed: EvaluationSeed = None,
    protocol: Protocols = None,
    methods: Methods = None,
    transfer: Transfer = None,
    compat: Compat = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=_options.path,
            metavar="FILE",
            help="Also write the JSON document there.",
            show_default="eval.json of a run folder that its own recipe measures",
        ),
    ] = None,
    overwrite: Overwrite = False,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a model on fixed seeded test prompts, without and with an adapter.

    Name a run or a recipe, or give --model and --data.
    """
    asked = _protocols.changes(protocol, methods, transfer, compat)
    changes = _options.overrides(
        model=model,
        data=data,
        text_column=text_column,
        label_column=label_column,
        labels=labels,
        label_words=label_words,
        demonstrations=demonstrations,
        settings=[*asked, *(settings or ())],
        evaluation=seed,
    )
    subject = _resolve.subject(Shell(as_json=as_json, quiet=quiet), run_or_recipe, adapter)
    if subject.recipe is None and (model is None or data is None):
        missing = "--model" if model is None else "--data"
        raise UsageError(
            f"{missing} is missing: without a recipe, or a run folder that holds one, both "
            "--model and --data are needed"
        )
    file, wanted = _file(None if changes else subject.run, output, overwrite=overwrite)
    ranks = _ranks.join(resumable=False)
    if not ranks.first:  # the first rank speaks for all
        as_json, quiet = False, True
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        document = _measure(shell, ranks, subject, changes)
        if not ranks.first:
            return
        if not as_json:
            _show(shell, document)
        _write(shell, document, file, wanted=wanted)
        if not as_json and subject.adapter is None:
            named = subject.recipe
            what = [named] if named else ["--model", model, "--data", data]
            shell.say("", f"next: {_words.command('finetune', *what)}")
    shell.document(document)


def _file(run: Path | None, output: Path | None, *, overwrite: bool) -> tuple[Path | None, bool]:
    """Where the document goes, and whether somebody asked for that.

    Args:
        run: the folder that the document describes whole, if there is one.
        output: what somebody asked for.
        overwrite: whether that may be there.

    Raises:
        OutputError: it was asked for and cannot go there.
    """
    if output is not None:
        _options.check_file(output, overwrite=overwrite)
        return output, True
    from abft_mlx.trainer import EVALUATION_FILE

    return (None if run is None else run / EVALUATION_FILE), False


def _write(shell: Shell, document: dict[str, Any], file: Path | None, *, wanted: bool) -> None:
    if file is None:
        return
    from abft_mlx import files

    try:
        files.write_json(file, plain(document))
    except OutputError as error:
        if wanted:
            raise
        shell.say(f"note: {error}")  # what was measured is not lost: it is shown
        return
    shell.say(f"wrote {file}")


def _measure(
    shell: Shell,
    ranks: Ranks,
    subject: _resolve.Subject,
    changes: list[str],
) -> dict[str, Any]:
    from abft_mlx import experiment, runtime

    runtime.use_wired_memory()
    opened = _options.open_recipe(subject.recipe, changes)
    shell.say(f"measuring {opened.model} on {opened.data.source} …")
    with _progress.board(shell) as board:
        document = experiment.evaluate(
            opened,
            subject.adapter,
            events=BoardEvents(board),
            ranks=ranks,
        )
    asked, measured = opened.evaluation.queries, document["prompts"]
    if "verdict" not in document:
        measured //= opened.evaluation.repeats
    if measured < asked and any(one.startswith("evaluation.queries=") for one in changes):
        shell.say(f"evaluation.queries is {asked:,}, but there are only {measured:,} test rows")
    k = [one for one in changes if one.startswith("prompt.demonstrations=")]
    if k and "verdict" in document and subject.adapter is not None:
        shell.say(f"{k[-1]} changes nothing: a run shows its own {document['k']} demonstrations")
    return document


def _show(shell: Shell, document: dict[str, Any]) -> None:
    names = document["labels"]
    pairs = zip(names, document["label_words"], strict=True)
    renamed = [f"{name} as {word.strip()!r}" for name, word in pairs if word.strip() != name]
    if renamed:
        shell.say(f"labels in prompts: {', '.join(renamed)}")
    if "verdict" in document:
        for line in _words.verdict(document):
            shell.tell(line)
        return
    if "methods" in document:
        _accuracy(shell, document)
    _protocols.show(shell, document)


def _accuracy(shell: Shell, document: dict[str, Any]) -> None:
    names = document["labels"]
    rows = {}
    if "base" in document:
        rows = {_row("base model", n): m for n, m in document["base"]["methods"].items()}
    last = "with adapter" if "base" in document else "model"
    rows |= {_row(last, n): m for n, m in document["methods"].items()}
    chat = " in chat turns" if document["chat_template"] else ""
    kept = " fixed" if document["demonstrations"] == "fixed" else ""
    shell.tell(f"{document['prompts']:,} prompts with {document['k']}{kept} demonstrations{chat}")
    shell.show(_words.measures(rows))
    for name, method in rows.items():
        table = None if len(rows) > 2 else _words.confusion(names, method["confusion"])
        if table is not None:
            shell.tell("", f"{name}, prompts:")
            shell.show(table)


def _row(state: str, method: str) -> str:
    return state if method == "vanilla" else f"{state}, {method.replace('_', '-')}"
