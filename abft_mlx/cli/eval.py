"""``abft-mlx eval``: how good a classifier a model is, without and with an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from abft_mlx.cli import options, words
from abft_mlx.cli.progress import BoardEvents, board
from abft_mlx.cli.shell import Shell, join_ranks, plain, table
from abft_mlx.errors import OutputError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from abft_mlx.ranks import Ranks


def evaluate(
    run_or_recipe: str | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    adapter: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    label_words: str | None = None,
    demonstrations: str | None = None,
    seed: int | None = None,
    protocol: str | None = None,
    methods: str | None = None,
    transfer: str | None = None,
    compat: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
    settings: list[str] | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Measure a model on test prompts, without and with an adapter.

    Name a run or a recipe, or give --model and --data. The prompts are drawn by a seed.

    Args:
        protocol (A,B): What to measure: accuracy, robustness, bias, unseen, transfer, with commas
            between them, or all. [default: accuracy]
        methods (A,B): Ways to predict: vanilla, zero_shot, contextual, domain, batch, hidden, knn,
            with commas between them, or all. [default: vanilla]
        transfer (A,B): Recipes of other tasks, for the transfer protocol.
        compat: Repeat the StaICC benchmark's faults, to compare with its numbers.
        output (FILE): Also write the JSON document there. [default: eval.json of a run folder that
            its own recipe measures]
    """
    changes = options.overrides(
        settings, _protocols(protocol, methods, transfer, compat), model=model, data=data,
        text_column=text_column, label_column=label_column, labels=labels,
        label_words=label_words, demonstrations=demonstrations, evaluation_seed=seed,
    )  # fmt: skip
    subject = options.subject(Shell(as_json=as_json, quiet=quiet), run_or_recipe, adapter)
    if subject.recipe is None and (model is None or data is None):
        missing = "--model" if model is None else "--data"
        raise UsageError(
            f"{missing} is missing: without a recipe, or a run folder that holds one, both "
            "--model and --data are needed"
        )
    file = output
    if output is not None:
        options.check_file(output, overwrite=overwrite)
    elif subject.run is not None and not changes:
        from abft_mlx.trainer import EVALUATION_FILE

        file = subject.run / EVALUATION_FILE
    ranks = join_ranks(resumable=False)
    if not ranks.first:  # the first rank speaks for all
        as_json, quiet = False, True
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        document = _measure(shell, ranks, subject, changes)
        if not ranks.first:
            return
        if not as_json:
            _show(shell, document)
        if file is not None:
            _write(shell, document, file, wanted=output is not None)
        if not as_json and subject.adapter is None:
            what = [subject.recipe] if subject.recipe else ["--model", model, "--data", data]
            shell.say("", f"next: {words.command('finetune', *what)}")
    shell.document(document)


def _protocols(
    protocols: str | None, methods: str | None, transfer: str | None, compat: bool
) -> dict[str, Any]:
    """The recipe fields that these options set; ``all`` means no transfer without its tasks."""
    from abft_mlx import recipe

    changes: dict[str, Any] = {}
    if transfer is not None:
        changes["evaluation.transfer"] = options.names(transfer, "--transfer")
    if protocols is not None:
        chosen = _chosen(protocols, "--protocol", get_args(recipe.Protocol))
        if protocols.strip() == "all" and transfer is None:
            chosen.remove("transfer")
        changes["evaluation.protocols"] = chosen
    if methods is not None:
        changes["evaluation.methods"] = _chosen(methods, "--methods", get_args(recipe.Method))
    if compat:
        changes["evaluation.compat"] = True
    # The protocol draws demonstrations for each query; a run's classifier has its own.
    return changes and {**changes, "evaluation.demonstrations": "per_query"}


def _chosen(text: str, flag: str, known: Sequence[str]) -> list[str]:
    """Which of the known names an option lists."""
    chosen = options.names(text, flag)
    if chosen == ["all"]:
        return list(known)
    for name in chosen:
        if name not in known:
            raise UsageError(f"{flag} has {name!r}; known are {', '.join(known)}, and all")
    return chosen


def _write(shell: Shell, document: dict[str, Any], file: Path, *, wanted: bool) -> None:
    """Write the document; a failure only counts where somebody wanted the file."""
    from abft_mlx import files

    try:
        files.write_json(file, plain(document))
    except OutputError as error:
        if wanted:
            raise
        shell.say(f"note: {error}")  # what was measured is not lost: it is shown
    else:
        shell.say(f"wrote {file}")


def _measure(
    shell: Shell, ranks: Ranks, subject: options.Subject, changes: dict[str, Any]
) -> dict[str, Any]:
    """The JSON document, and notes on settings without effect."""
    from abft_mlx import experiment, runtime

    runtime.use_wired_memory()
    opened = options.open_recipe(subject.recipe, changes)
    shell.say(f"measuring {opened.model} on {opened.data.source} …")
    with board(shell) as shown:
        document = experiment.evaluate(
            opened, subject.adapter, events=BoardEvents(shown), ranks=ranks
        )
    asked, measured = opened.evaluation.queries, document["prompts"]
    if "verdict" not in document:
        measured //= opened.evaluation.repeats
    if measured < asked and "evaluation.queries" in changes:
        shell.say(f"evaluation.queries is {asked:,}, but there are only {measured:,} test rows")
    if "prompt.demonstrations" in changes and "verdict" in document and subject.adapter is not None:
        k = changes["prompt.demonstrations"]
        shell.say(
            f"prompt.demonstrations {k} changes nothing: a run shows its own {document['k']} "
            "demonstrations"
        )
    return document


