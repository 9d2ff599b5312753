"""ABFT in one file: from labelled texts to a trained adapter and an answer read from attention.

    python docs/abft_in_one_file.py --model MODEL --data FILE.csv --output RUN

What abft-mlx does, in plain MLX and mlx-lm, without what makes it quick, safe and general: every
prompt is computed whole, nothing is validated or resumed, and the model must be built like Llama
in mlx-lm. A test compares losses and gradients with the package's.

The method, arXiv 2505.14233: in a prompt of labelled demonstrations and a query, look only at the
last position. Train W_Q and W_K so that attention heads look at the labels of demonstrations that
equal the query's label. `--objective abft` is the paper's loss on that attention. The default,
`read_out`, also reads the answer from it: a weighted sum over heads of the log attention on each
class's labels.

Letters in shapes: B prompts, H heads, T tokens, K demonstrations, C classes.
"""

import argparse
import csv
import json
import math
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# isort: off
import abft_mlx  # noqa: F401  (on Linux it loads a fast BLAS, which must come before MLX)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
# isort: on

KEYS = ["self_attn.q_proj", "self_attn.k_proj"]
LORA = {"rank": 16, "scale": 2.0, "dropout": 0.0, "keys": KEYS}
GROUP = 16  # prompts with the same demonstrations, which centre each other
EPSILON = 1e-3  # attention that every class has
PENALTY = 0.3  # of the fitted head weights


# --- Prompts
@dataclass
class Batch:
    """Prompts behind the same demonstrations, padded on the right.

    Attributes:
        tokens: (B, T).
        last: (B,) index of each prompt's last token.
        positions: (B, K) where the demonstrations' labels end.
        labels: (B, K) class numbers of the demonstrations.
        gold: (B,) class numbers of the queries.
    """

    tokens: mx.array
    last: mx.array
    positions: mx.array
    labels: mx.array
    gold: mx.array


def make_batch(tokenizer, names, demonstrations, queries):
    """Few-shot prompts, tokenized piece by piece, so that label positions need no search.

    Args:
        tokenizer: the model's.
        names: C class names.
        demonstrations: K pairs of a text and its class number.
        queries: B pairs; a class number may be None where it is not known.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    shared, positions = tokenizer.encode("")[:1], []  # a first token, where the model has one
    for text, label in demonstrations:
        shared += encode(f"text: {text} label:") + encode(f" {names[label]}")
        positions.append(len(shared) - 1)
        shared += encode("\n")
    prompts = [shared + encode(f"text: {text} label:") for text, _ in queries]
    longest = max(map(len, prompts))
    return Batch(
        mx.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts]),
        mx.array([len(prompt) - 1 for prompt in prompts]),
        mx.array([positions] * len(prompts)),
        mx.array([[label for _, label in demonstrations]] * len(prompts)),
        mx.array([label or 0 for _, label in queries]),
    )


def draw(texts, classes, count, source):
    """Demonstrations, each class as often as the others and at least four, and other texts."""
    shuffled = source.sample(texts, len(texts))
    each = math.ceil(4 / classes)
    shown = [pair for c in range(classes) for pair in [x for x in shuffled if x[1] == c][:each]]
    source.shuffle(shown)
    return shown, [pair for pair in shuffled if pair not in shown][:count]


# --- Attention
@contextmanager
def recorded(model, last):
    """A list that a forward pass fills: per layer (B, H, T) attention of the last positions."""
    module = sys.modules[type(model.layers[0].self_attn).__module__]
    original, rows = module.scaled_dot_product_attention, []

    def attend(queries, keys, values, *arguments, scale, **named):
        B, H, T, D = queries.shape
        at = mx.broadcast_to(last[:, None, None, None], (B, H, 1, D))
        query = mx.take_along_axis(queries, at, axis=2)
        all_keys = mx.repeat(keys, H // keys.shape[1], axis=1)
        scores = ((query * scale) @ all_keys.swapaxes(2, 3))[:, :, 0].astype(mx.float32)
        past = mx.arange(T) <= last[:, None]
        rows.append(mx.softmax(mx.where(past[:, None], scores, -mx.inf), axis=-1))
        return original(queries, keys, values, *arguments, scale=scale, **named)

    module.scaled_dot_product_attention = attend
    try:
        yield rows
    finally:
        module.scaled_dot_product_attention = original


def label_attention(model, batch):
    """(B, H, K) attention of all layers' heads on the demonstrations' labels."""
    with recorded(model, batch.last) as rows:
        model.model(batch.tokens)  # all but the LM head
    patterns = mx.concatenate(rows, axis=1)
    B, H, _ = patterns.shape
    at = mx.broadcast_to(batch.positions[:, None], (B, H, batch.positions.shape[1]))
    return mx.take_along_axis(patterns, at, axis=2)


# --- Losses
def abft_loss(model, batch, punish, reward=1.0):
    """The paper's equation 1 and the number of induction heads, means over prompts.

    A head counts where its attention on all labels is above k / (k + ln n). Attention on other
    labels than the query's costs `punish` (A), attention missing on the query's `reward` (B).
    """
    attention = label_attention(model, batch)
    B, _, K = attention.shape
    mass = mx.stop_gradient(attention.sum(axis=2))
    kept = mass > K / (K + mx.log(batch.last + 1))[:, None]
    right = (batch.labels == batch.gold[:, None])[:, None]
    wrong_mass = mx.where(right, 0, attention).sum(axis=2)
    right_mass = mx.where(right, attention, 0).sum(axis=2)
    loss = punish * wrong_mass + reward * (1 - right_mass)
    return mx.where(kept, loss, 0).sum() / B, kept.sum() / B


def next_punish(punish, heads, cp=0.03, ci=0.005, cd=0.005):
    """The paper's PID law: A for the next update, after those that had `heads` induction heads."""
    if len(heads) < 3:
        return punish
    change, bend = heads[-1] - heads[-2], heads[-1] - 2 * heads[-2] + heads[-3]
    return max(0.0, punish + cp * change + ci * (heads[-1] - heads[0]) + cd * bend)


