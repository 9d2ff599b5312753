"""Make the bundled teaching model: ``python tools/make_demo_model.py --output FOLDER``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import abft_mlx  # noqa: F401  (prepares the BLAS before MLX is imported)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from demo_corpus import Corpus, Stage, save_tokenizer, tokenizer, word_vectors
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

CONTEXT_TOKENS = 1024
READERS = {0: (0, 1)}
INDUCERS = {1: (0, 1), 2: (0, 1)}

STAGES = (
    Stage(150, 16, 64, words=(1, 1), lexicon=(1, 1)),
    Stage(100, 8, 88, words=(2, 4), lexicon=(1, 3)),
    Stage(500, 7, 120, lexicon=(2, 8), invented=0.3, unlabelled=0.05),
    Stage(150, 7, 120, lexicon=(2, 8), invented=0.3, unlabelled=0.05, supervision=(1.0, 0.0)),
    Stage(150, 7, 120, lexicon=(2, 8), invented=0.3, unlabelled=0.05, supervision=(0.0, 0.0)),
)


# MLX's CPU exp takes 15 ns an element on x86; exponentials from multiplications take 2.


def exponential(x: mx.array) -> mx.array:
    """exp(x) for -40 <= x <= 20: a polynomial, squared six times."""
    y = mx.clip(x, -40.0, 20.0) * (1.0 / 64.0)
    z = 1.0 + y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y * (1.0 / 24.0 + y * (1.0 / 120.0)))))
    for _ in range(6):
        z = z * z
    return z


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis."""
    z = exponential(x - x.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


@softmax.vjp
def _softmax_vjp(_, cotangent, output):
    weighted = cotangent * output
    return weighted - output * weighted.sum(axis=-1, keepdims=True)


@mx.custom_function
def silu(x: mx.array) -> mx.array:
    """The input times its sigmoid."""
    return x / (1.0 + exponential(-x))


@silu.vjp
def _silu_vjp(primals, cotangent, output):
    x = primals[0] if isinstance(primals, (list, tuple)) else primals
    gate = 1.0 / (1.0 + exponential(-x))
    return cotangent * (gate + output * (1.0 - gate))


@mx.custom_function
def logsumexp(x: mx.array) -> mx.array:
    """Log of the sum of exponentials over the last axis."""
    top = x.max(axis=-1, keepdims=True)
    return (mx.log(exponential(x - top).sum(axis=-1, keepdims=True)) + top).squeeze(-1)


@logsumexp.vjp
def _logsumexp_vjp(primals, cotangent, output):
    x = primals[0] if isinstance(primals, (list, tuple)) else primals
    return exponential(x - output[..., None]) * cotangent[..., None]


def configuration(vocabulary: int, width: int, layers: int, heads: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def initialise(
    model: Model, std: float, vectors: mx.array, frequent: mx.array, company: float
) -> None:
    """Weights from which matching and copying are a short way off.

    Above the first layer a head's keys start as its queries, so that like attends to like; values
    are undone by the output projection, and the output layer starts as the embeddings, so that
    what is attended to is also what is predicted, for words never seen as labels too.
    """
    width = model.args.hidden_size
    own = mx.random.normal((model.args.vocab_size, width))
    shared = vectors @ orthogonal(width)[: vectors.shape[1]] * math.sqrt(width)
    known = (mx.abs(vectors).sum(axis=1, keepdims=True) > 0).astype(mx.float32) * company
    words = mx.sqrt(1 - known * known) * own + known * shared
    model._common = mx.random.normal((width,)) * (0.5 * std)
    often = frequent[:, None] * mx.random.normal((width,))
    model.model.embed_tokens.weight = (words + often) * std + model._common
    model.lm_head.weight = words * 0.1
    common = model._common / mx.linalg.norm(model._common, stream=mx.cpu)
    without = mx.eye(width) - common[:, None] * common[None, :]
    for index, layer in enumerate(model.model.layers):
        a, m = layer.self_attn, layer.mlp
        if index == 0:
            a.q_proj.weight = mx.random.normal(a.q_proj.weight.shape) * 0.05
            a.k_proj.weight = mx.random.normal(a.k_proj.weight.shape) * 0.05
        else:
            a.q_proj.weight = 1.5 * mx.concatenate([orthogonal(width) for _ in range(a.n_heads)])
            a.k_proj.weight = mx.array(a.q_proj.weight)
        rotations = mx.concatenate([orthogonal(width) for _ in range(a.n_heads)])
        a.v_proj.weight = rotations @ without
        a.o_proj.weight = rotations.T * (std * (6.0 if index == 0 else 2.0) / a.n_heads)
        for part, size in ((m.gate_proj, 0.08), (m.up_proj, 0.08), (m.down_proj, 0.01)):
            part.weight = mx.random.normal(part.weight.shape) * size


def orthogonal(width: int) -> mx.array:
    """A random rotation (width, width)."""
    return mx.linalg.qr(mx.random.normal((width, width)), stream=mx.cpu)[0]


def disguised(model: Model, batch: dict) -> mx.array:
    """Embeddings (B, T, width) whose class-bearing words are disguised, anew in each sequence.

    A random signed permutation of the coordinates keeps how alike two words of a sequence are,
    and gives no direction a lasting meaning: nothing but matching in context can be learned.
    """
    plain = model.model.embed_tokens(batch["tokens"])
    order = mx.broadcast_to(batch["order"][:, None, :], plain.shape)
    other = mx.take_along_axis(plain - model._common, order, axis=-1) * batch["sign"][:, None, :]
    return mx.where(batch["bears"][..., None] > 0, other + model._common, plain)


def forward(model: Model, hidden: mx.array):
    """Final hidden states (B, T, width) and every layer's patterns (B, H, T, T)."""
    shape = hidden.shape[:2]
    length = shape[1]
    mask = mx.triu(mx.full((length, length), -1e9), k=1)
    patterns = []
    for layer in model.model.layers:
        a = layer.self_attn
        x = layer.input_layernorm(hidden)
        q, k, v = (
            p(x).reshape(*shape, a.n_heads, -1).transpose(0, 2, 1, 3)
            for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        scores = (a.rope(q) * a.scale) @ a.rope(k).swapaxes(-1, -2) + mask
        pattern = softmax(scores)
        patterns.append(pattern)
        mixed = (pattern @ v).transpose(0, 2, 1, 3).reshape(*shape, -1)
        hidden = hidden + a.o_proj(mixed)
        x = layer.post_attention_layernorm(hidden)
        m = layer.mlp
        hidden = hidden + m.down_proj(silu(m.gate_proj(x)) * m.up_proj(x))
    return model.model.norm(hidden), patterns


def negative_log_likelihood(model: Model, hidden: mx.array, pick: mx.array, targets: mx.array):
    """Loss and correctness (B, K) at the positions that ``pick`` (B, K, T) selects."""
    logits = model.lm_head(pick @ hidden) + model._unseen
    at_target = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logsumexp(logits) - at_target, at_target >= logits.max(axis=-1)


def losses(model: Model, batch: dict, weight: mx.array, language: float):
    """The training loss of a batch (:meth:`Corpus.batch`), and its parts for the log."""
    hidden, patterns = forward(model, disguised(model, batch))
    places = mx.arange(batch["tokens"].shape[1])
    at_asker, at_label, at_text = (
        (batch[name][..., None] == places).astype(mx.float32) for name in ("asker", "label", "text")
    )
    nll, hit = negative_log_likelihood(model, hidden, at_asker, batch["label_target"])
    answered, item = batch["answered"], batch["item"]
    answers, items = mx.maximum(answered.sum(), 1), mx.maximum(item.sum(), 1)
    label = (nll * answered).sum() / answers
    accuracy = (hit * answered).sum() / answers
    text = negative_log_likelihood(model, hidden, at_text, batch["text_target"])[0].mean()
    looking, copying, mass = mx.array(0.0), mx.array(0.0), mx.array(0.0)
    for index, heads in READERS.items():
        for head in heads:
            for rows in (at_asker, at_label):
                logs = mx.log(rows @ patterns[index][:, head] + 1e-6)
                looking -= ((batch["reader"] * logs).sum(-1) * item).sum() / items
    for index, heads in INDUCERS.items():
        for head in heads:
            right = ((at_asker @ patterns[index][:, head]) * batch["inducer"]).sum(-1)
            copying -= (mx.log(right + 1e-6) * answered).sum() / answers
            mass = (right * answered).sum() / answers
    total = label + language * text + weight * (0.5 * looking + copying)
    return total, (label, text, looking, copying, accuracy, mass)


def train(
    model: Model, corpus: Corpus, stages, *, rows: int, rate: float, language: float, log, keep=None
):
    total_steps = sum(stage.steps for stage in stages)
    warm = min(100, max(1, total_steps // 10))
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, rate, warm),
            optim.cosine_decay(rate, total_steps, rate * 0.05),
        ],
        [warm],
    )
    model.model.embed_tokens.freeze()
    model.lm_head.freeze()
    optimiser = optim.Adam(learning_rate=schedule, betas=[0.9, 0.98])
    state = [model.state, optimiser.state]

    def step(batch, weight):
        def objective(current):
            return losses(current, batch, weight, language)

        (value, parts), gradient = nn.value_and_grad(model, lambda: objective(model))()
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimiser.update(model, gradient)
        return value, parts

    done = 0
    start = time.time()
    for number, stage in enumerate(stages):
        compiled = mx.compile(step, inputs=state, outputs=state)
        for i in range(stage.steps):
            batch = {k: mx.array(v) for k, v in corpus.batch(stage, rows).items()}
            low, high = stage.supervision
            weight = mx.array(low + (high - low) * i / max(1, stage.steps))
            value, parts = compiled(batch, weight)
            mx.eval(state, value, parts)
            done += 1
            if done % 50 == 0 or i == stage.steps - 1:
                shown = " ".join(
                    f"{n} {float(p):.3f}"
                    for n, p in zip(
                        ("label", "text", "looking", "copying", "accuracy", "mass"),
                        parts,
                        strict=True,
                    )
                )
                log(f"stage {number} step {done}/{total_steps} {time.time() - start:.0f}s {shown}")
                if keep is not None and done % 200 == 0:
                    keep(done)
                if not math.isfinite(float(value)):
                    raise SystemExit("the loss is no longer finite")


def save(model: Model, settings: dict, encoder, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_tokenizer(encoder, folder, CONTEXT_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--std", type=float, default=0.2)
    parser.add_argument("--company", type=float, default=0.5)
    parser.add_argument("--language", type=float, default=0.1)
    parser.add_argument("--smoke", action="store_true", help="two tiny steps a stage, for tests")
    chosen = parser.parse_args()
    encoder = tokenizer()
    settings = configuration(encoder.get_vocab_size(), chosen.width, chosen.layers, chosen.heads)
    mx.random.seed(chosen.seed)
    model = Model(ModelArgs.from_dict(settings))
    corpus = Corpus(encoder, chosen.seed, chosen.width)
    company, common = (mx.array(each) for each in word_vectors(encoder))
    initialise(model, chosen.std, company, common, chosen.company)
    size = sum(v.size for _, v in tree_flatten(model.parameters()))
    print(f"vocabulary {encoder.get_vocab_size()}, {size} parameters", flush=True)
    stages = [replace(stage, steps=2) if chosen.smoke else stage for stage in STAGES]
    model._unseen = mx.array(corpus.unseen())
    train(
        model,
        corpus,
        stages,
        rows=2 if chosen.smoke else chosen.rows,
        rate=chosen.rate,
        language=chosen.language,
        log=lambda line: print(line, flush=True),
        keep=lambda _: save(model, settings, encoder, chosen.output),
    )
    save(model, settings, encoder, chosen.output)


if __name__ == "__main__":
    main()
