"""From an adapter of any format to another format or to a merged model, measured.

The same prompts are asked of the base alone, of base + adapter, and of what was written. Over a
quantized base merged weights have to be quantized again, or stay in floating point; what that does
to a small adapter is not known beforehand. Letters: N prompts, V vocabulary, C labels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import utils as mlx_lm_utils

from abft_mlx import adapters, data, experiment, loading, prediction, read_out, runtime
from abft_mlx import recipe as recipes
from abft_mlx.adapters.files import HUB_NAME
from abft_mlx.adapters.lora import base_of, is_quantized, put
from abft_mlx.errors import (
    AdapterError,
    DataError,
    ModelError,
    OutputError,
    RunError,
    UsageError,
)
from abft_mlx.evaluation import check_finite, outputs, vocabulary_logits
from abft_mlx.exchange import peft
from abft_mlx.files import write_failure, write_json
from abft_mlx.ports import resolve
from abft_mlx.prompts import LabelSpace, Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.task import least_demonstrations, prompt_builder

Format = Literal["mlx", "peft", "fused"]
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64
# Of the adapter's effect: below the first a part is lost, below the second all counts as lost.
KEPT_WHOLE, KEPT_AT_LEAST = 0.9, 0.5
# What a merged model takes over from its base as it is.
COPIED_FILES = (
    "generation_config.json", "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "chat_template.*", "*.py",
)  # fmt: skip
# What an export may leave in its folder, and --overwrite may therefore remove.
OWN_FILES = ("*.safetensors", "*config.json", "*.index.json", "README.md", *COPIED_FILES)
LM_HEAD_ONLY = (
    "the run answers from attention, and other programs only know the LM head, whose accuracy is "
    "another: train with --set objective.lm_head=0.5 for them"
)


@dataclass(frozen=True)
class Precision:
    """In what precision the merged model is written. At most one of these; none is the base's own.

    Attributes:
        dequantize: all of a quantized base becomes floating point.
        float_merged: what the adapter changes stays in floating point, the rest as it is.
        bits: quantize to these: a float base as a whole, of a quantized one what was merged.
    """

    dequantize: bool = False
    float_merged: bool = False
    bits: int | None = None

    def check(self, quantized: bool) -> None:
        """Raise UsageError for two at once, unknown bits, or a base that is not quantized."""
        flags = {
            "--dequantize": self.dequantize,
            "--float-merged": self.float_merged,
            "--quantize": self.bits is not None,
        }
        chosen = [flag for flag, value in flags.items() if value]
        if len(chosen) > 1:
            raise UsageError(f"{chosen[0]} and {chosen[1]} exclude each other; give one of them")
        if self.bits is not None and self.bits not in BITS:
            raise UsageError(
                f"--quantize {self.bits}: MLX quantizes to {', '.join(map(str, BITS))} bits"
            )
        if not quantized and chosen and self.bits is None:
            raise UsageError(f"{chosen[0]}: the base is not quantized, so leave it out")

    def in_words(self, quantized: bool) -> str:
        """What the written model will be."""
        if self.dequantize:
            return "floating point, dequantized"
        if self.float_merged:
            return "as the base, what was merged in floating point"
        if self.bits is not None:
            return ("as the base, what was merged in " if quantized else "") + f"{self.bits} bits"
        return "quantized again as the base" if quantized else "floating point, as the base"


class Answers(NamedTuple):
    """What a model answers to some prompts."""

    vocabulary: np.ndarray  # (N, V) float32, logits at the last position
    labels: np.ndarray  # (N, C), scores of the classes: logits where label words are one token


def _distance(left: Answers, right: Answers) -> dict[str, Any]:
    """Absolute differences of two models' logits, and prompts with the same label in both."""
    distances: dict[str, Any] = {}
    for name in ("vocabulary", "labels"):
        apart = np.abs(getattr(left, name) - getattr(right, name))
        distances[f"{name}_max"] = float(apart.max())
        distances[f"{name}_mean"] = float(apart.mean(dtype=np.float64))
    same = left.labels.argmax(axis=1) == right.labels.argmax(axis=1)
    return distances | {"agreement": int(same.sum())}


