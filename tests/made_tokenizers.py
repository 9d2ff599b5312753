"""Tokenizers of every kind that matters to prompts, trained on a page of made-up text."""

from __future__ import annotations

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
CORPUS = [
    f"text: the {noun} was {word}, and {word} it stays! label: {label}\n"
    for noun in ("film", "meal", "weather", "story", "music", "café")
    for word in ("good", "bad", "lovely", "dull", "spambot", "hamlet")
    for label in ("positive", "negative", "spam", "ham", "not spam", "A", "B", "C", "D")
] * 3


def _train(tokenizer: Tokenizer, alphabet: list[str], size: int, **options: object) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        **options,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
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
def llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind a split by pattern, with a BOS; digits stand apart from spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, pre_tokenizers.ByteLevel.alphabet(), 600)
    _bos(tokenizer)
    return _wrap(tokenizer)


@cache
def llama2(scheme: str = "first") -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: spaces are ▁, one is put before the text, and a BOS before that."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    _train(tokenizer, ["\n"], 500)
    _bos(tokenizer)
    return _wrap(tokenizer)


@cache
def llama2_legacy() -> PreTrainedTokenizerFast:
    """As the first Llama checkpoints: a normalizer writes the ▁, and nothing splits the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Trained on words, as SentencePiece does, so that no merge spans them.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁|\n|[:,!]"), "merged_with_next")
    _train(tokenizer, ["\n"], 500)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    _bos(tokenizer)
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
    "llama2-first": lambda: llama2("first"),
    "llama2-always": lambda: llama2("always"),
    "llama2-legacy": llama2_legacy,
    "words": words,
}
