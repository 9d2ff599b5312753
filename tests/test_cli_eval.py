"""``abft-mlx eval`` with protocols and methods, on a model of two layers and on the bundled one."""

from __future__ import annotations

import pytest
from cli_support import document, invoke

SMALL = (
    "--set", "evaluation.queries=10",
    "--set", "evaluation.repeats=1",
    "--set", "evaluation.calibration_prompts=6",
    "--set", "evaluation.anchor_prompts=12",
    "--set", "evaluation.bootstrap_samples=20",
)  # fmt: skip


def test_every_protocol_and_method_in_one_document() -> None:
    result = invoke(
        "eval", "demo", "--protocol", "all", "--methods", "all", "--transfer",
        "generated/urgency,generated/question", *SMALL, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert list(found["methods"]) == [
        "vanilla", "zero_shot", "contextual", "domain", "batch", "hidden", "knn",
    ]  # fmt: skip
    for method in found["methods"].values():
        assert len(method["right"]) == found["prompts"] == 10
        low, high = method["interval"]["accuracy"]
        assert low <= method["accuracy"] <= high
    assert {one["second"] for one in found["comparisons"]} == {"vanilla"}
    assert len(found["comparisons"]) == 6
    assert set(found["robustness"]) == {"template", "demonstrations"}
    assert 0 <= found["bias"]["contextual_entropy"] <= found["bias"]["maximum_entropy"]
    assert set(found["unseen"]) == {"random", "unseen", "zero_shot"}
    assert found["unseen"]["random"] == found["methods"]["vanilla"]
    assert found["unseen"]["zero_shot"] == found["methods"]["zero_shot"]
    assert set(found["transfer"]["tasks"]) == {"generated/urgency", "generated/question"}
    assert "base" not in found


def test_a_person_sees_a_table_of_each_protocol() -> None:
    result = invoke("eval", "demo", "--protocol", "all", "--methods", "vanilla, batch", *SMALL)
    assert result.exit_code == 0, result.stderr
    shown = result.stdout
    assert "model, batch" in shown
    assert "model, batch against model" in shown
    for heading in ("robustness", "bias", "demonstrations without the query's label"):
        assert f"\n{heading}\n" in shown
    # Without other tasks, all means all that can be measured.
    assert "other tasks" not in shown


def test_compat_changes_likelihood_but_not_accuracy() -> None:
    plain, compat = (
        document(invoke("eval", "demo", *flags, *SMALL, "--json")) for flags in ((), ("--compat",))
    )
    one, other = plain["methods"]["vanilla"], compat["methods"]["vanilla"]
    assert (plain["compat"], compat["compat"]) == (False, True)
    assert one["accuracy"] == other["accuracy"]
    assert one["right"] == other["right"]
    # Three labels: a second softmax caps the probability at e / (e + 2).
    assert other["true_label_probability"] < 0.577 < max(0.58, one["true_label_probability"])
    assert other["true_label_probability"] != one["true_label_probability"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--protocol", "acuracy"), ("--protocol has 'acuracy'", "robustness")),
        (("--methods", "prototype"), ("--methods has 'prototype'", "contextual")),
        (("--protocol", "transfer"), ("evaluation.transfer is empty", "--transfer")),
        (("--transfer", "trec2"), ("trec2", "trec")),
    ],
)
def test_bad_choices_get_one_line(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    result = invoke("eval", "demo", *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
