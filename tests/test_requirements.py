"""What is asked for: pyproject.toml's bounds, the lowest versions tested, and the locks agree."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# PyTorch comes in builds that no list of hashes holds for, and on Linux with CUDA.
UNLOCKED = {"torch"}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = (("darwin", "arm64"), ("linux", "x86_64"), ("linux", "aarch64"))


@pytest.fixture(scope="module")
def project(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


def group(project: dict[str, Any], name: str) -> list[str]:
    """The requirements of a dependency group and of the groups that it includes."""
    entries = project["dependency-groups"][name]
    return [
        requirement
        for entry in entries
        for requirement in (
            [entry] if isinstance(entry, str) else group(project, entry["include-group"])
        )
    ]


def lines(path: Path) -> list[str]:
    """The requirements of a file, hashes and all, without its comments."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def lowest(checkout: Path) -> list[Requirement]:
    return [Requirement(line) for line in lines(checkout / "requirements/lowest.txt")]


def test_lowest_versions_are_the_lower_bounds(
    project: dict[str, Any], lowest: list[Requirement]
) -> None:
    asked = list(project["project"]["dependencies"])
    for needs in project["project"]["optional-dependencies"].values():
        asked += needs

    def pins(requirements: list[Requirement], operator: str) -> dict[tuple[str, str], Version]:
        return {
            (canonicalize_name(one.name), str(one.marker)): Version(
                str(one.specifier).removeprefix(operator)
            )
            for one in requirements
        }

    assert pins(lowest, "==") == pins([Requirement(one) for one in asked], ">=")


@pytest.mark.skipif(
    "ABFT_MLX_LOWEST" not in os.environ, reason="only in the environment of make lowest"
)
def test_the_lowest_versions_are_installed(lowest: list[Requirement]) -> None:
    for one in lowest:
        if one.marker is None or one.marker.evaluate():
            assert one.specifier.contains(metadata.version(one.name)), one.name


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), PLATFORMS)
@pytest.mark.parametrize("name", ["dev", "lint"])
def test_the_locks_have_all_that_is_asked_for(
    project: dict[str, Any], checkout: Path, name: str, python: str, system: str, machine: str
) -> None:
    here = dict(default_environment())
    here |= {"python_version": python, "python_full_version": f"{python}.9"}
    here |= {"sys_platform": system, "platform_machine": machine, "implementation_name": "cpython"}
    here |= {"platform_python_implementation": "CPython", "os_name": "posix"}
    here["platform_system"] = system.capitalize()
    pins: dict[str, Version] = {}
    for line in lines(checkout / f"requirements/{name}.lock"):
        pin, *hashes = line.split("--hash=")
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", one) for one in hashes), pin
        locked = Requirement(pin)
        if locked.marker is None or locked.marker.evaluate(here):
            (version,) = locked.specifier
            assert canonicalize_name(locked.name) not in pins, f"{pin} is locked twice"
            pins[canonicalize_name(locked.name)] = Version(version.version)
    asked = group(project, name) + (project["project"]["dependencies"] if name == "dev" else [])
    for one in map(Requirement, asked):
        if one.name in UNLOCKED or (one.marker is not None and not one.marker.evaluate(here)):
            continue
        version = pins.get(canonicalize_name(one.name))
        assert version is not None, f"{one} is not locked: make lock"
        assert one.specifier.contains(version), f"{one} has {version} locked: make lock"
    assert not [one for one in pins if re.match(r"torch|triton|nvidia|cuda", one)]
