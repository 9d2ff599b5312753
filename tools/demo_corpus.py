"""What the bundled teaching model reads: its tokenizer and its training sequences.

Every sequence is made here from the word lists of :mod:`abft_mlx.data.generated`. In-context
labels come only from training families and from tasks invented on the spot; words that are labels
of held-out families never stand in a label's place.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from abft_mlx.data.generated import NEUTRAL, SHARED_TEMPLATES, TASKS, generate
from abft_mlx.data.generated import TASKS as FAMILIES

END = "<|end_of_text|>"
TEXT_SAMPLES = 6
SLOTS = ("N", "A", "V")
HELD_OUT_LABELS = {word for task in TASKS.values() if task.held_out for word in task.labels}
TRAINING = [family for name, family in FAMILIES.items() if not TASKS[name].held_out]
EVERY = list(FAMILIES.values())
HELD_OUT = [family for name, family in FAMILIES.items() if TASKS[name].held_out]
CLASS_WORDS = sorted(
    {w for f in FAMILIES.values() for c in f.classes.values() for some in c.values() for w in some}
)
BY_SLOT = {
    slot: sorted(
        {w for f in FAMILIES.values() for words in f.classes.values() for w in words[slot]}
    )
    for slot in SLOTS
}
OPENERS = [
    "text",
    "input",
    "sentence",
    "note",
    "item",
    "example",
    "entry",
    "x",
    "sample",
    "excerpt",
]
ASKERS = [
    "label",
    "class",
    "category",
    "type",
    "group",
    "tag",
    "output",
    "answers",
    "y",
    "mark",
]


def tokenizer(merges: int = 512) -> Tokenizer:
    """Byte-level BPE with every word of the generated texts, after a space, as one token."""
    texts = [text for name in TASKS for text, _ in generate(name, 500, 1)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    words: list[str] = []
    for text in texts:
        words.extend(text.split())
    for group in NEUTRAL.values():
        words.extend(word for entry in group for word in entry.split())
    for family in FAMILIES.values():
        words.extend([*family.classes, family.label_prefix.rstrip(":")])
    words.extend([*CLASS_WORDS, *ASKERS])
    openings = [f.input_prefix.rstrip(": ") for f in FAMILIES.values()]
    openings.extend(OPENERS)
    for piece in sorted({"Ġ" + word for word in words} | set(openings)):
        vocabulary.setdefault(piece, len(vocabulary))
    vocabulary[END] = len(vocabulary)
    result = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(pair) for pair in learned["merges"]],
            ignore_merges=True,
        )
    )
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([END])
    return result


def word_vectors(
    encoder: Tokenizer, dimensions: int = 48, lines: int = 3000
) -> tuple[np.ndarray, np.ndarray]:
    """What unlabelled texts of every family tell of a word: the company it keeps, how common it is.

    Company: leading eigenvectors of the positive pointwise mutual information of words that share
    a text, a unit vector for each word, zero for tokens that stand in no text.

    Returns:
        company (V, dimensions) and commonness (V,) float32, from 0, as common as a class's words or
        less, to 1, about twenty times as common or more.
    """
    ids = encoder.get_vocab()
    together = np.zeros((len(ids), len(ids)))
    counts = np.zeros(len(ids))
    for name in TASKS:
        for text, _ in generate(name, lines, 1):
            present = sorted({ids["Ġ" + word] for word in text.split()})
            together[np.ix_(present, present)] += 1.0
            counts[present] += 1.0
    np.fill_diagonal(together, 0.0)
    single = together.sum(axis=1)
    used = np.flatnonzero(single)
    expected = np.outer(single[used], single[used]) / single.sum()
    information = np.log(np.maximum(together[np.ix_(used, used)], 1e-9) / expected)
    vectors = np.linalg.eigh(np.maximum(information, 0.0))[1][:, -dimensions:]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    company = np.zeros((len(ids), dimensions), np.float32)
    company[used] = vectors
    usual = np.median(counts[used])
    common = np.clip(np.log(np.maximum(counts, 1.0) / usual) / np.log(20.0), 0.0, 1.0)
    return company, common.astype(np.float32)


def save_tokenizer(encoder: Tokenizer, folder: Path, context_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as ``transformers`` reads them."""
    encoder.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@dataclass
