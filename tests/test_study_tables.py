"""Tables and intervals of a study, against NumPy, SciPy and the paper's own file."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from made_cells import answers, cell, consistency, failed, run, study, summary
from scipy import stats

from abft_mlx import analysis
from abft_mlx.analysis.study_data import (
    Facts,
    bootstrap,
    facts,
    measurements,
    paired,
    paper_targets,
    share_right,
)
from abft_mlx.analysis.study_tables import table_md

Lines = list[dict[str, str]]


def section(page: str, title: str) -> Lines:
    """The lines of one table of a page, by column."""
    text = page.partition(f"## {title}\n")[2]
    lines = [line.strip("| ").split(" | ") for line in text.strip().split("\n\n")[0].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def page(cells: list[dict], **changes: object) -> str:
    return table_md(Facts.model_validate(facts(study(**changes), cells)))


def grid() -> list[dict]:
    """One base, two tasks; vanilla at 50%, ABFT at 75% and 80%."""
    made = []
    for number, task in enumerate(("sst2", "trec")):
        untrained = {"vanilla": answers(0.5, 40, number), "contextual": answers(0.6, 40, number)}
        made.append(cell("untrained", untrained, task=task, model="GPT2-L"))
        for seed, rate in ((1, 0.75), (2, 0.8)):
            right = answers(rate, 40, 10 * seed + number)
            made.append(cell("abft", right, task=task, seed=seed, model="GPT2-L"))
    return made


class TestAccuracy:
    def test_means_spreads_and_gain(self) -> None:
        lines = section(page(grid()), "Accuracy")
        by_method = {line["method"]: line for line in lines}
        assert list(by_method) == ["vanilla", "contextual", "abft"]
        abft = by_method["abft"]
        spread = 100 * np.std([0.75, 0.8], ddof=1)
        assert abft["SST2 (n = 40)"] == f"77.5 ± {spread:.1f}"
        assert abft["mean"] == f"77.5 ± {spread:.1f}"
        assert abft["seeds"] == "2"
        assert abft["over vanilla"].startswith("+27.5 [+")
        low, high = (float(one) for one in abft["95% interval"].split(" to "))
        assert low < 77.5 < high
        assert by_method["contextual"]["over vanilla"].startswith("+10.0 [")
        assert by_method["vanilla"]["over vanilla"] == "–"
        assert by_method["vanilla"]["seeds"] == "–"

    def test_p_pools_seeds_and_tasks(self) -> None:
        cells = grid()
        texts = {(one["method"], one["task"], one["seed"]): one["evaluation"] for one in cells}
        counts = [0, 0]
        for task in ("sst2", "trec"):
            base = texts["untrained", task, None]["methods"]["vanilla"]["right"]
            for seed in (1, 2):
                ours = texts["abft", task, seed]["methods"]["vanilla"]["right"]
                pairs = list(zip(ours, base, strict=True))
                counts[0] += pairs.count(("1", "0"))
                counts[1] += pairs.count(("0", "1"))
        expected = stats.binomtest(counts[0], sum(counts), 0.5).pvalue
        abft = section(page(cells), "Accuracy")[-1]
        assert abft["p"] == ("< 0.001" if expected < 0.001 else f"{expected:.3f}")
        calibrated = section(page(cells), "Accuracy")[1]
        assert calibrated["p"] not in ("–", abft["p"])

    def test_the_papers_numbers_stand_beside(self) -> None:
        lines = section(page(grid(), paper={"table": "table1"}), "Accuracy")
        vanilla, contextual, abft = lines
        assert vanilla["SST2 (n = 40)"] == "50.0 (paper 56.4, −6.3)"
        assert contextual["TREC (n = 40)"] == "60.0 (paper 34.1, +25.9)"
        assert abft["SST2 (n = 40)"].endswith("(paper 88.2, −10.7)")
        # A mean over two tasks is no mean over eight.
        assert "paper's mean" not in abft

    @pytest.mark.parametrize(
        ("name", "source"), [("GPT2-L", "x"), ("mine", "openai-community/gpt2-large")]
    )
    def test_the_papers_mean_over_all_eight(self, name: str, source: str) -> None:
        names = paper_targets()["tasks"]
        cells = [
            cell("untrained", {"vanilla": answers(0.5, 40)}, model=name, source=source, task=one)
            for one in names
        ]
        (line,) = section(page(cells, paper={"table": "table1"}), "Accuracy")
        assert line["paper's mean"] == "paper 45.9, +4.1"
        assert "paper" not in page(cells).partition("Rates are")[0]

    def test_only_common_seeds_and_prompts_are_paired(self) -> None:
        cells = [cell("abft", answers(0.5, 40), seed=seed) for seed in (1, 2, 3)]
        cells += [cell("no_pid", answers(0.5, 40), seed=seed) for seed in (2, 3, 4)]
        cells.append(cell("no_filter", answers(0.5, 20), seed=2))
        found = measurements(Facts.model_validate(facts(study(), cells)))
        by = {name: [one for one in found if one.method == name] for name in ("abft", "no_pid")}
        ((ours, theirs),) = paired(by["abft"], by["no_pid"])
        assert [one.cell.seed for one in ours] == [one.cell.seed for one in theirs] == [2, 3]
        assert not paired(by["abft"], [one for one in found if one.method == "no_filter"])


class TestParts:
    def test_out_of_domain(self) -> None:
        transfer = {"accuracy": 0.4, "tasks": {"trec": {"shared_queries": 7}}}
        right = answers(0.75, 40)
        cells = [
            cell("abft", right, seed=1, evaluation={"transfer": transfer}, model="Llama3-8B"),
            cell("abft", right, seed=2, evaluation={"transfer": {**transfer, "accuracy": 0.5}},
                 model="Llama3-8B"),
        ]  # fmt: skip
        (line,) = section(page(cells, paper={"table": "table2"}), "Out of domain")
        spread = 100 * np.std([0.4, 0.5], ddof=1)
        assert line["out of domain"] == f"45.0 ± {spread:.1f}"
        assert line["paper out of domain"] == "paper 64.3, −19.3"
        assert line["queries left out, at most"] == "7"
        cost = section(page(cells, paper={"table": "table2"}), "Cost")[0]
        assert cost["paper, of ABFT's"] == "1"
        assert "6.8M" in page(cells, paper={"table": "table2"})

    def test_consistency_and_unseen_and_bias(self) -> None:
        parts = {
            "robustness": consistency(0.9, 0.8),
            "unseen": {
                kind: summary(answers(rate, 40))
                for kind, rate in (("random", 0.5), ("unseen", 0.25), ("zero_shot", 0.75))
            },
            "bias": {
                "contextual_entropy": 0.5, "domain_entropy": 0.4, "maximum_entropy": 0.7,
                "posterior_kl": None, "gler": 0.125,
            },
        }  # fmt: skip
        # Accuracy itself was not asked for.
        one = cell("untrained", model="GPT2-XL", evaluation=parts)
        made = page([one], paper={"table": "table3"})
        (line,) = section(made, "Consistency")
        assert list(line.values())[2:] == ["90.0", "paper 81.3, +8.7", "80.0", "paper 68.4, +11.6"]
        (line,) = section(made, "Labels that no demonstration carries")
        assert list(line.values())[2:] == ["50.0", "25.0", "75.0"]
        (line,) = section(made, "Bias")
        assert list(line.values())[2:] == ["0.500", "0.400", "0.700", "–", "0.125"]
        assert "## Accuracy" not in made

    def test_plane_and_extrapolation(self) -> None:
        factors = [0.0, 0.5, 1.0]
        accuracy = [[0.5, 0.55, 0.6], [0.7, 0.65, 0.6], [0.8, 0.9, 0.3]]
        plane = {"axes": ["abft", "end_to_end"], "factors": factors, "prompts": 40,
                 "accuracy": accuracy}  # fmt: skip
        extrapolation = {
            "factors": [1.0, 2.0],
            "validation": {"prompts": 16, "accuracy": [0.5, 0.6]},
            "test": {"prompts": 40, "accuracy": [0.4, 0.45]},
            "chosen": 2.0,
        }
        made = page(
            [
                cell("plane", seed=1, plane=plane, run=None),
                cell("extrapolate", answers(0.45, 40), seed=1, extrapolation=extrapolation),
            ]
        )
        (line,) = section(made, "Between the weights")
        assert list(line.values())[3:] == [
            "50.0", "80.0", "60.0", "65.0", "90.0", "abft 1, end_to_end 0.5",
        ]  # fmt: skip
        (line,) = section(made, "Extrapolated adapters")
        assert list(line.values())[3:] == ["2", "16", "40.0", "45.0"]

    def test_heads_failures_and_cost_come_last(self) -> None:
        slow = run([8.0, 6.0], seconds=30.0, peak_memory_bytes=2_000_000)
        cells = [
            cell("abft", answers(0.5, 40), seed=1),
            cell("no_pid", answers(0.5, 40), seed=1, run=slow),
            cell("end_to_end", answers(0.5, 40), seed=1, kind="end_to_end", run=run([0.0, 0.0])),
            failed(error="it | broke\nhere"),
        ]
        made = page(cells)
        heads = {line["method"]: line for line in section(made, "Induction heads while training")}
        assert set(heads) == {"abft", "no_pid"}
        assert (heads["no_pid"]["first update"], heads["no_pid"]["last update"]) == ("8.00", "6.00")
        assert "| demo--trec--abft--1 | it \\| broke here |" in made
        assert "1 cell failed" in made
        cost = {line["method"]: line for line in section(made, "Cost")}
        assert (cost["no_pid"]["of ABFT's"], cost["no_pid"]["peak MB"]) == ("3.00", "2")
        titles = [line for line in made.splitlines() if line.startswith("## ")]
        assert titles[-2:] == ["## Failed cells", "## Cost"]


class TestFiles:
    def test_csv_has_a_line_for_every_measurement(self, tmp_path: Path) -> None:
        cells = [*grid(), failed()]
        analysis.write_study(tmp_path, study(), cells)
        lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
        assert len(lines) == 8
        abft = next(one for one in lines if one["method"] == "abft" and one["seed"] == "2")
        expected = {
            "model": "GPT2-L", "task": "sst2", "n": "40", "accuracy": "0.8", "low": "0.78",
            "high": "0.82", "macro_f1": "0.4", "true_label_probability": "0.25",
            "expected_calibration_error": "0.125", "seconds": "10", "trainable_parameters": "1000",
            "peak_memory_bytes": "50000000", "induction_heads_first": "4",
            "induction_heads_last": "3", "sweep": "", "unseen_label_accuracy": "",
        }  # fmt: skip
        assert {key: abft[key] for key in expected} == expected
        vanilla = lines[0]
        assert (vanilla["method"], vanilla["seed"], vanilla["seconds"]) == ("vanilla", "", "")

    def test_same_cells_same_bytes(self, tmp_path: Path) -> None:
        cells = [*grid(), failed(), failed("demo--trec--abft--2")]
        made = [analysis.write_study(tmp_path / "a", study(figures=["accuracy"]), cells)]
        random.Random(1).shuffle(cells)
        made.append(analysis.write_study(tmp_path / "b", study(figures=["accuracy"]), cells))
        names = [[path.name for path in one] for one in made]
        assert names[0] == names[1]
        assert {"table.md", "table.csv", "study.json"} < set(names[0])
        for first, second in zip(*made, strict=True):
            assert first.read_bytes() == second.read_bytes(), first.name

    def test_facts_hold_no_recipe_and_no_paths(self, tmp_path: Path) -> None:
        one = cell(
            "untrained", {"vanilla": answers(0.5, 40)}, source="/home/somebody/models/M-4bit"
        )
        one["recipe"]["prompt"] = {"instruction": "a wording"}
        analysis.write_study(tmp_path, study(), [one])
        text = (tmp_path / "study.json").read_text()
        assert "somebody" not in text
        assert "a wording" not in text
        document = json.loads(text)
        assert document["cells"][0]["source"] == "M-4bit"
        assert document["schema"] == 1
        # What claims are made from makes the same table.
        assert table_md(Facts.model_validate(document)) == (tmp_path / "table.md").read_text()


def test_shipped_numbers_are_the_reference(shared: Path) -> None:
    theirs = json.loads((shared / "reference" / "paper_targets.json").read_text())
    ours = paper_targets()
    assert ours["model_ids"] == theirs["model_ids"]
    assert list(ours["tasks"].values()) == theirs["dataset_order"]
    methods = {"Vanilla": "vanilla", "Calibrate": "contextual", "MetaICL": "metaicl",
               "PICL": "picl", "ABFT": "abft"}  # fmt: skip
    for model, table in theirs["table1_accuracy_percent"].items():
        assert set(ours["table1"][model]) == {methods[one] for one in table}
        for method, entry in table.items():
            row = ours["table1"][model][methods[method]]
            assert (row["accuracy"], row["average"]) == (entry["acc"], entry["average"])
            assert row.get("spread") == entry.get("std")
            assert row["average"] == pytest.approx(np.mean(list(entry["acc"].values())), abs=0.01)
    for key, table in theirs["table2_e2e_vs_abft"].items():
        name = key.replace(" (4-bit, LoRA)", "").replace("R1-14B", "R1-Distill-Qwen-14B")
        row = ours["table2"][name]
        assert row["vanilla"]["average"] == table["Vanilla"]["acc"]
        for theirs_name, our_name in (("E2E", "end_to_end"), ("ABFT", "abft")):
            entry = table[theirs_name]
            assert row[our_name] == {
                "average": entry["acc_id"], "transfer": entry["acc_od"],
                "trainable_parameters": entry["param"], "relative_time": entry["time"],
            }  # fmt: skip
    llama = ours["table3"]["Llama3-8B"]
    assert [*llama["template"].values(), *llama["demonstrations"].values()] == theirs[
        "table3_consistency_percent"
    ]["Llama3-8B"]
    ablations = theirs["table4_ablation_avg_over_8"]["Falcon3-7B"]
    assert (
        ours["table4"]["Falcon3-7B"]["no_reward"]["average"] == ablations["w/o PID, A=0.5 B=0"][1]
    )
    assert (
        ours["table4"]["Falcon3-7B"]["no_punish"]["average"] == ablations["w/o PID, A=0 B=1.0"][1]
    )


class TestIntervals:
    def test_shares_group_prompts_by_query(self) -> None:
        # Prompt i has query i modulo Q: here queries 0, 1, 2 asked twice.
        cells = [cell("abft", "100110", seed=1), cell("abft", "110110", seed=2)]
        rows = measurements(Facts.model_validate(facts(study(), cells)))
        np.testing.assert_array_equal(share_right(rows), [[1, 0.5, 0], [1, 1, 0]])

    def test_one_seed_agrees_with_a_bootstrap_of_scipy(self) -> None:
        shares = np.random.default_rng(0).choice([0, 0.5, 1], size=300, p=[0.2, 0.3, 0.5])
        ours = bootstrap([shares[None]])
        theirs = stats.bootstrap(
            (shares,), np.mean, n_resamples=4000, method="percentile", rng=1
        ).confidence_interval
        assert ours == pytest.approx((shares.mean(), theirs.low, theirs.high), abs=0.005)

    def test_seeds_and_queries_both_widen(self) -> None:
        random_ = np.random.default_rng(3)
        Q, S = 400, 8
        seed_effect, query_effect = random_.normal(0, 0.1, (S, 1)), random_.normal(0, 0.2, (1, Q))
        made = bootstrap([0.5 + seed_effect + query_effect])
        error = np.sqrt(seed_effect.var() / S + query_effect.var() / Q)
        width = (made.high - made.low) / (2 * stats.norm.ppf(0.975))
        assert width == pytest.approx(error, rel=0.08)

    def test_a_difference_cancels_what_both_sides_share(self) -> None:
        shares = np.random.default_rng(4).random((3, 200))
        assert bootstrap([shares + 0.1], [shares]) == pytest.approx((0.1, 0.1, 0.1))
        # Against an untrained base only the seeds' own spread cancels not.
        base = shares.mean(axis=0, keepdims=True)
        made = bootstrap([np.repeat(base, 3, axis=0) + 0.1], [base])
        assert made == pytest.approx((0.1, 0.1, 0.1))
