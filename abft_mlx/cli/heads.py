"""``abft-mlx heads``: the census of a model's attention heads, without and with an adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx.cli import options
from abft_mlx.cli.progress import BoardEvents, board
from abft_mlx.cli.shell import Shell, alone, table
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.induction import Heads

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
    model: str,
    *,
    adapter: str | None = None,
    data: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    label_words: str | None = None,
    prompts: int | None = None,
    seed: int | None = None,
    detectors: bool = True,
    every: bool = False,
    output: list[Path] | None = None,
    overwrite: bool = False,
    settings: list[str] | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """See what every attention head does with the labels.

    For each head: its attention on label tokens, on right labels minus wrong ones, how often that
    is above the paper's filter, and its attention on the first token; before and after an adapter.

    Args:
        model (RUN_OR_MODEL): A run folder, which means its model with its adapter, and its data; a
            recipe; or a model (a local folder, a hub id, or demo) with --data.
        prompts: Test prompts to look at. [min: 1] [default: 128]
        detectors: Also score every head on repeated random tokens: previous-token, duplicate-token,
            induction.
        every (--all): Show every head, not the first 20.
        output (FILE): Where to write: a .csv with a row for each head, or a .npz for plot and
            report. May be given twice. [default: heads.npz of a run folder]
    """
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        alone("heads")
        subject = options.subject(shell, model, adapter, models=True, data=data)
        if subject.recipe is None and (subject.model is None or data is None):
            raise UsageError(
                f"--data is missing: nothing says what the prompts of {model} are made of"
                if subject.model
                else f"{model} is an adapter without a recipe; name its base model first, and give "
                f"--adapter {model}"
            )
        changes = options.overrides(
            settings, model=subject.model, data=data, text_column=text_column,
            label_column=label_column, labels=labels, label_words=label_words,
            evaluation_seed=seed,
        )  # fmt: skip
        for path in output or ():
            if path.suffix not in (".npz", ".csv"):
                raise UsageError(f"--output {path}: write a name that ends in .npz or .csv")
            options.check_file(path, overwrite=overwrite)
        from abft_mlx import experiment, induction, runtime
        from abft_mlx.cli.picture import Picture

        runtime.use_wired_memory()
        files = output or ([subject.run / induction.HEADS_FILE] if subject.run else [])
        recipe = options.open_recipe(subject.recipe, changes)
        shell.say(f"looking at the heads of {recipe.model} on {recipe.data.source} …")
        with board(shell) as shown:
            census = experiment.heads(
                recipe,
                subject.adapter,
                prompts=prompts or experiment.HEADS_PROMPTS,
                detectors=detectors,
                events=BoardEvents(shown),
            )
        for path in files:
            (induction.write_csv if path.suffix == ".csv" else induction.write_heads)(path, census)
        if not as_json:
            _show(shell, census, every=every)
            if not quiet:
                shell.tell("")
                shell.show(Picture(census))
        shell.say(*(f"wrote {path}" for path in files))
    shell.document(
        {
            "schema": 1,
            **census.facts,
            "labels": list(census.labels),
            "prompts": census.prompts,
            "states": _states(census),
            "files": [str(path) for path in files],
        }
    )


def _show(shell: Shell, census: Heads, *, every: bool) -> None:
    """Print heads by their weight, or their attention on labels, and what detectors say of them."""
    import numpy as np

    from abft_mlx import induction

    states = census.states
    of = {name: f" {name}" if len(states) > 1 else "" for name in states}
    counts = ", ".join(f"{s.heads_per_prompt:.1f}{of[name]}" for name, s in states.items())
    shell.tell(
        f"{census.prompts:,} prompts with {census.facts.get('k')} demonstrations; induction heads "
        f"in a prompt: {counts}"
    )
    weights = [np.abs(state.weight) for state in states.values() if state.weight is not None]
    ranks = np.nanmax(np.stack(weights or [state.magnitude for state in states.values()]), axis=0)
    places = np.argwhere(~np.isnan(ranks)).tolist()
    places.sort(key=lambda at: (-ranks[tuple(at)], at))
    limit = len(places) if every else _SHOWN
    detected = all(state.detected for state in states.values())
    headings = [*_SCORES.values(), *(_CLASSIC.values() if detected else ())]
    rows = table("layer", "head", "", *(["weight"] if weights else []), *headings, left=0)
    rows.padding = (0, 1, 0, 0)
    for layer, head in places[:limit]:
        where = [str(layer), str(head)]
        for name, state in states.items():
            cells = [where[0], where[1], name]
            if weights:
                cells.append("" if state.weight is None else f"{state.weight[layer, head]:+.2f}")
            for key in _SCORES:
                sign = "+" if key == "correctness" else ""
                cells.append(f"{getattr(state, key)[layer, head]:{sign}.0%}")
            if detected:
                cells += [f"{getattr(state.detected, key)[layer, head]:.0%}" for key in _CLASSIC]
            rows.add_row(*cells)
            where = ["", ""]
    shell.show(rows)
    if len(places) > limit:
        less = "weight" if weights else "attention on labels"
        shell.tell(f"and {len(places) - limit:,} heads with less {less}; --all shows them")
    for name, state in states.items():
        compared = induction.agreement(state)
        if compared is not None:
            shell.tell(
                f"{of[name].strip()}{': ' if of[name] else ''}of the {compared.count} heads above "
                f"the filter in half of the prompts, {compared.shared} are among the "
                f"{compared.count} that best continue repeated random tokens "
                f"({compared.by_chance:.1f} by chance); rank correlation "
                f"{compared.rank_correlation:+.2f}"
            )


def _states(census: Heads) -> dict[str, Any]:
    """The states of the JSON document."""
    from abft_mlx import induction

    states = {}
    for name, state in census.states.items():
        row: dict[str, Any] = {"heads_per_prompt": state.heads_per_prompt}
        row |= {key: getattr(state, key).tolist() for key in _SCORES}
        if state.weight is not None:
            row["weight"] = state.weight.tolist()
        compared = induction.agreement(state)
        if state.detected is not None and compared is not None:
            row["detected"] = {
                **{key: getattr(state.detected, key).tolist() for key in _CLASSIC},
                "sequences": state.detected.sequences,
                "repeated_tokens": state.detected.repeated_tokens,
            }
            row["agreement"] = asdict(compared)
        states[name] = row
    return states
