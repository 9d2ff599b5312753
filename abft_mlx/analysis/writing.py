"""From the cells of a study to its table, its CSV, its facts and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abft_mlx import files
from abft_mlx.analysis.facts import facts
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plots import check, plots
from abft_mlx.analysis.table_csv import table_csv
from abft_mlx.analysis.tables import table_md


class Written(list[Path]):
    """The files that were written.

    Attributes:
        notes: lines about what could not be, such as a figure that no cell measured.
    """

    def __init__(self, paths: Sequence[Path] = (), notes: Sequence[str] = ()) -> None:
        super().__init__(paths)
        self.notes = tuple(notes)


def write_study(folder: Path, study: Any, cells: Sequence[dict[str, Any]]) -> Written:
    """Write ``table.md``, ``table.csv``, ``study.json`` and the figures that the study names.

    The same cells, in any order, make the same bytes.

    Args:
        folder: where to; made if it is not there.
        study: anything with ``name``, ``description``, ``paper`` and ``figures``.
        cells: the documents of the study's cells, done or failed.

    Returns:
        The files, and notes on what is missing; without matplotlib, that the figures are.

    Raises:
        RecipeError: the study names a figure or a published table that does not exist.
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    check(study)
    document = facts(study, cells)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_failure(folder, error) from error
    written = [folder / name for name in ("table.md", "table.csv", "study.json")]
    files.write_text(written[0], table_md(document))
    files.write_text(written[1], table_csv(document))
    files.write_json(written[2], document)
    if not document["figures"]:
        return Written(written)
    missing = style.missing()
    if missing:
        return Written(written, [missing])
    drawn, notes = plots(document)
    for one in drawn:
        inches = None if one.height is None else one.height(style.WIDTHS["page"])
        written += style.write(folder / one.stem, one.draw, one.caption, height=inches)
    return Written(written, notes)
