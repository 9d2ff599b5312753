"""``abft-mlx predict``: labels for texts from a file or standard input, as they come."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from abft_mlx.cli import options
from abft_mlx.cli.progress import board, duration
from abft_mlx.cli.shell import Shell, alone, dump
from abft_mlx.errors import OutputError, PromptError, UsageError, first_few

if TYPE_CHECKING:
    from abft_mlx.data import Queries, Query
    from abft_mlx.prediction import Opened, Prediction, Predictor

    Answer = tuple[Query, Prediction | None]
    Write = Callable[[Query, Prediction | None], None]

_STANDARD_INPUT = "-"
# The label of texts that are answered with too little probability.
UNSURE = "unsure"
_DEMONSTRATIONS_SHOWN, _SKIPPED_SHOWN = 12, 5
_TABLES = {".csv": ",", ".tsv": "\t"}
_OBJECTS = (".jsonl", ".ndjson", ".json")
_NEVER_WRITTEN = (".xlsx", ".xls", ".ods", ".parquet")


def predict(
    run_or_recipe: str | None = None,
    file: str | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    adapter: str | None = None,
    demonstrations: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    label_words: str | None = None,
    seed: int | None = None,
    batch_tokens: int | None = None,
    output: Path | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    threshold: float | None = None,
    show_prompt: str | None = None,
    settings: list[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Label texts from a file or standard input.

    Standard output gets a JSON object for each: {"text", "label", "probabilities": {label:
    probability}}. --output labels.csv writes a table instead. Everything for people is on standard
    error.

    Args:
        run_or_recipe (RUN_OR_RECIPE): A run folder, which means its model with its adapter; or a
            recipe. May be left out where --adapter RUN, or --model with --data or --demonstrations,
            says it all.
        file (FILE): The texts: a .txt file with one in each line; a .csv, .jsonl or .parquet file
            with a column of them; or - for lines of standard input. [default: -]
        demonstrations (FILE): Labelled texts, all of which are shown in every prompt, in order.
            [default: the run's own]
        text_column: The column of texts in FILE; in --data, too, and without a recipe in
            --demonstrations. [default: the recipe's]
        batch_tokens: evaluation.batch_tokens: tokens in a forward pass, cached ones included. [min:
            1] [default: 16384]
        output (FILE): Where the answers go. A .csv or .tsv keeps all columns of FILE and adds label
            and probability; any other file gets JSON Lines. [default: standard output]
        on_error: What to do with a text that is empty, too long or not UTF-8: stop, or skip it and
            leave its label empty in a .csv.
        threshold: Give the label unsure to texts whose most probable label is less probable. eval
            prints what that gains. [min: 0] [max: 1] [default: every text gets a label]
        show_prompt (TEXT): Print the prompt that would be asked about this text, and stop.
        as_json (--json): With --output: one JSON document on standard output that says what was
            done. Without: the lines stay as they are, and an error becomes the last of them.
    """
    from abft_mlx.recipe.files import DATA_SUFFIXES

    # A lone argument may be the run or the texts.
    first = run_or_recipe
    if first and file is None and (first == "-" or first.lower().endswith(DATA_SUFFIXES)):
        first, file = None, first
    file = file or _STANDARD_INPUT
    shell = Shell(as_json=as_json or output is None, quiet=quiet)
    subject = options.subject(shell, first, adapter)
    own = subject.recipe is None
    changes = options.overrides(
        settings, model=model, data=data or (demonstrations if own else None),
        text_column=text_column if data is not None or own else None, label_column=label_column,
        labels=labels, label_words=label_words, evaluation_seed=seed, batch_tokens=batch_tokens,
    )  # fmt: skip
    if own:
        options.both_needed(
            model, data or demonstrations, "; --demonstrations can stand for --data"
        )
    with shell.speaking():
        alone("predict")
        from abft_mlx import data as data_
        from abft_mlx import prediction, runtime

        runtime.use_wired_memory()
        recipe = options.open_recipe(subject.recipe, changes)
        if show_prompt is None:
            # Before the model is opened: a wrong file must not cost a download.
            section = recipe.data.model_copy(update={"text": text_column} if text_column else {})
            stream = sys.stdin.buffer if file == _STANDARD_INPUT else None
            source = "standard input" if stream else file
            queries = data_.Queries(source, section, stream, skip=on_error == "skip")
            if output is not None:
                _check_output(output, file, overwrite=overwrite)
        with board(shell) as shown:
            shown.stage(f"opening {recipe.model}")
            opened = prediction.prepare(recipe, subject.adapter, demonstrations)
        if show_prompt is not None:
            predictor, where = opened.predictor, "the prompt of --show-prompt"
            # The gold label, here the first, is not part of a prompt.
            prompt = predictor.builder.build(
                predictor.shown(show_prompt), show_prompt, 0, where=where
            )
            text = predictor.builder.tokenizer.decode(list(prompt.token_ids))
            print(text.removesuffix("\n"), file=shell.stdout)
            return
        space = opened.predictor.builder.space
        if threshold is not None and UNSURE in space.names:
            raise UsageError(
                f"--threshold {threshold:g}: a class is named {UNSURE}, so an answer could mean "
                "both; leave --threshold out, and look at the probabilities"
            )
        if demonstrations is None and data not in (None, opened.source):
            shell.tell(f"--data {data} is not used: demonstrations are in {opened.source}")
        stored = Path(opened.source).name == prediction.DEMONSTRATIONS_FILE
        if seed is not None and (stored or demonstrations is not None):
            shell.tell(f"--seed {seed} is not used: demonstrations are in {opened.source}")
        _introduce(shell, opened)
        if file == _STANDARD_INPUT and sys.stdin.isatty():
            shell.say("reading standard input, a text in each line; Ctrl-D ends it")
        answers = _Answers(opened.predictor, threshold, skip=on_error == "skip")
        start = time.perf_counter()
        # Lines of answers on the same terminal show how far it is.
        live = output is not None or not shell.stdout.isatty()
        writing = nullcontext(shell.stdout) if output is None else _open(output, file)
        with writing as stream_, board(shell, live=live) as shown:
            shown.stage("labelling", "texts")
            write = _writer(stream_, output, queries, file)
            for arrived in queries:
                for query, answer in answers.of(arrived):
                    write(query, answer)
                    stream_.flush()
                    shown.progress(answers.count, queries.total)
        seconds = time.perf_counter() - start
        _conclude(shell, opened, queries, answers, seconds)
    if output is not None:
        shell.document(
            {
                "schema": 1,
                "model": opened.recipe.model,
                "adapter": None if subject.adapter is None else str(subject.adapter),
                "labels": list(space.names),
                "label_words": list(space.words),
                "k": opened.predictor.k,
                "demonstrations": opened.shown(),
                "cached_tokens": len(opened.predictor.prefix),
                "texts": answers.count,
                "empty_texts_dropped": queries.dropped,
                "skipped": len(answers.skipped),
                "seconds": seconds,
                "output": str(output),
                "unsure": answers.unsure,
            }
        )


