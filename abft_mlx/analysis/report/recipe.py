"""What makes a run again: its recipe, versions, device, fingerprints, seeds and commands."""

from __future__ import annotations

from typing import Any

from abft_mlx.analysis.report.html import Markup, element, join, table
from abft_mlx.analysis.run_files import RunFiles
from abft_mlx.documents import find, number, short, text


def recipe(run: RunFiles) -> Markup:
    """recipe.yaml, to copy."""
    if not run.recipe_text:
        return element("p", "There is no recipe.yaml in the run's folder.")
    return copyable(run.recipe_text.rstrip("\n"), "recipe-text", "Copy the recipe")


def copyable(content: str, identity: str, button: str) -> Markup:
    """A text with a button that copies it."""
    return element(
        "div",
        element("button", button, type="button", class_="copy scripted", data_copy=identity),
        element("span", role="status", class_="copied"),
        element(
            "pre", element("code", content), id=identity, class_="wide", tabindex="0",
            role="region", aria_label=button.replace("Copy ", ""),
        ),
        class_="copyable",
    )  # fmt: skip


def reproduce() -> Markup:
    """The commands that make the run, its evaluation and this page again."""
    commands = (
        "abft-mlx finetune recipe.yaml --output NEW\n"
        "abft-mlx eval --adapter NEW\n"
        "abft-mlx report NEW"
    )
    return join(
        element(
            "p", "In the run's folder, where recipe.yaml lies; NEW is a folder for the new run. "
            "The same versions on the same kind of machine give the same numbers.",
        ),
        copyable(commands, "commands", "Copy the commands"),
    )  # fmt: skip


def made_with(run: RunFiles) -> Markup:
    """Versions, device, fingerprints and seeds."""
    rows: list[list[Any]] = []

    def add(name: str, value: Any) -> None:
        if value not in (None, "", {}):
            rows.append([name, value])

    versions = find(run.run, "versions")
    if isinstance(versions, dict):
        add("versions", ", ".join(f"{name} {one}" for name, one in versions.items()))
    add("device", text(run.run, "device"))
    add("platform", text(run.run, "platform"))
    for part in ("model", "data"):
        source = text(run.run, part, "source")
        revision = text(run.run, part, "revision")
        add(
            part,
            None if source is None else short(source) + (f" at {revision}" if revision else ""),
        )
        kind = text(run.run, part, "kind")
        add(f"where the {part} came from", kind)
        add(f"fingerprint of the {part}", text(run.run, part, "fingerprint"))
    seeds = find(run.run, "seeds")
    if isinstance(seeds, dict):
        add("seeds", ", ".join(f"{name} {one}" for name, one in seeds.items()))
    classes = find(run.run, "data", "classes")
    if isinstance(classes, dict):
        add("texts by class", ", ".join(f"{name} {_count(one)}" for name, one in classes.items()))
    rows_of = find(run.run, "data", "rows")
    if isinstance(rows_of, dict):
        add("texts by use", ", ".join(f"{name} {_count(one)}" for name, one in rows_of.items()))
    template = text(run.run, "chat_template")
    add("chat template", template)
    parameters = number(run.run, "trainable_parameters")
    add("trained numbers", None if parameters is None else f"{parameters:,}")
    return table(["", "value"], rows, name="made with")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
