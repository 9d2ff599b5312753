"""``abft-mlx heads``: the census of a model's attention heads, without and with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import _options, _progress, _ranks, _resolve
from abft_mlx.cli._events import BoardEvents
from abft_mlx.cli._options import (
    Adapter,
    Data,
    EvaluationSeed,
    Json,
    LabelColumn,
    Labels,
    LabelWords,
    Overwrite,
    Quiet,
    Set,
    TextColumn,
)
from abft_mlx.cli._shell import Shell
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from abft_mlx.induction import Heads

_SUFFIXES = (".npz", ".csv")
_SHOWN = 20
_SCORES = {
    "magnitude": "labels",
    "correctness": "right −\nwrong",
    "share": "above\nfilter",
    "sink": "first\ntoken",
}
_CLASSIC = {
    "previous_token": "previous\ntoken",
    "duplicate_token": "duplicate\ntoken",
    "induction": "induction",
}


def heads(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run folder, which means its model with its adapter, and its data; a recipe; or "
            "a model (a local folder, a hub id, or demo) with --data.",
        ),
    ],
    adapter: Adapter = None,
    data: Data = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    labels: Labels = None,
    label_words: LabelWords = None,
    prompts: Annotated[
        int | None,
        typer.Option(min=1, help="Test prompts to look at.", show_default="128"),
    ] = None,
    seed: EvaluationSeed = None,
    detectors: Annotated[
        bool,
        typer.Option(
            "--detectors/--no-detectors",
            help="Also score every head on repeated random tokens: previous-token, "
            "duplicate-token, induction.",
        ),
    ] = True,
    every: Annotated[
        bool, typer.Option("--all", help=f"Show every head, not the first {_SHOWN}.")
    ] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            parser=_options.path,
            metavar="FILE",
            help="Where to write: a .csv with a row for each head, or a .npz for plot and report. "
            "May be given twice.",
            show_default="heads.npz of a run folder",
        ),
    ] = None,
    overwrite: Overwrite = False,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """See what every attention head does with the demonstrations' labels.

    For each head: its attention on label tokens, on right labels minus wrong ones, how often that
    is above the paper's filter, and its attention on the first token; before and after an adapter.
    """
    from abft_mlx.cli._picture import Picture

    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        _ranks.alone("heads")
        subject = _resolve.subject(shell, model, adapter, models=True, data=data)
        if subject.recipe is None and (subject.model is None or data is None):
            raise UsageError(
                f"--data is missing: nothing says what the prompts of {model} are made of"
                if subject.model
                else f"{model} is an adapter without a recipe; name its base model first, and give "
                f"--adapter {model}"
            )
        changes = _options.overrides(
            model=subject.model,
            data=data,
            text_column=text_column,
            label_column=label_column,
            labels=labels,
            label_words=label_words,
            settings=settings,
            evaluation=seed,
        )
        files = _outputs(subject.run, output, overwrite=overwrite)
        found = _see(shell, subject, changes, prompts, detectors=detectors)
        _write(found, files)
        if not as_json:
            _show(shell, found, every=every)
            if not quiet:
                shell.tell("")
                shell.show(Picture(found))
        for file in files:
            shell.say(f"wrote {file}")
    shell.document(_document(found, files))


def _outputs(run: Path | None, given: list[Path] | None, *, overwrite: bool) -> list[Path]:
    """The files to write, seen to be possible before any work."""
    if given is None:
        from abft_mlx.induction import HEADS_FILE

        return [] if run is None else [run / HEADS_FILE]
    for path in given:
        if path.suffix not in _SUFFIXES:
            raise UsageError(f"--output {path}: write a name that ends in .npz or .csv")
        _options.check_file(path, overwrite=overwrite)
    return given


def _see(
    shell: Shell,
    subject: _resolve.Subject,
    changes: list[str],
    prompts: int | None,
    *,
    detectors: bool,
) -> Heads:
    from abft_mlx import experiment, runtime

    runtime.use_wired_memory()
    opened = _options.open_recipe(subject.recipe, changes)
    shell.say(f"looking at the heads of {opened.model} on {opened.data.source} …")
    with _progress.board(shell) as board:
        return experiment.heads(
            opened,
            subject.adapter,
            prompts=prompts or experiment.HEADS_PROMPTS,
            detectors=detectors,
            events=BoardEvents(board),
        )


def _write(found: Heads, outputs: list[Path]) -> None:
    from abft_mlx import induction

    for path in outputs:
        (induction.write_csv if path.suffix == ".csv" else induction.write_heads)(path, found)


def _show(shell: Shell, found: Heads, *, every: bool) -> None:
    from abft_mlx import induction

    names = list(found.states)
    counts = ", ".join(
        f"{one.heads_per_prompt:.1f}" + (f" {name}" if len(names) > 1 else "")
        for name, one in found.states.items()
    )
    shell.tell(
        f"{found.prompts:,} prompts with {found.facts.get('k')} demonstrations; induction heads in "
        f"a prompt: {counts}"
    )
    table, left = _table(found, None if every else _SHOWN)
    shell.show(table)
    if left:
        less = "weight" if any(one.weight is not None for one in found.states.values()) else (
            "attention on labels"
        )  # fmt: skip
        shell.tell(f"and {left:,} heads with less {less}; --all shows them")
    for name, state in found.states.items():
        compared = induction.agreement(state)
        if compared is not None:
            of = f"{name}: " if len(names) > 1 else ""
            shell.tell(
                f"{of}of the {compared.count} heads above the filter in half of the prompts, "
                f"{compared.shared} are among the {compared.count} that best continue repeated "
                f"random tokens ({compared.by_chance:.1f} by chance); rank correlation "
                f"{compared.rank_correlation:+.2f}"
            )


def _table(found: Heads, shown: int | None) -> tuple[Table, int]:
    """Heads by their weight, or their attention on labels, and how many are not shown."""
    import numpy as np
    from rich.table import Table

    states = found.states.values()
    weights = [np.abs(one.weight) for one in states if one.weight is not None]
    ranks = np.nanmax(np.stack(weights or [one.magnitude for one in states]), axis=0)
    places = np.argwhere(~np.isnan(ranks)).tolist()
    places.sort(key=lambda at: (-ranks[tuple(at)], at))
    classic = {key: _CLASSIC[key] for key in _CLASSIC if all(one.detected for one in states)}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    weight = ("weight",) if weights else ()
    for heading in ("layer", "head", "", *weight, *_SCORES.values(), *classic.values()):
        table.add_column(heading, justify="right")
    for layer, head in places[:shown]:
        where = [str(layer), str(head)]
        for name, state in found.states.items():
            scores = [getattr(state, key)[layer, head] for key in _SCORES]
            scores += [getattr(state.detected, key)[layer, head] for key in classic]
            signed = list(_SCORES).index("correctness")
            cells = [f"{one:{'+' if n == signed else ''}.0%}" for n, one in enumerate(scores)]
            if weights:
                own = "" if state.weight is None else f"{state.weight[layer, head]:+.2f}"
                cells = [own, *cells]
            table.add_row(*where, name, *cells)
            where = ["", ""]
    return table, len(places) - len(places[:shown])


def _document(found: Heads, outputs: list[Path]) -> dict[str, Any]:
    from dataclasses import asdict

    from abft_mlx import induction

    states = {}
    for name, state in found.states.items():
        one: dict[str, Any] = {"heads_per_prompt": state.heads_per_prompt}
        one |= {key: getattr(state, key).tolist() for key in _SCORES}
        if state.weight is not None:
            one["weight"] = state.weight.tolist()
        compared = induction.agreement(state)
        if state.detected is not None and compared is not None:
            one["detected"] = {key: getattr(state.detected, key).tolist() for key in _CLASSIC}
            one["detected"] |= {
                "sequences": state.detected.sequences,
                "repeated_tokens": state.detected.repeated_tokens,
            }
            one["agreement"] = asdict(compared)
        states[name] = one
    return {
        "schema": 1,
        **found.facts,
        "labels": list(found.labels),
        "prompts": found.prompts,
        "states": states,
        "files": [str(one) for one in outputs],
    }