def _compare(adapted: Answers, base: Answers, result: Answers) -> dict[str, Any]:
    """Distances of base + adapter from the base alone and from what was written.

    ``kept`` is the share of the adapter's effect on the labels' scores that is left: one minus the
    result's mean distance in parts of the base's, so that noise counts as loss; None where the
    adapter does nothing. ``lost``: less than half is left, or the base's labels are nearer.
    """
    own, left = _distance(adapted, base), _distance(adapted, result)
    effect = own["labels_mean"]
    kept = 1 - left["labels_mean"] / effect if effect else None
    lost = kept is not None and (kept < KEPT_AT_LEAST or left["agreement"] < own["agreement"])
    return {
        "prompts": len(adapted.labels), "result": left, "base": own, "kept": kept, "lost": lost
    }  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What an export wrote and measured."""

    folder: Path
    files: dict[str, int]  # name to bytes
    layers: list[str]  # that the adapter changes
    base_model: str | None  # hub id of the base in the adapter's configuration
    precision: str | None  # of a merged model's weights, in words
    measured: dict[str, Any] | None  # against base + adapter, as _compare gives it
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
    on_stage: Callable[[str], None] = lambda _: None,
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
    precision = precision or Precision()
    _check_options(to, scale, precision, base_model)
    name = recipe.model if recipe is not None else model
    if name is None:
        raise UsageError(f"{adapter} does not name its base model; give --model")
    path = loading.find(name, recipe.revision if recipe is not None else revision)
    _check_folder(folder, [adapter, path], overwrite=overwrite)
    on_stage(f"opening {name} with {adapter}")
    ask: Callable[[nn.Module], Answers] | None = None
    measured_on = None
    if recipe is None:
        loaded = loading.load_model(name, revision, adapter=adapter)
    else:
        loaded, space, queries, measured_on = _open(recipe, adapter, prompts, test_texts)
        tokens = recipe.evaluation.batch_tokens
        ask = functools.partial(
            _answers, prompts=queries, space=space, batch_tokens=tokens, on_progress=on_progress
        )
    base = loaded.model
    modules = adapters.adapted(base)
    layers, changes_quantized = list(modules), any(map(is_quantized, modules.values()))
    quantized = changes_quantized or "quantization" in loaded.config
    if scale != 1:
        adapters.scale(base, scale)
    warnings = [LM_HEAD_ONLY] if read_out.of(base) is not None else []
    if to == "fused":
        precision.check(quantized)
    elif to == "peft":
        peft.check(base)
    else:
        full = [path for path, m in modules.items() if isinstance(m, adapters.FullLinear)]
        if full and changes_quantized:
            raise AdapterError(
                f"stock mlx-lm cannot load an adapter of {full[0]} on a quantized base; export "
                "--to fused instead"
            )
    if ask is not None:
        on_stage("asking base + adapter")
        adapted = ask(base)
        with adapters.without(base):
            alone = ask(base)
    local = name == loading.DEMO or Path(name).exists() or HUB_NAME.fullmatch(name) is None
    # transformers cannot load what MLX quantized.
    if base_model is None and not (local or to == "fused" or (to == "peft" and quantized)):
        base_model = name
    if to == "peft" and quantized and base_model is None:
        warnings.append(
            "the base is quantized by MLX, and transformers cannot load it: use this adapter with "
            "the model that the base was made from, and name that one with --base-model"
        )
    on_stage(f"writing {folder}")
    with _staged(folder) as staged:
        if to == "fused":
            _save_fused(loaded, _fuse(loaded, quantized, precision), staged)
        else:
            (peft if to == "peft" else adapters).save(base, staged, base_model=base_model)
        measured = None
        if ask is not None:
            on_stage("asking what was written")
            if to == "fused":
                # One model in memory at a time.
                del loaded, base, modules
                runtime.release_memory()
                base = loading.load_model(str(staged)).model
            else:
                adapters.detach(base)
                adapters.load(base, staged)
            measured = _compare(adapted, alone, ask(base))
            warnings += _loss(measured, to, quantized, precision)
        files = {file.name: file.stat().st_size for file in sorted(staged.iterdir())}
    words = precision.in_words(quantized) if to == "fused" else None
    return Exported(
        folder, files, layers, base_model, words, measured, measured_on, tuple(warnings)
    )


def _answers(
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


def _open(
    recipe: Recipe, adapter: Path, count: int, test_texts: bool
) -> tuple[loading.Loaded, LabelSpace, list[Prompt], str]:
    """A recipe's model with an adapter, its labels, prompts to ask it, and what these are."""
    recipe = recipes.resolve(recipe)
    shipped = prediction.Shipped.read(adapter)
    if shipped is None:
        opened = experiment.prepare(recipe, adapter)
        few = recipe.evaluation.model_copy(update={"queries": count, "repeats": 1})
        queries = list(opened.task.test_prompts(few))
        return opened.loaded, opened.task.space, queries, f"test texts of {recipe.data.source}"
    section = prediction.with_words(recipes.task(recipe), shipped)
    try:
        texts = data.load(section.data)
        pairs = data.split(texts, section.data, least_demonstrations(section)).test.pairs()[:count]
        problem = f"{recipe.data.source} has no test texts"
    except (DataError, RunError) as error:
        if test_texts:
            raise
        pairs, problem = [], str(error)
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    builder = prompt_builder(section, shipped.names, loaded.tokenizer, loaded.context_tokens)
    predictor = shipped.predictor(loaded.model, builder, recipe.evaluation.batch_tokens)
    shown = shipped.demonstrations
    if pairs:
        chosen = predictor.prompts_of(pairs)
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


