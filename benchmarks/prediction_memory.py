"""Memory and time of predicting labels: label tokens at the last position, or every logit there is.

    python benchmarks/prediction_memory.py
    python benchmarks/prediction_memory.py --prompts 256 --batch-tokens 4096 --vocabulary 128256

A Llama with random weights reads random prompts, each way in a process of its own:

- ours: the head at each prompt's last position, for the label tokens; batched by length;
- all logits, same batches: the model's own logits at every position, of which the last is kept;
- both again, a prompt at a time: the smallest memory, with no product large enough to be fast.

Prints a Markdown table: seconds of one pass after a warm-up, peak memory that MLX allocated
(weights included), and that the operating system counted for the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

from abft_mlx import runtime

WAYS = {
    "ours": "label tokens at the last position, batches",
    "naive": "all logits, same batches",
    "ours-single": "label tokens at the last position, one prompt at a time",
    "naive-single": "all logits, one prompt at a time",
}
LABEL_TOKENS = (3, 5, 8, 13)
DEMONSTRATIONS = 4
AGREE = 1e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, value, what in (
        ("--layers", 4, "layers of the model"),
        ("--width", 256, "width of its hidden states, a multiple of 64"),
        ("--vocabulary", 32768, "tokens that it knows"),
        ("--prompts", 1024, "prompts"),
        ("--tokens", 160, "mean length of a prompt; a half more and a half less occur"),
        ("--batch-tokens", 16384, "tokens in a batch, padding included"),
    ):
        parser.add_argument(flag, type=int, default=value, help=f"{what} (default {value})")
    parser.add_argument("--way", choices=WAYS, help="only this way, as JSON: what a process does")
    return parser.parse_args()


def build(chosen: argparse.Namespace):
    """A Llama with random weights, and random prompts."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models import llama

    from abft_mlx.prompts import Prompt

    mx.random.seed(0)
    heads = max(1, chosen.width // 64)
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
    rng = np.random.default_rng(0)
    prompts = []
    for length in rng.integers(chosen.tokens // 2, 3 * chosen.tokens // 2 + 1, chosen.prompts):
        ids = tuple(rng.integers(0, chosen.vocabulary, length).tolist())
        places = tuple(range(DEMONSTRATIONS))
        prompts.append(Prompt(ids, places, places, 0, LABEL_TOKENS[:1]))
    return model, prompts


def predictor(way: str, model, batch_tokens: int) -> Callable:
    """From prompts to label probabilities (N, C)."""
    import mlx.core as mx
    import numpy as np

    from abft_mlx import evaluation
    from abft_mlx.prompts import LabelSpace, batches

    space = LabelSpace(tuple("abcd"), tuple("abcd"), tuple((one,) for one in LABEL_TOKENS))
    labels = mx.array(LABEL_TOKENS)
    bucket = 32
    if way.endswith("single"):
        batch_tokens = 1
        # A naive loop does not pad either.
        bucket = 1

    def naive(prompts) -> np.ndarray:
        found = np.zeros((len(prompts), len(space)))
        for piece in batches(prompts, max_tokens=batch_tokens, bucket_tokens=bucket):
            logits = model(mx.array(piece.tokens))
            at_last = mx.take_along_axis(logits, mx.array(piece.last)[:, None, None], axis=1)[:, 0]
            found[piece.rows] = np.array(mx.softmax(at_last[:, labels], axis=-1))
        return found

    def ours(prompts) -> np.ndarray:
        return evaluation.label_probabilities(model, prompts, space, batch_tokens=batch_tokens)

    return ours if way.startswith("ours") else naive


def measure(chosen: argparse.Namespace) -> dict:
    """Predict in one way, in this process."""
    import mlx.core as mx

    model, prompts = build(chosen)
    predict = predictor(chosen.way, model, chosen.batch_tokens)
    several = 8 if chosen.way.endswith("single") else chosen.batch_tokens // chosen.tokens
    predict(sorted(prompts, key=lambda one: -len(one.token_ids))[: max(1, several)])
    mx.clear_cache()
    runtime.reset_peak_memory()
    start = time.perf_counter()
    found = predict(prompts)
    return {
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
        "process_peak_bytes": runtime.process_peak_bytes(),
        "weight_bytes": sum(value.nbytes for _, value in _weights(model)),
        "tokens": sum(len(one.token_ids) for one in prompts),
        "device": runtime.device_description(),
        "probabilities": found.tolist(),
    }


def _weights(model) -> list:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def main() -> int:
    """Measure every way, print the table; exit status 1 if the predictions differ."""
    chosen = arguments()
    if chosen.way:
        print(json.dumps(measure(chosen)))
        return 0
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{WAYS[way]}: failed with status {done.returncode}", file=sys.stderr)
            continue
        found[way] = json.loads(done.stdout)
    if "ours" not in found:
        return 1
    ours = found["ours"]
    print(
        f"{chosen.prompts} prompts of {ours['tokens'] / chosen.prompts:.0f} tokens on average, "
        f"{chosen.layers} layers x {chosen.width}, vocabulary {chosen.vocabulary}, "
        f"{chosen.batch_tokens} tokens a batch, weights {ours['weight_bytes'] / 2**20:.0f} MiB; "
        f"{ours['device']}\n"
    )
    print("| way | seconds | x ours | MLX peak, MiB | x ours | process peak, MiB | x ours |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    largest = 0.0
    for way, one in found.items():
        cells = [WAYS[way]]
        for name, unit, digits in (
            ("seconds", 1, 1), ("peak_memory_bytes", 2**20, 0), ("process_peak_bytes", 2**20, 0),
        ):  # fmt: skip
            cells += [f"{one[name] / unit:.{digits}f}", f"{one[name] / ours[name]:.1f}"]
        print(f"| {' | '.join(cells)} |")
        pairs = zip(one["probabilities"], ours["probabilities"], strict=True)
        largest = max(largest, *(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)))
    print(f"\nLargest difference of a probability: {largest:.1e}.")
    return 0 if largest <= AGREE and len(found) == len(WAYS) else 1


if __name__ == "__main__":
    sys.exit(main())
