"""The paper's claims, decided: every verdict comes out each way, by its interval alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from made_cells import answers, cell, consistency, failed, run, study, summary

from abft_mlx import analysis
from abft_mlx.analysis.facts import facts
from abft_mlx.analysis.special import planes
from abft_mlx.analysis.statistics import Estimate

HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be tested at this scale"
NOT_MEASURED = "not measured"
N = 1000
FEW = 40


@pytest.fixture(scope="module")
def claims(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("claims")


@pytest.fixture(scope="module")
def rules(claims: ModuleType) -> ModuleType:
    return claims.rules


def verdicts(claims: ModuleType, cells: list[dict], number: int) -> list[str]:
    """What a claim's findings say, by its number in the page."""
    some = claims.studies([facts(study(), cells)])
    claim = claims.claims()[number - 1]
    return [one.verdict for _, one in claims.findings(claim, some)]


def flips(right: str, share: float, seed: int = 0, *, up: bool) -> str:
    """Turn a share of all answers right (or wrong), chosen among those that are not."""
    values = np.array([int(one) for one in right])
    where = np.flatnonzero(values != up)
    chosen = np.random.default_rng(seed).choice(where, round(share * len(values)), replace=False)
    values[chosen] = up
    return "".join(map(str, values))


def pair(first: str, second: str, change: float, prompts: int = N) -> list[dict]:
    """Two methods; the first is ``change`` more accurate than the second on the same prompts."""
    base = answers(0.5, prompts, 1)
    made = []
    for seed in (1, 2):
        theirs = flips(base, 0.02, 50 + seed, up=True)
        ours = flips(theirs, abs(change), seed, up=change > 0) if change else theirs
        if prompts == FEW:  # as many the other way: too few prompts to tell
            ours = flips(flips(ours, 0.1, 90 + seed, up=True), 0.1, 70 + seed, up=False)
        for method, right in ((first, ours), (second, theirs)):
            if method in ("vanilla", "contextual"):
                if seed == 1:
                    made.append(cell("untrained", {method: base}, repeats=1))
            else:
                made.append(cell(method, right, seed=seed, repeats=1))
    return made


RISES = [(0.1, N, HOLDS), (-0.1, N, FAILS), (0.05, FEW, UNTOLD)]
NOT_WORSE = [(0.1, N, HOLDS), (0.0, N, HOLDS), (-0.1, N, FAILS), (-0.025, FEW, UNTOLD)]


