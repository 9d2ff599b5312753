"""What the hub refuses in a model card, by its specification."""

from __future__ import annotations

import re

import yaml

LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "other"}


def card_problems(content: str) -> list[str]:
    """What the hub would refuse in a card's metadata, by its specification of model cards."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata"]
    head = yaml.safe_load(match[1])
    problems = []
    if "base_model" in head and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(head["base_model"])):
        problems.append("base_model is not the id of a model")
    if head.get("license", "mit") not in LICENSES:
        problems.append("license must be one of the hub's")
    for one in head.get("datasets", []):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", one):
            problems.append("datasets holds what is no id")
    for model in head.get("model-index", []):
        for result in model["results"]:
            complete = result["task"]["type"] and result["dataset"]["type"]
            if not complete or not all("value" in one for one in result["metrics"]):
                problems.append("model-index is not complete")
    return problems
