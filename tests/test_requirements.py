"""What is asked for: pyproject.toml's bounds, the lowest versions tested, and the lock agree."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

# PyTorch comes in builds that no list of hashes holds for, and on Linux with CUDA.
UNLOCKED = {"torch"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = (("darwin", "arm64"), ("linux", "x86_64"), ("linux", "aarch64"))


@pytest.fixture(scope="module")
def project(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


def group(project: dict[str, Any], name: str) -> list[str]:
    """The requirements of a dependency group and of the groups that it includes."""
    found: list[str] = []
    for one in project["dependency-groups"][name]:
        found += [one] if isinstance(one, str) else group(project, one["include-group"])
    return found


def lines(path: Path) -> list[str]:
    """The requirements of a file, hashes and all, without its comments."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def key(one: Requirement) -> tuple[str, str, str]:
    return canonicalize_name(one.name), ",".join(sorted(one.extras)), str(one.marker)


@pytest.fixture(scope="module")
def lowest(checkout: Path) -> list[Requirement]:
    return [Requirement(line) for line in lines(checkout / "requirements/lowest.txt")]


@pytest.fixture(scope="module")
def locked(checkout: Path) -> list[Requirement]:
    found = []
    for line in lines(checkout / "requirements/dev.lock"):
        pin, *hashes = line.split("--hash=")
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", one) for one in hashes), pin
        found.append(Requirement(pin))
    return found


def test_lowest_versions_are_the_lower_bounds(
    project: dict[str, Any], lowest: list[Requirement]
) -> None:
    extras = project["project"]["optional-dependencies"]
    asked = project["project"]["dependencies"] + [
        one for name, needs in extras.items() if name != "tracking" for one in needs
    ]
    bounds = {key(one): one.specifier for one in map(Requirement, asked)}
    tested = {key(one): one.specifier for one in lowest}
    assert bounds.keys() == tested.keys()
    for name, specifier in tested.items():
        (pin,), (bound,) = specifier, bounds[name]
        assert (pin.operator, bound.operator) == ("==", ">="), name
        assert Version(pin.version) == Version(bound.version), name


def test_groups_ask_for_no_more_than_users_get(project: dict[str, Any]) -> None:
    extras = [
        one for needs in project["project"]["optional-dependencies"].values() for one in needs
    ]
    bounds = {one.name: one.specifier for one in map(Requirement, extras)}
    for one in map(Requirement, group(project, "dev")):
        if one.name in bounds and one.name not in UNLOCKED:
            assert one.specifier == bounds[one.name], one.name


@pytest.mark.skipif(
    "ABFT_MLX_LOWEST" not in os.environ, reason="only in the environment of make lowest"
)
def test_the_lowest_versions_are_installed(lowest: list[Requirement]) -> None:
    applying = [one for one in lowest if one.marker is None or one.marker.evaluate()]
    assert len(applying) > 10
    for one in applying:
        assert one.specifier.contains(metadata.version(one.name)), one.name


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), PLATFORMS)
def test_the_lock_has_all_that_is_asked_for(
    project: dict[str, Any], locked: list[Requirement], python: str, system: str, machine: str
) -> None:
    here = dict(default_environment())
    here |= {"python_version": python, "python_full_version": f"{python}.9"}
    here |= {"sys_platform": system, "platform_machine": machine, "implementation_name": "cpython"}
    here |= {"platform_python_implementation": "CPython", "os_name": "posix"}
    here["platform_system"] = system.capitalize()
    pins: dict[str, Version] = {}
    for one in locked:
        if one.marker is None or one.marker.evaluate(here):
            name = canonicalize_name(one.name)
            assert name not in pins, f"{name} is locked twice"
            (pin,) = one.specifier
            pins[name] = Version(pin.version)
    for one in map(Requirement, project["project"]["dependencies"] + group(project, "dev")):
        if one.name in UNLOCKED or (one.marker is not None and not one.marker.evaluate(here)):
            continue
        name = canonicalize_name(one.name)
        assert name in pins, f"{name} is not locked: make lock"
        assert one.specifier.contains(pins[name]), f"{one} has {pins[name]} locked: make lock"
    assert ("mlx-metal" in pins) == (system == "darwin")
    assert ("mlx-cpu" in pins) == (system == "linux")


def test_the_lock_is_whole(project: dict[str, Any], locked: list[Requirement]) -> None:
    pins: dict[str, list[Requirement]] = {}
    for one in locked:
        pins.setdefault(canonicalize_name(one.name), []).append(one)
    waiting = [canonicalize_name(Requirement(one).name) for one in group(project, "dev")]
    waiting += [canonicalize_name(Requirement(o).name) for o in project["project"]["dependencies"]]
    seen: set[str] = set(UNLOCKED)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in pins, f"{name} is needed and not locked: make lock"
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of the development group, and not installed here
        # What another version needs is no matter of the lock.
        if any(one.specifier.contains(found.version) for one in pins[name]):
            waiting += [
                canonicalize_name(one.name)
                for one in map(Requirement, found.requires or [])
                if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    assert len(seen) > 50


def test_the_lock_names_no_place_and_no_gpu_build(checkout: Path) -> None:
    text = (checkout / "requirements/dev.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-(-index|-extra-index|-find|i|f)", text, flags=re.MULTILINE)
    assert not re.search(r"^(torch|triton|nvidia|cuda)\b", text, flags=re.MULTILINE)
