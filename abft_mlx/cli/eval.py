"""``abft-mlx eval``: how good a classifier a model is, without and with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from abft_mlx.cli import options, words
from abft_mlx.cli.progress import BoardEvents, board
from abft_mlx.cli.shell import Shell, join_ranks, plain, table
from abft_mlx.errors import OutputError, UsageError

if TYPE_CHECKING:
    from abft_mlx.ranks import Ranks

_MEASURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "expected_calibration_error": "ECE",
    "true_label_probability": "true-label probability",
}


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
    if subject.recipe is None:
        options.both_needed(model, data)
    file = output
    if output is not None:
        options.check_file(output, overwrite=overwrite)
    elif subject.run is not None and not changes:
        from abft_mlx.trainer import EVALUATION_FILE

        file = subject.run / EVALUATION_FILE
    ranks = join_ranks(resumable=False)
    # The first rank speaks for all.
    shell = Shell(as_json=as_json and ranks.first, quiet=quiet or not ranks.first)
    with shell.speaking():
        document = _measure(shell, ranks, subject, changes)
        if not ranks.first:
            return
        if not as_json:
            _show(shell, document)
        if file is not None:
            from abft_mlx import files

            try:
                files.write_json(file, plain(document))
                shell.say(f"wrote {file}")
            except OutputError as error:
                if output is not None:
                    raise
                shell.say(f"note: {error}")  # what was measured is not lost: it is shown
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


def _chosen(text: str, flag: str, allowed: Sequence[str]) -> list[str]:
    """Which of the allowed names an option lists."""
    chosen = options.names(text, flag)
    if chosen == ["all"]:
        return list(allowed)
    for name in chosen:
        if name not in allowed:
            raise UsageError(f"{flag} has {name!r}; known are {', '.join(allowed)}, and all")
    return chosen


def _measure(
    shell: Shell, ranks: Ranks, subject: options.Subject, changes: dict[str, Any]
) -> dict[str, Any]:
    """The JSON document, and notes on settings without effect."""
    from abft_mlx import experiment, runtime

    runtime.use_wired_memory()
    recipe = options.open_recipe(subject.recipe, changes)
    shell.say(f"measuring {recipe.model} on {recipe.data.source} …")
    with board(shell) as shown:
        document = experiment.evaluate(
            recipe, subject.adapter, events=BoardEvents(shown), ranks=ranks
        )
    queries, measured = recipe.evaluation.queries, document["prompts"]
    if "verdict" not in document:
        measured //= recipe.evaluation.repeats
    if measured < queries and "evaluation.queries" in changes:
        shell.say(f"evaluation.queries is {queries:,}, but there are only {measured:,} test rows")
    if "prompt.demonstrations" in changes and "verdict" in document and subject.adapter is not None:
        shell.say(
            f"prompt.demonstrations {changes['prompt.demonstrations']} changes nothing: a run "
            f"shows its own {document['k']} demonstrations"
        )
    return document


def _show(shell: Shell, document: Mapping[str, Any]) -> None:
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
    if document.get("comparisons"):
        shell.tell("", "paired tests (exact McNemar)")
        rows = table("", "only the first right", "only the second right", "p")
        for pair in document["comparisons"]:
            sides = []
            for side in (pair["first"], pair["second"]):
                of_base = side.startswith("base.")
                state = "base model" if of_base else list(states)[-1]
                sides.append(_method(state, side.removeprefix("base.")))
            counts = [f"{pair[key]:,}" for key in ("only_first", "only_second")]
            rows.add_row(" against ".join(sides), *counts, f"{pair['p_value']:.2g}")
        shell.show(rows)
    for part, title in (
        ("robustness", "robustness"),
        ("bias", "bias"),
        ("unseen", "demonstrations without the query's label"),
        ("transfer", "other tasks, without texts seen in training"),
    ):
        columns = [_lines(part, state[part]) for state in states.values() if part in state]
        if columns:
            shell.tell("", title)
            rows = table("", *states)
            for name in columns[0]:
                rows.add_row(name, *(column.get(name, "") for column in columns))
            shell.show(rows)


def _method(state: str, name: str) -> str:
    """What tables call a method of the model in some state; plain prompting has no name."""
    return state if name == "vanilla" else f"{state}, {name.replace('_', '-')}"


def _accuracy(shell: Shell, document: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Print the table of methods, and the confusions if they are few."""
    methods = {
        _method(state, name): method
        for state, measured in states.items()
        for name, method in measured["methods"].items()
    }
    chat = " in chat turns" if document["chat_template"] else ""
    fixed = " fixed" if document["demonstrations"] == "fixed" else ""
    shell.tell(f"{document['prompts']:,} prompts with {document['k']}{fixed} demonstrations{chat}")
    with_interval = any("interval" in method for method in methods.values())
    headings = list(_MEASURES.values())
    rows = table("", headings[0], *(["95% interval"] if with_interval else []), *headings[1:])
    for name, method in methods.items():
        cells = [f"{method[key]:.1%}" for key in _MEASURES]
        if with_interval:
            low, high = method.get("interval", {}).get("accuracy", (None, None))
            cells.insert(1, "" if low is None else f"{low:.1%}–{high:.1%}")
        rows.add_row(name, *cells)
    shell.show(rows)
    if len(methods) > 2 or len(document["labels"]) > words.CLASSES_SHOWN:
        return
    for name, method in methods.items():
        rows = table("gold \\ predicted", *document["labels"])
        for label, counts in zip(document["labels"], method["confusion"], strict=True):
            rows.add_row(label, *(f"{count:,}" for count in counts))
        shell.tell("", f"{name}, prompts:")
        shell.show(rows)


def _rate(measured: Mapping[str, Any], key: str = "accuracy") -> str:
    """A rate with its interval."""
    interval = measured.get("interval")
    if isinstance(interval, Mapping):
        interval = interval.get(key)
    low, high = interval or (None, None)
    return f"{measured[key]:.1%}" + ("" if low is None else f" [{low:.1%}, {high:.1%}]")


def _lines(name: str, part: Mapping[str, Any]) -> dict[str, str]:
    """What a protocol other than accuracy measured, by line."""
    if name == "robustness":
        return {
            "template consistency": _rate(part["template"], "consistency"),
            "demonstration consistency": _rate(part["demonstrations"], "consistency"),
        }
    if name == "bias":
        most, kl = part["maximum_entropy"], part["posterior_kl"]
        return {
            "contextual entropy (nats)": f"{part['contextual_entropy']:.3f} of {most:.3f}",
            "domain entropy (nats)": f"{part['domain_entropy']:.3f} of {most:.3f}",
            "posterior KL (nats)": "no label predicted of one that occurs"
            if kl is None
            else f"{kl:.3f}",
            "GLER (accuracy per share of right labels)": f"{part['gler']:.3f}",
        }
    if name == "unseen":
        return {
            "accuracy, random": _rate(part["random"]),
            "accuracy, none with it": _rate(part["unseen"]),
            "accuracy, no demonstrations": _rate(part["zero_shot"]),
        }
    lines = {}
    for task_name, task in part["tasks"].items():
        rate = _rate(task) if "accuracy" in task else "–"
        lines[task_name] = f"{rate}, n {task['prompts']:,}, shared {task['shared_queries']:,}"
    return lines | ({} if part["accuracy"] is None else {"mean": f"{part['accuracy']:.1%}"})
