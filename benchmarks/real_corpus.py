"""In-context tasks over real texts, for the real-text base, and its tokenizer."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field

import numpy as np
from real_texts import KIN, Real
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end_of_text|>"
OPENERS = ("sentence", "review", "question", "tweet", "text", "input", "item", "note", "example")
ASKERS = ("label", "class", "category", "type", "answer", "topic", "group", "kind")


def tokenizer(sets: list[Real], merges: int) -> Tokenizer:
    """Byte-level BPE; label words and the templates' words are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((" " + text for one in sets for text in one.texts), trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    pieces = {"Ġ" + word for one in sets for word in (*one.words, *one.asker.split())}
    pieces |= {*("Ġ" + word for word in ASKERS), *OPENERS, *(one.opener for one in sets)}
    for piece in sorted(pieces):
        vocabulary.setdefault(piece, len(vocabulary))
    vocabulary[END] = len(vocabulary)
    result = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[tuple(p) for p in learned["merges"]], ignore_merges=True
        )
    )
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([END])
    for one in sets:
        encoded = result.encode_batch([" " + text for text in one.texts])
        one.tokens = [np.array(each.ids, np.int32) for each in encoded]
    return result


def word_vectors(sets: list[Real], size: int, dimensions: int, window: int = 6) -> np.ndarray:
    """A unit vector for each token from the company it keeps, (V, dimensions) float32.

    Positive pointwise mutual information within a window, and its leading eigenvectors.
    """
    from scipy import sparse

    together = sparse.csr_matrix((size, size), dtype=np.float32)
    stream = np.concatenate([np.append(t, -1) for one in sets for t in one.tokens])
    document = np.cumsum(stream < 0)
    for step in range(1, window + 1):
        same = (document[:-step] == document[step:]) & (stream[:-step] >= 0) & (stream[step:] >= 0)
        a, b = stream[:-step][same], stream[step:][same]
        weight = np.full(len(a), 1.0 / step, np.float32)
        one_way = sparse.coo_matrix((weight, (a, b)), shape=(size, size)).tocsr()
        together = together + one_way + one_way.T
    single = np.asarray(together.sum(axis=1)).ravel()
    # Frequent neighbours count for less (power 0.75), as in word2vec.
    context = single**0.75 / (single**0.75).sum()
    pairs = together.tocoo()
    information = np.log(pairs.data / (single[pairs.row] * context[pairs.col]))
    # The two directions of a pair differ through the power: their mean is symmetric.
    matrix = sparse.coo_matrix((np.maximum(information, 0), (pairs.row, pairs.col)), (size, size))
    matrix = ((matrix + matrix.T) * 0.5).tocsr()
    values, vectors = sparse.linalg.eigsh(matrix, k=dimensions, v0=np.ones(size))
    found = vectors * np.sqrt(np.abs(values))
    return (found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)).astype(
        np.float32
    )


def frequencies(sets: list[Real], size: int) -> np.ndarray:
    """How often each token occurs, as a share, (V,)."""
    counts = np.bincount(np.concatenate([t for one in sets for t in one.tokens]), minlength=size)
    return counts / counts.sum()


@dataclass
class Row:
    """One training sequence while it is written; lists of positions have one entry an item."""

    tokens: list[int] = field(default_factory=list)
    askers: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    topics: list[int] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """How hard the sequences of one part of the training are.

    Attributes:
        steps: updates.
        length_tokens: of a sequence.
        items: labelled texts in a sequence, at most.
        kinds: weight of each kind of task.
        supervision: weight of the loss on attention at the stage's start and end.
    """

    steps: int
    length_tokens: int
    items: int
    kinds: dict[str, float]
    supervision: tuple[float, float] = (1.0, 1.0)


