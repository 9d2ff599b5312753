"""What a figure of a study or a run consists of, before anything is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from abft_mlx.analysis.measurements import Measurement, tasks
from abft_mlx.analysis.run_facts import RunFacts
from abft_mlx.documents import section


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        stem: its files' name without a suffix.
        draw: draws on a matplotlib Axes.
        caption: one line below it: what of, n, seeds.
        height: inches of the Axes, from the width of the figure in inches; None for the usual.
    """

    stem: str
    draw: Callable[[Any], Any]
    caption: str
    height: Callable[[float], float] | None = None


def stem(*parts: str) -> str:
    """A file name of several words."""
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in parts)


def by_model(found: Iterable[Measurement]) -> list[tuple[str, list[Measurement]]]:
    """Measurements of each model, in order."""
    grouped: dict[str, list[Measurement]] = {}
    for one in found:
        grouped.setdefault(one.model, []).append(one)
    return list(grouped.items())


def caption(model: str, some: Sequence[Measurement], more: str = "") -> str:
    """Model, tasks, n and training seeds in one line."""
    prompts = [str(one) for one in sorted({one.prompts for one in some if one.prompts})]
    n = f"n = {' to '.join(dict.fromkeys((prompts[0], prompts[-1])))} prompts" if prompts else ""
    names = tasks(some)
    of = names[0] if len(names) == 1 else f"{len(names)} tasks"
    return "; ".join(part for part in (model, of, n, seeds(one.seed for one in some), more) if part)


def seeds(values: Iterable[int | None]) -> str:
    """How many training seeds, in words."""
    count = len({one for one in values if one is not None})
    return f"{count} training seed{'' if count == 1 else 's'}" if count else "not trained"


def caption_line(run: RunFacts, *more: str, runs: Sequence[RunFacts] = ()) -> str:
    """Model, data, demonstrations, training seeds and what else is to be said, in one line.

    Args:
        run: whose figure it is.
        more: parts of the line, behind model and data.
        runs: all runs that the figure shows.
    """
    k = section(run.recipe, "prompt").get("demonstrations")
    found = [one.seed for one in runs or [run]]
    seeds_of = list(dict.fromkeys(str(one) for one in found if one is not None))
    seed = f"training seed{'' if len(seeds_of) == 1 else 's'} {', '.join(seeds_of)}"
    known = [f"{run.model} on {run.data}", f"k = {k}" if k else "", *more, seed if seeds_of else ""]
    return "; ".join(one for one in known if one)
