"""How `make docs` builds the site: Markdown and notebooks through MyST, the API from docstrings.

Nothing is fetched while it builds, and every warning is an error.
"""

from __future__ import annotations

import re
from typing import Any

from abft_mlx import __version__, runtime

runtime.prepare()  # before autodoc imports mlx

project = "abft-mlx"
copyright = "the abft-mlx founders"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "notebooks/runs", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"abft-mlx {__version__}"
html_show_sphinx = False

# Pages are read on GitHub, too: plain Markdown, whose headings may be linked.
myst_heading_anchors = 3

# Notebooks are shown with the outputs that they hold; `make notebooks` and the tests run them.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"np.ndarray": "numpy.ndarray"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

_OUTWARD = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:abft_mlx|benchmarks|recipes|tests|tools)[^)]*\)")


def _without_sources(app: Any, name: str, content: list[str]) -> None:
    """Links to the repository's own files lead nowhere from the site: their words stay."""
    del app, name
    content[0] = _OUTWARD.sub(r"\1", content[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _without_sources)
