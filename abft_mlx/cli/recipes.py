"""``abft-mlx recipes``: list, show, copy and validate recipes."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from abft_mlx.cli.options import documented
from abft_mlx.cli.shell import Command, Shell, table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show, copy and check recipes.",
    epilog="\b\nExamples:\n  abft-mlx recipes list\n  abft-mlx recipes copy your-data mine.yaml",
)


def list_recipes(*, as_json: bool = False) -> None:
    """List the recipes that ship with abft-mlx."""
    from abft_mlx import recipe

    shell = Shell(as_json=as_json)
    rows = table("recipe", "what it is", left=2)
    width = shell.console().width - max(map(len, recipe.shipped()), default=0) - 2
    listed = []
    for name, path in sorted(recipe.shipped().items()):
        loaded = recipe.load(name)
        what = loaded.description or ""
        rows.add_row(name, what if len(what) <= width else f"{what[: width - 1]}…")
        facts = {"name": name, "description": loaded.description, "model": loaded.model}
        listed.append({**facts, "data": loaded.data.source, "path": str(path)})
    if not as_json:
        shell.show(rows)
        shell.say("", "next: abft-mlx recipes show NAME, or abft-mlx recipes copy NAME")
    shell.document({"recipes": listed})


def show(name: str, *, as_json: bool = False) -> None:
    """Print a recipe; with --json every field of it, defaults included.

    Args:
        name (NAME): A shipped recipe or a .yaml file.
    """
    from abft_mlx import recipe

    shell = Shell(as_json=as_json)
    path = recipe.find(name)
    loaded = recipe.load(path)
    if not as_json:
        shell.tell(path.read_text(encoding="utf-8").rstrip("\n"))
    shell.document({"recipe": loaded.model_dump(mode="json")})


def copy(
    name: str,
    destination: Path | None = None,
    *,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """Copy a shipped recipe to a file of yours, to change it.

    Args:
        name (NAME): A shipped recipe.
        destination (DEST): A file or folder. [default: NAME.yaml]
    """
    from abft_mlx import recipe
    from abft_mlx.errors import OutputError
    from abft_mlx.recipe import files

    shell = Shell(as_json=as_json)
    source = recipe.find(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; name another file, or replace it with --overwrite")
    target.write_text(files.read(source), encoding="utf-8")
    shell.say(f"wrote {target}", f"next: abft-mlx finetune {target}")
    shell.document({"path": str(target)})


def validate(files: list[str], *, as_json: bool = False) -> None:
    """Check recipes, and say everything that is wrong with them.

    Args:
        files (FILE): Recipe files or shipped names.
    """
    from abft_mlx import recipe
    from abft_mlx.errors import RecipeError

    shell = Shell(as_json=as_json)
    results: list[dict[str, object]] = []
    for name in files:
        try:
            recipe.load(name)
        except RecipeError as error:
            results.append({"file": name, "valid": False, "error": str(error)})
            print(f"error: {error}", file=sys.stderr)
        else:
            results.append({"file": name, "valid": True})
            shell.say(f"{name}: valid")
    shell.document({"files": results})
    if not all(result["valid"] for result in results):
        raise typer.Exit(2)


app.command("list", cls=Command)(documented(list_recipes))
for _function in (show, copy, validate):
    app.command(cls=Command)(documented(_function))
