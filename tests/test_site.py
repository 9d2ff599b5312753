"""The site of docs/ builds without a warning, offline, and has every page and public name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import abft_mlx
from abft_mlx.analysis import figures

MISSING = [name for name in ("sphinx", "myst_nb", "furo") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the site is built with {', '.join(MISSING)}: pip install --group docs"
)


def build(docs: Path, output: Path, checkout: Path) -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does, where a proxy that is not there stands for the network."""
    nowhere = "http://127.0.0.1:9"
    path = {"PATH": "", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(output / "doctrees"), str(docs), str(output / "html")]
    return subprocess.run(
        command,
        env={**path, "http_proxy": nowhere, "https_proxy": nowhere},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    done = build(checkout / "docs", output, checkout)
    assert done.returncode == 0, done.stderr
    return output / "html"


def test_every_page_is_there_and_found_from_the_first(site: Path, checkout: Path) -> None:
    docs = checkout / "docs"
    sources = [*docs.rglob("*.md"), *docs.glob("notebooks/*.ipynb")]
    pages = {path.relative_to(docs).with_suffix(".html") for path in sources}
    first = (site / "index.html").read_text(encoding="utf-8")
    for page in pages:
        assert (site / page).is_file()
        assert f'href="{page.as_posix()}"' in first or page.name == "index.html"


def test_links_of_pages_lead_to_pages(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith(("mailto:", "data:")):
                assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_reference_has_what_the_package_offers(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in set(abft_mlx.__all__) - {"__version__"}:
        assert f'id="abft_mlx.{name}"' in page
    for name in (
        "Classifier.fit",
        "Classifier.predict_proba",
        "attention.capture",
        "errors.DataError",
    ):
        assert f'id="abft_mlx.{name}"' in page
    assert "Probabilities of the classes, (N, C) float64" in page


def test_the_reference_has_every_figure(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in figures.__all__:
        assert re.search(rf'id="abft_mlx.analysis.figures.{name}"', page), name
