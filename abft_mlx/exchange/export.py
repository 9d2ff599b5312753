"""From an adapter of any format to another format or to a merged model, measured.

The same prompts are asked of the base alone, of base + adapter, and of what was written.
Letters: N prompts, V vocabulary, C labels.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
import numpy as np

from abft_mlx import adapters, data, experiment, loading, prediction, read_out, runtime
from abft_mlx import recipe as recipes
from abft_mlx.adapters.files import HUB_NAME
from abft_mlx.adapters.lora import SplitLoRALinear, is_quantized
from abft_mlx.errors import AdapterError, DataError, OutputError, RunError, UsageError
from abft_mlx.evaluation import check_finite, outputs, vocabulary_logits
from abft_mlx.exchange import fused, peft
from abft_mlx.exchange.fused import BITS, Precision
from abft_mlx.files import write_failure
from abft_mlx.prompts import LabelSpace, Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.task import least_demonstrations, prompt_builder

Format = Literal["mlx", "peft", "fused"]
FORMATS: tuple[Format, ...] = ("mlx", "peft", "fused")
# Of the adapter's effect: below the first a part is lost, below the second all counts as lost.
KEPT_WHOLE, KEPT_AT_LEAST = 0.9, 0.5
# What an export may leave in its folder, and --overwrite may therefore remove.
OWN_FILES = ("*.safetensors", "*config.json", "*.index.json", "README.md", *fused.COPIED_FILES)
LM_HEAD_ONLY = (
    "the run answers from attention, and other programs only know the LM head, whose accuracy is "
    "another: train with --set objective.lm_head=0.5 for them"
)


@dataclass(frozen=True)
class Answers:
    """What a model answers to some prompts."""

    vocabulary: np.ndarray  # (N, V) float32, logits at the last position
    labels: np.ndarray  # (N, C), scores of the classes: logits where label words are one token


def answers(
    model: nn.Module,
    prompts: Sequence[Prompt],
    space: LabelSpace,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Ask a model some prompts; RunError if a score is not finite."""
    result = outputs(model, prompts, space, batch_tokens=batch_tokens, on_progress=on_progress)
    logits = np.concatenate([np.array(part) for part in vocabulary_logits(model, result.hidden)])
    labels = logits[:, list(space.first_ids)]
    if result.later is not None:
        labels = labels + np.array(result.later, np.float64)
    check_finite(labels)
    return Answers(logits, labels)


@dataclass(frozen=True)
class Distance:
    """Absolute differences of two models' logits, and prompts with the same label in both."""

    vocabulary_max: float
    vocabulary_mean: float
    labels_max: float
    labels_mean: float
    agreement: int

    @classmethod
    def between(cls, left: Answers, right: Answers) -> Distance:
        """From the answers of two models to the same prompts."""
        whole = np.abs(left.vocabulary - right.vocabulary)
        few = np.abs(left.labels - right.labels)
        return cls(
            vocabulary_max=float(whole.max()),
            vocabulary_mean=float(whole.mean(dtype=np.float64)),
            labels_max=float(few.max()),
            labels_mean=float(few.mean(dtype=np.float64)),
            agreement=int((left.labels.argmax(axis=1) == right.labels.argmax(axis=1)).sum()),
        )


@dataclass(frozen=True)
class Comparison:
    """Distances from base + adapter, of N prompts."""

    prompts: int
    result: Distance  # to what was written
    base: Distance  # to the base alone: the adapter's own effect

    @property
    def kept(self) -> float | None:
        """Share of the adapter's effect on the labels' scores that is left: 1 is all of it.

        One minus the result's mean distance in parts of the base's, so that noise counts as loss;
        below 0 the result is further off than the base. None where the adapter does nothing.
        """
        if self.base.labels_mean == 0:
            return None
        return 1 - self.result.labels_mean / self.base.labels_mean

    @property
    def lost(self) -> bool:
        """Whether less than half of the effect is left, or the base's labels are nearer."""
        if self.kept is None:
            return False
        return self.kept < KEPT_AT_LEAST or self.result.agreement < self.base.agreement

    def as_dict(self) -> dict[str, Any]:
        """For the JSON document."""
        return asdict(self) | {"kept": self.kept, "lost": self.lost}


