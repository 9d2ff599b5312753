"""Tokenizers of every kind that matters to prompts, trained on a page of made-up text."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# Cased scripts are cut where lower case turns to upper, marks stay with their letters.
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Labels that stand alone in their line, as answers in chats do.
ANSWERS = [f"{label}\n" for label in ("positive", "negative", "spam", "ham")] * 20
TEKKEN_CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
TEKKEN_CONTROL += [f"<SPECIAL_{number}>" for number in range(len(TEKKEN_CONTROL), 100)]
CORPUS = [
    f"text: the {noun} was {word}, and {word} it stays! label: {label}\n"
    for noun in ("film", "meal", "weather", "story", "music", "café")
    for word in ("good", "bad", "lovely", "dull", "spambot", "hamlet")
    for label in ("positive", "negative", "spam", "ham", "not spam", "A", "B", "C", "D")
] * 3


def _train(
    tokenizer: Tokenizer, alphabet: list[str], size: int, answers: bool = False, **options: object
) -> Tokenizer:
    given = {"special_tokens": ["<unk>", "<s>", "</s>"], **options}
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, **given
    )
    tokenizer.train_from_iterator(CORPUS + ANSWERS if answers else CORPUS, trainer)
    return tokenizer


def _bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )


def _with_bytes(tokenizer: Tokenizer) -> None:
    """Put a token for every byte behind the special ones; characters unknown become their bytes."""
    model = json.loads(tokenizer.to_str())["model"]
    order = sorted(model["vocab"], key=model["vocab"].get)
    order[3:3] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: number for number, piece in enumerate(order)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer.model = models.BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def gpt2() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(_train(tokenizer, pre_tokenizers.ByteLevel.alphabet(), 600))


@cache
def llama3(answers: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind a split by pattern, with a BOS; digits stand apart from spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, pre_tokenizers.ByteLevel.alphabet(), 600, answers)
    _bos(tokenizer)
    return _wrap(tokenizer)


@cache
def qwen(answers: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of NFC text behind a split by pattern, digit by digit, without a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(_train(tokenizer, pre_tokenizers.ByteLevel.alphabet(), 600, answers))


@cache
def tekken(answers: bool = False) -> PreTrainedTokenizerFast:
    """Mistral's byte-level BPE: its own split, a block of control tokens first, and a BOS."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TEKKEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, alphabet, 700, answers, special_tokens=TEKKEN_CONTROL)
    _bos(tokenizer)
    return _wrap(tokenizer)


@cache
def llama2() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: spaces are ▁, one is put before the text, and a BOS before that."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    _train(tokenizer, ["\n"], 500)
    _bos(tokenizer)
    return _wrap(tokenizer)


@cache
def llama2_bytes(answers: bool = False) -> PreTrainedTokenizerFast:
    """As the first Llama checkpoints, and what no piece covers, line breaks too, becomes bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Line breaks and the é of the corpus are no part of what it learns.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\né]"), "removed"),
            pre_tokenizers.Split(Regex(r"▁|[:,!]"), "merged_with_next"),
        ]
    )
    _train(tokenizer, [], 500, answers)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _with_bytes(tokenizer)
    _bos(tokenizer)
    return _wrap(tokenizer)


@cache
def gemma(answers: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE whose text begins without ▁; tokens of several line breaks; a BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁|\n+|[:,!]"), "merged_with_next")
    _train(tokenizer, ["\n", "▁", *map(chr, range(33, 127))], 500, answers)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _with_bytes(tokenizer)
    tokenizer.add_tokens(["\n\n", "\n\n\n", "▁▁", "▁▁▁▁"])
    _bos(tokenizer)
    return _wrap(tokenizer)


@cache
def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's likeliest pieces, with ▁ before the text; unknown characters become bytes."""
    # Counted rather than trained: that trainer learns nothing from so few distinct words.
    counts = Counter(re.findall(r"▁\w+|[^\w▁]", "".join(CORPUS).replace(" ", "▁")))
    total = counts.total()
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(piece, math.log(count / total)) for piece, count in counts.items()]
    alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    pieces += [(letter, -12.0) for letter in alphabet if letter not in counts]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="first")]
    )
    return _wrap(tokenizer)


@cache
def merging() -> PreTrainedTokenizerFast:
    """A vocabulary that joins ':' and the word behind it into one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return _wrap(_train(tokenizer, [chr(code) for code in range(32, 127)] + ["\n"], 900))


@cache
def words() -> PreTrainedTokenizerFast:
    """Whole words, and <unk> for every other."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(":", "isolated"),
        ]
    )
    trainer = trainers.WordLevelTrainer(
        special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([line.replace(" A\n", "\n") for line in CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    return _wrap(tokenizer)


KINDS = {
    "gpt2": gpt2,
    "llama3": llama3,
    "qwen": qwen,
    "tekken": tekken,
    "llama2": llama2,
    "llama2-bytes": llama2_bytes,
    "gemma": gemma,
    "unigram": unigram,
    "words": words,
}


class Letters:
    """A token for each character, and for each of some longer pieces, the first that fits."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; there are no special tokens to add."""
        del add_special_tokens
        ids = []
        while text:
            piece = next((piece for piece in self.pieces if text.startswith(piece)), text[0])
            ids.append(ord(piece) if len(piece) == 1 else 0x110000 + self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return "".join(chr(i) if i < 0x110000 else self.pieces[i - 0x110000] for i in ids)
