"""What is built: the sdist holds the repository, and its wheel works from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from made_runs import evaluation, heads, write_run
from packaging.metadata import Metadata

import abft_mlx

ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel alone and borrows this one's dependencies."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    (wheel,) = built.glob("*.whl")
    pip = (folder / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def test_the_sdist_holds_the_repository(built: Path, checkout: Path) -> None:
    if shutil.which("git") is None or not (checkout / ".git").exists():
        pytest.skip("needs git and a clone, to know which files are the repository's")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = [one for one in archive.getmembers() if not one.isdir()]
    assert all(one.isreg() for one in members), "links and devices have no place in it"
    held = {one.name.split("/", 1)[1] for one in members}

    def listed(*options: str) -> set[str]:
        names = run("git", "ls-files", "-z", *options, cwd=checkout).split("\0")
        return {name for name in names if name and (checkout / name).exists()}

    tracked = {name for name in listed() if not name.startswith(".github/")}
    assert not tracked - held
    assert held - listed("--cached", "--others", "--exclude-standard") == {"PKG-INFO"}
    assert sdist.stat().st_size < 15_000_000


def test_the_wheel_holds_package_recipes_and_model(built: Path, checkout: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(about)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"abft_mlx", about.split("/")[0]}
    for path in (checkout / "recipes").glob("*.yaml"):
        assert f"abft_mlx/_recipes/{path.name}" in names
    package = checkout / "abft_mlx"
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(checkout).as_posix() in names
    assert not [name for name in names if "__pycache__" in name]
    assert wheel.stat().st_size < 10_000_000
    checked = Metadata.from_email(metadata, validate=True)
    assert (checked.name, str(checked.requires_python)) == ("abft-mlx", ">=3.11")
    needs = Parser().parsestr(metadata.decode()).get_all("Requires-Dist", [])
    assert any(one.startswith("mlx>=") and "sys_platform == 'darwin'" in one for one in needs)
    assert any(one.startswith("mlx[cpu]>=") and "sys_platform == 'linux'" in one for one in needs)
    assert not any("torch" in one and "extra ==" not in one for one in needs)


def test_the_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin/abft-mlx"
    listing = json.loads(run(command, "recipes", "list", "--json", cwd=tmp_path, env=ALONE))
    recipes = {one["name"]: Path(one["path"]) for one in listing["recipes"]}
    assert recipes["demo"].is_relative_to(installed)
    program = "from abft_mlx import loading; print(loading.load_model('demo').path)"
    where = run(installed / "bin/python", "-c", program, cwd=tmp_path, env=ALONE)
    assert Path(where.strip()).is_relative_to(installed)
    write_run(tmp_path / "run", heads(), measured=evaluation())
    run(command, "report", "run", "--no-figures", cwd=tmp_path, env=ALONE)
    assert "<style>" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_sdist_in_an_empty_environment(
    built: Path, tmp_path: Path, real_environment: dict[str, str]
) -> None:
    (sdist,) = built.glob("*.tar.gz")
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    pip = (folder / "bin/python", "-m", "pip", "install", "--quiet")
    run(*pip, sdist, cwd=tmp_path, env=real_environment)
    assert not list(folder.glob("lib/python*/site-packages/torch*")), "a plain install has no torch"
    command = folder / "bin/abft-mlx"
    assert abft_mlx.__version__ in run(command, "--version", cwd=tmp_path, env=ALONE)
    small = ("--set", "training.updates=1", "--set", "training.examples=32")
    report = run(
        command, "finetune", "demo", "--output", "run", *small, "--json", cwd=tmp_path, env=ALONE
    )
    assert json.loads(report)["updates"] == 1
    assert (tmp_path / "run/adapters.safetensors").is_file()
