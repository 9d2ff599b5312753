"""A run's title and its one paragraph."""

from __future__ import annotations

from abft_mlx.analysis.report.html import Markup, element, join
from abft_mlx.analysis.report.results import headline, interval, measured, rate
from abft_mlx.analysis.run_files import RunFiles
from abft_mlx.documents import find, number, short, text

_OBJECTIVES = {
    "abft": "ABFT",
    "end_to_end": "End-to-end fine-tuning",
    "read_out": "The label-attention read-out",
}


def title(run: RunFiles) -> str:
    """What was trained on what."""
    kind = text(run.recipe, "objective", "kind") or "abft"
    model = text(run.run, "model", "source") or text(run.recipe, "model") or "a model"
    data = text(run.run, "data", "source") or text(run.recipe, "data", "source") or "its data"
    name = {"abft": "ABFT", "end_to_end": "End to end", "read_out": "Read-out"}.get(kind, kind)
    return f"{name}: {short(model)} on {short(data)}"


def summary(run: RunFiles) -> Markup:
    """What was trained, on what, how long, how much memory, and what came of it."""
    parts = [_trained(run), _cost(run), _gained(run)]
    made = join(*(one for one in parts if one), between=" ")
    description = text(run.recipe, "description")
    return join(
        None if description is None else element("p", description, class_="lead"),
        element("p", made),
        None
        if run.run.get("finished") is True
        else element(
            "p", element("strong", "This run is not finished. "), "abft-mlx finetune --resume "
            "goes on with it; what follows is what it had written.", class_="warning",
        ),
    )  # fmt: skip


def validation(run: RunFiles) -> Markup | None:
    """Validation accuracy before and after, where the run measured it."""
    before, after = (number(run.run, "validation", key) for key in ("before", "after"))
    if before is None or after is None:
        return None
    n = number(run.run, "validation", "prompts")
    of = "" if n is None else f" (n = {n:,})"
    gained = element("strong", f"{rate(before)} → {rate(after)}")
    return join("Validation accuracy ", gained, f"{of}.")


def size(count_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count_bytes >= factor:
            return f"{count_bytes / factor:.3g} {unit}"
    return f"{count_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _trained(run: RunFiles) -> str:
    kind = text(run.recipe, "objective", "kind") or "abft"
    said = _OBJECTIVES.get(kind, kind)
    parameters = number(run.run, "trainable_parameters")
    what = "an adapter" if parameters is None else f"{parameters:,} parameters"
    rank = number(run.recipe, "adapter", "rank")
    if text(run.recipe, "adapter", "kind") == "full":
        what += ", all of W_Q and W_K"
    elif rank is not None:
        what += f", LoRA of rank {rank} on W_Q and W_K"
    if find(run.recipe, "adapter", "head") is True:
        what += " and the LM head"
    model = text(run.run, "model", "source") or "the model"
    data = text(run.run, "data", "source") or "its data"
    k = number(run.recipe, "prompt", "demonstrations")
    prompts = "" if k is None else f", prompts of {k} demonstrations"
    classes = find(run.run, "labels")
    of = f" ({len(classes)} labels)" if isinstance(classes, dict) else ""
    return f"{said} trained {what}, in the model {short(model)} on {short(data)}{of}{prompts}."


def _cost(run: RunFiles) -> str:
    updates = number(run.run, "totals", "updates")
    seen = number(run.run, "totals", "seen_examples")
    seconds = number(run.run, "totals", "seconds")
    peak = number(run.run, "totals", "peak_memory_bytes")
    adapter = number(run.run, "totals", "adapter_bytes")
    device = text(run.run, "device")
    told = "" if updates is None else f"{updates:,} updates"
    if told and seen is not None:
        told += f" of {seen:,} prompts in all"
    if seconds is not None:
        told += f"{' took' if told else 'It took'} {duration(seconds)}"
    if peak is not None:
        told += f"{', with ' if told else 'It took '}{size(peak)} of MLX's memory at the peak"
    if told and device:
        told += f" ({device})"
    if adapter:
        told += f"; the adapter is {size(adapter)}" if told else f"The adapter is {size(adapter)}"
    return told + "." if told else ""


def _gained(run: RunFiles) -> Markup | None:
    found = measured(run)
    line = headline(run)
    if line is not None:
        after = next((values for who, _, values in found if who == "adapter"), None)
        ends = None if after is None else interval(after, "accuracy")
        n = number(run.evaluation, "prompts")
        more = []
        if ends is not None:
            more.append(f"95% interval with the adapter {rate(ends[0])} to {rate(ends[1])}")
        more += [] if n is None else [f"n = {n:,}"]
        return join(line, f" ({', '.join(more)})." if more else ".")
    return validation(run)
