"""From an adapter folder of any kind to one of another kind, or to a merged model, measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.nn as nn

from abft_mlx import adapters, data, experiment, loading, prediction, read_out, runtime
from abft_mlx import recipe as recipes
from abft_mlx.adapters.files import HUB_NAME
from abft_mlx.adapters.layers import SplitLoRALinear, is_quantized
from abft_mlx.errors import AdapterError, DataError, RunError, UsageError
from abft_mlx.exchange import fused, output, peft
from abft_mlx.exchange.comparison import Answers, Comparison, answers, compare
from abft_mlx.exchange.fused import BITS, Precision
from abft_mlx.prompts import LabelSpace, Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.task import least_demonstrations, prompt_builder

Format = Literal["mlx", "peft", "fused"]
FORMATS: tuple[Format, ...] = ("mlx", "peft", "fused")


LM_HEAD_ONLY = (
    "the run answers from attention, and other programs only know the LM head, whose accuracy is "
    "another: train with --set objective.lm_head=0.5 for them"
)


@dataclass(frozen=True)
class Exported:
    """What an export wrote and measured.

    Attributes:
        folder: where it lies.
        files: name to bytes.
        layers: the layers that the adapter changes.
        base_model: hub id of the base that was written down, or None.
        precision: what the weights of a merged model are, in words; None for an adapter.
        comparison: with base + adapter, on real prompts; None where that was not wanted.
        measured_on: these prompts, in words; None without a comparison.
        warnings: what the user should know.
    """

    folder: Path
    files: dict[str, int]
    layers: list[str]
    base_model: str | None
    precision: str | None
    comparison: Comparison | None
    measured_on: str | None
    warnings: tuple[str, ...]


def export(
    adapter: str | Path,
    to: Format,
    folder: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    recipe: Recipe | None = None,
    test_texts: bool = False,
    prompts: int = 64,
    scale: float = 1.0,
    precision: Precision | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write an adapter in another format, and measure what was written against base + adapter.

    Args:
        adapter: a run folder, an adapter folder of mlx-lm or PEFT, or a hub id of any of them.
        to: "mlx" for stock mlx-lm, "peft", or "fused" for a model with the adapter merged in.
        folder: where to; whole or absent.
        model: the base, where there is no recipe to name it.
        revision: of a hub model.
        recipe: names the base, and the texts to measure on; without it nothing is measured. A run's
            own demonstrations are shown where it has some.
        test_texts: raise an error where the recipe's texts cannot be read. Otherwise a run's own
            demonstrations are asked then, each behind the others.
        prompts: how many test texts to measure on.
        scale: multiplies the adapter's effect.
        precision: of a merged model.
        base_model: hub id of the base to write into an adapter's configuration.
        overwrite: replace an earlier export.
        on_stage: called with what is being done.
        on_progress: called with the number of prompts asked and of all, one stage at a time.

    Raises:
        UsageError: something cannot be used or written; one line that says why.
    """
    folder, adapter = Path(folder), adapters.local_folder(adapter)
    tell = on_stage or (lambda _: None)
    _check(to, scale, precision, base_model)
    name = recipe.model if recipe is not None else model
    if name is None:
        raise UsageError(f"{adapter} does not name its base model; give --model")
    path = loading.find(name, recipe.revision if recipe is not None else revision)
    output.check(folder, [adapter, path], overwrite=overwrite)
    tell(f"opening {name} with {adapter}")
    ask: Callable[[nn.Module], Answers] | None = None
    measured_on = None
    if recipe is not None:
        loaded, space, asked, measured_on = _open(recipe, adapter, prompts, test_texts)
        ask = functools.partial(
            answers,
            prompts=asked,
            space=space,
            batch_tokens=recipe.evaluation.batch_tokens,
            on_progress=on_progress,
        )
    else:
        loaded = loading.load_model(name, revision, adapter=adapter)
    base, quantized = loaded.model, fused.quantized_base(loaded)
    if scale != 1:
        adapters.scale(base, scale)
    layers = list(adapters.adapted(base))
    reads_attention = read_out.of(base) is not None
    precision = precision or Precision()
    if to == "fused":
        precision.check(quantized)
    elif to == "peft":
        peft.check(base)
    else:
        _check_mlx(base)
    if ask is not None:
        tell("asking base + adapter")
        adapted = ask(base)
        with adapters.without(base):
            alone = ask(base)
    named = base_model if base_model is not None else _hub_name(name, to, quantized)
    tell(f"writing {folder}")
    with output.staged(folder) as staged:
        if to == "fused":
            fused.save(loaded, fused.fuse(loaded, precision), staged)
        else:
            (peft if to == "peft" else adapters).save(base, staged, base_model=named)
        comparison = None
        if ask is not None:
            tell("asking what was written")
            if to == "fused":
                # One model in memory at a time.
                del loaded, base
                runtime.release_memory()
                base = loading.load_model(str(staged)).model
            else:
                adapters.detach(base)
                adapters.load(base, staged)
            comparison = compare(alone, adapted, ask(base))
        files = output.sizes(staged)
    return Exported(
        folder,
        files,
        layers,
        named,
        precision.in_words(quantized) if to == "fused" else None,
        comparison,
        measured_on,
        tuple(
            [LM_HEAD_ONLY] * reads_attention
            + list(_warnings(to, quantized, named, precision, comparison))
        ),
    )