def _check_output(output: Path, file: str, *, overwrite: bool) -> None:
    """See whether the answers may be written; OutputError if not."""
    if output.suffix.lower() in _NEVER_WRITTEN:
        raise OutputError(
            f"--output {output}: {output.suffix} files are not written; name a .csv, .tsv or .jsonl"
        )
    source = Path(file).expanduser()
    if source.exists() and output.exists() and output.samefile(source):
        raise OutputError(f"--output {output} is the file of texts itself; name another file")
    options.check_file(output, overwrite=overwrite)


class _Answers:
    """Answers texts in order, and counts.

    Attributes:
        count: texts answered.
        unsure: of these, texts whose answer is below the threshold.
        skipped: why each of the other texts was skipped.
    """

    def __init__(self, predictor: Predictor, threshold: float | None, *, skip: bool) -> None:
        self.count = self.unsure = 0
        self.skipped: list[str] = []
        self.threshold = threshold
        self._predictor = predictor
        self._skip = skip

    def of(self, arrived: Sequence[Query]) -> Iterator[Answer]:
        """The texts with their answers, or None for a text that is skipped."""
        waiting = deque(arrived)
        usable = deque(query for query in arrived if query.problem is None)
        while usable:
            try:
                for answers in self._predictor.predict([list(usable)]):
                    for answer in answers:
                        query = usable.popleft()
                        yield from self._until(query, waiting)
                        yield query, self._counted(answer)
            except PromptError as error:
                if not self._skip:
                    raise
                query = usable.popleft()  # those before it have been answered
                yield from self._until(query, waiting)
                yield self._left_out(replace(query, problem=str(error)))
        yield from map(self._left_out, waiting)

    def _until(self, query: Query, waiting: deque[Query]) -> Iterator[Answer]:
        """What is skipped before a text."""
        while (earlier := waiting.popleft()) is not query:
            yield self._left_out(earlier)

    def _counted(self, answer: Prediction) -> Prediction:
        """An answer, or one that is unsure."""
        self.count += 1
        if self.threshold and answer.probabilities[answer.label] < self.threshold:
            self.unsure += 1
            return replace(answer, label=UNSURE)
        return answer

    def _left_out(self, query: Query) -> Answer:
        """A text that is skipped."""
        self.skipped.append(query.problem or "")
        return query, None


