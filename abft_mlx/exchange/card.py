"""The model card of a run: metadata that the hub reads, and ``card.md.j2`` for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from abft_mlx.recipe import Recipe

# Neither a hub id nor a file's name, so that whoever runs the recipe is asked for their own.
LOCAL_MODEL, LOCAL_DATA = "(a local folder)", "(a local file)"
TASK = "text-classification"
METRICS = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro-F1")}


@dataclass(frozen=True)
class Options:
    """What the card says beside the run's own facts."""

    license: str | None = None  # an id of the hub's list
    language: tuple[str, ...] = ()  # ISO codes
    results: Mapping[str, Any] | None = None  # eval's JSON of this adapter


@dataclass(frozen=True)
class Run:
    """A run as others may see it."""

    recipe: Recipe  # with placeholders for what is on this machine only
    facts: dict[str, Any]  # the content of run.json, likewise
    base_model: str | None  # the base's hub id
    datasets: tuple[str, ...]  # hub ids of the data it was trained and measured on


def write(
    run: Run,
    name: str,
    options: Options,
    *,
    demonstrations: bool,
    peft: Mapping[str, Any] | None,
    stock: bool,
) -> str:
    """Write the card.

    Args:
        run: without local names.
        name: the repository's id.
        options: licence, language and results.
        demonstrations: whether the run's demonstrations are sent, too.
        peft: the configuration of the PEFT folder that is sent, too, if one is.
        stock: whether stock mlx-lm can load the adapter.
    """
    recipe, results = run.recipe, options.results
    bundled = recipe.model == "demo"
    metrics = [*_validated(run), *_measured(run, results)]
    head = ModelCardData(
        base_model=run.base_model,
        base_model_relation="adapter" if run.base_model else None,
        datasets=list(run.datasets) or None,
        eval_results=metrics or None,
        language=list(options.language) or ("en" if bundled else None),
        library_name="mlx",
        license=options.license or ("mit" if bundled else None),
        metrics=sorted({metric.metric_type for metric in metrics}) or None,
        model_name=name.partition("/")[2] if metrics else None,
        pipeline_tag=TASK,
        tags=["abft", "lora", "mlx", "mlx-lm", *(["peft"] if peft is not None else [])],
    )
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": _cell, "repr": repr, "quote": shlex.quote}
    source = resources.files(__package__).joinpath("card.md.j2").read_text(encoding="utf-8")
    text = environment.from_string(source).render(
        base_model=run.base_model,
        data=_texts(run)[1],
        demonstrations=demonstrations,
        folder=name.partition("/")[2],
        local_data=recipe.data.source == LOCAL_DATA,
        metrics=METRICS,
        name=name,
        nameless=recipe.model == LOCAL_MODEL,
        peft=peft,
        recipe=recipe,
        results=results,
        run=_Part(run.facts),
        stock=stock,
        verdict=_Part((results or {}).get("verdict", {})),
    )
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}"))


class _Part(dict[str, Any]):
    """A JSON object whose absent parts read as None."""

    def __missing__(self, key: str) -> None:
        return None


def _cell(text: str) -> str:
    """A text inside a Markdown table."""
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def _texts(run: Run) -> tuple[str, str]:
    """A data set's id, or what stands for one, and its name for people."""
    source = run.recipe.data.source
    if source == LOCAL_DATA:
        return "local-file", "a local file"
    if source not in run.datasets and run.facts.get("data", {}).get("kind"):
        return "generated", f"abft-mlx's built-in task {source}"
    return source, source


def shown(facts: Mapping[str, Any], recipe: Recipe, classifier: bool) -> Any:
    """Demonstrations in a prompt, k: the classifier's, or those of the recipe's prompts."""
    stored = facts.get("classifier") if classifier else None
    return stored["k"] if stored else recipe.prompt.demonstrations


def _validated(run: Run) -> list[EvalResult]:
    """The accuracy on validation prompts of the update whose adapter was kept."""
    validation = run.facts.get("validation")
    if not validation:
        return []
    best = validation["kept_update"] == validation["best_update"]
    classifier = run.recipe.evaluation.demonstrations == "classifier"
    k = shown(run.facts, run.recipe, classifier)
    kept = validation["best" if best else "after"]
    return [_result(run, "validation", "accuracy", kept, validation["prompts"], k)]


def _measured(run: Run, results: Mapping[str, Any] | None) -> list[EvalResult]:
    """The metrics of eval's JSON."""
    if results is None:
        return []
    methods = results["methods"]
    method = methods.get("classifier") or methods.get("vanilla", {})
    return [
        _result(run, "test", metric, method[metric], results["prompts"], results["k"])
        for metric in METRICS
        if metric in method
    ]


def _result(run: Run, split: str, metric: str, value: float, n: int, k: int) -> EvalResult:
    """One metric as the hub reads it."""
    kind, title = METRICS[metric]
    identity, name = _texts(run)
    section = run.recipe.data
    on_hub = section.source in run.datasets
    return EvalResult(
        task_type=TASK,
        task_name="Few-shot text classification",
        dataset_type=identity,
        dataset_name=name,
        dataset_config=section.config if on_hub else None,
        dataset_revision=section.revision if on_hub else None,
        dataset_split=split,
        metric_type=kind,
        metric_name=f"{title} (n = {n:,}, k = {k})",
        metric_value=round(value, 6),
        metric_args={"n": n, "demonstrations": k},
    )