@dataclass(frozen=True)
class Exported:
    """What an export wrote and measured."""

    folder: Path
    files: dict[str, int]  # name to bytes
    layers: list[str]  # that the adapter changes
    base_model: str | None  # hub id of the base in the adapter's configuration
    precision: str | None  # of a merged model's weights, in words
    comparison: Comparison | None  # with base + adapter; None if nothing was measured
    measured_on: str | None  # the prompts, in words
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
    stage = on_stage or (lambda _: None)
    _check_options(to, scale, precision, base_model)
    name = recipe.model if recipe is not None else model
    if name is None:
        raise UsageError(f"{adapter} does not name its base model; give --model")
    path = loading.find(name, recipe.revision if recipe is not None else revision)
    _check_folder(folder, [adapter, path], overwrite=overwrite)
    stage(f"opening {name} with {adapter}")
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
    warnings = [LM_HEAD_ONLY] if read_out.of(base) is not None else []
    precision = precision or Precision()
    if to == "fused":
        precision.check(quantized)
    elif to == "peft":
        peft.check(base)
    else:
        _check_mlx(base)
    if ask is not None:
        stage("asking base + adapter")
        adapted = ask(base)
        with adapters.without(base):
            alone = ask(base)
    named = base_model if base_model is not None else _hub_name(name, to, quantized)
    if to == "peft" and quantized and named is None:
        warnings.append(
            "the base is quantized by MLX, and transformers cannot load it: use this adapter with "
            "the model that the base was made from, and name that one with --base-model"
        )
    stage(f"writing {folder}")
    with _staged(folder) as staged:
        if to == "fused":
            fused.save(loaded, fused.fuse(loaded, precision), staged)
        else:
            (peft if to == "peft" else adapters).save(base, staged, base_model=named)
        comparison = None
        if ask is not None:
            stage("asking what was written")
            if to == "fused":
                # One model in memory at a time.
                del loaded, base
                runtime.release_memory()
                base = loading.load_model(str(staged)).model
            else:
                adapters.detach(base)
                adapters.load(base, staged)
            result = ask(base)
            comparison = Comparison(
                len(adapted.labels),
                result=Distance.between(adapted, result),
                base=Distance.between(adapted, alone),
            )
            warnings += _loss(comparison, to, quantized, precision)
        files = {file.name: file.stat().st_size for file in sorted(staged.iterdir())}
    words = precision.in_words(quantized) if to == "fused" else None
    return Exported(folder, files, layers, named, words, comparison, measured_on, tuple(warnings))


def _open(
    recipe: Recipe, adapter: Path, count: int, test_texts: bool
) -> tuple[loading.Loaded, LabelSpace, list[Prompt], str]:
    """A recipe's model with an adapter, its labels, prompts to ask it, and what these are."""
    recipe = recipes.resolve(recipe)
    shipped = prediction.Shipped.read(adapter)
    if shipped is None:
        opened = experiment.prepare(recipe, adapter)
        few = recipe.evaluation.model_copy(update={"queries": count, "repeats": 1})
        chosen = list(opened.task.test_prompts(few))
        return opened.loaded, opened.task.space, chosen, f"test texts of {recipe.data.source}"
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
        chosen = predictor.prompts_of(asked)
        what = f"test texts of {recipe.data.source} behind the run's demonstrations"
    else:
        if shipped.nearest is not None:
            chosen = predictor.prompts_of(shown[:count])
        else:
            chosen = [
                builder.build((*shown[:n], *shown[n + 1 :]), *query, where="a demonstration")
                for n, query in enumerate(shown)
            ]
        what = f"the run's demonstrations, each behind the others ({problem})"
    return loaded, builder.space, chosen, what


def _check_options(
    to: str, scale: float, precision: Precision | None, base_model: str | None
) -> None:
    """Refuse options that exclude each other, before any long work."""
    if to not in FORMATS:
        raise UsageError(f"--to {to!r}: choose one of {', '.join(FORMATS)}")
    if not math.isfinite(scale) or scale == 0:
        raise UsageError(f"--scale {scale}: give a finite number that is not 0, such as 1.5")
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
    kinds = (adapters.FullLinear, SplitLoRALinear)
    whole = [path for path, module in modules.items() if isinstance(module, kinds)]
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


def _loss(
    comparison: Comparison, to: Format, quantized: bool, precision: Precision
) -> Iterator[str]:
    """A warning, if what was written has lost a part of the adapter's effect."""
    kept, lost = comparison.kept, comparison.lost
    if not lost and (kept is None or kept >= KEPT_WHOLE):
        return
    if to != "fused":
        way_out = "use the original adapter"
    elif not quantized:
        way_out = "leave --quantize out, or give it more bits"
    else:
        way_out = "give --float-merged, which keeps merged layers in floating point"
        way_out += "" if precision.bits == BITS[-1] else f"; or --quantize {BITS[-1]}"
    yield (
        f"{'the adapter' if lost else 'a part of the adapter'} is lost"
        f"{f' in {precision.bits} bits' if precision.bits else ''}: {max(kept or 0.0, 0.0):.0%} of "
        f"its effect on the labels is left, and {comparison.result.agreement} of "
        f"{comparison.prompts} labels are the same as with base + adapter (base alone: "
        f"{comparison.base.agreement}); {way_out}"
    )


def _check_folder(output: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a folder that contains what is read, or anything but an earlier export."""
    where = output.resolve()
    for source in (path.resolve() for path in sources):
        if where == source or where in source.parents:
            raise OutputError(
                f"{output}: contains {source.name}, which is exported; choose another --output"
            )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is a file; name a folder with --output")
    for path in sorted(output.iterdir()):
        if not any(path.match(pattern) for pattern in OWN_FILES):
            raise OutputError(
                f"{output}: contains {path.name}, which is not a file of an export; choose another "
                "--output"
            )
        if not overwrite:
            raise OutputError(
                f"{output}: contains an export already; use --overwrite to replace it, or another "
                "--output"
            )


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A new folder beside the output; it takes the output's place if the block succeeds."""
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except OSError as error:
        raise write_failure(output, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