def _open(output: Path, file: str) -> TextIO:
    """Where the answers go. A file grows as they come, so that a failure loses none of them."""
    table = output.suffix.lower() in _TABLES
    path = Path(file).expanduser()
    mark = b""
    if path.is_file():
        with path.open("rb") as source:
            mark = source.read(3)
    # Excel knows UTF-8 by its mark: a table that came with one gets one.
    coding = "utf-8-sig" if table and mark == b"\xef\xbb\xbf" else "utf-8"
    newline = "" if table else None
    try:
        return output.open("w", encoding=coding, errors="backslashreplace", newline=newline)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror})") from None


def _writer(stream: TextIO, output: Path | None, queries: Queries, file: str) -> Write:
    """What writes a text with its answer: a row of a table, or a JSON object."""
    suffix = "" if output is None else output.suffix.lower()
    objects = suffix in _OBJECTS and file.lower().endswith(_OBJECTS)
    columns = queries.columns if objects or suffix in _TABLES else ()
    label, share = (_free(name, columns) for name in ("label", "probability"))
    every = _free("probabilities", columns)
    table = csv.writer(stream, delimiter=_TABLES.get(suffix, ","), lineterminator="\n")

    def write_object(query: Query, answer: Prediction | None) -> None:
        if answer is not None:
            # The digits behind these depend on which texts shared a batch.
            shares = {name: round(share, 6) for name, share in answer.probabilities.items()}
            fields = dict(query.fields) if objects else {"text": answer.text}
            stream.write(dump({**fields, label: answer.label, every: shares}) + "\n")

    def write_row(query: Query, answer: Prediction | None) -> None:
        fields = query.fields or (("text", query.text),)
        cells = [value for _, value in fields]
        if [name for name, _ in fields] != list(columns):  # a header may name a column twice
            cells = [dict(fields).get(name) for name in columns]
        added = ["", ""]
        if answer is not None:
            added = [answer.label, f"{max(answer.probabilities.values()):.6f}"]
        table.writerow([*map(_cell, cells), *added])

    if suffix not in _TABLES:
        return write_object
    table.writerow([*columns, label, share])
    return write_row


def _cell(value: Any) -> str:
    """A value of a JSON or Parquet file as a table has it."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _free(name: str, taken: Sequence[str]) -> str:
    """A name for a column that is added: none that is there."""
    candidates = (name, f"predicted_{name}", *(f"predicted_{name}_{n}" for n in range(2, 1000)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _introduce(shell: Shell, opened: Opened) -> None:
    """Print what every prompt shows."""
    predictor = opened.predictor
    if predictor.nearest is not None:
        shell.say(
            f"each text is shown the {predictor.k} most similar of "
            f"{len(predictor.demonstrations):,} demonstrations from {opened.source}"
        )
        return
    shown = opened.shown()
    shell.say(f"{len(shown)} demonstrations in every prompt, from {opened.source}:")
    for row in shown[:_DEMONSTRATIONS_SHOWN]:
        text = row["text"] if len(row["text"]) <= 60 else f"{row['text'][:57]}..."
        shell.say(f"  {text!r} -> {row['label']}")
    if len(shown) > _DEMONSTRATIONS_SHOWN:
        shell.say(f"  and {len(shown) - _DEMONSTRATIONS_SHOWN} more")
    missing = opened.missing()
    if missing:
        shell.tell(
            f"warning: no demonstration has label {first_few(missing)}; texts of such a class are "
            "rarely recognised"
        )
    cached = len(predictor.prefix)
    whole = "mlx-lm's cache does not suit this architecture: every prompt is computed whole"
    shell.say(f"their {cached} tokens are computed once" if cached else whole)


def _conclude(
    shell: Shell, opened: Opened, queries: Queries, answers: _Answers, seconds: float
) -> None:
    """Print what was left out, and how long it took."""
    if answers.threshold is not None:
        shell.say(f"{answers.unsure:,} of {answers.count:,} texts are {UNSURE}")
    if queries.dropped:
        shell.tell(f"texts left out because they are empty: {queries.dropped}")
    if answers.skipped:
        shell.tell(f"texts skipped because they cannot be used: {len(answers.skipped):,}")
        shell.tell(*(f"  {line}" for line in answers.skipped[:_SKIPPED_SHOWN]))
        if len(answers.skipped) > _SKIPPED_SHOWN:
            shell.tell(f"  and {len(answers.skipped) - _SKIPPED_SHOWN:,} more")
    if shortened := opened.predictor.builder.shortened:
        limit = opened.recipe.prompt.max_text_tokens
        shell.say(f"texts shortened to {limit} tokens: {shortened}")
    shell.say(f"{answers.count:,} texts in {duration(seconds)}")