class Row:
    """One training sequence while it is written.

    Attributes:
        tokens: token ids.
        askers: positions of each item's label-prefix colon, which predicts the label.
        labels: positions of each item's label.
        classes: each item's class.
        words: positions of each item's class-bearing words.
    """

    tokens: list[int] = field(default_factory=list)
    askers: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    words: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """How hard the sequences of one part of the training are.

    Attributes:
        steps: updates.
        items: labelled texts in a sequence.
        length_tokens: padded length of a sequence.
        words: least and most words of an invented bag-of-words text; 0 for whole sentences.
        lexicon: least and most words that an invented class has for each slot.
        invented: share of sequences from invented tasks, the others come from training families.
        unlabelled: share of sequences that are plain lines of held-out texts, without labels.
        supervision: weight of the loss on attention at the stage's start and end.
    """

    steps: int
    items: int
    length_tokens: int
    words: tuple[int, int] = (0, 0)
    lexicon: tuple[int, int] = (1, 1)
    invented: float = 1.0
    unlabelled: float = 0.0
    supervision: tuple[float, float] = (1.0, 1.0)


class Corpus:
    """Writes batches of training sequences.

    Args:
        encoder: the tokenizer.
        seed: where every choice comes from.
    """

    def __init__(self, encoder: Tokenizer, seed: int, width: int = 128) -> None:
        self.width = width
        self.shuffle = np.random.default_rng(seed)
        self.chance = random.Random(f"corpus {seed}")
        self.ids = encoder.get_vocab()
        self.labels = [
            word
            for word in sorted({*CLASS_WORDS, *(w for f in TRAINING for w in f.classes)})
            if word not in HELD_OUT_LABELS
        ]
        self.templates = sorted({t for f in FAMILIES.values() for t in f.templates})
        self.colon, self.newline = self.ids[":"], self.ids["Ċ"]

    def _word(self, word: str) -> int:
        return self.ids["Ġ" + word]

    def _sentence(
        self, template: str, pools: list[dict[str, list[str]]], label: int, signal: float
    ):
        chance = self.chance
        words: list[tuple[str, bool]] = []
        for piece in template.split():
            if piece in NEUTRAL:
                words.extend((w, False) for w in chance.choice(NEUTRAL[piece]).split())
            elif piece in SLOTS:
                source = label
                if chance.random() >= signal:
                    source = (label + 1 + chance.randrange(len(pools) - 1)) % len(pools)
                words.append((chance.choice(pools[source][piece]), True))
            else:
                words.append((piece, False))
        fixed = []
        for index, (word, bears) in enumerate(words):
            if word == "a" and index + 1 < len(words) and words[index + 1][0][0] in "aeiou":
                word = "an"
            fixed.append((word, bears))
        return fixed

    def _task(self, stage: Stage):
        """Pools, signal, templates, pieces and label words of one sequence's task."""
        chance = self.chance
        if chance.random() < stage.invented:
            count = chance.choice((2, 2, 3, 3, 4))
            pools = [{} for _ in range(count)]
            for slot in SLOTS:
                sizes = [chance.randint(*stage.lexicon) for _ in pools]
                drawn = chance.sample(BY_SLOT[slot], sum(sizes))
                for pool, size in zip(pools, sizes, strict=True):
                    pool[slot] = drawn[:size]
                    drawn = drawn[size:]
            signal = chance.uniform(0.8, 1.0)
            family = None
        else:
            family = chance.choice(TRAINING)
            names = list(family.classes)
            count = chance.randint(2, len(names))
            chance.shuffle(names)
            pools = [{slot: list(family.classes[n][slot]) for slot in SLOTS} for n in names[:count]]
            signal = family.signal
        opener = chance.choice(OPENERS)
        asker = chance.choice(ASKERS) if chance.random() < 0.5 else chance.choice(CLASS_WORDS)
        words = chance.sample(self.labels, count)
        templates: tuple[str, ...] = (*SHARED_TEMPLATES, *self.templates)
        if family is not None:
            templates = (*SHARED_TEMPLATES, *family.templates)
            if chance.random() < 0.5:
                opener, asker = family.input_prefix.strip(), family.label_prefix
            if chance.random() < 0.5:
                words = chance.sample(list(family.classes), count)
        return pools, signal, templates, opener.rstrip(":"), asker.rstrip(":"), words

    def labelled(self, stage: Stage) -> Row:
        """A sequence of labelled items of one task."""
        chance, row = self.chance, Row()
        pools, signal, templates, opener, asker, words = self._task(stage)
        signal = 1.0 if stage.words == (1, 1) else signal
        for _ in range(stage.items):
            label = chance.randrange(len(pools))
            if stage.words[1]:
                template = " ".join(
                    chance.choice(SLOTS) for _ in range(chance.randint(*stage.words))
                )
            else:
                template = chance.choice(templates)
            text = self._sentence(template, pools, label, signal)
            if len(row.tokens) + len(text) + 6 > stage.length_tokens:
                break
            if stage.words != (1, 1):
                row.tokens += [self.ids[opener], self.colon]
            row.words.append([len(row.tokens) + i for i, (_, bears) in enumerate(text) if bears])
            row.tokens += [self._word(word) for word, _ in text]
            if stage.words != (1, 1):
                row.tokens.append(self._word(asker))
            row.tokens.append(self.colon)
            row.askers.append(len(row.tokens) - 1)
            row.labels.append(len(row.tokens))
            row.tokens += [self._word(words[label]), self.newline]
            row.classes.append(label)
        return row

    def plain(self, stage: Stage) -> Row:
        """Lines of held-out texts without labels."""
        chance, row = self.chance, Row()
        family = chance.choice(HELD_OUT)
        pools = [{s: list(c[s]) for s in SLOTS} for c in family.classes.values()]
        while True:
            text = self._sentence(
                chance.choice((*SHARED_TEMPLATES, *family.templates)),
                pools,
                chance.randrange(len(pools)),
                family.signal,
            )
            if len(row.tokens) + len(text) + 3 > stage.length_tokens:
                return row
            row.tokens += [self.ids[family.input_prefix.strip(": ")], self.colon]
            row.tokens += [*(self._word(word) for word, _ in text), self.newline]

    def unseen(self) -> np.ndarray:
        """What is added to the logits (V,): held-out label words take no part in any softmax."""
        result = np.zeros(len(self.ids), np.float32)
        result[[self._word(word) for word in sorted(HELD_OUT_LABELS)]] = -1e9
        return result

    def batch(self, stage: Stage, rows: int) -> dict[str, np.ndarray]:
        """Arrays of one update.

        Returns:
            tokens (B, T) int32; item arrays (B, K) int32: asker, label, answered (1 where an
            earlier item has the same class); reader (B, 2K, T) float32, the item's words that the
            colon and then the label should look at; inducer (B, K, T) bool, the earlier labels of
            the same class; text (B, T) float32, 1 where the next token counts as language.
        """
        count, length = stage.items, stage.length_tokens
        out = {
            "tokens": np.zeros((rows, length), np.int32),
            "asker": np.zeros((rows, count), np.int32),
            "label": np.zeros((rows, count), np.int32),
            "answered": np.zeros((rows, count), np.float32),
            "item": np.zeros((rows, count), np.float32),
            "reader": np.zeros((rows, count, length), np.float32),
            "inducer": np.zeros((rows, count, length), np.float32),
            "bears": np.zeros((rows, length), np.int32),
            "order": self.shuffle.permuted(np.tile(np.arange(self.width), (rows, 1)), axis=1),
            "sign": self.shuffle.choice((-1.0, 1.0), (rows, self.width)).astype(np.float32),
            "label_target": np.zeros((rows, count), np.int32),
            "text": np.zeros((rows, TEXT_SAMPLES), np.int32),
            "text_target": np.zeros((rows, TEXT_SAMPLES), np.int32),
        }
        for b in range(rows):
            plain = self.chance.random() < stage.unlabelled
            row = self.plain(stage) if plain else self.labelled(stage)
            size = len(row.tokens)
            out["tokens"][b, :size] = row.tokens
            plain_places = sorted(set(range(size - 1)) - set(row.askers))
            places = self.chance.choices(plain_places, k=TEXT_SAMPLES)
            out["text"][b] = places
            out["text_target"][b] = [row.tokens[place + 1] for place in places]
            for k, (asker, label, own) in enumerate(
                zip(row.askers, row.labels, row.words, strict=True)
            ):
                out["asker"][b, k], out["label"][b, k] = asker, label
                out["item"][b, k] = 1.0
                out["label_target"][b, k] = row.tokens[label]
                out["bears"][b, own] = 1
                out["reader"][b, k, own] = 1.0 / len(own)
                same = [row.labels[j] for j in range(k) if row.classes[j] == row.classes[k]]
                out["answered"][b, k] = float(bool(same))
                out["inducer"][b, k, same] = 1.0
        return out