class TestAccuracy:
    @pytest.mark.parametrize(("change", "prompts", "verdict"), RISES)
    @pytest.mark.parametrize(
        ("number", "first", "second"),
        [(1, "abft", "vanilla"), (8, "no_pid", "no_filter"), (12, "no_pid", "no_punish")],
    )
    def test_rises(
        self, claims: ModuleType, number: int, first: str, second: str, change: float,
        prompts: int, verdict: str,
    ) -> None:  # fmt: skip
        assert verdicts(claims, pair(first, second, change, prompts), number) == [verdict]

    @pytest.mark.parametrize(("change", "prompts", "verdict"), NOT_WORSE)
    @pytest.mark.parametrize(
        ("number", "second"),
        [(2, "contextual"), (3, "end_to_end"), (3, "end_to_end_qk")],
    )
    def test_is_not_worse(
        self, claims: ModuleType, number: int, second: str, change: float, prompts: int,
        verdict: str,
    ) -> None:  # fmt: skip
        assert verdicts(claims, pair("abft", second, change, prompts), number) == [verdict]

    @pytest.mark.parametrize(
        ("change", "prompts", "verdict"), [(-0.15, N, HOLDS), (0.1, N, FAILS), (-0.05, FEW, UNTOLD)]
    )
    def test_no_reward_destroys(
        self, claims: ModuleType, change: float, prompts: int, verdict: str
    ) -> None:
        assert verdicts(claims, pair("no_reward", "vanilla", change, prompts), 11) == [verdict]

    def test_one_seed_tells_nothing(self, claims: ModuleType) -> None:
        cells = [one for one in pair("abft", "vanilla", 0.2) if one["seed"] != 2]
        assert verdicts(claims, cells, 1) == [UNTOLD]
        cells = [one for one in pair("no_reward", "vanilla", -0.2) if one["seed"] != 2]
        assert verdicts(claims, cells, 11) == [UNTOLD]

    def test_swept_cells_are_no_evidence(self, claims: ModuleType) -> None:
        cells = pair("abft", "vanilla", 0.2)
        for one in cells:
            one["sweep"] = {"objective.punish": 1} if one["method"] == "abft" else {}
        assert verdicts(claims, cells, 1) == []

    def test_bases_are_judged_apart(self, claims: ModuleType) -> None:
        cells = pair("abft", "vanilla", 0.2)
        other = [
            {**one, "model": "b", "id": "b" + one["id"]} for one in pair("abft", "vanilla", -0.2)
        ]
        assert verdicts(claims, [*cells, *other], 1) == [FAILS, HOLDS]

    @pytest.mark.parametrize(("change", "prompts", "verdict"), RISES)
    def test_out_of_domain(
        self, claims: ModuleType, change: float, prompts: int, verdict: str
    ) -> None:
        cells = pair("abft", "end_to_end", change, prompts)
        for one in cells:
            right = one["evaluation"]["methods"]["vanilla"]["right"]
            one["evaluation"] = {
                # In domain the other way round: it must not matter.
                "methods": {"vanilla": summary(flips(right, 0.3, up=change < 0))},
                "transfer": {"accuracy": 0.5, "tasks": {"trec": summary(right)}},
            }
        assert verdicts(claims, cells, 4) == [verdict]

    @pytest.mark.parametrize(("change", "prompts", "verdict"), RISES)
    def test_unseen(self, claims: ModuleType, change: float, prompts: int, verdict: str) -> None:
        cells = pair("abft", "vanilla", change, prompts)
        for one in cells:
            right = one["evaluation"]["methods"]["vanilla"]["right"]
            one["evaluation"]["unseen"] = {"unseen": summary(right)}
            one["evaluation"]["methods"] = {"vanilla": summary(answers(0.5, prompts))}
        assert verdicts(claims, cells, 7) == [verdict]

    @pytest.mark.parametrize(
        ("change", "width", "verdict"),
        [(0.1, 0.02, HOLDS), (-0.1, 0.02, FAILS), (0.1, 0.2, UNTOLD)],
    )
    @pytest.mark.parametrize(("number", "kind"), [(5, "template"), (6, "demonstrations")])
    def test_consistency(
        self, claims: ModuleType, number: int, kind: str, change: float, width: float, verdict: str
    ) -> None:
        def parts(more: float) -> dict[str, Any]:
            both = {"template": 0.7 - more, "demonstrations": 0.7 - more, kind: 0.7 + more}
            return {"robustness": consistency(both["template"], both["demonstrations"], width)}

        cells = [cell("untrained", {"vanilla": answers(0.5, 40)}, evaluation=parts(0))]
        cells += [
            cell("abft", answers(0.5, 40), seed=seed, evaluation=parts(change)) for seed in (1, 2)
        ]
        assert verdicts(claims, cells, number) == [verdict]