def _show(shell: Shell, document: dict[str, Any]) -> None:
    """Print what was measured, base beside adapter where there are both."""
    pairs = zip(document["labels"], document["label_words"], strict=True)
    renamed = [f"{name} as {word.strip()!r}" for name, word in pairs if word.strip() != name]
    if renamed:
        shell.say(f"labels in prompts: {', '.join(renamed)}")
    if "verdict" in document:
        shell.tell(*words.verdict(document))
        return
    states = {"base model": document["base"]} if "base" in document else {}
    states["with adapter" if states else "model"] = document
    if "methods" in document:
        _accuracy(shell, document, states)
    for title, rows in (
        ("paired tests (exact McNemar)", _comparisons(document)),
        ("robustness", _table(states, "robustness", _robustness)),
        ("bias", _table(states, "bias", _bias)),
        ("demonstrations without the query's label", _table(states, "unseen", _unseen)),
        ("other tasks, without texts seen in training", _table(states, "transfer", _transfer)),
    ):
        if rows is not None:
            shell.tell("", title)
            shell.show(rows)


def _accuracy(shell: Shell, document: dict[str, Any], states: dict[str, Any]) -> None:
    """Print the table of methods, and the confusions if they are few."""
    rows = {
        state if name == "vanilla" else f"{state}, {name.replace('_', '-')}": method
        for state, measured in states.items()
        for name, method in measured["methods"].items()
    }
    chat = " in chat turns" if document["chat_template"] else ""
    fixed = " fixed" if document["demonstrations"] == "fixed" else ""
    shell.tell(f"{document['prompts']:,} prompts with {document['k']}{fixed} demonstrations{chat}")
    shell.show(words.measures(rows))
    for name, method in rows.items() if len(rows) <= 2 else ():
        confusion = words.confusion(document["labels"], method["confusion"])
        if confusion is not None:
            shell.tell("", f"{name}, prompts:")
            shell.show(confusion)


def _comparisons(document: Mapping[str, Any]) -> Table | None:
    """The paired tests."""
    if not document.get("comparisons"):
        return None
    rows = table("", "only the first right", "only the second right", "p")
    for pair in document["comparisons"]:
        second = pair["second"].replace("base.", "base model's ")
        rows.add_row(
            f"{pair['first']} against {second}",
            f"{pair['only_first']:,}",
            f"{pair['only_second']:,}",
            f"{pair['p_value']:.2g}",
        )
    return rows


def _table(
    states: Mapping[str, Any], part: str, rows: Callable[[Mapping[str, Any]], dict[str, str]]
) -> Table | None:
    """One part of the document, a column for each state."""
    if not any(part in state for state in states.values()):
        return None
    shown = table("", *states)
    columns = [rows(state[part]) for state in states.values()]
    for name in columns[0]:
        shown.add_row(name, *(column.get(name, "") for column in columns))
    return shown


def _rate(measured: Mapping[str, Any], key: str = "accuracy") -> str:
    """A rate with its interval."""
    interval = measured.get("interval")
    if isinstance(interval, Mapping):
        interval = interval.get(key)
    low, high = interval or (None, None)
    return f"{measured[key]:.1%}" + ("" if low is None else f" [{low:.1%}, {high:.1%}]")


def _robustness(part: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the robustness protocol."""
    return {
        "template consistency": _rate(part["template"], "consistency"),
        "demonstration consistency": _rate(part["demonstrations"], "consistency"),
    }


def _bias(part: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the bias protocol."""
    most, kl = part["maximum_entropy"], part["posterior_kl"]
    unknown = "no label predicted of one that occurs"
    return {
        "contextual entropy (nats)": f"{part['contextual_entropy']:.3f} of {most:.3f}",
        "domain entropy (nats)": f"{part['domain_entropy']:.3f} of {most:.3f}",
        "posterior KL (nats)": unknown if kl is None else f"{kl:.3f}",
        "GLER (accuracy per share of right labels)": f"{part['gler']:.3f}",
    }


def _unseen(part: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the unseen protocol."""
    return {
        "accuracy, random": _rate(part["random"]),
        "accuracy, none with it": _rate(part["unseen"]),
        "accuracy, no demonstrations": _rate(part["zero_shot"]),
    }


def _transfer(part: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the transfer protocol."""
    rows = {}
    for name, task in part["tasks"].items():
        shown = _rate(task) if "accuracy" in task else "–"
        rows[name] = f"{shown}, n {task['prompts']:,}, shared {task['shared_queries']:,}"
    if part["accuracy"] is not None:
        rows["mean"] = f"{part['accuracy']:.1%}"
    return rows
