"""docs/claims.md from the folders of studies: does each claim of the paper hold here?

    python benchmarks/claims.py runs/claims-generated* --output docs/claims.md

Every verdict follows from an interval by the rule that stands beside it; nothing is judged by hand.
Folders are those of ``abft-mlx study``; what is read of them is ``study.json``, which may be given
itself, compressed (``gzip -n``) or not. ``docs/claims/`` holds those of the page as it stands.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claim_rules as rules
from claim_list import claims
from claim_types import Claim, Finding, Study

from abft_mlx.analysis.measurements import measurements, scored
from abft_mlx.analysis.paper import Paper
from abft_mlx.analysis.statistics import HOW
from abft_mlx.analysis.tables import accuracy
from abft_mlx.analysis.text import table
from abft_mlx.errors import OutputError

_FORWARD = "python benchmarks/claims.py"


def read(folder: Path) -> dict[str, Any]:
    """The facts of one study.

    Raises:
        OutputError: there are none.
    """
    path = folder / "study.json" if folder.is_dir() else folder
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except FileNotFoundError:
        raise OutputError(f"{path}: no such file; abft-mlx study writes it") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); run the study again") from None


def studies(documents: Sequence[dict[str, Any]]) -> list[Study]:
    """Each base of each study."""
    found = []
    for document in documents:
        every = measurements(document)
        for model in dict.fromkeys(cell["model"] for cell in document["cells"]):
            of_model = [one for one in every if one.model == model]
            found.append(Study(document["name"], model, document, of_model))
    return found


def findings(claim: Claim, some: Sequence[Study]) -> list[tuple[Study, Finding]]:
    """What all studies say of a claim."""
    return [(study, one) for study in some for one in claim.find(study)]


def page(documents: Sequence[dict[str, Any]], command: str) -> str:
    """The whole document.

    Args:
        documents: facts of studies.
        command: what made the page.
    """
    some = studies(documents)
    machines = sorted({one for document in documents for one in document["machines"]})
    found = [(claim, findings(claim, some)) for claim in claims()]
    parts = [
        "# The paper's claims, measured again",
        "Cho et al., *Mechanistic Fine-tuning for In-context Learning*, arXiv 2505.14233. Made by",
        f"    {command}",
        "from the files of the studies; every verdict follows from an interval by the rule beside "
        "it. " + (f"Measured on: {'; '.join(machines)}." if machines else ""),
        "## Verdicts",
        _overview(found),
        f"{HOW} A point is one percentage point. Comparisons of trained methods need "
        f"{rules.FEWEST_SEEDS} training seeds or more. The intervals are not corrected for their "
        "number.",
        "## Claim by claim",
    ]
    for number, (claim, several) in enumerate(found, 1):
        parts += [f"### {number}. {claim.statement}", claim.rule, _detail(several)]
    parts.append("## Accuracy by task")
    for document in documents:
        plain = [one for one in scored(measurements(document)) if not one.sweep]
        failed = len(document["failed"])
        if plain:
            parts += [f"### {document['name']}", accuracy(plain, Paper())]
        if failed:
            parts.append(f"{failed} cell{'' if failed == 1 else 's'} of {document['name']} failed.")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _overview(found: Sequence[tuple[Claim, list[tuple[Study, Finding]]]]) -> str:
    lines = []
    for number, (claim, several) in enumerate(found, 1):
        if not several:
            lines.append([str(number), claim.statement, "–", "not measured", "–"])
        for study, one in several:
            name = f"{claim.statement} ({one.detail})" if one.detail else claim.statement
            lines.append([str(number), name, study.model, f"**{one.verdict}**", one.figures])
    return table(["", "claim", "base", "verdict", "figures"], lines)


def _detail(several: Sequence[tuple[Study, Finding]]) -> str:
    if not several:
        return "No study given here measured it."
    lines = [
        [study.name, study.model, one.detail or "–", one.figures, one.scope, one.verdict]
        for study, one in several
    ]
    return table(["study", "base", "against", "figures", "of", "verdict"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the studies, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a study")
    parser.add_argument("--output", type=Path, help="the page; without it, printed")
    chosen = parser.parse_args(arguments)
    try:
        documents = [read(folder) for folder in chosen.folders]
    except OutputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    where = f" --output {chosen.output.name}" if chosen.output else ""
    if chosen.output and chosen.output.parent.name:
        where = f" --output {chosen.output.parent.name}/{chosen.output.name}"
    names = " ".join(
        f"runs/{folder.name}" if folder.is_absolute() else str(folder) for folder in chosen.folders
    )
    text = page(documents, f"{_FORWARD} {names}{where}")
    if chosen.output is None:
        print(text, end="")
        return
    chosen.output.write_text(text, encoding="utf-8")
    print(f"wrote {chosen.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
