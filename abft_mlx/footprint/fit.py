"""Whether a run fits this machine and, where it does not, what would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abft_mlx import loading, prefix
from abft_mlx import recipe as recipes
from abft_mlx.errors import UsageError
from abft_mlx.footprint.estimate import Footprint, footprint
from abft_mlx.trainer import plan

BITS = 4


@dataclass(frozen=True)
class Fit:
    """A recipe's memory on its model beside what a machine has.

    Attributes:
        model: its name.
        number_type: of its floating-point weights.
        bits: of its quantized weights, None for an unquantized model.
        length_tokens: the longest prompt.
        footprint: the estimate.
        limit_bytes: what the machine has for MLX.
        way_out: what would fit, or that nothing here does; None where the recipe fits.
    """

    model: str
    number_type: str
    bits: int | None
    length_tokens: int
    footprint: Footprint
    limit_bytes: int
    way_out: str | None

    @property
    def fits(self) -> bool:
        """Whether training and evaluation both do."""
        return _peak(self.footprint) <= self.limit_bytes

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "model": self.model,
            "number_type": self.number_type,
            "bits": self.bits,
            "length_tokens": self.length_tokens,
            **self.footprint.as_dict(),
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "way_out": self.way_out,
        }


def examine(recipe: recipes.Recipe, length_tokens: int, limit_bytes: int) -> Fit:
    """Estimate a recipe's memory from its model's config.json alone.

    Args:
        recipe: a resolved recipe.
        length_tokens: the longest prompt.
        limit_bytes: what the machine has for MLX.

    Raises:
        ModelError: the config cannot be found or read, or the architecture is not supported.
        AdapterError: the recipe's adapter cannot be put on this model.
        UsageError: the model was not made for prompts of this length.
    """
    model, config = loading.skeleton(recipe.model, recipe.revision)
    context = loading.context_tokens(config)
    if context is not None and length_tokens > context:
        raise UsageError(
            f"--length {length_tokens}: {recipe.model} was made for {context} tokens at most; give "
            "fewer"
        )
    recipe = recipes.share(recipe, able=prefix.shareable(model))
    found = footprint(model, recipe, length_tokens)
    quantization = config.get("quantization") or {}
    way_out = None
    if _peak(found) > limit_bytes:
        way_out = _way_out(recipe, found, length_tokens, limit_bytes, bool(quantization))
    return Fit(
        model=recipe.model,
        number_type=loading.number_type(config),
        bits=quantization.get("bits"),
        length_tokens=length_tokens,
        footprint=found,
        limit_bytes=limit_bytes,
        way_out=way_out,
    )


def _peak(found: Footprint) -> int:
    return max(found.training_bytes, found.evaluation_bytes)


def _way_out(
    recipe: recipes.Recipe, found: Footprint, length_tokens: int, limit_bytes: int, quantized: bool
) -> str:
    """The mildest of a few changes that fits, in words."""
    width = plan.padded_tokens(length_tokens)
    # What is kept can go to files instead, as far as memory lacks.
    kept, lacking = found.kept_hidden_bytes, found.training_bytes - limit_bytes
    files = ("training.keep_hidden_bytes=0",) if kept else ()
    small = (f"training.micro_batch_tokens={width}", f"evaluation.batch_tokens={width}", *files)
    halves = []
    rows = found.rows // 2
    while rows > 1:
        tokens = rows * width
        halves.append(
            (f"training.micro_batch_tokens={tokens}", f"evaluation.batch_tokens={tokens}", *files)
        )
        rows //= 2
    tries: list[tuple[tuple[str, ...], bool]] = [(small, False)]
    if 0 < lacking <= kept:
        tries.insert(0, ((f"training.keep_hidden_bytes={kept - lacking}",), False))
    lora = ("adapter.kind=lora",) if recipe.adapter.kind == "full" else ()
    if lora:
        tries += [(lora, False), (lora + small, False)]
    if not quantized:
        tries += [(lora, True), (lora + small, True)]
    for changes, convert in tries:
        if not _fits(recipe, changes, convert, length_tokens, limit_bytes):
            continue
        if changes == small:
            for larger in halves:
                if _fits(recipe, larger, False, length_tokens, limit_bytes):
                    changes = larger
                    break
        words = [f"--set {one}" for one in changes]
        if convert:
            words.insert(0, f"a {BITS}-bit copy of the model (mlx_lm.convert -q --q-bits {BITS})")
        return f"fits with {' and '.join(words)}"
    return "nothing that this package can change makes it fit; take a smaller model or machine"


def _fits(
    recipe: recipes.Recipe,
    changes: tuple[str, ...],
    convert: bool,
    length_tokens: int,
    limit_bytes: int,
) -> bool:
    model, _ = loading.skeleton(recipe.model, recipe.revision, bits=BITS if convert else None)
    changed = recipes.change(recipe, changes)
    return _peak(footprint(model, changed, length_tokens)) <= limit_bytes
