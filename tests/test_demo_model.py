"""The bundled teaching model: small, ordinary, with induction heads; and its script repeatable."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from abft_mlx import attention
from abft_mlx.data.generated import DEMO_TASK, TASKS, generate

HELD_OUT = sorted(name for name, task in TASKS.items() if task.held_out)
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(checkout: Path) -> Path:
    return checkout / "abft_mlx" / "assets" / "demo-model"


@pytest.fixture(scope="module")
def loaded(folder: Path):
    import mlx_lm

    return mlx_lm.load(str(folder))


def prompts(tokenizer, name: str, count: int):
    """Few-shot prompts: tokens (B, T), last (B,), label positions (B, K), gold (B,), label ids."""
    task, rows = TASKS[name], generate(name, 5 * count, 7)
    ids = [tokenizer.encode(" " + word, add_special_tokens=False) for word in task.labels]
    assert [len(each) for each in ids] == [1] * len(ids)
    made, positions, gold = [], [], []
    for start in range(0, 5 * count, 5):
        tokens: list[int] = []
        places = []
        for text, label in rows[start : start + 4]:
            item = f"{task.input_prefix}{text} {task.label_prefix}"
            tokens += tokenizer.encode(item, add_special_tokens=False)
            places.append(len(tokens))
            tokens += [ids[label][0], *tokenizer.encode("\n", add_special_tokens=False)]
        text, label = rows[start + 4]
        item = f"{task.input_prefix}{text} {task.label_prefix}"
        made.append(tokens + tokenizer.encode(item, add_special_tokens=False))
        positions.append(places)
        gold.append(label)
    batch = np.zeros((count, max(map(len, made))), np.int32)
    for index, tokens in enumerate(made):
        batch[index, : len(tokens)] = tokens
    last = np.array([len(tokens) - 1 for tokens in made], np.int32)
    return batch, last, np.array(positions), np.array(gold), [each[0] for each in ids]


def test_the_folder_is_small_and_complete(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(FILES) <= set(files)
    assert sum(files.values()) < 10_000_000
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_each_word_of_a_task_is_one_token_and_pieces_make_the_whole(loaded) -> None:
    tokenizer = loaded[1]
    for name, task in TASKS.items():
        for text, label in generate(name, 50, 5):
            for word in text.split():
                assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1, word
            start = f"{task.input_prefix}{text} {task.label_prefix}"
            pieces = [start, " " + task.labels[label], "\n"]
            whole = tokenizer.encode("".join(pieces), add_special_tokens=False)
            parts = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
            assert whole == [token for part in parts for token in part]
            assert len(parts[1]) == 1
            assert tokenizer.decode(whole) == "".join(pieces)


def test_any_text_survives_the_tokenizer(loaded) -> None:
    text = "Größe: 3½ €, “naïve” — 東京 🙂\tend\n"
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_tasks_have_induction_heads(loaded, name: str) -> None:
    model, tokenizer = loaded
    tokens, last, positions, _, _ = prompts(tokenizer, name, 32)
    rows = attention.capture(model, mx.array(tokens), mx.array(last))
    filtered = 4 / (4 + np.log(last + 1.0))
    strong = 0
    for layer in rows:
        pattern = np.array(layer)
        mass = np.take_along_axis(pattern, positions[:, None, :], axis=2).sum(axis=2)
        strong += int(((mass > filtered[:, None]).mean(axis=0) > 0.5).sum())
    assert strong >= 1


def test_it_answers_the_demo_task_with_a_label_better_than_by_chance(loaded) -> None:
    model, tokenizer = loaded
    tokens, last, _, gold, ids = prompts(tokenizer, DEMO_TASK, 200)
    logits = model(mx.array(tokens))[mx.arange(len(last)), mx.array(last)]
    greedy = np.array(logits.argmax(axis=-1))
    assert np.isin(greedy, ids).mean() > 0.9
    guess = np.array(logits[:, mx.array(ids)]).argmax(axis=1)
    chance = 1 / len(ids)
    accuracy = float((guess == gold).mean())
    assert accuracy > chance + 3 * math.sqrt(chance * (1 - chance) / len(gold))
    assert accuracy < 0.9


def test_transformers_opens_it_too(folder: Path, loaded) -> None:
    torch = pytest.importorskip("torch", reason="needs the bench extra")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens, _, _, _, _ = prompts(loaded[1], DEMO_TASK, 1)
    task = TASKS[DEMO_TASK]
    text = f"{task.input_prefix}hello {task.label_prefix} {task.labels[0]}\n"
    assert tokenizer.encode(text) == loaded[1].encode(text)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    found = np.array(loaded[0](mx.array(tokens)))
    assert np.abs(found - expected).max() < 1e-3


@pytest.mark.slow
def test_the_script_gives_the_same_model_for_the_same_seed(tmp_path: Path, checkout: Path) -> None:
    script = checkout / "tools" / "make_demo_model.py"
    weights = []
    for name, seed in (("first", "3"), ("second", "3"), ("third", "4")):
        subprocess.run(
            [
                sys.executable,
                str(script),
                "--output",
                str(tmp_path / name),
                "--seed",
                seed,
                "--smoke",
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        assert all((tmp_path / name / file).is_file() for file in FILES)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_held_out_labels_stand_in_no_training_sequence(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(checkout / "tools"))
    demo_corpus = pytest.importorskip("demo_corpus")
    made = demo_corpus.tokenizer(merges=8)
    held_out = {made.get_vocab()["Ġ" + w] for name in HELD_OUT for w in TASKS[name].labels}
    corpus = demo_corpus.Corpus(made, 0)
    stage = demo_corpus.Stage(1, 7, 120, lexicon=(2, 8), invented=0.3, unlabelled=0.3)
    for _ in range(10):
        batch = corpus.batch(stage, 16)
        assert not held_out & set(batch["tokens"].ravel().tolist())
        at_label = np.take_along_axis(batch["tokens"], batch["label"], axis=1)
        assert np.array_equal(at_label * (batch["item"] > 0), batch["label_target"])
