"""Figures at both widths: nothing is cut, no text lies upon another, small models and large."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_support import covering, every_axes, outside, overlapping, texts
from made_heads import ODD, example, heads
from matplotlib.text import Text

from abft_mlx.analysis import run_heads
from abft_mlx.analysis.figures import (
    accuracy,
    attention_map,
    confusion,
    confusions,
    data_efficiency,
    detectors,
    extrapolation,
    grid,
    head_map,
    head_maps,
    interpolation,
    label_attention,
    plane,
    reliability,
    shift,
    style,
    time_to_accuracy,
    training_curves,
)

CAPTION = (
    "a model with a rather long name on some_data_with_a_name.csv; k = 4; n = 1,024 prompts; 16 of "
    "1,024 heads: those with the most attention on labels in any state; 4 training seeds; $ & _ <b>"
)
LONG = [
    "a class with a very long name",
    "_under",
    "$do$lar",
    "中文",
    *(f"no {n}" for n in range(73)),
]
random = np.random.default_rng(0)


def curve(updates: int) -> dict[str, np.ndarray]:
    return {name: random.random(updates) for name, _, _ in training_curves.PANELS}


def attention(layers: int, count: int, tokens: int, states: tuple[str, ...], gold: int = 1) -> Any:
    """As run_heads puts it together: the draw function and its height."""
    made = example(layers, count, tokens, states, gold=gold)
    chosen, _ = run_heads.top_heads(made.rows, made.label_positions)
    rows = [one[tuple(np.array(chosen).T)] for one in made.rows.values()]
    draw = partial(
        run_heads.attention_maps.draw, states=rows, tokens=made.tokens,
        label_positions=made.label_positions, right=made.demonstration_labels == made.gold,
        names=[f"L{layer} H{head}" for layer, head in chosen], state_names=states,
    )  # fmt: skip
    return draw, lambda _across: run_heads.attention_maps.height(len(chosen), len(states))


def head_figure(layers: int, count: int, part: str, *, diverging: bool = False) -> Any:
    seen = heads(layers, count)
    tables = [getattr(one, part) for one in seen.states.values()]
    draw = partial(head_maps.draw, states=tables, names=list(seen.states), label="share of it",
                   diverging=diverging)  # fmt: skip
    return draw, lambda across: head_maps.height(2, across)


def bars(methods: int, tasks: list[str]) -> Any:
    table = random.random((methods, len(tasks)))
    names = [f"method number {n}" for n in range(methods)]
    return partial(accuracy.draw, accuracy=table, spread=table / 20, paper=table, methods=names,
                   tasks=tasks), None  # fmt: skip


def matrices(classes: int) -> Any:
    counts = [random.integers(0, 2000, (classes, classes)) for _ in range(2)]
    draw = partial(confusions.draw, counts=counts, names=LONG[:classes], state_names=["a", "b"])
    return draw, lambda across: confusions.height(classes, 2, across)


def matrix(classes: int) -> Any:
    counts = random.integers(0, 30, (classes, classes))
    draw = partial(confusion.draw, counts=counts, names=LONG[:classes])
    return draw, lambda _across: confusion.height(classes)


def lines(count: int) -> dict[str, Any]:
    return {"names": [f"series number {n}" for n in range(count)]}


def cases() -> dict[str, Any]:
    """Name to draw function and height."""
    layers = [random.random(32) for _ in range(4)]
    factors = np.linspace(-0.5, 1.5, 9)
    square = random.random((9, 9))
    runs = [curve(32) for _ in range(3)]
    seen = [32.0 * np.arange(1, 33)] * 3
    counts = random.integers(0, 500, (2, 10))
    means = random.random((2, 10))
    sizes = 32 * 2 ** np.arange(6)
    training = partial(training_curves.draw, seen=seen, curves=runs, **lines(3))
    return {
        "head-map-32x32": (partial(head_map.draw, values=random.random((32, 32)), label="x"), None),
        "head-map-80x64": (partial(head_map.draw, values=random.random((80, 64)), label="x"), None),
        "head-map-1x1": (partial(head_map.draw, values=np.array([[-0.5]]), label="x"), None),
        "head-maps-3x2": head_figure(3, 2, "magnitude"),
        "head-maps-32x32": head_figure(32, 32, "correctness", diverging=True),
        "attention-3x2": attention(3, 2, 40, ("before", "after")),
        "attention-32x32": attention(32, 32, 300, ("before", "abft", "end_to_end")),
        "attention-no-label-is-right": attention(3, 2, 40, ("before",), gold=3),
        "attention-one-state": attention(1, 2, 5, ("before",)),
        "training": (training, lambda _across: training_curves.height(runs)),
        "detectors": (partial(detectors.draw, magnitude=random.random((32, 32)),
                              induction=random.random((32, 32))), None),
        "confusions-3": matrices(3),
        "confusions-14": matrices(14),
        "confusions-77": matrices(77),
        "confusion-14": matrix(14),
        "confusion-77": matrix(77),
        "reliability": (partial(reliability.draw, confidence=means, accuracy=means, count=counts,
                                names=["before", "after"]), None),
        "label-attention": (partial(label_attention.draw, on_labels=layers, on_gold=layers,
                                    **lines(4)), None),
        "shift": (partial(shift.draw, shifts=layers, spread=layers, **lines(4)), None),
        "interpolation": (partial(interpolation.draw, share=factors, accuracy=square,
                                  names=("abft", "end_to_end"), base=0.5), None),
        "plane": (partial(plane.draw, accuracy=square, factors=factors,
                          names=("abft", "end_to_end")), None),
        "extrapolation": (partial(extrapolation.draw, factors=factors, validation=square,
                                  test=square, chosen=factors[:2]), None),
        "grid": (partial(grid.draw, accuracy=square[:4, :3], punish=factors[:4],
                         reward=factors[:3], limits=(0.0, 1.0), title="abft"), None),
        "data-efficiency": (partial(data_efficiency.draw, examples=sizes, accuracy=means[:, :6],
                                    low=means[:, :6], high=means[:, :6], methods=["a", "b"],
                                    untrained=0.5), None),
        "time-to-accuracy": (partial(time_to_accuracy.draw, seconds=seen[:2],
                                     accuracy=[one["loss"] for one in runs[:2]],
                                     names=["a", "b"], untrained=0.3), None),
        "accuracy-2x2": bars(2, ["SST2", "MR"]),
        "accuracy-10x8": bars(10, [f"a task named {n}" for n in range(8)]),
    }  # fmt: skip


CASES = cases()


@pytest.mark.parametrize("width", list(style.WIDTHS))
@pytest.mark.parametrize("name", list(CASES))
def test_nothing_is_cut_and_no_text_lies_upon_another(name: str, width: str) -> None:
    draw, height = CASES[name]
    inches = None if height is None else height(style.WIDTHS[width])
    with style.look():
        figure = style.framed(draw, CAPTION, height=inches, width=width)
        drawn = texts(figure)
        assert outside(figure, drawn) == []
        assert overlapping(figure, drawn) == []
        assert covering(figure) == []
        assert " ".join(drawn[0][0].split()) == CAPTION.replace("$", r"\$")
        # All that is drawn can be read: 7 points at the size at which it is printed.
        sizes = {
            one.get_fontsize()
            for ax in every_axes(figure)
            for one in ax.findobj(Text)
            if one.get_text().strip()
        }
        assert min(sizes) >= 7
        assert figure.get_figwidth() == style.WIDTHS[width]


@pytest.mark.parametrize("width", list(style.WIDTHS))
def test_the_axes_are_as_high_as_was_said(width: str) -> None:
    draw, _ = CASES["detectors"]
    with style.look():
        for caption in ("short", CAPTION * 3):
            figure = style.framed(draw, caption, height=2.0, width=width)
            figure.draw_without_rendering()
            height = figure.axes[0].get_position().height * figure.get_figheight()
            assert height == pytest.approx(2.0, abs=0.02)


def test_what_is_measured_here_is_seen() -> None:
    """The measures find an overlap, and a text over the edge."""
    with style.look():
        figure = style.framed(lambda ax: ax.text(0.5, 0.5, "one"), "caption")
        assert overlapping(figure) == []
        figure.axes[0].text(0.51, 0.51, "two")
        assert overlapping(figure) == [("one", "two")]
        far = figure.axes[0].text(0.99, 0.1, "far over the edge" * 3)
        far.set_in_layout(False)
        assert outside(figure) == ["far over the edge" * 3]


def test_formats_are_the_same_bytes_and_hold_text_as_text(tmp_path: Path) -> None:
    made = example(1, 2, len(ODD), ("before",))
    draw = partial(
        attention_map.draw, rows=made.rows["before"][0], tokens=made.tokens,
        label_positions=made.label_positions, right=made.demonstration_labels == made.gold,
        names=["L0 H0", "L0 H1"],
    )  # fmt: skip
    written = [
        style.write(tmp_path / name, draw, "n = 1; 50% of $5", formats=style.FORMATS)
        for name in ("model-0.5B", "two")
    ]
    assert [one.name for one in written[0]] == [
        "model-0.5B.svg", "model-0.5B.png", "model-0.5B.pdf",
    ]  # fmt: skip
    assert [one.read_bytes() for one in written[0]] == [one.read_bytes() for one in written[1]]
    svg = written[0][0].read_text(encoding="utf-8")
    for text in ("&lt;script&gt;", "$x_1$", "n = 1; 50% of $5", "attention (share)", "L0 H1"):
        assert f">{text}</text>" in svg, text
    assert written[0][2].read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in written[0][2].read_bytes()