def _open(
    recipe: Recipe, adapter: Path, count: int, test_texts: bool
) -> tuple[loading.Loaded, LabelSpace, list[Prompt], str]:
    """A recipe's model with an adapter, its labels, prompts to ask it, and what these are."""
    recipe = recipes.resolve(recipe)
    shipped = prediction.Shipped.read(adapter)
    if shipped is None:
        opened = experiment.prepare(recipe, adapter)
        few = recipe.evaluation.model_copy(update={"queries": count, "repeats": 1})
        made = list(opened.task.test_prompts(few))
        return opened.loaded, opened.task.space, made, f"test texts of {recipe.data.source}"
    section = prediction.with_words(recipes.task(recipe), shipped)
    try:
        texts = data.load(section.data)
        asked = data.split(texts, section.data, least_demonstrations(section)).test.pairs()[:count]
        problem = f"{recipe.data.source} has no test texts"
    except (DataError, RunError) as error:
        if test_texts:
            raise
        asked, problem = [], str(error)
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    builder = prompt_builder(section, shipped.names, loaded.tokenizer, loaded.context_tokens)
    predictor = shipped.predictor(loaded.model, builder, recipe.evaluation.batch_tokens)
    shown = shipped.demonstrations
    if asked:
        made = predictor.prompts_of(asked)
        what = f"test texts of {recipe.data.source} behind the run's demonstrations"
    else:
        if shipped.nearest is not None:
            made = predictor.prompts_of(shown[:count])
        else:
            made = [
                builder.build((*shown[:n], *shown[n + 1 :]), *one, where="a demonstration")
                for n, one in enumerate(shown)
            ]
        what = f"the run's demonstrations, each behind the others ({problem})"
    return loaded, builder.space, made, what


def _check(to: str, scale: float, precision: Precision | None, base_model: str | None) -> None:
    if to not in FORMATS:
        raise UsageError(f"--to {to!r}: choose one of {', '.join(FORMATS)}")
    if not math.isfinite(scale) or scale == 0:
        raise UsageError(
            f"--scale {scale}: give a finite number that is not 0, such as 1.5; 1 leaves the "
            "adapter as it was trained"
        )
    if to != "fused" and precision not in (None, Precision()):
        raise UsageError(
            "--dequantize, --float-merged and --quantize are for merged models; leave them out, or "
            "export --to fused"
        )
    if to == "fused" and base_model is not None:
        raise UsageError(
            f"--base-model {base_model}: a merged model needs no base; leave it out, or export "
            "--to mlx or --to peft"
        )
    if base_model is not None and HUB_NAME.fullmatch(base_model) is None:
        raise UsageError(f"--base-model {base_model!r} is not a hub id; give one like owner/name")


def _check_mlx(model: nn.Module) -> None:
    """Refuse an adapter that stock mlx-lm cannot load."""
    modules = adapters.adapted(model)
    whole = [
        path
        for path, one in modules.items()
        if isinstance(one, (adapters.FullLinear, SplitLoRALinear))
    ]
    if whole and any(map(is_quantized, modules.values())):
        raise AdapterError(
            f"stock mlx-lm cannot load an adapter of {whole[0]} on a quantized base; export --to "
            "fused instead"
        )


def _hub_name(name: str, to: Format, quantized: bool) -> str | None:
    """The base that an adapter's configuration names, where the base at hand is that one."""
    local = name == loading.DEMO or Path(name).exists() or HUB_NAME.fullmatch(name) is None
    # transformers cannot load what MLX quantized.
    other = to == "peft" and quantized
    return None if local or other or to == "fused" else name


def _warnings(
    to: Format,
    quantized: bool,
    base_model: str | None,
    precision: Precision,
    comparison: Comparison | None,
) -> list[str]:
    found = []
    if to == "peft" and quantized and base_model is None:
        found.append(
            "the base is quantized by MLX, and transformers cannot load it: use this adapter with "
            "the model that the base was made from, and name that one with --base-model"
        )
    if comparison is not None and (comparison.lost or comparison.weakened):
        bits = f" in {precision.bits} bits" if precision.bits else ""
        what = "the adapter is lost" if comparison.lost else "a part of the adapter is lost"
        found.append(
            f"{what}{bits}: {max(comparison.kept or 0.0, 0.0):.0%} of its effect on "
            f"the labels is left, and {comparison.result.agreement} of {comparison.prompts} "
            "labels are the same as with base + adapter (base alone: "
            f"{comparison.base.agreement}); {_way_out(to, quantized, precision)}"
        )
    return found


def _way_out(to: Format, quantized: bool, precision: Precision) -> str:
    if to != "fused":
        return "use the original adapter"
    if not quantized:
        return "leave --quantize out, or give it more bits"
    more = "" if precision.bits == BITS[-1] else f"; or --quantize {BITS[-1]}"
    return "give --float-merged, which keeps merged layers in floating point" + more
