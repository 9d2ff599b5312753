"""``abft-mlx recipes``: list, show, copy and validate recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abft_mlx.cli.options import Json, Overwrite
from abft_mlx.cli.shell import Command, Shell

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The recipes that ship with abft-mlx, and your own.",
)


@app.command("list", cls=Command)
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that ship with abft-mlx."""
    from rich.table import Table

    from abft_mlx import recipe

    shell = Shell(as_json=as_json)
    found = []
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is")
    for name, path in sorted(recipe.shipped().items()):
        loaded = recipe.load(name)
        table.add_row(name, loaded.description or "")
        found.append(
            {
                "name": name,
                "description": loaded.description,
                "model": loaded.model,
                "data": loaded.data.source,
                "path": str(path),
            }
        )
    if not as_json:
        shell.show(table)
        shell.say("", "next: abft-mlx recipes show NAME, or abft-mlx recipes copy NAME")
    shell.document({"recipes": found})


@app.command("show", cls=Command)
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe or a .yaml file.")],
    as_json: Json = False,
) -> None:
    """Print a recipe; with --json every field of it, defaults included."""
    from abft_mlx import recipe

    shell = Shell(as_json=as_json)
    path = recipe.find(name)
    loaded = recipe.load(path)
    if not as_json:
        shell.tell(path.read_text(encoding="utf-8").rstrip("\n"))
    shell.document({"recipe": loaded.model_dump(mode="json")})


@app.command("copy", cls=Command)
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.")],
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DEST", help="A file or folder.", show_default="NAME.yaml"),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Copy a shipped recipe to a file of yours, to change it."""
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


@app.command("validate", cls=Command)
def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Recipe files or shipped names.")
    ],
    as_json: Json = False,
) -> None:
    """Check recipes, and say everything that is wrong with them."""
    from abft_mlx import recipe
    from abft_mlx.errors import RecipeError

    shell = Shell(as_json=as_json)
    results: list[dict[str, object]] = []
    for name in files:
        try:
            recipe.load(name)
        except RecipeError as error:
            results.append({"file": name, "valid": False, "error": str(error)})
            typer.echo(f"error: {error}", err=True)
        else:
            results.append({"file": name, "valid": True})
            shell.say(f"{name}: valid")
    shell.document({"files": results})
    if not all(result["valid"] for result in results):
        raise typer.Exit(2)
