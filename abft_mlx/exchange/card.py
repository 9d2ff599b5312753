"""The model card of a run: metadata that the hub reads, and what a person wants to know."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from abft_mlx.exchange.cleaning import LOCAL_DATA, LOCAL_MODEL, Cleaned

PAPER = "https://arxiv.org/abs/2505.14233"
TASK = "text-classification"
EXAMPLE = "a text to classify"
_METRICS = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro-F1")}
_BUNDLED_LICENSE, _BUNDLED_LANGUAGE = "mit", "en"


@dataclass(frozen=True)
class Wishes:
    """What only its owner can say of an adapter.

    Attributes:
        license: an id of the hub's list; None leaves it out.
        language: ISO codes; none leave it out.
        results: a document of ``abft-mlx eval --json`` that measured this adapter.
    """

    license: str | None = None
    language: tuple[str, ...] = ()
    results: Mapping[str, Any] | None = None


def write(
    cleaned: Cleaned, name: str, *, wishes: Wishes, peft: Mapping[str, Any] | None, stock: bool
) -> ModelCard:
    """Write the card.

    Args:
        cleaned: the run, without local names; nothing else of it is used.
        name: the repository's id.
        wishes: what the owner says.
        peft: the configuration of the PEFT folder that goes along, if one does.
        stock: whether stock mlx-lm can put the adapter on.
    """
    bundled = cleaned.recipe.model == "demo"
    results = [*_validated(cleaned), *_measured(cleaned, wishes.results)]
    tags = ["abft", "lora", "mlx", "mlx-lm", *(["peft"] if peft is not None else [])]
    head = ModelCardData(
        base_model=cleaned.base_model,
        base_model_relation="adapter" if cleaned.base_model else None,
        datasets=list(cleaned.datasets) or None,
        eval_results=results or None,
        language=list(wishes.language) or (_BUNDLED_LANGUAGE if bundled else None),
        library_name="mlx",
        license=wishes.license or (_BUNDLED_LICENSE if bundled else None),
        metrics=sorted({one.metric_type for one in results}) or None,
        model_name=name.partition("/")[2] if results else None,
        pipeline_tag=TASK,
        tags=tags,
    )
    parts = [
        f"# {name.partition('/')[2]}",
        _summary(cleaned),
        _results(cleaned, wishes.results),
        _use(cleaned, name, peft=peft, stock=stock),
        _prompt(cleaned),
        _training(cleaned),
        _limits(cleaned),
    ]
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _summary(cleaned: Cleaned) -> str:
    recipe = cleaned.recipe
    lora = f"LoRA of rank {recipe.adapter.rank} on W_Q and W_K"
    what = lora if recipe.adapter.kind == "lora" else "W_Q and W_K themselves"
    head = " and the LM head" if recipe.adapter.head else ""
    return (
        f"An adapter that makes {_base(cleaned)} a better few-shot classifier: {what}{head}, "
        "trained by Attention Behavior Fine-Tuning (ABFT, "
        f"[arXiv 2505.14233]({PAPER})) with abft-mlx {_version(cleaned)}. "
        + (
            "The loss is the label token's cross-entropy, end to end."
            if recipe.objective.kind == "end_to_end"
            else "The loss is on the attention of induction heads: at a prompt's last token they "
            "learn to look at the right labels among the demonstrations."
        )
    )


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
    section, kind = cleaned.recipe.data, cleaned.run.get("data", {}).get("kind")
    if section.source == LOCAL_DATA:
        return "local-file", "a local file"
    if section.source in cleaned.datasets:
        return section.source, section.source
    return (
        ("generated", f"abft-mlx's built-in task {section.source}")
        if kind
        else (
            section.source,
            section.source,
        )
    )


def _validated(cleaned: Cleaned) -> list[EvalResult]:
    found = cleaned.run.get("validation")
    if not found:
        return []
    kept = found["best"] if found["kept_update"] == found["best_update"] else found["after"]
    return [_result(cleaned, "validation", "accuracy", kept, found["prompts"])]


def _measured(cleaned: Cleaned, document: Mapping[str, Any] | None) -> list[EvalResult]:
    vanilla = (document or {}).get("methods", {}).get("vanilla", {})
    return [
        _result(cleaned, "test", metric, vanilla[metric], document["prompts"])
        for metric in _METRICS
        if document is not None and metric in vanilla
    ]


def _result(cleaned: Cleaned, split: str, metric: str, value: float, n: int) -> EvalResult:
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
        metric_name=f"{title} (n = {n:,}, k = {cleaned.recipe.prompt.demonstrations})",
        metric_value=round(value, 6),
        metric_args={"n": n, "demonstrations": cleaned.recipe.prompt.demonstrations},
    )


def _results(cleaned: Cleaned, document: Mapping[str, Any] | None) -> str:
    lines = ["## Results", ""]
    k = cleaned.recipe.prompt.demonstrations
    if document is not None and "methods" in document:
        n, base = document["prompts"], document.get("base", {}).get("methods", {})
        lines += [
            f"Measured with `abft-mlx eval`, {n:,} test prompts of {k} demonstrations, on "
            f"{_texts(cleaned)[1]}; 95% bootstrap intervals in brackets where there are some.",
            "",
            "| method | | accuracy | macro-F1 |",
            "|---|---|---|---|",
        ]
        for name, method in document["methods"].items():
            title = name.replace("_", "-")
            if name in base:
                lines.append(f"| {title} | base | {_cells(base[name])} |")
            lines.append(f"| {title} | with this adapter | {_cells(method)} |")
        lines.append("")
    found = cleaned.run.get("validation")
    if found:
        lines.append(
            f"During training, on {found['prompts']:,} validation prompts: accuracy "
            f"{found['before']:.1%} before, {found['after']:.1%} after the last update, "
            f"{found['best']:.1%} at best. The adapter is that of update {found['kept_update']}"
            + (
                ", which these prompts chose, so the last figure flatters it."
                if found["kept_update"] == found["best_update"]
                else "."
            )
        )
    if len(lines) == 2:
        lines.append(
            "Nobody has said what was measured of this adapter. The first command below does."
        )
    return "\n".join(lines).rstrip()


def _cells(method: Mapping[str, Any]) -> str:
    cells = []
    for metric in _METRICS:
        ends = method.get("interval", {}).get(metric)
        text = f"{method[metric]:.1%}"
        if isinstance(ends, list | tuple) and len(ends) == 2:
            text += f" ({ends[0]:.1%}–{ends[1]:.1%})"
        cells.append(text)
    return " | ".join(cells)


def _use(cleaned: Cleaned, name: str, *, peft: Mapping[str, Any] | None, stock: bool) -> str:
    recipe = cleaned.recipe
    nameless = recipe.model == LOCAL_MODEL
    model = " --model THE-BASE-MODEL" if nameless else ""
    texts = " --data labelled.csv" if recipe.data.source == LOCAL_DATA else ""
    lines = ["## How to use it", ""]
    if nameless:
        lines += ["The base was a local folder: put its own name where it says THE-BASE-MODEL.", ""]
    if texts:
        lines += ["labelled.csv is a file of yours with a `text` and a `label` column.", ""]
    lines += [
        "With abft-mlx, accuracy without and with it, then labels for the lines of a file:",
        "",
        "```sh",
        f"abft-mlx eval --adapter {name}{model}{texts}",
        f"abft-mlx predict --adapter {name}{model}{texts} texts.txt",
        "```",
        "",
    ]
    folder = name.partition("/")[2]
    base = shlex.quote(cleaned.base_model or recipe.model)
    if nameless and not cleaned.base_model:
        base = "THE-BASE-MODEL"
    if recipe.model == "demo":
        base = '"$(python -c \'from abft_mlx import loading; print(loading.find("demo"))\')"'
    if stock:
        lines += [
            "With stock [mlx-lm](https://github.com/ml-explore/mlx-lm), which wants a folder:",
            "",
            "```sh",
            f"hf download {name} --local-dir {folder}",
            f"mlx_lm.generate --model {base} --adapter-path {folder} --max-tokens 1 "
            f"--ignore-chat-template --prompt {shlex.quote(_example(cleaned))}",
            "```",
            "",
        ]
    else:
        lines += ["Stock mlx-lm cannot put a trained LM head on a quantized base.", ""]
    if peft is not None:
        named = peft.get("base_model_name_or_path") or "THE-BASE-MODEL"
        lines += [
            "With [PEFT](https://github.com/huggingface/peft), on the base as transformers has it, "
            "unquantized:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{named}")',
            f'model = PeftModel.from_pretrained(base, "{name}", subfolder="peft")',
            "```",
        ]
    else:
        lines.append("For PEFT, `abft-mlx push --with-peft` sends that format along.")
    return "\n".join(lines)


def _example(cleaned: Cleaned) -> str:
    prompt = cleaned.recipe.prompt
    word = next(iter(cleaned.run.get("labels", {}).values()), "label")
    shown = f"{prompt.input_prefix}an example{prompt.input_affix}{prompt.label_prefix}"
    shown += f"{'' if word.startswith(' ') else ' '}{word}{prompt.label_affix}"
    asked = f"{prompt.query_prefix}{prompt.input_prefix}{EXAMPLE}{prompt.input_affix}"
    return f"{prompt.instruction}{shown}{asked}{prompt.label_prefix}"


def _prompt(cleaned: Cleaned) -> str:
    prompt = cleaned.recipe.prompt
    pieces = ("instruction", "input_prefix", "input_affix", "label_prefix", "label_affix")
    rows = [
        f"| {one} | `{_cell(repr(getattr(prompt, one)))}` |" for one in (*pieces, "query_prefix")
    ]
    words = [
        f"| {_cell(label)} | `{_cell(repr(word))}` |"
        for label, word in cleaned.run.get("labels", {}).items()
    ]
    chat = " in the turns of the base's chat template" if prompt.chat else ""
    return "\n".join(
        [
            "## Prompt",
            "",
            f"{prompt.demonstrations} demonstrations and a query{chat}. It was trained with these "
            "pieces, and others may do worse:",
            "",
            "| piece | text |",
            "|---|---|",
            *rows,
            "",
            "The answer is the most probable of these words:",
            "",
            "| label | word |",
            "|---|---|",
            *words,
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def _training(cleaned: Cleaned) -> str:
    recipe, totals = cleaned.recipe, cleaned.run.get("totals", {})
    rows = cleaned.run.get("data", {}).get("rows", {})
    of = f", {rows['training']:,} rows of it" if "training" in rows else ""
    names = ", ".join(one.name for one in recipe.mixture)
    texts = f"a mixture of {names}" if names else f"{_texts(cleaned)[1]}{of}"
    seconds = totals.get("seconds")
    cost = (
        f", {seconds:,.0f} s on {cleaned.run.get('device', 'an unnamed device')}" if seconds else ""
    )
    return (
        f"## Training\n\nOn {texts}: {totals.get('updates', recipe.training.updates)} updates of "
        f"{recipe.training.prompts_per_update} prompts, {totals.get('seen_examples', 0):,} prompts "
        f"in all, learning rate {recipe.training.learning_rate:g}, seed {recipe.training.seed}"
        f"{cost}. `recipe.yaml` holds every setting, `metrics.jsonl` every update, `run.json` the "
        "versions and fingerprints."
    )


def _limits(cleaned: Cleaned) -> str:
    lines = [
        "## Limits",
        "",
        "- It answers with one of the words above, whatever the text is; it does not abstain.",
        "- It improves what the base does in context. Texts that the base cannot read stay at "
        "chance.",
        "- It was trained on one task and one wording of prompts; nothing is said of others.",
        "- Faults and slants of the base and of the training texts are in it, too.",
    ]
    if cleaned.recipe.model == "demo":
        lines.append(
            "- The base is a teaching model that has never read real English: use it to learn and "
            "to test only."
        )
    return "\n".join(lines)


def _version(cleaned: Cleaned) -> str:
    return str(cleaned.run.get("versions", {}).get("abft-mlx", "of an unknown version"))
