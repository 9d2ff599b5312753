"""What ``eval`` may measure: its options, and tables of what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from abft_mlx.cli.options import override
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from abft_mlx.cli.shell import Shell

Protocols = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        metavar="A,B",
        help="What to measure: accuracy, robustness, bias, unseen, transfer, with commas between "
        "them, or all.",
        show_default="accuracy",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Ways to predict: vanilla, zero_shot, contextual, domain, batch, hidden, knn, with "
        "commas between them, or all.",
        show_default="vanilla",
    ),
]
Transfer = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Recipes of other tasks, for the transfer protocol.",
        show_default=False,
    ),
]
Compat = Annotated[
    bool,
    typer.Option(
        "--compat", help="Repeat the StaICC benchmark's faults, to compare with its numbers."
    ),
]


def changes(
    protocols: str | None, methods: str | None, transfer: str | None, compat: bool
) -> list[str]:
    """The recipe fields that these options set.

    ``all`` leaves out transfer where no other task is named.
    """
    from abft_mlx import recipe

    made = []
    if transfer is not None:
        made.append(override("evaluation.transfer", _words(transfer, "--transfer")))
    if protocols is not None:
        known = get_args(recipe.Protocol)
        chosen = _chosen(protocols, "--protocol", known)
        if protocols.strip() == "all" and transfer is None:
            chosen.remove("transfer")
        made.append(override("evaluation.protocols", chosen))
    if methods is not None:
        chosen = _chosen(methods, "--methods", get_args(recipe.Method))
        made.append(override("evaluation.methods", chosen))
    if compat:
        made.append(override("evaluation.compat", True))
    # The protocol draws demonstrations for each query; a run's classifier has its own.
    if made:
        made.append(override("evaluation.demonstrations", "per_query"))
    return made


def _words(text: str, flag: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(
            f"{flag} {text!r} has an empty name in it; write names with commas between"
        )
    return words


def _chosen(text: str, flag: str, known: Sequence[str]) -> list[str]:
    words = _words(text, flag)
    if words == ["all"]:
        return list(known)
    for word in words:
        if word not in known:
            raise UsageError(f"{flag} has {word!r}; known are {', '.join(known)}, and all")
    return list(dict.fromkeys(words))


def show(shell: Shell, document: Mapping[str, Any]) -> None:
    """Print what a protocol beyond accuracy measured, base beside adapter where there are both."""
    states = {"base model": document["base"]} if "base" in document else {}
    states["with adapter" if states else "model"] = document
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


def interval(measured: Mapping[str, Any], key: str = "accuracy") -> str:
    """An interval as a person reads it, or nothing."""
    found = measured.get("interval")
    low, high = (found.get(key, (None, None)) if isinstance(found, Mapping) else found) or (
        None,
        None,
    )
    return "" if low is None else f"[{low:.1%}, {high:.1%}]"


def _grid(headings: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _comparisons(document: Mapping[str, Any]) -> Table | None:
    if not document.get("comparisons"):
        return None
    table = _grid(["", "only the first right", "only the second right", "p"])
    for one in document["comparisons"]:
        second = one["second"].replace("base.", "base model's ")
        table.add_row(
            f"{one['first']} against {second}",
            f"{one['only_first']:,}",
            f"{one['only_second']:,}",
            f"{one['p_value']:.2g}",
        )
    return table


def _table(states: Mapping[str, Any], part: str, rows: Any) -> Table | None:
    if not any(part in state for state in states.values()):
        return None
    table = _grid(["", *states])
    columns = [rows(state[part]) for state in states.values()]
    for name in columns[0]:
        table.add_row(name, *(column.get(name, "") for column in columns))
    return table


def _robustness(part: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{name} consistency": f"{part[key]['consistency']:.1%} {interval(part[key])}".strip()
        for name, key in (("template", "template"), ("demonstration", "demonstrations"))
    }


def _bias(part: Mapping[str, Any]) -> dict[str, str]:
    most = part["maximum_entropy"]
    kl = part["posterior_kl"]
    return {
        "contextual entropy (nats)": f"{part['contextual_entropy']:.3f} of {most:.3f}",
        "domain entropy (nats)": f"{part['domain_entropy']:.3f} of {most:.3f}",
        "posterior KL (nats)": "no label predicted of one that occurs"
        if kl is None
        else f"{kl:.3f}",
        "GLER (accuracy per share of right labels)": f"{part['gler']:.3f}",
    }


def _unseen(part: Mapping[str, Any]) -> dict[str, str]:
    names = (("random", "random"), ("none with it", "unseen"), ("no demonstrations", "zero_shot"))
    return {
        f"accuracy, {name}": f"{part[key]['accuracy']:.1%} {interval(part[key])}".strip()
        for name, key in names
    }


def _transfer(part: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    for name, one in part["tasks"].items():
        shown = f"{one['accuracy']:.1%} {interval(one)}".strip() if "accuracy" in one else "–"
        rows[name] = f"{shown}, n {one['prompts']:,}, shared {one['shared_queries']:,}"
    if part["accuracy"] is not None:
        rows["mean"] = f"{part['accuracy']:.1%}"
    return rows
