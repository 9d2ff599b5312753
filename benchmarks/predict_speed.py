"""Texts per second of predict, against prompting mlx-lm with one text at a time.

    python benchmarks/predict_speed.py
    python benchmarks/predict_speed.py --model demo --demonstrations 16

Each way gets the same prompts, of a generated task's texts, and goes from text to label:

- predict: `abft_mlx.prediction`, the prefix's own computation included;
- mlx-lm: `model(tokens)[:, -1]` of the whole prompt, a prompt at a time, and the label whose token
  has the largest logit;
- mlx-lm, cached: the same behind a deep copy of its own prompt cache, made once: what a program
  that knows of mlx-lm's caches does.

Interleaved, medians after a warm-up. mlx-lm answers fewer texts, for it takes long. Exit status 1
if the labels differ or a probability does by more than 1e-3.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from abft_mlx import data, loading, prediction, recipe, runtime
from abft_mlx.task import prompt_builder

AGREE = 1e-3
GOALS = {4: 4.0, 16: 10.0}
Answers = tuple[list[int], np.ndarray]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("random", "demo"), help="only this one")
    parser.add_argument("--task", default="generated/urgency", help="recipe of the texts")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[4, 16], metavar="K")
    for flag, value, what in (
        ("--texts", 256, "texts that predict answers"),
        ("--single", 12, "texts that mlx-lm answers, the first of them"),
        ("--repeats", 5, "timed passes of each way"),
        ("--layers", 6, "layers of the random Llama"),
        ("--width", 512, "its width, a multiple of 64"),
        ("--vocabulary", 32000, "tokens that it knows"),
    ):
        parser.add_argument(flag, type=int, default=value, help=f"{what} (default {value})")
    return parser.parse_args()


def random_llama(chosen: argparse.Namespace) -> nn.Module:
    """A Llama with random weights."""
    mx.random.seed(0)
    heads = chosen.width // 64
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=chosen.width,
            num_hidden_layers=chosen.layers,
            intermediate_size=4 * chosen.width,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rms_norm_eps=1e-5,
            vocab_size=chosen.vocabulary,
            tie_word_embeddings=False,
        )
    )
    mx.eval(model.parameters())
    return model


def ways(
    model: nn.Module, tokenizer: Any, chosen: argparse.Namespace, k: int
) -> dict[str, Callable[[], Answers]]:
    """From nothing but texts to labels and probabilities, in each way."""
    section = recipe.task(recipe.load(chosen.task, [f"prompt.demonstrations={k}"]))
    texts = data.load(section.data)
    split = data.split(texts, section.data, k)
    pairs = split.demonstrations.pairs()[:k]
    asked = [data.Query(text, "text") for text in split.test.texts[: chosen.texts]]
    builder = prompt_builder(section, texts.names, tokenizer)
    written = [builder.text(pairs, one.text) for one in asked[: chosen.single]]
    start = builder.build(pairs, "a", 0).token_ids
    start = start[: len(start) - len(tokenizer.encode(builder.text(pairs, "a")))]
    labels = mx.array(builder.space.first_ids)
    longest = [len(builder.build(pairs, one.text, 0).token_ids) for one in asked]
    print(f"k = {k}: {len(asked)} texts, prompts of {statistics.mean(longest):.0f} tokens", end="")

    def answered(logits: list[mx.array]) -> Answers:
        found = mx.stack([row[labels] for row in logits]).astype(mx.float32)
        return mx.argmax(found, axis=-1).tolist(), np.array(mx.softmax(found, axis=-1))

    def encoded(text: str) -> list[int]:
        return [*start, *tokenizer.encode(text, add_special_tokens=False)]

    def whole() -> Answers:
        rows = []
        for text in written:
            rows.append(model(mx.array([encoded(text)]))[0, -1])
            mx.eval(rows[-1])
        return answered(rows)

    def cached() -> Answers:
        shared = prediction.Predictor(model, builder, pairs, 16384).prefix.token_ids
        kept = make_prompt_cache(model)
        mx.eval(model(mx.array([shared]), cache=kept))
        rows = []
        for text in written:
            own = encoded(text)[len(shared) :]
            rows.append(model(mx.array([own]), cache=copy.deepcopy(kept))[0, -1])
            mx.eval(rows[-1])
        return answered(rows)

    def ours() -> Answers:
        fresh = prompt_builder(section, texts.names, tokenizer)
        predictor = prediction.Predictor(model, fresh, pairs, 16384)
        found = [one for some in predictor.predict([asked]) for one in some]
        names = builder.space.names
        table = np.array([list(one.probabilities.values()) for one in found])
        return [names.index(one.label) for one in found], table

    return {"predict": ours, "mlx-lm": whole, "mlx-lm, cached": cached}


def measure(found: dict[str, Callable[[], Answers]], chosen: argparse.Namespace, k: int) -> bool:
    """Time the ways in turn, print their rows, and say whether they agree."""
    answers = {name: way() for name, way in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(chosen.repeats):
        for name, way in found.items():
            start = time.perf_counter()
            way()
            seconds[name].append((time.perf_counter() - start) / len(answers[name][0]))
    rates = {name: 1 / statistics.median(taken) for name, taken in seconds.items()}
    labels, table = answers["predict"]
    same, largest = True, 0.0
    for theirs, probabilities in answers.values():
        same &= labels[: len(theirs)] == theirs
        largest = max(largest, float(np.abs(table[: len(theirs)] - probabilities).max()))
    print("\n\n| way | texts per second | least and most | predict is |")
    print("|---|---:|---:|---:|")
    for name, rate in rates.items():
        ends = f"{1 / max(seconds[name]):.1f} to {1 / min(seconds[name]):.1f}"
        print(f"| {name} | {rate:.1f} | {ends} | {rates['predict'] / rate:.1f} x |")
    goal = f", goal {GOALS[k]:g} x mlx-lm" if k in GOALS else ""
    print(
        f"\nLabels {'the same' if same else 'DIFFER'}, largest difference of a probability "
        f"{largest:.1e}{goal}.\n"
    )
    return same and largest <= AGREE


def main() -> int:
    """Measure every model at every k; exit status 1 if the ways disagree."""
    chosen = arguments()
    demo = loading.load_model("demo")
    print(f"{runtime.device_description()}, medians of {chosen.repeats}\n")
    agree = True
    for name in [chosen.model] if chosen.model else ["random", "demo"]:
        model = demo.model if name == "demo" else random_llama(chosen)
        size = "bundled" if name == "demo" else f"{chosen.layers} x {chosen.width}"
        print(f"## {name}, {size}\n")
        for k in chosen.demonstrations:
            agree &= measure(ways(model, demo.tokenizer, chosen, k), chosen, k)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
