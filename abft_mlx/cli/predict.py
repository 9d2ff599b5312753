"""``abft-mlx predict``: labels for texts from a file or standard input, as they come."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from abft_mlx.cli import options
from abft_mlx.cli.progress import board, duration
from abft_mlx.cli.shell import Shell, alone, dump
from abft_mlx.errors import OutputError, PromptError, UsageError, first_few

if TYPE_CHECKING:
    from abft_mlx.adapters import Source
    from abft_mlx.data import Queries, Query
    from abft_mlx.prediction import Opened, Prediction, Predictor

    Answer = tuple[Query, Prediction | None]

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
    first, file = _arguments(run_or_recipe, file)
    shell = Shell(as_json=as_json or output is None, quiet=quiet)
    subject = options.subject(shell, first, adapter)
    own = subject.recipe is None
    changes = options.overrides(
        settings, model=model, data=data or (demonstrations if own else None),
        text_column=text_column if data is not None or own else None, label_column=label_column,
        labels=labels, label_words=label_words, evaluation_seed=seed, batch_tokens=batch_tokens,
    )  # fmt: skip
    if own and (model is None or (data is None and demonstrations is None)):
        missing = "--model" if model is None else "--data or --demonstrations"
        raise UsageError(
            f"{missing} is missing: without a recipe or a run folder, --model is needed, and "
            "--data or --demonstrations to show labelled texts"
        )
    with shell.speaking():
        alone("predict")
        from abft_mlx import prediction, runtime

        runtime.use_wired_memory()
        recipe = options.open_recipe(subject.recipe, changes)
        if show_prompt is None:
            # Before the model is opened: a wrong file must not cost a download.
            section = recipe.data.model_copy(update={"text": text_column} if text_column else {})
            queries = _queries(file, section, skip=on_error == "skip")
            if output is not None:
                _check_output(output, file, overwrite=overwrite)
        with board(shell) as shown:
            shown.stage(f"opening {recipe.model}")
            opened = prediction.prepare(recipe, subject.adapter, demonstrations)
        if show_prompt is not None:
            prompt = _prompt(opened.predictor, show_prompt)
            print(prompt, file=shell.stdout, end="" if prompt.endswith("\n") else "\n")
            return
        if threshold is not None and UNSURE in opened.predictor.builder.space.names:
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
        answers = _Answers(opened.predictor, queries, threshold, skip=on_error == "skip")
        seconds = _run(shell, answers, queries, file, output)
        _conclude(shell, opened, queries, answers, seconds)
    if output is not None:
        shell.document(_document(opened, subject.adapter, queries, answers, seconds, output))


def _arguments(first: str | None, second: str | None) -> tuple[str | None, str]:
    """The run or recipe, and the texts: a lone argument may be either."""
    from abft_mlx.recipe.files import DATA_SUFFIXES

    if first is None or second is not None:
        return first, second or _STANDARD_INPUT
    if first == _STANDARD_INPUT or first.lower().endswith(DATA_SUFFIXES):
        return None, first
    return first, _STANDARD_INPUT


def _queries(file: str, section: Any, *, skip: bool) -> Queries:
    """The texts to label."""
    from abft_mlx.data import Queries

    if file == _STANDARD_INPUT:
        return Queries("standard input", section, sys.stdin.buffer, skip=skip)
    return Queries(file, section, skip=skip)


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


def _prompt(predictor: Predictor, text: str) -> str:
    """The prompt that is asked about a text, as text."""
    builder = predictor.builder
    # The gold label, here the first, is not part of a prompt.
    prompt = builder.build(predictor.shown(text), text, 0, where="the prompt of --show-prompt")
    return str(builder.tokenizer.decode(list(prompt.token_ids)))


def _run(
    shell: Shell, answers: _Answers, queries: Queries, file: str, output: Path | None
) -> float:
    """Write the answers as they come; the seconds that took."""
    if file == _STANDARD_INPUT and sys.stdin.isatty():
        shell.say("reading standard input, a text in each line; Ctrl-D ends it")
    start = time.perf_counter()
    # Lines of answers on the same terminal show how far it is.
    live = output is not None or not shell.stdout.isatty()
    with _opened(shell, output, file) as stream, board(shell, live=live) as shown:
        shown.stage("labelling", "texts")
        write = _writer(stream, output, queries, file)
        for some in answers.batches():
            for query, answer in some:
                write(query, answer)
            stream.flush()
            shown.progress(answers.count, queries.known)
    return time.perf_counter() - start


class _Answers:
    """Texts with their answers, in order.

    Attributes:
        count: texts answered.
        unsure: of these, texts whose answer is below the threshold.
        skips: texts skipped.
        skipped: why the first few of them were.
    """

    def __init__(
        self,
        predictor: Predictor,
        queries: Iterable[list[Query]],
        threshold: float | None,
        *,
        skip: bool,
    ) -> None:
        self.count = self.unsure = self.skips = 0
        self.skipped: list[str] = []
        self.threshold = threshold
        self._predictor = predictor
        self._queries = queries
        self._skip = skip

    def batches(self) -> Iterator[list[Answer]]:
        """Lists of texts with their answers, or None for a text that is skipped.

        Raises:
            PromptError: a text makes no prompt, and is not to be skipped.
            RunError: the model's answers are not finite.
        """
        for arrived in self._queries:
            waiting = deque(arrived)
            usable = [query for query in arrived if query.problem is None]
            while waiting:
                done = 0
                try:
                    for some in self._predictor.predict([usable] if usable else []):
                        done += len(some)
                        yield self._taken(waiting, some)
                    yield [self._left_out(query) for query in waiting]
                    break
                except PromptError as error:
                    if not self._skip:
                        raise
                    # Those before it have been answered.
                    bad = replace(usable[done], problem=str(error))
                    usable = usable[done + 1 :]
                    yield [*self._taken(waiting, [None])[:-1], self._left_out(bad)]

    def _taken(self, waiting: deque[Query], answers: Sequence[Prediction | None]) -> list[Answer]:
        """Take answered texts from those that wait, and what is skipped between them."""
        taken: list[Answer] = []
        for answer in answers:
            while waiting[0].problem is not None:
                taken.append(self._left_out(waiting.popleft()))
            if answer is not None:
                self.count += 1
                if self.threshold and answer.probabilities[answer.label] < self.threshold:
                    self.unsure += 1
                    answer = replace(answer, label=UNSURE)
            taken.append((waiting.popleft(), answer))
        return taken

    def _left_out(self, query: Query) -> Answer:
        """A text that is skipped."""
        self.skips += 1
        if len(self.skipped) < _SKIPPED_SHOWN:
            self.skipped.append(query.problem or "")
        return query, None


@contextlib.contextmanager
def _opened(shell: Shell, output: Path | None, file: str) -> Iterator[TextIO]:
    """Where the answers go. A file grows as they come, so that a failure loses none of them."""
    if output is None:
        yield shell.stdout
        return
    table = output.suffix.lower() in _TABLES
    # Excel knows UTF-8 by its mark: a table that came with one gets one.
    encoding = "utf-8-sig" if table and _has_mark(file) else "utf-8"
    try:
        stream = output.open(
            "w", encoding=encoding, errors="backslashreplace", newline="" if table else None
        )
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror})") from None
    with stream:
        yield stream


def _has_mark(file: str) -> bool:
    """Whether a file begins with the byte order mark of UTF-8."""
    path = Path(file).expanduser()
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(3) == b"\xef\xbb\xbf"


def _writer(
    stream: TextIO, output: Path | None, queries: Queries, file: str
) -> Callable[[Query, Prediction | None], None]:
    """What writes a text with its answer: a row of a table, or a JSON object."""
    suffix = "" if output is None else output.suffix.lower()
    if suffix in _TABLES:
        return _table(stream, _TABLES[suffix], queries.columns)
    own = suffix in _OBJECTS and file.lower().endswith(_OBJECTS)
    columns = queries.columns if own else ()
    label, probabilities = _free("label", columns), _free("probabilities", columns)

    def write(query: Query, answer: Prediction | None) -> None:
        if answer is not None:
            # The digits behind these depend on which texts shared a batch.
            shares = {name: round(share, 6) for name, share in answer.probabilities.items()}
            fields = dict(query.fields) if own else {"text": answer.text}
            stream.write(dump({**fields, label: answer.label, probabilities: shares}) + "\n")

    return write


def _table(
    stream: TextIO, delimiter: str, columns: Sequence[str]
) -> Callable[[Query, Prediction | None], None]:
    """What writes rows with all columns of the input, the label and its probability."""
    rows = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    rows.writerow([*columns, _free("label", columns), _free("probability", columns)])

    def write(query: Query, answer: Prediction | None) -> None:
        fields = query.fields or (("text", query.text),)
        if [name for name, _ in fields] == list(columns):  # a header may name a column twice
            cells = [value for _, value in fields]
        else:
            known = dict(fields)
            cells = [known.get(name) for name in columns]
        added = ["", ""]
        if answer is not None:
            added = [answer.label, f"{max(answer.probabilities.values()):.6f}"]
        rows.writerow([*map(_cell, cells), *added])

    return write


def _cell(value: Any) -> str:
    """A value of a JSON or Parquet file as a table has it."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _free(name: str, taken: Sequence[str]) -> str:
    """A name for a column that is added: none that is there."""
    names = (name, f"predicted_{name}", *(f"predicted_{name}_{n}" for n in range(2, 1000)))
    return next(candidate for candidate in names if candidate not in taken)


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
    shell.say(
        f"their {cached} tokens are computed once"
        if cached
        else "mlx-lm's cache does not suit this architecture: every prompt is computed whole"
    )