def _check_options(to: str, scale: float, precision: Precision, base_model: str | None) -> None:
    """Refuse options that exclude each other, before any long work."""
    if not math.isfinite(scale) or scale == 0:
        raise UsageError(f"--scale {scale}: give a finite number that is not 0, such as 1.5")
    if to != "fused" and precision != Precision():
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


def _loss(
    measured: dict[str, Any], to: Format, quantized: bool, precision: Precision
) -> Iterator[str]:
    """A warning, if what was written has lost a part of the adapter's effect."""
    kept, lost = measured["kept"], measured["lost"]
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
        f"its effect on the labels is left, and {measured['result']['agreement']} of "
        f"{measured['prompts']} labels are the same as with base + adapter (base alone: "
        f"{measured['base']['agreement']}); {way_out}"
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


def _fuse(loaded: loading.Loaded, quantized: bool, precision: Precision) -> dict[str, Any]:
    """Merge the adapter into the model, in place; the config.json of the merged model."""
    config, model = copy.deepcopy(loaded.config), loaded.model
    if not quantized and "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        raise ModelError(
            f"{loaded.source} is quantized with {method}, which cannot be merged into; take the "
            "unquantized model"
        )
    bases = {path: base_of(module) for path, module in adapters.adapted(model).items()}
    adapters.merge(model, dequantize=True)
    if precision.dequantize:
        mlx_lm_utils.dequantize_model(model)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
    elif quantized:
        for path, base in bases.items():
            if "scales" in base and precision.float_merged:
                config["quantization"].pop(path, None)
            elif "scales" in base:
                _quantize_again(model, path, base, precision.bits, config["quantization"])
    elif precision.bits is not None:
        # It prints what it did, which the command says itself.
        with contextlib.redirect_stdout(io.StringIO()):
            _, config = mlx_lm_utils.quantize_model(model, config, GROUP_SIZE, precision.bits)
        if not any("scales" in module for _, module in model.named_modules()):
            raise UsageError(
                f"--quantize {precision.bits}: no layer of this model is as wide as a multiple of "
                f"{GROUP_SIZE}, so none can be quantized; leave it out"
            )
    mx.eval(model.parameters())
    return config


def _quantize_again(
    model: nn.Module, path: str, base: nn.Module, bits: int | None, written: dict[str, Any]
) -> None:
    """Quantize a merged layer as its base was; note in the configuration if it has other bits."""
    settings = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    if bits not in (None, base.bits):
        group = base.group_size if base.mode == "affine" else GROUP_SIZE
        settings = {"group_size": group, "bits": bits, "mode": "affine"}
        written[path] = settings
    merged = resolve(model, path)
    if not hasattr(merged, "to_quantized") or merged.weight.shape[-1] % settings["group_size"]:
        raise AdapterError(
            f"{path} cannot be quantized again in groups of {settings['group_size']}; give "
            "--float-merged to leave it in floating point"
        )
    put(model, path, merged.to_quantized(**settings))


def _save_fused(loaded: loading.Loaded, config: dict[str, Any], folder: Path) -> None:
    """Write a merged model: weights, config.json, the base's tokenizer."""
    model = loaded.model
    try:
        mlx_lm_utils.save_model(folder, model, donate_model=False)
    except RuntimeError as error:
        raise OutputError(f"{folder}: cannot be written ({error})") from error
    vision = "vision_tower" in getattr(model, "model", {})
    options = {"keep_vision_config": True} if vision else {}
    mlx_lm_utils.save_config(config, config_path=folder / "config.json", **options)
    for file in sorted(loaded.path.iterdir()):
        if not file.is_file() or not any(file.match(pattern) for pattern in COPIED_FILES):
            continue
        shutil.copyfile(file, folder / file.name)
        if file.name == "tokenizer_config.json":
            # It may remember a folder of this machine.
            settings = json.loads(file.read_text(encoding="utf-8"))
            name = settings.get("name_or_path")
            if isinstance(name, str) and HUB_NAME.fullmatch(name) is None:
                del settings["name_or_path"]
                write_json(folder / file.name, settings)