class TestInside:
    @pytest.mark.parametrize(
        ("held", "without", "verdict"),
        [
            ([(10, 10), (10, 11)], [(10, 5), (10, 16)], HOLDS),
            ([(10, 5), (10, 6)], [(10, 10), (10, 10)], FAILS),
            ([(10, 10), (10, 5)], [(10, 9), (10, 6)], UNTOLD),
        ],
    )
    def test_heads(self, claims: ModuleType, held: list, without: list, verdict: str) -> None:
        cells = [
            cell(method, seed=seed, run=run([start] * 4 + [end] * 4))
            for method, pairs in (("abft", held), ("no_pid", without))
            for seed, (start, end) in enumerate(pairs)
        ]
        # Other weights' runs say nothing of the paper's.
        cells += [
            {**one, "id": f"{one['id']}x", "sweep": {"objective.punish": 2}, "run": run([5.0, 1.0])}
            for one in cells
        ]
        assert verdicts(claims, cells, 9) == [verdict]

    def test_drift(self, rules: ModuleType) -> None:
        # First three updates 4, last quarter of eight 3.
        assert rules.drift([3.0, 4.0, 5.0, 9.0, 9.0, 9.0, 2.0, 4.0]) == pytest.approx(0.25)
        assert rules.drift([4.0, 4.0, 4.0, 6.0]) == pytest.approx(0.5)
        assert rules.drift([0.0, 0.0]) == 0

    @pytest.mark.parametrize(
        ("held", "without", "prompts", "verdict"),
        [(0.0, 0.1, N, HOLDS), (0.1, 0.0, N, FAILS), (0.0, 0.02, FEW, UNTOLD)],
    )
    def test_sensitivity(
        self, claims: ModuleType, held: float, without: float, prompts: int, verdict: str
    ) -> None:
        cells = [
            cell(method, answers(0.5 + step * part, prompts, 7), seed=seed, repeats=1,
                 sweep={"objective.punish": a, "objective.reward": b})
            for method, step in (("abft", held), ("no_pid", without))
            for seed in (1, 2)
            for part, (a, b) in enumerate(((0, 1), (0, 2), (1, 1), (1, 2)))
        ]  # fmt: skip
        assert verdicts(claims, cells, 10) == [verdict]
        assert verdicts(claims, [one for one in cells if one["seed"] == 1], 10) == [UNTOLD]
        assert verdicts(claims, [one for one in cells if one["method"] == "abft"], 10) == []

    def test_sensitivity_is_a_standard_deviation(self, claims: ModuleType) -> None:
        rates = [0.2, 0.4, 0.4, 0.8]
        grid = ((0, 1), (0, 2), (1, 1), (1, 2))
        cells = [
            cell(method, answers(rate if method == "no_pid" else 0.5, 40), seed=1,
                 sweep={"objective.punish": a, "objective.reward": b})
            for method in ("abft", "no_pid")
            for rate, (a, b) in zip(rates, grid, strict=True)
        ]  # fmt: skip
        found = claims.studies([facts(study(), cells)])[0].found
        sides = [[one for one in found if one.method == name] for name in ("no_pid", "abft")]
        made = claims.rules.sensitivity(*sides)
        assert made.without == pytest.approx(np.std(rates))
        assert made.held == pytest.approx(0)
        assert made.difference.mean == pytest.approx(np.std(rates))
        assert (made.points, made.tasks) == (4, ("sst2",))

    @pytest.mark.parametrize(
        ("dip", "prompts", "verdict"),
        [(-0.05, 4000, HOLDS), (0.2, 4000, FAILS), (0.02, FEW, UNTOLD)],
    )
    @pytest.mark.parametrize("axis", ["end_to_end", "end_to_end_qk"])
    def test_basin(
        self, claims: ModuleType, dip: float, prompts: int, verdict: str, axis: str
    ) -> None:
        assert verdicts(claims, plane_cells(dip, prompts, axis), 13) == [verdict]
        assert verdicts(claims, plane_cells(dip, prompts, "metaicl"), 13) == []

    def test_barrier_is_below_the_line_between_the_ends(self, claims: ModuleType) -> None:
        some = list(planes(facts(study(), plane_cells(0.2, 400, "end_to_end"))))
        depth, t = claims.rules.barrier(some)
        # Ends at 0.8 and 0.6; the point in the middle lies 0.2 under 0.7.
        assert (depth.mean, t) == (pytest.approx(0.2), 0.5)

    def test_barrier_compares_the_same_queries(self, claims: ModuleType) -> None:
        def width(apart: bool) -> float:
            cells = plane_cells(0.1, 2000, "end_to_end", repeats=1, apart=apart)
            depth, _ = claims.rules.barrier(list(planes(facts(study(), cells))))
            assert depth.mean == pytest.approx(0.1)
            return depth.high - depth.low

        # Rates 0.8, 0.6 and 0.6: the middle answers what the second end answers, so that a query
        # is 0 or 0.5 below the line; answered apart, the three variances add.
        together = 0.2 * 0.8 * 0.25
        alone = 0.25 * 0.8 * 0.2 + 0.25 * 0.6 * 0.4 + 0.6 * 0.4
        for apart, variance in ((False, together), (True, alone)):
            expected = 2 * 1.96 * np.sqrt(variance / 2000)
            assert width(apart) == pytest.approx(expected, rel=0.08)

    def test_no_barrier_without_answers(self, claims: ModuleType) -> None:
        cells = plane_cells(0.2, 400, "end_to_end")
        del cells[0]["plane"]["right"]
        assert verdicts(claims, cells, 13) == []

    def test_worst_point_of_the_segment(self, claims: ModuleType) -> None:
        (made,) = plane_cells(0.0, 400, "end_to_end")[:1]
        factors = [0.0, 0.25, 0.5, 0.75, 1.0]
        rates = np.full((5, 5), 0.1)
        # The line between the ends lies at 0.65, 0.7 and 0.75.
        for row, rate in enumerate((0.6, 0.5, 0.6, 0.75, 0.8)):
            rates[row, 4 - row] = rate
        made["plane"] |= {
            "factors": factors,
            "accuracy": rates.tolist(),
            "right": [[answers(rate, 400) for rate in row] for row in rates],
        }
        depth, t = claims.rules.barrier(list(planes(facts(study(), [made]))))
        assert (depth.mean, t) == (pytest.approx(0.15), 0.75)

    @pytest.mark.parametrize(
        ("peaks", "layers", "verdict"),
        [([4, 6], 8, HOLDS), ([0, 1], 8, FAILS), ([0, 7], 8, UNTOLD), ([2, 2], 3, UNTOLD)],
    )
    def test_layers(self, claims: ModuleType, peaks: list, layers: int, verdict: str) -> None:
        cells = []
        for seed, peak in enumerate(peaks):
            norms = [1.0] * layers
            norms[peak] = 2.0
            # Keys alone have their peak elsewhere: the sum decides.
            keys = [0.1] * layers
            keys[-1] = 0.5
            cells.append(cell("abft", seed=seed, shift={"q": norms, "k": keys, "head": None}))
        assert verdicts(claims, cells, 14) == [verdict]


