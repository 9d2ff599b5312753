"""Attention Behavior Fine-Tuning with MLX: a better few-shot classifier, by training attention.

::

    import abft_mlx

    run = abft_mlx.finetune("demo", "runs/demo")
    model, tokenizer = abft_mlx.load("demo", adapter=run.output)
    result = abft_mlx.evaluate("demo", adapter=run.output)
    labels = abft_mlx.Classifier(adapter=run.output).predict(["where is my order"])

Everything is imported on first use, after :func:`abft_mlx.runtime.prepare` has found a BLAS: on
Linux, import ``abft_mlx`` and what you need of it before ``mlx``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Classifier", "__version__", "evaluate", "finetune", "load", "prepare"]

if TYPE_CHECKING:
    from abft_mlx.api import evaluate, finetune, load, prepare
    from abft_mlx.classifier import Classifier

_HOMES = {
    "Classifier": "classifier",
    "evaluate": "api",
    "finetune": "api",
    "load": "api",
    "prepare": "api",
}
_LIGHT_ROOMS = frozenset({"data", "errors", "prompts", "recipe", "runtime"})
_MLX_ROOMS = frozenset(
    {
        "adapters",
        "attention",
        "classifier",
        "evaluation",
        "exchange",
        "experiment",
        "induction",
        "loading",
        "objective",
        "ports",
        "prediction",
        "study",
        "trainer",
    }
)


def __getattr__(name: str) -> Any:
    """Import a function, a class or a room of this package when it is first asked for (PEP 562)."""
    from importlib import import_module

    if name in _LIGHT_ROOMS:
        return import_module(f"abft_mlx.{name}")
    if name in _HOMES or name in _MLX_ROOMS:
        from abft_mlx.runtime import prepare

        prepare()
        if name in _MLX_ROOMS:
            return import_module(f"abft_mlx.{name}")
        value = getattr(import_module(f"abft_mlx.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'abft_mlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What this package offers, imported or not."""
    return sorted({*globals(), *_HOMES, *_LIGHT_ROOMS, *_MLX_ROOMS})
