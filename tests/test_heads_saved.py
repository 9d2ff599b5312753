"""heads.npz: what is seen of heads survives the file, and other files are refused in one line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from abft_mlx.errors import OutputError
from abft_mlx.induction import (
    Detected,
    Example,
    Heads,
    HeadState,
    agreement,
    read_heads,
    rows,
    write_csv,
    write_heads,
)

TOKENS = ("<s>", "a\n", "", "'\"", "\x00end\x00", "日本", "🦊", "</script>", " praise", " x\t")


def state(seed: int, *, detected: bool = True) -> HeadState:
    """Three layers of four heads, the middle one without."""
    rng = np.random.default_rng(seed)

    def table() -> np.ndarray:
        values = rng.random((3, 4))
        values[1] = np.nan
        return values

    found = Detected(table(), table(), table(), 16, 9) if detected else None
    return HeadState(table(), 2 * table() - 1, table(), table(), found)


def heads() -> Heads:
    rng = np.random.default_rng(9)
    patterns = {name: rng.dirichlet([0.1] * 10, (3, 4)).astype(np.float32) for name in "xy"}
    patterns["x"][1] = np.nan
    example = Example(TOKENS, np.array([2, 8]), np.array([1, 0]), 1, patterns)
    return Heads(
        {"x": state(1), "y": state(2, detected=False)},
        (example,),
        ("no", "ja 日本"),
        12,
        {"model": "m", "adapter": None, "k": 2},
    )


def test_everything_survives_the_file(tmp_path: Path) -> None:
    made = heads()
    path = tmp_path / "heads.npz"
    write_heads(path, made)
    found = read_heads(path)
    assert list(found.states) == ["x", "y"]
    assert (found.labels, found.prompts, found.facts) == (made.labels, made.prompts, made.facts)
    for name, one in made.states.items():
        for part in ("magnitude", "correctness", "share", "sink"):
            got = getattr(found.states[name], part)
            assert got.dtype == np.float64
            np.testing.assert_array_equal(got, getattr(one, part))
    first = found.states["x"].detected
    assert found.states["y"].detected is None
    assert first is not None
    assert (first.sequences, first.repeated_tokens) == (16, 9)
    for part in ("previous_token", "duplicate_token", "induction"):
        wanted = getattr(made.states["x"].detected, part)
        np.testing.assert_array_equal(getattr(first, part), wanted)
    (example,) = found.examples
    assert example.tokens == TOKENS
    assert example.gold == 1
    np.testing.assert_array_equal(example.label_positions, [2, 8])
    np.testing.assert_array_equal(example.demonstration_labels, [1, 0])
    for name, wanted in made.examples[0].rows.items():
        assert example.rows[name].dtype == np.float32
        np.testing.assert_allclose(example.rows[name], wanted, rtol=1e-3, atol=1e-7)
    assert np.load(path, allow_pickle=False)["example0.x"].dtype == np.float16


def test_the_same_heads_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_heads(tmp_path / name, heads())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def without_a_part(path: Path) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files if key != "y.sink"}
    np.savez(path, **arrays)


def one_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.arange(3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "is no file of heads"),
        (lambda path: path.write_bytes(b""), "is no file of heads"),
        (lambda path: path.write_text("{}"), "is no file of heads"),
        (lambda path: np.savez(path, a=np.arange(3)), "is no file of heads"),
        (one_array, "is no file of heads"),
        (lambda path: np.savez(path, about=np.array([{}], dtype=object)), "is no file of heads"),
        (without_a_part, "y.sink"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "heads.npz"
    write_heads(path, heads())
    spoil(path)
    with pytest.raises(OutputError, match=message) as caught:
        read_heads(path)
    assert str(path) in str(caught.value)
    assert "abft-mlx heads" in str(caught.value)


def test_rows_and_csv_are_one_line_a_head(tmp_path: Path) -> None:
    made = heads()
    listed = rows(made)
    # Two states of two layers with heads.
    assert len(listed) == 2 * 2 * 4
    assert {one["layer"] for one in listed} == {0, 2}
    for one in listed:
        of = made.states[one["state"]]
        at = one["layer"], one["head"]
        assert one["correctness"] == of.correctness[at]
        assert one["sink"] == of.sink[at]
        if of.detected is None:
            assert one["induction"] is one["previous_token"] is None
        else:
            assert one["induction"] == of.detected.induction[at]
    write_csv(tmp_path / "heads.csv", made)
    with (tmp_path / "heads.csv").open(newline="", encoding="utf-8") as lines:
        read = list(csv.DictReader(lines))
    assert [float(one["magnitude"]) for one in read] == [one["magnitude"] for one in listed]
    assert [one["induction"] for one in read][8:] == [""] * 8


@pytest.mark.parametrize("seed", [4, 5, 6, 7])
def test_agreement_equals_scipy_and_counting(seed: int) -> None:
    one = state(seed)
    found = agreement(one)
    assert found is not None
    assert one.detected is not None
    known = ~np.isnan(one.magnitude)
    wanted = stats.spearmanr(one.magnitude[known], one.detected.induction[known]).statistic
    assert found.rank_correlation == pytest.approx(wanted)
    ours = {n for n, share in enumerate(one.share[known]) if share >= 0.5}
    classic = sorted(range(8), key=lambda n: -one.detected.induction[known][n])[: len(ours)]  # type: ignore[union-attr]
    assert 2 <= len(ours) <= 7
    assert found.count == len(ours)
    assert found.shared == len(ours & set(classic))
    assert found.by_chance == pytest.approx(len(ours) ** 2 / 8)
    assert agreement(state(4, detected=False)) is None


def test_agreement_with_equal_scores() -> None:
    one = state(4)
    assert one.detected is not None
    one.magnitude[0] = [0.5, 0.5, 0.2, 0.2]
    found = agreement(one)
    known = ~np.isnan(one.magnitude)
    wanted = stats.spearmanr(one.magnitude[known], one.detected.induction[known]).statistic
    assert found is not None
    assert found.rank_correlation == pytest.approx(wanted)
    one.detected.induction[:] = 0.1
    flat = agreement(one)
    assert flat is not None
    assert np.isnan(flat.rank_correlation)


def small(share: list[float], induction: list[float]) -> HeadState:
    """One layer of heads, with their magnitudes in order."""
    found = np.array([induction])
    table = np.arange(len(share), dtype=float)[None]
    return HeadState(table, table, np.array([share]), table, Detected(found, found, found, 16, 9))


def test_half_of_the_prompts_is_enough_and_of_equals_the_first_count() -> None:
    found = agreement(small([0.5, 0.4, 1.0, 0.49], [3.0, 1.0, 2.0, 0.0]))
    assert found is not None
    assert (found.count, found.shared, found.by_chance) == (2, 2, 1.0)
    assert found.rank_correlation == pytest.approx(-0.8)
    # 200 heads of two scores: of the better ones, those that come first.
    share = [0.0] * 50 + [1.0] * 50 + [0.0] * 100
    found = agreement(small(share, [float(n % 2 == 0) for n in range(200)]))
    assert found is not None
    assert (found.count, found.shared) == (50, 25)


def test_a_csv_byte_for_byte(tmp_path: Path) -> None:
    made = Heads({"x": small([0.5, 0.25], [1.0, 0.1])}, (), ("a",), 1)
    write_csv(tmp_path / "heads.csv", made)
    assert (tmp_path / "heads.csv").read_bytes() == (
        b"state,layer,head,magnitude,correctness,share,sink,previous_token,duplicate_token,"
        b"induction,weight\n"
        b"x,0,0,0.0,0.0,0.5,0.0,1.0,1.0,1.0,\n"
        b"x,0,1,1.0,1.0,0.25,1.0,0.1,0.1,0.1,\n"
    )