def plane_cells(
    dip: float, prompts: int, axis: str, repeats: int = 2, *, apart: bool = False
) -> list[dict]:
    """Two planes with ends at 0.8 and 0.6, and a dip half-way; the same queries are answered
    rightly at all points as far as the rates allow, or they are drawn apart."""
    factors = [0.0, 0.5, 1.0]
    accuracy = [[0.1, 0.1, 0.6], [0.1, 0.7 - dip, 0.1], [0.8, 0.1, 0.1]]
    right = [
        [answers(rate, prompts, 3 * row + column if apart else 0) for column, rate in enumerate(of)]
        for row, of in enumerate(accuracy)
    ]
    part = {"axes": ["abft", axis], "factors": factors, "prompts": prompts, "accuracy": accuracy,
            "right": right}  # fmt: skip
    return [cell("plane", seed=one, plane=dict(part), run=None, repeats=repeats) for one in (1, 2)]


class TestRules:
    @pytest.mark.parametrize(
        ("low", "high", "verdict", "not_less"),
        [
            (0.001, 0.5, HOLDS, HOLDS),
            (0.0, 0.5, UNTOLD, HOLDS),
            (-0.005, 0.009, FAILS, HOLDS),
            (-0.011, 0.011, UNTOLD, UNTOLD),
            (-0.5, -0.001, FAILS, FAILS),
        ],
    )
    def test_edges(
        self, rules: ModuleType, low: float, high: float, verdict: str, not_less: str
    ) -> None:
        one = Estimate((low + high) / 2, low, high)
        assert (rules.more(one), rules.no_less(one)) == (verdict, not_less)

    def test_basin_edges(self, rules: ModuleType) -> None:
        assert rules.one_basin(Estimate(0.01, 0.001, 0.019)) == HOLDS
        assert rules.one_basin(Estimate(0.01, 0.001, 0.021)) == FAILS
        assert rules.one_basin(Estimate(0.01, -0.001, 0.021)) == UNTOLD


class TestPage:
    def test_written_from_folders(
        self, claims: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        analysis.write_study(tmp_path / "one", study(name="one"), pair("abft", "vanilla", 0.1))
        cells = [*plane_cells(0.2, 4000, "end_to_end"), failed()]
        analysis.write_study(tmp_path / "two", study(name="two"), cells)
        page = tmp_path / "docs" / "claims.md"
        page.parent.mkdir()
        folders = [str(tmp_path / "one"), str(tmp_path / "two")]
        claims.main([*folders, "--output", str(page)])
        text = page.read_text(encoding="utf-8")
        assert "python benchmarks/claims.py runs/one runs/two --output docs/claims.md" in text
        assert str(tmp_path) not in text
        rows = [line for line in text.splitlines() if line.startswith("| 1 |")]
        assert rows == [
            "| 1 | ABFT is more accurate than vanilla few-shot prompting | demo | **holds** | "
            + rows[0].split(" | ")[-1]
        ]
        assert "+12.0 [+" in rows[0]
        assert "| 13 |" in text
        assert "**does not hold**" in text
        assert f"| 2 | ABFT is at least as accurate as calibration | – | {NOT_MEASURED} |" in text
        assert "1 tasks" not in text
        assert "1 task, 2 runs, n = 1,000 a run" in text
        assert "1 cell of two failed." in text
        assert text.count("### ") == 14 + 1
        claims.main(folders)
        printed = capsys.readouterr().out
        assert printed.partition("Verdicts")[2] == text.partition("Verdicts")[2]
        claims.main([*folders, "--output", str(page)])
        assert page.read_text(encoding="utf-8") == text

    def test_no_study_there(
        self, claims: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for told in ("abft-mlx study writes it", "cannot be read"):
            with pytest.raises(SystemExit) as ended:
                claims.main([str(tmp_path)])
            assert ended.value.code == 2
            message = capsys.readouterr().err
            assert message.startswith("error: ")
            assert told in message
            assert message.count("\n") == 1
            (tmp_path / "study.json").write_text("{")

    def test_compressed_facts_are_the_same(self, claims: ModuleType, tmp_path: Path) -> None:
        analysis.write_study(tmp_path, study(), pair("abft", "vanilla", 0.1))
        packed = tmp_path / "made.json.gz"
        packed.write_bytes(gzip.compress((tmp_path / "study.json").read_bytes()))
        assert claims.read(packed) == claims.read(tmp_path)

    def test_facts_suffice(self, claims: ModuleType, tmp_path: Path) -> None:
        cells = pair("abft", "vanilla", 0.1)
        analysis.write_study(tmp_path, study(), cells)
        read = claims.read(tmp_path)
        assert claims.page([read], "x") == claims.page([facts(study(), cells)], "x")
        assert json.loads((tmp_path / "study.json").read_text()) == read
