"""Sizes of models and batches that the bench measures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from abft_mlx.errors import UsageError

_HEAD_DIM = 64


@dataclass(frozen=True)
class Size:
    """One Llama of random weights and one batch of prompts.

    Attributes:
        layers: L.
        width: hidden width, a multiple of 64; heads are 64 wide.
        vocabulary: V.
        prompts: prompts of one step (B).
        tokens: tokens of each prompt (T).
        demonstrations: k.
    """

    layers: int = 12
    width: int = 768
    vocabulary: int = 32_000
    prompts: int = 8
    tokens: int = 160
    demonstrations: int = 4

    @property
    def n_heads(self) -> int:
        """Query heads; as many key/value heads."""
        return self.width // _HEAD_DIM

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLP: 8/3 of the width, as in Llama."""
        return -(-8 * self.width // 3 // _HEAD_DIM) * _HEAD_DIM

    def __str__(self) -> str:
        return (
            f"{self.layers}x{self.width}x{self.vocabulary}:"
            f"{self.prompts}x{self.tokens}k{self.demonstrations}"
        )


REFERENCE = Size()


def parse(text: str) -> Size:
    """A size as ``12x768x32000:8x160k4``: layers, width, vocabulary, prompts, tokens, k.

    Raises:
        UsageError: the text is no such size, or one that cannot be made.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)x(\d+)k(\d+)", text)
    if not found:
        raise UsageError(
            f"size {text!r} is not like {REFERENCE}: layers x width x vocabulary : prompts x "
            "tokens k demonstrations"
        )
    size = Size(*map(int, found.groups()))
    if min(size.layers, size.width, size.prompts, size.demonstrations) < 1 or size.width % 64:
        raise UsageError(
            f"size {text!r}: numbers must be at least 1 and the width a multiple of 64"
        )
    if size.tokens < 4 * (size.demonstrations + 1) or size.vocabulary < 64:
        raise UsageError(
            f"size {text!r}: a prompt needs four tokens for each text, and a vocabulary 64 tokens"
        )
    return size


def quick(on_gpu: bool) -> Size:
    """A size that takes under three minutes: the reference, or on a CPU a third of its layers."""
    return REFERENCE if on_gpu else replace(REFERENCE, layers=REFERENCE.layers // 3)


def sweep() -> list[Size]:
    """One thing at a time around the reference size."""
    small = replace(REFERENCE, layers=4, width=512)
    changes: list[Size] = [REFERENCE]
    changes += [replace(small, width=width) for width in (256, 512, 1024)]
    changes += [replace(small, layers=layers) for layers in (2, 8, 16)]
    changes += [
        replace(small, tokens=tokens, prompts=prompts)
        for tokens, prompts in ((64, 32), (256, 8), (512, 4), (1024, 2), (2048, 1))
    ]
    changes += [replace(small, prompts=prompts) for prompts in (1, 2, 4, 16)]
    changes += [replace(small, demonstrations=k) for k in (2, 16)]
    return list(dict.fromkeys(changes))


def known(names: Sequence[str], every: Iterable[str]) -> None:
    """Refuse names of contenders that there are not.

    Raises:
        UsageError: one of them is unknown.
    """
    for name in names:
        if name not in every:
            raise UsageError(f"contender {name!r} is not known; there are {', '.join(every)}")
