"""What measured accuracy means for a user: better than prompting, better than a simple baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abft_mlx.evaluation.metrics import mcnemar, right_answers

# Differences with a larger p-value count as none.
SIGNIFICANT = 0.05
BETTER, SAME, WORSE = "better", "no clear difference", "worse"


def compare(right: str, other: str) -> str:
    """BETTER, SAME or WORSE by the exact McNemar test of two ``right`` strings."""
    found = mcnemar(right_answers(right), right_answers(other))
    if found["p_value"] >= SIGNIFICANT:
        return SAME
    return BETTER if found["only_first"] > found["only_second"] else WORSE


def recalls(labels: list[str], counts: list[list[int]]) -> dict[str, float | None]:
    """Share of each class's texts that were labelled rightly; None for a class without texts."""
    return {
        name: row[number] / sum(row) if sum(row) else None
        for number, (name, row) in enumerate(zip(labels, counts, strict=True))
    }


def verdict(document: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a classifier.

    Args:
        document: eval's JSON with ``methods.classifier``, and ``base`` and ``baselines`` where
            there is an adapter and training texts.

    Returns:
        ``accuracy``, ``interval``, ``n``; ``before``, ``majority``, ``bag_of_words`` and the
        comparisons ``against_prompting`` and ``against_bag_of_words`` where they were measured;
        ``recall`` of each class; ``sentence`` and ``next`` for a person.
    """
    method = document["methods"]["classifier"]
    found: dict[str, Any] = {
        "accuracy": method["accuracy"],
        "interval": method.get("interval", {}).get("accuracy"),
        "n": document["prompts"],
        "recall": recalls(document["labels"], method["confusion"]),
    }
    base = document.get("base", {}).get("methods", {}).get("classifier")
    if base is not None:
        found["before"] = base["accuracy"]
        found["against_prompting"] = compare(method["right"], base["right"])
    baselines = document.get("baselines", {})
    if "bag_of_words" in baselines:
        simple = baselines["bag_of_words"]
        found["majority"] = baselines["majority"]["accuracy"]
        found["bag_of_words"] = simple["accuracy"]
        found["against_bag_of_words"] = compare(method["right"], simple["right"])
    found["sentence"] = _sentence(found)
    found["next"] = _next(found)
    return found


def _sentence(found: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    words = {BETTER: "better than", SAME: "not clearly different from", WORSE: "worse than"}
    parts = [
        f"{words[found[against]]} {name} ({found[rate]:.1%})"
        for rate, against, name in (
            ("before", "against_prompting", "prompting"),
            ("bag_of_words", "against_bag_of_words", "bag of words"),
        )
        if rate in found
    ]
    what = "The fine-tuned classifier" if "before" in found else "The prompted classifier"
    joined = " and ".join(parts) or "measured without a comparison"
    return f"{what} ({found['accuracy']:.1%}) is {joined}."


def _next(found: Mapping[str, Any]) -> str:
    """What to do next."""
    if found["n"] < 100:
        more = f"label more texts: {found['n']} test texts say little"
    else:
        more = "label more texts, or take a larger model"
    if "before" not in found:
        return "Fine-tune it: abft-mlx finetune."
    if found.get("against_bag_of_words") == WORSE:
        return f"Bag of words with logistic regression is the better choice here; or {more}."
    if found.get("against_prompting") == WORSE:
        return f"Use the model without the adapter; or {more}."
    if found.get("against_prompting") == SAME:
        return f"To gain more, train longer (--updates 128), or {more}."
    return "Label texts with it: abft-mlx predict."
