"""The model card of a run: metadata that the hub reads, and ``card.md.j2`` for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from abft_mlx.exchange.cleaning import LOCAL_DATA, LOCAL_MODEL, Cleaned
from abft_mlx.recipe import Recipe

TASK = "text-classification"
_METRICS = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro-F1")}
_BUNDLED_LICENSE, _BUNDLED_LANGUAGE = "mit", "en"


@dataclass(frozen=True)
class Options:
    """What the card says beside the run's own facts.

    Attributes:
        license: an id of the hub's list; None leaves it out.
        language: ISO codes; none leave it out.
        results: eval's JSON of this adapter.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    results: Mapping[str, Any] | None = None


def write(
    cleaned: Cleaned,
    name: str,
    *,
    options: Options,
    demonstrations: bool,
    peft: Mapping[str, Any] | None,
    stock: bool,
) -> ModelCard:
    """Write the card.

    Args:
        cleaned: the run, without local names; nothing else of it is used.
        name: the repository's id.
        options: licence, language and results.
        demonstrations: whether the run's demonstrations are sent, too.
        peft: the configuration of the PEFT folder that is sent, too, if one is.
        stock: whether stock mlx-lm can load the adapter.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: a part of the run or of the results is
            missing or of another kind.
    """
    bundled = cleaned.recipe.model == "demo"
    results = [*_validated(cleaned), *_measured(cleaned, options.results)]
    head = ModelCardData(
        base_model=cleaned.base_model,
        base_model_relation="adapter" if cleaned.base_model else None,
        datasets=list(cleaned.datasets) or None,
        eval_results=results or None,
        language=list(options.language) or (_BUNDLED_LANGUAGE if bundled else None),
        library_name="mlx",
        license=options.license or (_BUNDLED_LICENSE if bundled else None),
        metrics=sorted({one.metric_type for one in results}) or None,
        model_name=name.partition("/")[2] if results else None,
        pipeline_tag=TASK,
        tags=["abft", "lora", "mlx", "mlx-lm", *(["peft"] if peft is not None else [])],
    )
    text = _text(cleaned, name, options.results, demonstrations, peft, stock)
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")


def _text(
    cleaned: Cleaned,
    name: str,
    results: Mapping[str, Any] | None,
    demonstrations: bool,
    peft: Mapping[str, Any] | None,
    stock: bool,
) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": _cell, "repr": repr}
    source = resources.files(__package__).joinpath("card.md.j2").read_text(encoding="utf-8")
    recipe, run = cleaned.recipe, cleaned.run
    nameless = recipe.model == LOCAL_MODEL
    base = "THE-BASE-MODEL" if nameless else shlex.quote(cleaned.base_model or recipe.model)
    if recipe.model == "demo":
        base = '"$(python -c \'from abft_mlx import loading; print(loading.find("demo"))\')"'
    try:
        return environment.from_string(source).render(
            base=_base(cleaned),
            base_option=base,
            data=_texts(cleaned)[1],
            demonstrations=demonstrations,
            folder=name.partition("/")[2],
            local_data=recipe.data.source == LOCAL_DATA,
            name=name,
            nameless=nameless,
            peft=peft,
            recipe=recipe,
            results=results,
            run=_Part(run),
            stock=stock,
            table=[] if results is None else _table(results),
            trained_on=_trained_on(cleaned),
            validation=run.get("validation"),
            verdict=_Part((results or {}).get("verdict", {})),
        )
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from None


class _Part(dict[str, Any]):
    """A JSON object whose absent parts read as None."""

    def __missing__(self, key: str) -> None:
        return None


def _base(cleaned: Cleaned) -> str:
    if cleaned.base_model:
        return f"[{cleaned.base_model}](https://huggingface.co/{cleaned.base_model})"
    if cleaned.recipe.model == "demo":
        return "the small teaching model that abft-mlx brings along"
    if cleaned.recipe.model == LOCAL_MODEL:
        return "a model from a local folder"
    return f"`{cleaned.recipe.model}`"


def _texts(cleaned: Cleaned) -> tuple[str, str]:
    """A data set's id, or what stands for one, and its name for people."""
    source = cleaned.recipe.data.source
    if source == LOCAL_DATA:
        return "local-file", "a local file"
    if source not in cleaned.datasets and cleaned.run.get("data", {}).get("kind"):
        return "generated", f"abft-mlx's built-in task {source}"
    return source, source


def _trained_on(cleaned: Cleaned) -> str:
    names = ", ".join(one.name for one in cleaned.recipe.mixture)
    if names:
        return f"a mixture of {names}"
    rows = cleaned.run.get("data", {}).get("rows", {})
    return _texts(cleaned)[1] + (f", {rows['training']:,} rows of it" if "training" in rows else "")


def shown(run: Mapping[str, Any], recipe: Recipe, classifier: bool) -> Any:
    """Demonstrations in a prompt, k: the classifier's, or those of the recipe's prompts."""
    stored = run.get("classifier") if classifier else None
    return stored["k"] if stored else recipe.prompt.demonstrations


def _validated(cleaned: Cleaned) -> list[EvalResult]:
    found = cleaned.run.get("validation")
    if not found:
        return []
    kept = found["best"] if found["kept_update"] == found["best_update"] else found["after"]
    classifier = cleaned.recipe.evaluation.demonstrations == "classifier"
    k = shown(cleaned.run, cleaned.recipe, classifier)
    return [_result(cleaned, "validation", "accuracy", kept, found["prompts"], k)]


def _measured(cleaned: Cleaned, document: Mapping[str, Any] | None) -> list[EvalResult]:
    if document is None:
        return []
    methods = document["methods"]
    method = methods.get("classifier") or methods.get("vanilla", {})
    return [
        _result(cleaned, "test", metric, method[metric], document["prompts"], document["k"])
        for metric in _METRICS
        if metric in method
    ]


def _result(cleaned: Cleaned, split: str, metric: str, value: float, n: int, k: int) -> EvalResult:
    kind, title = _METRICS[metric]
    identity, name = _texts(cleaned)
    section = cleaned.recipe.data
    on_hub = section.source in cleaned.datasets
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


def _table(document: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of results: a title and a cell for each metric."""
    methods, baselines = document["methods"], document.get("baselines", {})
    base = document.get("base", {}).get("methods", {})
    titles = {"classifier": "", "vanilla": ", not calibrated"} if "classifier" in methods else {}
    rows = []
    for name, method in methods.items():
        if name == "vanilla" and method == methods.get("classifier"):
            continue
        title = titles.get(name, f", {name.replace('_', '-')}")
        rows.append([f"with this adapter{title}", *_cells(method)])
        if name in base:
            rows.append([f"prompting without it{title}", *_cells(base[name])])
    if "bag_of_words" in baselines:
        bag = _cells(baselines["bag_of_words"])
        rows.append(["bag of words and logistic regression", *bag])
    if "majority" in baselines:
        common = baselines["majority"]
        title = f"always the most frequent label ({_cell(common['label'])})"
        rows.append([title, f"{common['accuracy']:.1%}", "–"])
    return rows


def _cells(method: Mapping[str, Any]) -> list[str]:
    cells = []
    for metric in _METRICS:
        ends = method.get("interval", {}).get(metric)
        text = f"{method[metric]:.1%}"
        if isinstance(ends, list | tuple) and len(ends) == 2:
            text += f" ({ends[0]:.1%}–{ends[1]:.1%})"
        cells.append(text)
    return cells


def _cell(text: str) -> str:
    """A text inside a Markdown table."""
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
