"""Estimated against measured peak memory of training and evaluation, on small random models.

    python benchmarks/footprint.py
    python benchmarks/footprint.py --only gpt2

Each row builds a model from a config, estimates from the config alone, as ``abft-mlx doctor
--model`` does, then makes the weights, runs two real optimizer updates and measures MLX's peak
during the second; likewise one batch of an evaluation. Prints a Markdown table; exit status 1 if an
estimate of training or evaluation is off by more than 15%.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

from abft_mlx import runtime

LIMIT = 0.15
MEBIBYTE = 2**20
DECODER = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_head": 4,
    "n_layer": 4,
    "n_positions": 1024,
    "n_ctx": 1024,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 2000,
}
FULL, END = "adapter.kind=full", "objective.kind=end_to_end"
LOCAL, SHARED = "training.gradient=local", "training.shared_demonstrations=8"
HALVES = "training.prompts_per_update=16"
# Name, config, prompts of a micro-batch, tokens of a prompt, settings of the recipe.
CASES: list[tuple[str, dict[str, Any], int, int, tuple[str, ...]]] = [
    ("llama", DECODER, 8, 96, ()),
    ("llama, several micro-batches", DECODER, 8, 96, (HALVES,)),
    ("llama, one prompt", DECODER, 1, 96, ()),
    ("llama, long", DECODER, 2, 512, ()),
    ("llama, 128 wide", DECODER | {"hidden_size": 128, "intermediate_size": 512}, 16, 64, ()),
    ("llama, 512 wide", DECODER | {"hidden_size": 512, "intermediate_size": 1376}, 4, 96, ()),
    ("llama, 2 layers", DECODER | {"num_hidden_layers": 2}, 8, 96, ()),
    ("llama, 12 layers", DECODER | {"num_hidden_layers": 12}, 4, 96, ()),
    ("llama, grouped heads", DECODER | {"num_key_value_heads": 2}, 8, 128, ()),
    ("llama, one key head", DECODER | {"num_key_value_heads": 1}, 8, 128, ()),
    ("llama, wide heads", DECODER | {"head_dim": 128, "num_key_value_heads": 2}, 4, 128, ()),
    ("llama, 32,000 tokens", DECODER | {"vocab_size": 32000}, 8, 64, ()),
    ("llama, 32,000, end to end", DECODER | {"vocab_size": 32000}, 8, 64, (END,)),
    ("llama, end to end", DECODER, 8, 96, (END,)),
    ("llama, end to end, head", DECODER | {"vocab_size": 16000}, 8, 96, (END, "adapter.head=true")),
    ("llama, full", DECODER, 8, 96, (FULL,)),
    ("llama, full, end to end", DECODER, 8, 96, (FULL, END)),
    (
        "llama, full, 512 wide, several micro-batches",
        DECODER | {"hidden_size": 512, "num_hidden_layers": 6},
        1,
        32,
        (FULL, "training.prompts_per_update=2"),
    ),
    ("llama, local", DECODER, 8, 96, (LOCAL,)),
    ("llama, local, several micro-batches", DECODER, 8, 96, (LOCAL, HALVES)),
    ("llama, local, long", DECODER, 2, 512, (LOCAL,)),
    ("llama, local, full, 12 layers", DECODER | {"num_hidden_layers": 12}, 4, 96, (LOCAL, FULL)),
    ("gpt2, local", GPT2, 8, 96, (LOCAL,)),
    ("llama, shared", DECODER, 8, 96, (SHARED,)),
    ("llama, shared, two groups", DECODER, 16, 96, (SHARED,)),
    ("llama, shared, long", DECODER, 8, 320, (SHARED,)),
    ("llama, shared, local", DECODER, 8, 96, (SHARED, LOCAL)),
    ("gpt2, shared", GPT2, 8, 160, (SHARED,)),
    ("llama, every head counts", DECODER, 8, 96, ("objective.filter=false",)),
    ("llama, dropout", DECODER, 8, 96, ("adapter.dropout=0.1",)),
    ("llama, 4-bit", DECODER | {"quantization": {"group_size": 64, "bits": 4}}, 8, 96, ()),
    (
        "llama, 4-bit, end to end",
        DECODER | {"quantization": {"group_size": 64, "bits": 4}, "hidden_size": 512},
        4,
        128,
        (END,),
    ),
    ("llama, bfloat16", DECODER | {"torch_dtype": "bfloat16"}, 4, 96, ()),
    ("llama, bfloat16, full", DECODER | {"torch_dtype": "bfloat16"}, 4, 96, (FULL,)),
    ("qwen2", DECODER | {"model_type": "qwen2", "num_key_value_heads": 2}, 8, 96, ()),
    (
        "qwen2, tied, end to end",
        DECODER | {"model_type": "qwen2", "tie_word_embeddings": True},
        8,
        96,
        (END,),
    ),
    (
        "qwen3",
        DECODER | {"model_type": "qwen3", "head_dim": 64, "num_key_value_heads": 2,
                   "rope_theta": 1e6},
        8,
        96,
        (),
    ),
    ("gpt2", GPT2, 8, 96, ()),
    ("gpt2, 8 layers, long", GPT2 | {"n_layer": 8}, 2, 320, ()),
    ("gpt2, full", GPT2, 8, 96, (FULL,)),
    ("gpt2, full, end to end", GPT2 | {"vocab_size": 20000}, 8, 96, (FULL, END)),
]  # fmt: skip


def recipe_for(rows: int, tokens: int, settings: tuple[str, ...]):
    """A resolved recipe whose micro-batches have so many prompts of so many tokens."""
    from abft_mlx import recipe as recipes
    from abft_mlx.trainer import plan

    width = plan.padded_tokens(tokens)
    changes = [
        f"training.prompts_per_update={rows}",
        f"training.micro_batch_tokens={rows * width}",
        f"evaluation.batch_tokens={2 * rows * width}",
        *settings,
    ]
    return recipes.resolve(recipes.default(changes))


def compare(
    config: dict[str, Any], rows: int, tokens: int, settings: tuple[str, ...]
) -> dict[str, int]:
    """Estimated and measured bytes of one case.

    Args:
        config: a config.json's content.
        rows: prompts of a micro-batch.
        tokens: tokens of every prompt.
        settings: more settings of the recipe.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from abft_mlx import activations, adapters, loading
    from abft_mlx.evaluation.forward import hidden_at_last
    from abft_mlx.footprint import footprint
    from abft_mlx.prompts import Prompt
    from abft_mlx.trainer import Trainer, plan

    # What an earlier case left to Python's collector would count.
    gc.collect()
    recipe = recipe_for(rows, tokens, settings)
    estimate = footprint(loading.describe(config, "model"), recipe, tokens)
    model = loading.describe(config, "model")
    mx.eval(model.parameters())
    adapters.attach(model, recipe.adapter)
    ids = tuple(1 + i % 1000 for i in range(tokens))
    # Four demonstrations are four fifths of a prompt's tokens, where they are shared.
    m, shared = recipe.training.together, tokens * 4 // 5
    rests = [
        (1001 + n % m,) * (tokens - shared) if m > 1 else ids[shared:]
        for n in range(recipe.training.prompts_per_update)
    ]
    prompts = [Prompt(ids[:shared] + one, (5, 9, 20, 33), (0, 1, 0, 1), 0, (3,)) for one in rests]
    trainer = Trainer(model, prompts, recipe)
    assert trainer.rows == estimate.rows == rows
    adapters.train_mode(model)

    def update() -> None:
        alone = m == 1
        cut = (
            plan.micro_batches(prompts, rows)
            if alone
            else plan.shared_micro_batches(prompts, m, rows)
        )
        trainer.step.update(cut, 0.5)

    def measured(work: Callable[[], object]) -> int:
        """The most of three: how far MLX runs ahead hangs on what else the machine does."""
        peaks = []
        for _ in range(3):
            mx.clear_cache()
            runtime.reset_peak_memory()
            work()
            peaks.append(runtime.peak_memory_bytes())
        return max(peaks)

    update()
    before = mx.get_active_memory()
    training = measured(update)
    adapters.train_mode(model, False)
    optimizer = sum(one.nbytes for _, one in tree_flatten(trainer.optimizer.state))
    batch = plan.micro_batches([prompts[0]] * estimate.evaluation_rows, estimate.evaluation_rows)[0]
    arrays = batch.arrays()

    def evaluate() -> None:
        with activations.quickly(model):
            hidden = hidden_at_last(model, arrays["tokens"], arrays["last"])
        mx.eval(hidden)

    evaluation = measured(evaluate)
    return {
        "weights": estimate.weights_bytes,
        "resident": before,
        "training_estimate": estimate.training_bytes,
        "training": training,
        # The optimizer, which an evaluation of its own does not have, lives on here.
        "evaluation_estimate": estimate.evaluation_bytes,
        "evaluation": evaluation - optimizer,
    }


