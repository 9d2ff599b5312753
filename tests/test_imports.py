"""Each module imports only from modules above it in the table of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path


def order(checkout: Path) -> list[str]:
    page = (checkout / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \[`(\w+)/?`\]\(abft_mlx/", page, flags=re.MULTILINE)


def imported(path: Path, package: Path) -> Iterator[str]:
    """The parts of the package that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # The version is a plain constant that every module may read.
            if name.startswith(f"{package.name}.") and name != f"{package.name}.__version__":
                yield name.split(".")[1]


def test_the_table_has_every_module(checkout: Path) -> None:
    parts = {path.stem for path in (checkout / "abft_mlx").glob("[!_]*.py")}
    parts |= {path.parent.name for path in (checkout / "abft_mlx").glob("[!_]*/__init__.py")}
    assert sorted(order(checkout)) == sorted(parts)


def test_modules_import_only_from_above(checkout: Path) -> None:
    package, parts = checkout / "abft_mlx", order(checkout)
    found = 0
    for path in package.rglob("*.py"):
        if path == package / "__init__.py":
            continue
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for part in imported(path, package):
            assert parts.index(part) <= parts.index(own), f"{path} imports {part}"
            found += 1
    assert found > 100
