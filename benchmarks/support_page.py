"""The page of the support table: what the checks found, and what is known of those that fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers_difference import ABSENT

LIMIT = 1e-4
LOGIT_LIMIT = 1e-3
COLUMNS = (
    "architecture", "layers", "trains", "eager", "logits", "NumPy", "port", "LoRA", "4 bits",
    "all else", "stock", "hooks",
)  # fmt: skip
_NO_ATTENTION = "it has no softmax attention"
REASONS = {
    "bitnet": "its layers are Metal kernels: no gradient, and none on a CPU",
    "deepseek_v41": "its keys are its values, many of them of groups of tokens: no row over tokens",
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "muse_spark": "Metal kernels make its queries and keys: no gradient, and none on a CPU",
    "olmo": "it needs ai2-olmo, and then mlx-lm's code fails: it adds the mask 'causal' to scores",
    "phi3small": "mlx-lm adds its boolean mask to the scores of its blocks, so that it looks ahead",
    "prism_hadamard_qwen35": "packed checkpoints alone, on whose layers mlx-lm can put no LoRA",
    "rwkv7": _NO_ATTENTION,
}
_SHARED = "an embedding of the tokens for each layer, and keys and values of earlier layers"
BESIDES = {
    "afm7": "keys and values of earlier blocks",
    "gemma3n": _SHARED,
    "gemma4": _SHARED,
    "gemma4_text": _SHARED,
    "iquestloopcoder": "no hooks: its code runs its blocks piece by piece",
    "kimi_k3": "what earlier blocks gave",
    "talkie": "the embeddings of the tokens",
}
PAGE = """\
# Architectures

Made by

    python benchmarks/support_table.py --output docs/architectures.md

from every module of mlx-lm {mlx_lm}'s `models/`, each at a tiny random size in float32.
**{supported} of {total} are supported and passed every check**: {oracle} of them also against
transformers {transformers}'s eager attention, the rest against independent NumPy alone, for the
reason that stands below.

- **layers**: with softmax attention, of all. A layer without has no heads; a block that attends
  twice is two layers.
- **trains**: the projections that are W_Q and W_K; of a fused one, that part of its outputs.
- **eager**: largest difference between the recorded rows, or **logits**, and those of transformers'
  eager attention with the same weights, which mlx-lm read from the checkpoint that transformers
  wrote: a right-padded batch and its prompts unpadded, all longer than the sliding windows.
- **NumPy**: largest difference between the rows and float64 NumPy's softmax of the queries, keys,
  mask and sinks that the model hands to its attention function; NumPy's pattern times the values
  gives the model's own attention output to within {limit:.0e}, too. A dash where the model computes
  its pattern itself. Rows of the padded batch are those of its prompts alone, as closely.
- **port**: largest difference between the port's logits and the model's own, of all tokens
  and of a few.
- **LoRA**: how far three updates of LoRA on W_Q and W_K moved the rows. **4 bits**: the same on a
  quantized base. **all else**: how far they moved any other weight, W_V before all, on either base.
- **stock**: largest logit difference after stock mlx-lm loaded the saved adapter.
- **hooks**: hooks that change nothing changed no logit; given here is the largest logit difference
  of a run on other tokens whose last block was handed the hidden states of this one.

Errors are at most {limit:.0e}, those of transformers' logits {logits:.0e}, "all else" is exactly
0; otherwise the architecture is among those that are not supported.

{rows}

## Without transformers as an oracle

transformers has no {absent}.

{exceptions}

## Where transformers and mlx-lm differ

On some checkpoints the two compute different things, and abft-mlx follows mlx-lm, which runs the
model. The figures above are of settings in which they are the same.

{notes}

## Blocks that read more than hidden states

A hook sees and changes their hidden states like any other's, but they cannot go on from hidden
states alone.

{besides}

## Not supported

{failures}
"""


def problem(name: str, found: dict[str, Any]) -> str | None:
    """What of the checks failed, or None."""
    if "error" in found:
        return str(found["error"])
    limits = dict.fromkeys(
        ("pattern", "output", "padding", "logits", "stock", "hooks", "eager"), LIMIT
    )
    limits["eager_logits"] = LOGIT_LIMIT
    wrong = [
        f"{one} {found[one]:.1e}"
        for one, limit in limits.items()
        if found[one] is not None and not found[one] <= limit
    ]
    wrong += [f"{one} {found[one]:.1e}" for one in ("lora", "quantized") if not found[one] > 1e-4]
    wrong += [one for one in ("kept", "quantized_kept") if found[one] != 0]
    # What has no oracle of its own kind needs the other; patterns of 1 / T would always agree.
    if found["eager"] is None and (found["pattern"] is None or not found["why_not"]):
        wrong.append("nothing to compare with")
    if found["eager"] is not None and not found["largest"] > 0.15:
        wrong.append(f"uniform patterns {found['largest']:.2f}")
    if (found["hooks"] is None) != (name in BESIDES):
        wrong.append("hooks")
    return ", ".join(wrong) or None


def page(found: dict[str, dict[str, Any]]) -> str:
    """The document of all results."""
    import mlx_lm
    import transformers

    problems = {name: problem(name, one) for name, one in found.items()}
    good = {name: one for name, one in found.items() if problems[name] is None}
    unlike = {name: one["why_not"] for name, one in good.items() if one["why_not"]}
    return PAGE.format(
        mlx_lm=mlx_lm.__version__,
        transformers=transformers.__version__,
        supported=len(good),
        total=len(found),
        oracle=sum(one["eager"] is not None for one in good.values()),
        limit=LIMIT,
        logits=LOGIT_LIMIT,
        rows=_table(COLUMNS, [_row(name, one) for name, one in good.items()]),
        absent=", ".join(name for name, why in unlike.items() if why == ABSENT),
        exceptions=_table(
            ("architecture", "why"), [[*one] for one in unlike.items() if one[1] != ABSENT]
        ),
        notes=_table(
            ("architecture", "how"),
            [[name, one["note"]] for name, one in good.items() if one["note"]],
        ),
        besides=_table(
            ("architecture", "what else"), [[*one] for one in BESIDES.items() if one[0] in good]
        ),
        failures=_table(
            ("architecture", "why"),
            [[name, _why(name, what)] for name, what in problems.items() if what],
        ),
    )


def _row(name: str, one: dict[str, Any]) -> list[str]:
    errors = (one[key] for key in ("eager", "eager_logits", "pattern", "logits"))
    return [
        name,
        f"{one['layers'][0]} of {one['layers'][1]}",
        " ".join(one["trained"]),
        *map(_error, errors),
        f"{one['lora']:.2f}",
        f"{one['quantized']:.2f}",
        _error(max(one["kept"], one["quantized_kept"])),
        _error(one["stock"]),
        _error(one["hooks"]),
    ]


def _table(columns: Sequence[str], rows: list[list[str]]) -> str:
    every = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every) if rows else "None."


def _error(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.0e}"


def _why(name: str, text: str) -> str:
    """What went wrong, and where it is known, why."""
    seen = text.partition(";")[0].replace("|", "\\|").replace("\n", " ")
    return f"{REASONS[name]} ({seen})" if name in REASONS else seen