def main() -> int:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    chosen = parser.parse_args()
    cases = [one for one in CASES if chosen.only in one[0]]
    if not cases:
        parser.error(f"--only {chosen.only}: no case has it in its name; leave it out for all")
    print(runtime.device_description() + "\n")
    print("| model | prompts x tokens | settings | weights | training, estimated | measured "
          "| ratio | beside what stays | evaluation, estimated | measured | ratio |")  # fmt: skip
    print("|---|---|---|" + "---:|" * 8)
    worst = 0.0
    for name, config, rows, tokens, settings in cases:
        found = compare(config, rows, tokens, settings)
        training = found["training_estimate"] / found["training"]
        evaluation = found["evaluation_estimate"] / found["evaluation"]
        stays = found["resident"]
        beside = (found["training_estimate"] - stays) / (found["training"] - stays)
        worst = max(worst, abs(training - 1), abs(evaluation - 1))
        cells = [name, f"{rows} x {tokens}", " ".join(settings)]
        cells += [f"{found[key] / MEBIBYTE:.1f}"
                  for key in ("weights", "training_estimate", "training")]  # fmt: skip
        cells += [f"{training:.3f}", f"{beside:.3f}"]
        cells += [f"{found[key] / MEBIBYTE:.1f}" for key in ("evaluation_estimate", "evaluation")]
        print(f"| {' | '.join([*cells, f'{evaluation:.3f}'])} |", flush=True)
    print(f"\nLargest error: {worst:.1%}; bytes in MiB.")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
