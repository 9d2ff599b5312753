"""SmolLM2-135M-Instruct, as ``make real-model`` writes it, and a file of support messages."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2(checkout: Path) -> Path:
    folder = checkout / "build/models/smollm2"
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs a real model in {folder}: make real-model")
    return folder


@pytest.fixture(scope="session")
def messages() -> Path:
    """168 messages to a shop in four classes of 42; columns id, message, team."""
    return Path(__file__).with_name("messages.csv")
