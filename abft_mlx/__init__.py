"""Attention Behavior Fine-Tuning with MLX: a better few-shot classifier, by training attention.

::

    import abft_mlx

    run = abft_mlx.finetune("demo", "runs/demo")
    model, tokenizer = abft_mlx.load("demo", adapter=run.output)
    result = abft_mlx.evaluate("demo", adapter=run.output)
    labels = abft_mlx.Classifier(adapter=run.output).predict(["where is my order"])

Importing ``abft_mlx`` loads an optimised BLAS on Linux, so import it before ``mlx``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Before anything can import MLX, which on Linux looks for its BLAS when it is imported.
from abft_mlx.runtime import prepare as _prepare_blas

_prepare_blas()

__all__ = ["Classifier", "__version__", "evaluate", "finetune", "load", "prepare"]

if TYPE_CHECKING:
    from abft_mlx.api import evaluate, finetune, load, prepare
    from abft_mlx.classifier import Classifier


def __getattr__(name: str) -> Any:
    """Import a public function, or a module of this package, when it is first asked for (PEP 562).

    ``import abft_mlx`` alone takes 20 ms; MLX and transformers take seconds.
    """
    if name in __all__:
        home = "classifier" if name == "Classifier" else "api"
        value = getattr(import_module(f"abft_mlx.{home}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"abft_mlx.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"abft_mlx.{name}":
                raise
    raise AttributeError(f"module 'abft_mlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What this package offers, imported or not."""
    return sorted({*globals(), *__all__})
