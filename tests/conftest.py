"""What every test stands on: optimised BLAS first, the user's folders out of reach, no network."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import abft_mlx  # noqa: F401  (loads the BLAS before any test imports mlx)

CHECKOUT = Path(__file__).resolve().parent.parent

# As the machine had it: for tests that start pip, which wants its caches and settings.
REAL_ENVIRONMENT = dict(os.environ)

# huggingface_hub and rich read these when they are imported, so they cannot wait for a fixture.
_HOME = Path(tempfile.mkdtemp(prefix="abft-mlx-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
os.environ.update(
    HOME=str(_HOME),
    XDG_CACHE_HOME=str(_HOME / "cache"),
    HF_HOME=str(_HOME / "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    NO_COLOR="1",
    COLUMNS="100",
)

from hypothesis import settings  # noqa: E402  (after the folders are isolated)

# The same examples every time, and no clock: a test that fails now fails again.
settings.register_profile("abft-mlx", derandomize=True, deadline=None, database=None)
settings.load_profile("abft-mlx")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts and golden references that lies beside a founder's checkout."""
    folder = CHECKOUT.parent / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip(f"needs the real texts and references in {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of this checkout."""
    return CHECKOUT


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with random weights, in a folder."""
    from cli_support import write_model

    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of labelled texts for it."""
    from cli_support import write_texts

    return write_texts(tmp_path_factory.mktemp("texts") / "mail.csv")


@pytest.fixture(scope="session")
def benchmark() -> Callable[[str], ModuleType]:
    """Imports a support module of tests/ by name."""
    return importlib.import_module


@pytest.fixture(scope="session")
def real_environment() -> dict[str, str]:
    """The environment before the tests isolated it: for starting pip, never for abft-mlx."""
    return dict(REAL_ENVIRONMENT)