def features(model, batch, classes):
    """(B, H, C) log attention on the labels of each class, centred over the group's prompts.

    The mean over queries behind the same demonstrations is what the demonstrations alone do.
    """
    of_class = (batch.labels[..., None] == mx.arange(classes)).astype(mx.float32)
    logs = mx.log(label_attention(model, batch) @ of_class + EPSILON)
    return logs - logs.mean(axis=0)


def class_scores(model, batch, classes):
    """(B, C) head weights times features, summed over heads."""
    return (model.head_weights[:, None] * features(model, batch, classes)).sum(axis=1)


def read_out_loss(model, batch, classes):
    """Cross-entropy of the class scores."""
    scores = class_scores(model, batch, classes)
    return nn.losses.cross_entropy(scores, batch.gold, reduction="mean")


def fit(groups):
    """(H,) head weights by logistic regression on groups of features (B, H, C) and gold (B,)."""
    x = mx.concatenate([feature for feature, _ in groups])
    gold = mx.concatenate([label for _, label in groups])
    x = x - x.mean(axis=2, keepdims=True)
    size = mx.sqrt((x**2).mean(axis=(0, 2))) + EPSILON
    x = x / size[:, None]

    def loss(weights):
        surprise = nn.losses.cross_entropy((weights[:, None] * x).sum(axis=1), gold)
        return surprise.mean() + PENALTY * (weights**2).sum()

    weights, optimizer = {"w": mx.zeros(len(size))}, optim.Adam(0.03)
    for _ in range(300):
        weights = optimizer.apply_gradients({"w": mx.grad(loss)(weights["w"])}, weights)
        mx.eval(weights, optimizer.state)
    return weights["w"] / size


# --- Training
def train(model, tokenizer, texts, names, objective, updates, source):
    """Fine-tune LoRA on W_Q and W_K, with two groups of prompts in each update."""
    classes = len(names)

    def group():
        return make_batch(tokenizer, names, *draw(texts, classes, GROUP, source))

    if objective == "read_out":
        groups = []
        for _ in range(2 * updates):
            batch = group()
            groups.append((features(model, batch, classes), batch.gold))
            mx.eval(groups)
        fitted = fit(groups)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    loss_and_gradient = nn.value_and_grad(model, abft_loss)
    if objective == "read_out":
        model.head_weights = fitted
        loss_and_gradient = nn.value_and_grad(model, partial(read_out_loss, classes=classes))
    rate = 1e-3 if objective == "read_out" else 1e-4
    optimizer = optim.Adam(rate, bias_correction=True)
    punish, heads = 0.5, []
    for update in range(1, updates + 1):
        total, line, count = None, 0.0, 0.0
        for _ in range(2):
            if objective == "read_out":
                loss, gradient = loss_and_gradient(model, group())
            else:
                (loss, kept), gradient = loss_and_gradient(model, group(), punish)
                count += kept.item() / 2
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            line += loss.item() / 2
        optimizer.update(model, tree_map(lambda gradient: gradient / 2, total))
        mx.eval(model.trainable_parameters(), optimizer.state)
        if objective == "abft":
            heads.append(count)
            punish = next_punish(punish, heads)
        print(f"update {update}/{updates}  loss {line:.3f}", flush=True)


def save(model, folder):
    """The adapter, as mlx-lm loads it, with the head weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(tree_flatten(model.trainable_parameters()))
    if "head_weights" in parameters:
        weights = parameters.pop("head_weights")
        mx.save_safetensors(str(folder / "head_weights.safetensors"), {"all_layers": weights})
    mx.save_safetensors(str(folder / "adapters.safetensors"), parameters)
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": LORA}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


# --- Answers
def answers(model, tokenizer, names, demonstrations, texts):
    """The class of each text, by the read-out, or by the first token at the LM head."""
    batch = make_batch(tokenizer, names, demonstrations, [(text, None) for text in texts])
    if "head_weights" in model:
        return class_scores(model, batch, len(names)).argmax(axis=1).tolist()
    logits = model(batch.tokens)[mx.arange(len(texts)), batch.last]
    first = [tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in names]
    return logits[:, mx.array(first)].argmax(axis=1).tolist()


def main():
    """Train on three quarters of a CSV file, and measure on the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, or a model of the hub")
    parser.add_argument(
        "--data", type=Path, required=True, help="a CSV file with columns text and label"
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder for the adapter")
    parser.add_argument("--objective", choices=("read_out", "abft"), default="read_out")
    parser.add_argument("--updates", type=int, default=32)
    asked = parser.parse_args()
    with asked.data.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    names = sorted({label for _, label in rows})
    texts = [(text, names.index(label)) for text, label in rows]
    source = random.Random(0)
    source.shuffle(texts)
    held_out = min(256, len(texts) // 4) // GROUP * GROUP
    test, training = texts[:held_out], texts[held_out:]
    model, tokenizer = mlx_lm.load(asked.model)
    train(model, tokenizer, training, names, asked.objective, asked.updates, source)
    save(model, asked.output)
    demonstrations, _ = draw(training, len(names), 0, source)
    right = 0
    for start in range(0, held_out, GROUP):
        part = test[start : start + GROUP]
        labels = answers(model, tokenizer, names, demonstrations, [text for text, _ in part])
        right += sum(label == gold for label, (_, gold) in zip(labels, part, strict=True))
    print(f"accuracy on {held_out} texts that were not trained on: {right / held_out:.1%}")


if __name__ == "__main__":
    main()
