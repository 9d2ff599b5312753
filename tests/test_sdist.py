"""The sdist: it holds what the repository holds, and installs where there is nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from test_wheel import run, site_packages

import abft_mlx

# What only the place where the repository lies needs.
LEFT_OUT = {".github"}


def tracked(checkout: Path, *options: str) -> set[str]:
    """Names of the repository's files.

    Args:
        checkout: its root.
        options: of ``git ls-files``.
    """
    if shutil.which("git") is None or not (checkout / ".git").exists():
        pytest.skip("needs git and a clone, to know which files are the repository's")
    done = subprocess.run(
        ["git", "ls-files", "-z", *options],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {name for name in done.stdout.split("\0") if name and (checkout / name).exists()}
    return {name for name in names if name.split("/")[0] not in LEFT_OUT}


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(
        sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, checkout,
        cwd=folder,
    )  # fmt: skip
    (built,) = folder.glob("*.tar.gz")
    return built


def names(sdist: Path) -> set[str]:
    """Its files, without the folder that all lie in."""
    with tarfile.open(sdist) as archive:
        members = [one for one in archive.getmembers() if not one.isdir()]
    assert all(one.isreg() for one in members), "links and devices have no place in it"
    tops = {one.name.split("/")[0] for one in members}
    assert tops == {f"abft_mlx-{abft_mlx.__version__}"}
    return {one.name.split("/", 1)[1] for one in members}


def test_it_holds_what_the_repository_holds(sdist: Path, checkout: Path) -> None:
    held = names(sdist)
    assert not tracked(checkout) - held, "missing"
    own = tracked(checkout, "--cached", "--others", "--exclude-standard")
    assert held - own == {"PKG-INFO"}
    assert {"Makefile", ".ci/run", "requirements/dev.lock", "tests/conftest.py"} <= held


def test_it_is_small(sdist: Path) -> None:
    assert sdist.stat().st_size < 15_000_000


def test_what_an_index_reads_is_valid(sdist: Path, checkout: Path) -> None:
    with tarfile.open(sdist) as archive:
        top = archive.getnames()[0].split("/")[0]
        member = archive.extractfile(f"{top}/PKG-INFO")
        assert member is not None
        text = member.read()
    about = Metadata.from_email(text, validate=True)
    assert about.name == "abft-mlx"
    assert about.description_content_type == "text/markdown"
    assert about.summary
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    assert (about.description or "").strip() == readme.strip()
    assert Parser().parsestr(text.decode())["Requires-Python"] == str(about.requires_python)


@pytest.mark.slow
def test_sdist_in_an_empty_environment(
    checkout: Path, tmp_path: Path, real_environment: dict[str, str]
) -> None:
    run(
        sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, checkout,
        cwd=tmp_path, env=real_environment,
    )  # fmt: skip
    (built,) = tmp_path.glob("*.tar.gz")
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    run(
        folder / "bin/python", "-m", "pip", "install", "--quiet", built,
        cwd=tmp_path, env=real_environment,
    )  # fmt: skip
    command = folder / "bin/abft-mlx"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert abft_mlx.__version__ in run(command, "--version", cwd=tmp_path, env=alone)
    listing = json.loads(run(command, "recipes", "list", "--json", cwd=tmp_path, env=alone))
    recipes = {one["name"]: Path(one["path"]) for one in listing["recipes"]}
    assert recipes["demo"].is_relative_to(site_packages(folder))
    report = json.loads(
        run(
            command, "finetune", "demo", "--output", "run",
            "--set", "training.updates=1", "--set", "training.examples=32", "--json",
            cwd=tmp_path, env=alone,
        )
    )  # fmt: skip
    assert report["updates"] == 1
    assert (tmp_path / "run/adapters.safetensors").is_file()