class Corpus:
    """Writes batches of in-context tasks over real texts.

    Kinds of task, all with random label words: ``word`` and ``words`` (texts of one or a few words
    from invented classes of words), ``keyword`` (sentences with a word of an invented class),
    ``near`` (sentences near one of a few random sentences), ``side`` (sentences on either side of
    a random direction), ``first`` (sentences that begin alike), ``real`` (labels of data sets that
    are not left out), ``plain`` (sentences without labels).
    """

    TEXT_TOKENS = 40
    LANGUAGE = 16

    def __init__(self, sets: list[Real], made: Tokenizer, left_out, seed: int) -> None:
        self.chance = random.Random(f"real corpus {seed}")
        self.numbers = np.random.default_rng(seed)
        self.made, self.sets = made, sets
        self.size = made.get_vocab_size()
        self.left_out = set(left_out) | {kin for name in left_out for kin in KIN.get(name, ())}
        self.labelled = [one for one in sets if one.name not in self.left_out]
        ids = made.get_vocab()
        self.colon, self.newline, self.space = ids[":"], ids["Ċ"], ids["Ġ"]
        self.openers = {w: ids[w] for w in {*OPENERS, *(one.opener for one in sets)}}
        self.askers = {w: made.encode(" " + w).ids for w in {*ASKERS, *(one.asker for one in sets)}}
        self.frequency = frequencies(sets, self.size)
        self.vectors = word_vectors(sets, self.size, 96)
        self.weight = (1e-3 / (1e-3 + self.frequency)).astype(np.float32)
        self.first_topic: dict[str, int] = {}
        self.topics = 0
        for one in sets:
            self.first_topic[one.name] = self.topics
            self.topics += len(one.words)
        reserved = {w for one in sets if one.name in self.left_out for w in one.words}
        self.reserved = [ids["Ġ" + w] for w in sorted(reserved)]
        words = [
            (token, i)
            for token, i in ids.items()
            if re.fullmatch("Ġ[a-z]{3,}", token) and self.frequency[i] > 2e-6
        ]
        by_count = sorted(words, key=lambda word: (-self.frequency[word[1]], word[0]))
        self.label_ids = [i for token, i in by_count[30:] if i not in set(self.reserved)]
        self.content = np.array([i for _, i in by_count[100:]])
        self._index()

    def _index(self) -> None:
        """Sentence features, and which sentences hold which word or begin with it."""
        self.texts = [t[: self.TEXT_TOKENS] for one in self.sets for t in one.tokens]
        self.home = np.concatenate([np.full(len(s.tokens), i) for i, s in enumerate(self.sets)])
        self.features = np.zeros((len(self.texts), 2 * self.vectors.shape[1]), np.float32)
        holding: dict[int, list[int]] = {}
        self.beginning: list[dict[int, list[int]]] = [{} for _ in self.sets]
        for row, text in enumerate(self.texts):
            pooled = self.weight[text] @ self.vectors[text]
            self.features[row] = np.concatenate([pooled, self.vectors[text[0]]])
            for token in set(text.tolist()):
                holding.setdefault(token, []).append(row)
            self.beginning[self.home[row]].setdefault(int(text[0]), []).append(row)
        half = self.vectors.shape[1]
        for i in range(len(self.sets)):
            own = self.home == i
            self.features[own] -= self.features[own].mean(axis=0)
        for part in (slice(0, half), slice(half, None)):
            norm = np.linalg.norm(self.features[:, part], axis=1, keepdims=True)
            self.features[:, part] /= np.maximum(norm, 1e-6)
        self.holding = {t: rows for t, rows in holding.items() if 15 <= len(rows) <= 4000}
        self.content = np.array([i for i in self.content.tolist() if i in self.holding])
        nearest = self.vectors[self.content] @ self.vectors[self.content].T
        self.neighbours = self.content[np.argsort(-nearest, axis=1)[:, :12]]
        self.rows_of = [np.flatnonzero(self.home == i) for i in range(len(self.sets))]

    def _lexicons(self, count: int, least: int, most: int) -> list[list[int]]:
        """Classes of words: one word and some of its neighbours, no word in two classes."""
        result: list[list[int]] = []
        used: set[int] = set()
        while len(result) < count:
            row = self.chance.randrange(len(self.content))
            words = [int(w) for w in self.neighbours[row] if int(w) not in used]
            if len(words) == len(self.neighbours[row]):
                result.append(words[: self.chance.randint(least, most)])
                used.update(words)
        return result

    def _task(self, kind: str) -> tuple[list, Real | None, list[int]]:
        """For each class, a list of texts (token arrays) to draw from; the data set; the topics.

        Topics number the real classes of all sets; there are none for other kinds of task.
        """
        chance = self.chance
        count = chance.choice((2, 2, 2, 3, 3, 4, 5))
        if kind in ("word", "words"):
            pools = []
            for words in self._lexicons(count, 1, 1 if kind == "word" else 6):
                few = (1, 1) if kind == "word" else (1, 4)
                pools.append([chance.choices(words, k=chance.randint(*few)) for _ in range(16)])
            return pools, None, []
        if kind == "keyword":
            pools = []
            for words in self._lexicons(count, 1, 5):
                rows = [chance.choice(self.holding[chance.choice(words)]) for _ in range(16)]
                pools.append([self.texts[row] for row in rows])
            return pools, None, []
        if kind == "real":
            one = chance.choice(self.labelled)
            classes = chance.sample(range(len(one.words)), chance.randint(2, len(one.words)))
            rows = chance.sample(one.shown, min(400, len(one.shown)))
            pools = [[one.tokens[r] for r in rows if one.labels[r] == c] for c in classes]
            pools = [[text[: self.TEXT_TOKENS] for text in pool] for pool in pools]
            topics = [self.first_topic[one.name] + c for c in classes]
            some = [i for i, pool in enumerate(pools) if len(pool) > 2]
            return [pools[i] for i in some], one, [topics[i] for i in some]
        index = chance.randrange(len(self.sets))
        one = self.sets[index]
        if kind == "first":
            starts = [w for w, rows in self.beginning[index].items() if len(rows) >= 12]
            starts = chance.sample(starts, min(count, len(starts)))
            pools = [chance.sample(self.beginning[index][w], 12) for w in starts]
            return [[self.texts[row] for row in pool] for pool in pools], one, []
        rows = self.numbers.choice(self.rows_of[index], min(1500, len(self.rows_of[index])), False)
        features = self.features[rows].copy()
        half = features.shape[1] // 2
        features[:, half:] *= chance.choice((0.0, 0.0, 0.7, 1.5))
        if kind == "side":
            direction = features[0] - features[1]
            if chance.random() < 0.5:
                direction = self.numbers.standard_normal(len(direction)) * features.std(axis=0)
            order = np.argsort(features @ direction)
            share = max(12, int(len(rows) * chance.uniform(0.02, 0.2)))
            picked = [order[:share], order[-share:]]
        else:
            closeness = features @ features[:count].T
            best = closeness.argmax(axis=1)
            share = max(10, int(len(rows) * chance.uniform(0.01, 0.08)))
            picked = []
            for c in range(count):
                mine = np.flatnonzero(best == c)
                picked.append(mine[np.argsort(-closeness[mine, c])[:share]])
            picked = [some for some in picked if len(some) > 3]
        return [[self.texts[rows[i]] for i in some] for some in picked], one, []

    def sequence(self, stage: Stage) -> Row:
        """Labelled texts of one task, or plain texts."""
        chance, row = self.chance, Row()
        kind = chance.choices(list(stage.kinds), weights=list(stage.kinds.values()))[0]
        plain = kind == "plain"
        pools, one, topics = self._task("near" if plain else kind)
        while len(pools) < 2:
            pools, one, topics = self._task(kind)
        opener, asker = chance.choice(sorted(self.openers)), chance.choice(sorted(self.askers))
        if kind == "real" and chance.random() < 0.5:
            opener, asker = one.opener, one.asker
        labels = chance.sample(self.label_ids, len(pools))
        spaced = chance.random() < 0.15
        for pool in pools:
            chance.shuffle(pool)
        for turn in range(stage.items):
            c = chance.randrange(len(pools))
            text = [*map(int, pools[c][turn % len(pools[c])]), *[self.space] * spaced]
            before = [] if kind == "word" else [self.openers[opener], self.colon]
            after = [] if kind == "word" else self.askers[asker]
            if len(row.tokens) + len(before) + len(text) + len(after) + 3 > stage.length_tokens:
                if row.classes or plain:
                    break
                text = text[: stage.length_tokens - 16]
            row.tokens += before
            start = len(row.tokens)
            row.tokens += text
            if plain:
                row.tokens.append(self.newline)
                continue
            row.texts.append((start, len(row.tokens)))
            row.tokens += [*after, self.colon]
            row.askers.append(len(row.tokens) - 1)
            row.labels.append(len(row.tokens))
            row.tokens += [labels[c], self.newline]
            row.classes.append(c)
            row.topics.append(topics[c] if topics else -1)
        return row

    def batch(self, stage: Stage, rows: int) -> dict[str, np.ndarray]:
        """Arrays of one update, T the longest sequence's length.

        Returns:
            tokens (B, T); asker, label, target, topic (-1: none), answered, item (B, K); reader
            (B, K, T), the shares
            of attention that an item's tokens should get; inducer (B, K, T), 1 at earlier labels of
            the same class; places and next (B, LANGUAGE), positions and tokens for language.
        """
        made = [self.sequence(stage) for _ in range(rows)]
        length, count = max(len(row.tokens) for row in made), stage.items
        out = {
            name: np.zeros((rows, count), np.int64)
            for name in ("asker", "label", "target", "topic")
        }
        out["topic"][:] = -1
        out["tokens"] = np.zeros((rows, length), np.int64)
        for name in ("answered", "item"):
            out[name] = np.zeros((rows, count), np.float32)
        for name in ("reader", "inducer"):
            out[name] = np.zeros((rows, count, length), np.float32)
        out["places"] = np.zeros((rows, self.LANGUAGE), np.int64)
        out["next"] = np.zeros((rows, self.LANGUAGE), np.int64)
        for b, row in enumerate(made):
            out["tokens"][b, : len(row.tokens)] = row.tokens
            free = sorted(set(range(len(row.tokens) - 1)) - set(row.askers))
            places = self.chance.choices(free, k=self.LANGUAGE)
            out["places"][b], out["next"][b] = places, [row.tokens[p + 1] for p in places]
            for k, (start, end) in enumerate(row.texts):
                out["asker"][b, k], out["label"][b, k] = row.askers[k], row.labels[k]
                out["target"][b, k] = row.tokens[row.labels[k]]
                out["item"][b, k] = 1.0
                out["topic"][b, k] = row.topics[k]
                weight = self.weight[row.tokens[start:end]]
                out["reader"][b, k, start:end] = weight / weight.sum()
                same = [row.labels[j] for j in range(k) if row.classes[j] == row.classes[k]]
                out["answered"][b, k] = float(bool(same))
                out["inducer"][b, k, same] = 1.0
        return out
