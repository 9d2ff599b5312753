"""What a user could pick instead, for real.py: methods that are no part of abft-mlx.

Each gets the rows that every other method gets, chooses its settings on the same validation rows,
and answers the same test rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import abft_mlx.evaluation as evaluation
from abft_mlx import data, recipe

# Inverse penalties of logistic regression, of which validation rows choose.
PENALTIES = (0.1, 1.0, 10.0, 100.0)
# mlx-lm's LoRA: rows of a batch, and the rate that its documentation's examples use most.
BATCH_ROWS = 8
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Rows:
    """The texts of a cell.

    Attributes:
        splits: training, validation and test.
        section: how many test texts are asked, and the resamples of the interval.
    """

    splits: data.Splits
    section: recipe.EvaluationSection

    @classmethod
    def read(cls, texts: Path, labels: int, seed: int) -> Rows:
        """As the command line splits them.

        Args:
            texts: a CSV file.
            labels: training rows.
            seed: of the split.
        """
        overrides = [f"data.source={texts}", f"data.training_rows={labels}", f"data.seed={seed}"]
        own = recipe.own_data(overrides)
        return cls(data.split(data.load(own.data), own.data), own.evaluation)

    @property
    def test(self) -> list[tuple[str, int]]:
        """The test texts that are asked, with class numbers."""
        return self.splits.test.pairs()[: self.section.queries]

    def entry(self, probabilities: np.ndarray) -> dict[str, Any]:
        """A method's entry of eval's JSON.

        Args:
            probabilities: (N, C) of the test texts.
        """
        gold = np.array([label for _, label in self.test])
        return evaluation.entry(probabilities, gold, np.arange(len(gold)), self.section)


def embeddings(rows: Rows, folder: Path) -> dict[str, Any]:
    """Logistic regression on the sentence embeddings of a transformers model (mean of tokens)."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(texts: Sequence[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), 64):
            part = list(texts[start : start + 64])
            batch = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(mean).numpy())
        return np.concatenate(parts)

    return _regression(rows, embed)


def probe(rows: Rows, folder: Path) -> dict[str, Any]:
    """Logistic regression on a language model's last hidden states (mean of a text's tokens)."""
    import mlx.core as mx
    import mlx_lm

    loaded = mlx_lm.load(str(folder))
    model, tokenizer = loaded[0], loaded[1]

    def embed(texts: Sequence[str]) -> np.ndarray:
        states = []
        for text in texts:
            tokens = tokenizer.encode(text)[-512:] or [0]
            states.append(np.array(model.model(mx.array([tokens]))[0].mean(axis=0)))
        features = np.stack(states).astype(np.float64)
        return features / np.linalg.norm(features, axis=1, keepdims=True) * 10

    return _regression(rows, embed)


def _regression(rows: Rows, embed: Callable[[Sequence[str]], np.ndarray]) -> dict[str, Any]:
    """Logistic regression on features, its penalty by accuracy on validation rows."""
    from sklearn.linear_model import LogisticRegression

    splits = rows.splits
    training, validation = embed(splits.training.texts), embed(splits.validation.texts)
    fits = [
        LogisticRegression(C=penalty, max_iter=2000).fit(training, splits.training.labels)
        for penalty in PENALTIES
    ]
    best = max(fits, key=lambda fit: fit.score(validation, splits.validation.labels))
    probabilities = np.zeros((len(rows.test), len(splits.test.names)))
    features = embed([text for text, _ in rows.test])
    probabilities[:, best.classes_] = best.predict_proba(features)
    return rows.entry(probabilities)


def mlx_lm_lora(rows: Rows, folder: Path, work: Path, seconds: float) -> dict[str, Any]:
    """mlx-lm's own LoRA, by its command line, for about as long as another method trained.

    Each text is a user's turn, its label the answer; the loss is on the answer alone. The label
    whose first token is most likely wins, or, where two begin alike, the likeliest whole label.

    Args:
        rows: the texts.
        folder: the language model.
        work: a folder for its files.
        seconds: of training; two short runs say how many steps that makes.
    """
    import mlx_lm

    names = rows.splits.training.names
    work.mkdir(parents=True, exist_ok=True)
    for part, texts in (("train", rows.splits.training), ("valid", rows.splits.validation)):
        turns = [
            {"prompt": _question(text, names), "completion": names[label]}
            for text, label in texts.pairs()
        ]
        lines = "".join(json.dumps(turn) + "\n" for turn in turns)
        (work / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    step = (_lora(folder, work, 12) - _lora(folder, work, 2)) / 10
    _lora(folder, work, max(10, round(seconds / step)))
    loaded = mlx_lm.load(str(folder), adapter_path=str(work / "adapters"))
    return rows.entry(_answers(loaded[0], loaded[1], [text for text, _ in rows.test], names))


def _question(text: str, names: Sequence[str]) -> str:
    """What a user would ask a chat model."""
    return f"Classify the text as one of: {', '.join(names)}.\n\n{text}"


def _lora(folder: Path, work: Path, steps: int) -> float:
    """Run mlx_lm.lora; returns its seconds, start included. abft_mlx comes first, for its BLAS."""
    begin = "import sys, abft_mlx; from mlx_lm.lora import main; main()"
    settings = {
        "--model": folder,
        "--data": work,
        "--adapter-path": work / "adapters",
        "--iters": steps,
        "--batch-size": BATCH_ROWS,
        "--num-layers": -1,
        "--learning-rate": LEARNING_RATE,
        "--steps-per-report": 10,
        "--steps-per-eval": steps + 1,
        "--val-batches": 1,
        "--save-every": steps + 1,
    }
    words = [str(word) for setting in settings.items() for word in setting]
    command = [sys.executable, "-c", begin, "--train", "--mask-prompt", *words]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"mlx_lm.lora: exit status {done.returncode}\n{done.stderr[-1000:]}")
    return time.perf_counter() - began


def _answers(model: Any, tokenizer: Any, texts: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """(N, C) probabilities of the labels as answers."""
    import mlx.core as mx

    labels = [tokenizer.encode(name, add_special_tokens=False) for name in names]
    distinct = len({label[0] for label in labels}) == len(labels)
    longest = 1 if distinct else max(map(len, labels))
    scores = []
    for text in texts:
        turns = [{"role": "user", "content": _question(text, names)}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        if distinct:
            logits = model(mx.array([prompt]))[0, -1]
            scores.append(np.array(logits - mx.logsumexp(logits))[[label[0] for label in labels]])
            continue
        padded = [prompt + label + [0] * (longest - len(label)) for label in labels]
        logits = model(mx.array(padded))[:, len(prompt) - 1 :]
        logits = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        scores.append([logits[c, range(len(y)), y].sum() for c, y in enumerate(labels)])
    powers = np.exp(np.array(scores) - np.max(scores, axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
