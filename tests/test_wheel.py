"""What is built: the wheel works from any folder, and the sdist makes the same wheel."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from report_support import evaluation, made_heads, write_run

from abft_mlx.analysis import report


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def contents(wheel: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, checkout,
        cwd=folder,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel alone and borrows this one's dependencies."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    run(
        folder / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index", wheel,
        cwd=folder,
    )  # fmt: skip
    borrowed = folder / site_packages(folder) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def site_packages(folder: Path) -> Path:
    (found,) = folder.glob("lib/python*/site-packages")
    return found


def test_wheel_holds_package_recipes_and_model(wheel: Path, checkout: Path) -> None:
    names = set(contents(wheel))
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2, tops
    assert tops > {"abft_mlx"}
    shipped = {path.name for path in (checkout / "recipes").glob("*.yaml")}
    assert "demo.yaml" in shipped
    assert {f"abft_mlx/_recipes/{name}" for name in shipped} <= names
    model = {f"abft_mlx/assets/demo-model/{name}" for name in ("config.json", "tokenizer.json")}
    assert model <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert "abft_mlx/py.typed" in names
    assert {
        f"abft_mlx/analysis/report/{name}" for name in ("page.html", "style.css", "script.js")
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert wheel.stat().st_size < 10_000_000


def test_wheel_names_its_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    needs = metadata.get_all("Requires-Dist", [])
    assert any(one.startswith("mlx>=") and "sys_platform == 'darwin'" in one for one in needs)
    assert any(one.startswith("mlx[cpu]>=") and "sys_platform == 'linux'" in one for one in needs)
    assert not any("torch" in one and "extra ==" not in one for one in needs)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "abft-mlx = abft_mlx.cli:app" in points


def test_sdist_makes_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, checkout,
        cwd=tmp_path,
    )  # fmt: skip
    assert list(tmp_path.glob("*.tar.gz"))
    (again,) = tmp_path.glob("*.whl")
    assert contents(again) == contents(wheel)


def test_installed_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    listing = json.loads(
        run(
            installed / "bin/abft-mlx", "recipes", "list", "--json",
            cwd=tmp_path, env=environment,
        )
    )  # fmt: skip
    recipes = {one["name"]: Path(one["path"]) for one in listing["recipes"]}
    assert "demo" in recipes
    assert all(path.is_relative_to(installed) for path in recipes.values())
    program = "from abft_mlx import loading; print(loading.load_model('demo').path)"
    where = run(installed / "bin/python", "-c", program, cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(installed)


def test_installed_wheel_writes_a_report(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    write_run(tmp_path / "run", made_heads(), measured=evaluation())
    command = (installed / "bin/abft-mlx", "report", "run", "--no-figures")
    run(*command, cwd=tmp_path, env=environment)
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    folder = Path(report.__file__).parent
    for name in ("style.css", "script.js"):
        assert (folder / name).read_text(encoding="utf-8") in text


def test_installed_wheel_adds_one_module(installed: Path) -> None:
    tops = {path.name for path in site_packages(installed).iterdir()}
    ours = {name for name in tops if "pip" not in name and name != "borrowed.pth"}
    assert ours - {"setuptools", "_distutils_hack", "distutils-precedence.pth", "pkg_resources"} - {
        name for name in ours if name.endswith(".dist-info")
    } == {"abft_mlx"}


@pytest.mark.slow
def test_wheel_in_an_empty_environment(
    wheel: Path, tmp_path: Path, real_environment: dict[str, str]
) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    run(
        folder / "bin/python", "-m", "pip", "install", "--quiet", wheel,
        cwd=tmp_path, env=real_environment,
    )  # fmt: skip
    assert not list(site_packages(folder).glob("torch*")), "a plain install must not bring torch"
    run(folder / "bin/abft-mlx", "recipes", "list", cwd=tmp_path)
    report = json.loads(
        run(
            folder / "bin/abft-mlx", "finetune", "demo", "--output", "run",
            "--set", "training.updates=1", "--set", "training.examples=32", "--json",
            cwd=tmp_path,
        )
    )  # fmt: skip
    assert (report["updates"], report["output"]) == (1, "run")
    assert (tmp_path / "run/adapters.safetensors").is_file()
