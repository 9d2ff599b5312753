"""One real browser for a test module, and pages in it that must ask no network for anything."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
# Colours as the browser paints them, whatever notation they are in.
CONTRAST = """() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    pen.clearRect(0, 0, 1, 1);
    for (const one of colours) { pen.fillStyle = one; pen.fillRect(0, 0, 1, 1); }
    return pen.getImageData(0, 0, 1, 1).data;
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((one) => {
      const c = one / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, style, .unseen, .paper")) continue;
    const under = [];
    for (let one = element; one; one = one.parentElement) {
      under.unshift(getComputedStyle(one).backgroundColor);
    }
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [ground, text] = [paint(under), paint([...under, ink])].map(light);
    const ratio = (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
    found.push([walk.currentNode.textContent.trim().slice(0, 40), ratio]);
  }
  return found;
}"""
# What leaves the window, or its own box, and the widths of all and of what is seen.
NARROW = """() => {
  const wrong = [];
  for (const one of document.body.querySelectorAll("*")) {
    if (!one.checkVisibility() || one.closest(".wide table, .wide > *, svg *, .unseen, .skip")) {
      continue;
    }
    const box = one.getBoundingClientRect();
    const name = one.outerHTML.slice(0, 90);
    if (box.width && (box.left < -0.5 || box.right > innerWidth + 0.5)) wrong.push(name);
    const style = getComputedStyle(one);
    if (style.display !== "inline" && style.overflowX === "visible"
        && one.scrollWidth > one.clientWidth + 1) wrong.push("inside: " + name);
  }
  return [wrong, document.documentElement.scrollWidth, document.documentElement.clientWidth];
}"""


def chromium() -> str | None:
    """A Chromium that is installed here, or None; playwright's own is never fetched."""
    named = os.environ.get("ABFT_MLX_CHROMIUM")
    if named:
        return named
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    return found or (str(MAC) if MAC.exists() else None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser that is started once; skips where there is none."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("needs a driver for a browser: pip install playwright")
    where = chromium()
    if where is None:
        pytest.skip(
            "needs a browser: apt-get install chromium, or Google Chrome, or name one with "
            "ABFT_MLX_CHROMIUM"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=where, args=ARGUMENTS)
        yield started
        started.close()


@contextmanager
def page(
    started: Any, path: Path, *, width: int = 1280, quiet: bool = True, **options: Any
) -> Iterator[Any]:
    """A file opened; afterwards nothing must have been requested and no error been logged.

    Args:
        started: from :func:`browser`.
        path: of the file.
        width: of the window.
        quiet: whether requests and errors on the console are failures.
        options: of the browser's context.
    """
    settings = {"reduced_motion": "reduce", "viewport": {"width": width, "height": 900}, **options}
    context = started.new_context(**settings)
    requests: list[str] = []
    errors: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on(
        "console",
        lambda one: errors.append(one.text) if one.type in ("error", "warning") else None,
    )
    opened.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    address = path.resolve().as_uri()
    try:
        opened.goto(address)
        yield opened
        assert not quiet or ([url for url in requests if url != address], errors) == ([], [])
    finally:
        context.close()