def _conclude(
    shell: Shell, opened: Opened, queries: Queries, answers: _Answers, seconds: float
) -> None:
    """Print what was left out, and how long it took."""
    if answers.threshold is not None:
        shell.say(f"{answers.unsure:,} of {answers.count:,} texts are {UNSURE}")
    if queries.dropped:
        shell.tell(f"texts left out because they are empty: {queries.dropped}")
    if answers.skips:
        shell.tell(f"texts skipped because they cannot be used: {answers.skips:,}")
        shell.tell(*(f"  {line}" for line in answers.skipped))
        if answers.skips > len(answers.skipped):
            shell.tell(f"  and {answers.skips - len(answers.skipped):,} more")
    shortened = opened.predictor.builder.shortened
    if shortened:
        limit = opened.recipe.prompt.max_text_tokens
        shell.say(f"texts shortened to {limit} tokens: {shortened}")
    shell.say(f"{answers.count:,} texts in {duration(seconds)}")


def _document(
    opened: Opened,
    adapter: Source | None,
    queries: Queries,
    answers: _Answers,
    seconds: float,
    output: Path,
) -> dict[str, Any]:
    """The JSON document."""
    space = opened.predictor.builder.space
    return {
        "schema": 1,
        "model": opened.recipe.model,
        "adapter": None if adapter is None else str(adapter),
        "labels": list(space.names),
        "label_words": list(space.words),
        "k": opened.predictor.k,
        "demonstrations": opened.shown(),
        "cached_tokens": len(opened.predictor.prefix),
        "texts": answers.count,
        "empty_texts_dropped": queries.dropped,
        "skipped": answers.skips,
        "seconds": seconds,
        "output": str(output),
        "unsure": answers.unsure,
    }
