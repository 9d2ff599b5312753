"""heads.npz: what is seen of heads survives the file, and other files are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "is no file of heads"),
        (lambda path: path.write_text("{}"), "is no file of heads"),
        (lambda path: np.savez(path, about=np.array([{}], dtype=object)), "is no file of heads"),
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


@pytest.mark.parametrize("seed", [4, 5])
def test_agreement_equals_scipy_and_counting(seed: int) -> None:
    one = state(seed)
    if seed == 5:  # equal scores share the mean of their ranks
        one.magnitude[0] = [0.5, 0.5, 0.2, 0.2]
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
    one.detected.induction[:] = 0.1
    constant = agreement(one)
    assert constant is not None
    assert np.isnan(constant.rank_correlation)


def small(share: list[float], induction: list[float]) -> HeadState:
    """One layer of heads, with their magnitudes in order."""
    found = np.array([induction])
    table = np.arange(len(share), dtype=float)[None]
    return HeadState(table, table, np.array([share]), table, Detected(found, found, found, 16, 9))


def test_a_csv_byte_for_byte(tmp_path: Path) -> None:
    made = Heads({"x": small([0.5, 0.25], [1.0, 0.1])}, (), ("a",), 1)
    write_csv(tmp_path / "heads.csv", made)
    assert (tmp_path / "heads.csv").read_bytes() == (
        b"state,layer,head,magnitude,correctness,share,sink,previous_token,duplicate_token,"
        b"induction,weight\n"
        b"x,0,0,0.0,0.0,0.5,0.0,1.0,1.0,1.0,\n"
        b"x,0,1,1.0,1.0,0.25,1.0,0.1,0.1,0.1,\n"
    )


Change = Callable[[dict[str, Any]], Any]
"""Changes the arrays of a file, by name, or what ``about`` says of them."""


def rewritten(path: Path, change: Change) -> None:
    """A file of heads with its arrays, or what it says about them, changed."""
    write_heads(path, heads())
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["about"] = json.loads(arrays["about"].tobytes())
    change(arrays)
    arrays["about"] = np.frombuffer(json.dumps(arrays["about"]).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


def test_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    rewritten(path, lambda arrays: arrays["about"].update(schema=7))
    with pytest.raises(OutputError, match="is of schema 7 and this abft-mlx reads 1"):
        read_heads(path)
    rewritten(path, lambda arrays: arrays["about"].update(schema=None))
    assert read_heads(str(path)).prompts == 12


def set_to(name: str, value: Any) -> Change:
    return lambda arrays: arrays.update({name: np.asarray(value)})


def of_example(**changes: Any) -> Change:
    return lambda arrays: arrays["about"]["examples"][0].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        set_to("y.share", np.zeros((3, 5))),
        lambda arrays: arrays.pop("y.sink"),
        lambda arrays: arrays["about"]["states"].pop("y"),
        set_to("example0.y", np.zeros((3, 5, 10))),
        of_example(tokens=["a"] * 9),
        of_example(gold=2),
        set_to("example0.label_positions", [2, 8, 9]),
        set_to("example0.label_positions", [2.0, 8.0]),
        set_to("example0.label_positions", [2, 10]),
        set_to("example0.demonstration_labels", [2, 0]),
    ],
)
def test_arrays_that_do_not_fit_together(change: Change, tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    rewritten(path, change)
    with pytest.raises(OutputError, match="is no file of heads"):
        read_heads(path)
