"""The house's order: each room imports only from rooms above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOMS = (
    "errors",
    "stopping",
    "files",
    "documents",
    "runtime",
    "hub",
    "ranks",
    "events",
    "recipe",
    "data",
    "prompts",
    "task",
    "ports",
    "attention",
    "activations",
    "recompute",
    "prefix",
    "induction",
    "read_out",
    "objective",
    "adapters",
    "loading",
    "trainer",
    "tracking",
    "evaluation",
    "footprint",
    "bench",
    "facts",
    "prediction",
    "experiment",
    "classifier",
    "study",
    "analysis",
    "exchange",
    "api",
    "cli",
)


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a module imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")
                # Relative to the package: a module's own name counts, a package's does not.
                keep = len(parents) - node.level + (path.name == "__init__.py")
                base = ".".join([*parents[:keep], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                # The version is a plain constant that every room may read.
                if base != "abft_mlx" or alias.name != "__version__":
                    found.add(inner if inner in known else base)
    return {one for one in found if one in known}


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.fixture(scope="module")
def graph(checkout: Path) -> dict[str, set[str]]:
    found = modules(checkout / "abft_mlx")
    return {name: imports(name, path, set(found)) for name, path in found.items()}


def test_every_module_is_in_a_room(graph: dict[str, set[str]]) -> None:
    unknown = [name for name in graph if name != "abft_mlx" and room(name) not in ROOMS]
    assert not unknown, f"not in the list of rooms, so in no order: {unknown}"


def test_rooms_import_only_from_rooms_above(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        if name != "abft_mlx"
        for target in targets
        if target == "abft_mlx" or ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]
    assert not wrong


def test_no_circles(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                # A package's __init__ imports its modules; these may name the package's others.
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
