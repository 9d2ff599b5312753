"""The report in a real browser: heads and tokens, keyboard, narrow, dark, without script, hostile.

What the page shows is compared with the arrays in heads.npz, to the precision that it promises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser_support
import numpy as np
import pytest
from made_cells import cell, failed, study
from made_runs import HOSTILE, evaluation, heads, update, write_run

from abft_mlx.analysis import write_study
from abft_mlx.analysis.report import write_report
from abft_mlx.induction import Heads, read_heads

pytestmark = pytest.mark.slow
# Half a 255th of the largest value there can be, and half of the last digit that is shown.
TOKEN_POINTS, LAST_DIGIT = 100 / 510 + 0.051, 0.051
LABELS = ("<script>window.owned=1</script>", "\u202eevil \x00\" onclick='window.owned=1'")


def ready(page: Any, example: int = 0) -> None:
    page.wait_for_selector(f"#attention-panel[data-ready='{example}']")


def cell_of(page: Any, layer: int, head: int) -> Any:
    return page.locator(".map tbody tr").nth(layer).locator("td").nth(head)


def shares(text: str) -> list[float]:
    """Percentages in a text."""
    return [float(one.replace("−", "-")) for one in re.findall(r"([−-]?\d+\.\d)%", text)]


def check_head(page: Any, seen: Heads, layer: int, head: int, example: int = 0) -> None:
    """Everything that the page says of one head on one prompt is what heads.npz says."""
    prompt = seen.examples[example]
    box = page.locator(f".example[data-example='{example}']")
    assert box.locator(".which").inner_text() == f"layer {layer}, head {head}"
    most = max(rows[layer, head].max() for rows in prompt.rows.values())
    for state, rows in prompt.rows.items():
        row = rows[layer, head].astype(np.float64)
        text = box.locator(f".tokens[data-state={state}]")
        written = shares(" ".join(text.locator(".token.label small").all_inner_texts()))
        np.testing.assert_allclose(written, 100 * row[prompt.label_positions], atol=TOKEN_POINTS)
        strength = text.locator(".token").evaluate_all(
            "spans => spans.map((span) => Number(span.style.getPropertyValue('--a')))"
        )
        np.testing.assert_allclose(strength, row / most, atol=1 / 510 + 0.001)
        colours = text.locator(".token").evaluate_all(
            "spans => spans.map((span) => getComputedStyle(span).backgroundColor)"
        )
        lightness = np.array([float(re.findall(r"[\d.]+", colour)[0]) for colour in colours])
        assert (np.diff(lightness[np.argsort(strength)]) <= 1e-4).all(), "more is darker"
        assert lightness.max() > lightness.min()
        right = row[prompt.label_positions[prompt.right]].sum()
        total = row[prompt.label_positions].sum()
        for key, value in (("right", right), ("wrong", total - right), ("labels", total)):
            shown = box.locator(f"[data-row={key}] [data-state={state}]").inner_text()
            assert abs(shares(shown)[0] - 100 * value) <= LAST_DIGIT


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browser_support.browser() as started:
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seen = heads(4, 3, tokens=30, examples=3, without=(1,))
    updates = [update(n) for n in range(1, 9)]
    folder = tmp_path_factory.mktemp("run")
    write_report(write_run(folder, seen, updates=updates, measured=evaluation()))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every text would be a script, or hide something, if a page let it."""
    seen = heads(2, 2, tokens=HOSTILE * 2, labels=LABELS, examples=2)
    measured = evaluation([[1, 1], [1, 1]], [[2, 0], [0, 2]], LABELS)
    folder = write_run(
        tmp_path_factory.mktemp("hostile"), seen, measured=measured,
        model={"source": LABELS[0]}, description=" ".join(HOSTILE).strip(),
    )  # fmt: skip
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = [cell("untrained", "0110" * 8)]
    cells += [cell("abft", "0111" * 8, seed=n) for n in (1, 2)]
    broken = failed(error="<script>window.owned=1</script>")
    folder = tmp_path_factory.mktemp("study")
    made = study(name="mails & more", figures=["accuracy", "head_count"])
    write_study(folder, made, [*cells, broken])
    write_report(folder)
    return folder


def opened(browser: Any, folder: Path, **options: Any) -> Any:
    return browser_support.page(browser, folder / "report.html", **options)


def test_pointing_at_a_head_lights_the_tokens(browser: Any, run: Path) -> None:
    seen = read_heads(run / "heads.npz")
    with opened(browser, run) as page:
        ready(page)
        kept = page.locator(".map td[aria-selected=true]").get_attribute("aria-label")
        for layer, head in ((0, 0), (3, 2), (2, 1)):
            cell_of(page, layer, head).hover()
            check_head(page, seen, layer, head)
        page.locator("h1").hover()
        assert page.locator(".example:not([hidden]) .which").inner_text() in kept
        cell_of(page, 0, 2).click()
        page.locator("h1").hover()
        check_head(page, seen, 0, 2)
        cell_of(page, 1, 0).hover()
        shown = page.locator(".example:not([hidden]) [data-row=labels] td").all_inner_texts()
        assert shown == ["–", "–"], "a layer without heads has no attention"


def test_tapping_a_head_keeps_it(browser: Any, run: Path) -> None:
    seen = read_heads(run / "heads.npz")
    with opened(browser, run, width=360, has_touch=True) as page:
        ready(page)
        cell_of(page, 2, 2).tap()
        check_head(page, seen, 2, 2)
        page.locator("h1").tap()
        check_head(page, seen, 2, 2)


def test_heads_by_keyboard_alone(browser: Any, run: Path) -> None:
    seen = read_heads(run / "heads.npz")
    with opened(browser, run) as page:
        ready(page)
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('role')") == "gridcell":
                break
        at = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert at == page.locator(".map td[aria-selected=true]").get_attribute("aria-label")
        assert page.locator(".map td[tabindex='0']").count() == 1
        for keys, layer, head in (
            ("Control+Home", 0, 0), ("ArrowRight", 0, 1), ("ArrowLeft", 0, 0), ("ArrowLeft", 0, 0),
            ("PageDown", 3, 0), ("End", 3, 2), ("ArrowRight", 3, 2), ("ArrowDown", 3, 2),
            ("ArrowUp", 2, 2), ("Home", 2, 0),
        ):  # fmt: skip
            page.keyboard.press(keys)
            focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
            assert focused.startswith(f"layer {layer}, head {head}: "), keys
            check_head(page, seen, layer, head)
        assert page.locator(".map td[tabindex='0']").count() == 1
        told = page.locator(".head-reading")
        assert told.get_attribute("aria-live") == "polite"
        census = [getattr(state, part)[2, 0] for part in ("magnitude", "correctness", "share",
                  "sink") for state in seen.states.values()]  # fmt: skip
        assert told.inner_text().startswith("Layer 2, head 0: ")
        np.testing.assert_allclose(
            shares(told.inner_text()), 100 * np.array(census), atol=LAST_DIGIT
        )


def test_the_map_shows_each_measure_in_each_state(browser: Any, run: Path) -> None:
    seen = read_heads(run / "heads.npz")
    before, after = seen.states["before"], seen.states["after"]
    with opened(browser, run) as page:
        ready(page)
        for measure in ("sink", "share", "correctness", "magnitude"):
            for state in ("before", "change", "after"):
                page.locator(f"input[name=measure][value={measure}]").check()
                page.locator(f"input[name=state][value={state}]").check()
                one, two = getattr(before, measure), getattr(after, measure)
                table = {"before": one, "after": two, "change": two - one}[state]
                labels = page.locator(".map tbody td").evaluate_all(
                    "cells => cells.map((cell) => [cell.getAttribute('aria-label'),"
                    " Number(cell.style.getPropertyValue('--a')),"
                    " cell.classList.contains('minus')])"
                )
                most = np.nanmax(np.abs(table if state == "change" else [one, two]))
                for (label, strength, minus), value in zip(labels, table.ravel(), strict=True):
                    if np.isnan(value):
                        assert label.endswith("no head")
                        continue
                    assert abs(shares(label)[0] - 100 * value) <= LAST_DIGIT
                    assert abs(strength - abs(value) / most) < 2e-3
                    assert minus == (value < -5e-5) or abs(value) < 1e-4


def test_prompts_are_switched_and_tokens_read(browser: Any, run: Path) -> None:
    seen = read_heads(run / "heads.npz")
    with opened(browser, run) as page:
        ready(page)
        cell_of(page, 3, 1).click()
        page.locator("input[name=example]").nth(0).focus()
        page.keyboard.press("ArrowRight")
        ready(page, 1)
        assert page.locator(".example:visible").count() == 1
        check_head(page, seen, 3, 1, example=1)
        reading = page.locator(".example[data-example='1'] .token-reading")
        token = page.locator(".example[data-example='1'] [data-state=after] .token").nth(5)
        token.hover()
        rows = [one[3, 1] for one in seen.examples[1].rows.values()]

        def check(n: int) -> None:
            assert reading.inner_text().startswith(f"token {n} ")
            values = [100 * row[n] for row in rows]
            np.testing.assert_allclose(shares(reading.inner_text()), values, atol=TOKEN_POINTS)
            assert page.locator(".token.current").count() == len(rows)

        check(5)
        page.locator(".example[data-example='1'] [data-state=before].tokens").focus()
        page.keyboard.press("ArrowRight")
        check(6)
        page.keyboard.press("Home")
        check(0)
        page.keyboard.press("ArrowDown")
        first = int(seen.examples[1].label_positions[0])
        check(first)
        wrong = seen.examples[1].demonstration_labels[0] != seen.examples[1].gold
        assert f"({'wrong' if wrong else 'right'} label)" in reading.inner_text()
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        check(len(seen.examples[1].tokens) - 1)


def test_the_keyboard_reaches_everything_and_sees_where_it_is(browser: Any, run: Path) -> None:
    with opened(browser, run) as page:
        ready(page)
        page.keyboard.press("Tab")
        skip = page.locator(".skip")
        assert skip.evaluate("one => one === document.activeElement")
        box = skip.bounding_box()
        assert min(box["x"], box["y"]) >= 0
        stops = []
        for _ in range(200):
            page.keyboard.press("Tab")
            where = page.evaluate(
                """() => {
                  const at = document.activeElement;
                  const seen = at.matches("input") ? at.nextElementSibling : at;
                  const style = getComputedStyle(seen);
                  return [at.matches("body"), at.outerHTML.slice(0, 80), style.outlineStyle,
                          parseFloat(style.outlineWidth)];
                }"""
            )
            if where[0]:
                break
            stops.append(where[1])
            assert where[2] == "solid", where
            assert where[3] >= 2, where
        assert len(stops) < 200
        for what in ("<a href", "<button", "gridcell", "class=\"tokens\"", "wide paper",
                     "<pre", 'name="example"', 'name="measure"', 'name="state"'):  # fmt: skip
            assert any(what in one for one in stops), what
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"


@pytest.mark.parametrize("name", ["run", "hostile", "studied"])
def test_a_narrow_window_scrolls_down_only(
    browser: Any, name: str, request: pytest.FixtureRequest
) -> None:
    with opened(browser, request.getfixturevalue(name), width=360) as page:
        if name != "studied":
            ready(page)
        for part in page.locator("details").all():
            part.locator("summary").click()
        wrong, full, seen = page.evaluate(browser_support.NARROW)
        assert wrong == []
        assert (full, seen) == (360, 360)


@pytest.mark.parametrize("name", ["run", "hostile", "studied"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(
    browser: Any, name: str, scheme: str, request: pytest.FixtureRequest
) -> None:
    with opened(browser, request.getfixturevalue(name), color_scheme=scheme) as page:
        if name != "studied":
            ready(page)
        for part in page.locator("details").all():
            part.locator("summary").click()
        found = page.evaluate(browser_support.CONTRAST)
        assert len(found) > 50
        assert [one for one in found if one[1] < 4.5] == []
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 20, 24)"}[scheme]


def test_without_a_script_all_can_be_read_but_attention(browser: Any, run: Path) -> None:
    with opened(browser, run, java_script_enabled=False) as page:
        assert "83.3%" in page.locator("#result").inner_text()
        assert page.locator("figure svg").count() == 8
        for picture in page.locator("figure svg").all():
            assert picture.bounding_box()["height"] > 100
        assert page.locator(".example:visible").count() == 3
        assert "need JavaScript" in page.locator("#attention noscript").inner_text()
        assert page.locator(".scripted:visible, .dynamic:visible").count() == 0
        assert page.locator("#recipe pre").is_visible()


def test_no_text_of_the_data_is_obeyed(browser: Any, hostile: Path) -> None:
    seen = read_heads(hostile / "heads.npz")
    with opened(browser, hostile) as page:
        ready(page)
        page.locator("input[name=example]").nth(1).check()
        ready(page, 1)
        assert page.evaluate("[typeof window.owned, document.scripts.length]") == ["undefined", 2]
        assert page.title() == f"ABFT: {LABELS[0]} on mails.csv"
        assert page.locator("img, iframe, object, embed, link, base, form").count() == 0
        attributes = page.evaluate(
            "[...document.querySelectorAll('*')].flatMap((one) => one.getAttributeNames())"
            ".filter((name) => name.startsWith('on'))"
        )
        assert attributes == []
        shown = page.locator(".example[data-example='1'] [data-state=after] .token").all()
        texts = [one.text_content() for one in shown]
        assert len(texts) == len(seen.examples[1].tokens)
        for token, text in zip(seen.examples[1].tokens, texts, strict=True):
            for piece in re.split("[\x00-\x1f\u202e\u2028]", token):
                assert piece in text
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028]", text)
        assert any("[U+202E]gnp.exe" in text for text in texts)


def test_the_policy_forbids_network_and_other_scripts(browser: Any, run: Path) -> None:
    with opened(browser, run, quiet=False) as page:
        refused = page.evaluate(
            """async () => {
              const seen = [];
              addEventListener("securitypolicyviolation", (one) =>
                seen.push(one.violatedDirective));
              const image = new Promise((done) => {
                const one = new Image();
                one.onerror = () => done("refused");
                one.onload = () => done("loaded");
                one.src = "http://127.0.0.1:9/a.png";
              });
              const script = document.createElement("script");
              script.textContent = "window.owned = 1";
              document.body.append(script);
              const fetched = await fetch("http://127.0.0.1:9/")
                .then(() => "sent", () => "refused");
              return [fetched, await image, typeof window.owned, seen];
            }"""
        )
        assert refused[:3] == ["refused", "refused", "undefined"]
        assert {"connect-src", "img-src", "script-src-elem"} <= set(refused[3])


def test_a_model_of_a_thousand_heads(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "big", heads(32, 32, tokens=300, examples=3))
    report = write_report(folder, figures=False)
    assert report.path.stat().st_size < 4_000_000
    seen = read_heads(folder / "heads.npz")
    with opened(browser, folder) as page:
        ready(page)
        assert page.locator(".map td").count() == 1024
        cell_of(page, 31, 30).hover()
        check_head(page, seen, 31, 30)
        page.locator("input[name=example]").nth(2).check()
        ready(page, 2)
        page.locator("h1").hover()
        cell_of(page, 17, 3).hover()
        check_head(page, seen, 17, 3, example=2)


def test_a_study_in_the_browser(browser: Any, studied: Path) -> None:
    facts = json.loads((studied / "study.json").read_text(encoding="utf-8"))
    with opened(browser, studied) as page:
        assert page.title() == "Study mails & more"
        table = page.locator("#accuracy table")
        lines = table.locator("tbody tr").all()
        rows = [line.locator("th, td").all_inner_texts() for line in lines]
        assert [row[1] for row in rows] == ["vanilla", "abft"]
        assert [row[3].split()[0] for row in rows] == ["50.0", "75.0"]
        assert "<script>window.owned=1</script>" in page.locator("#failed-cells").inner_text()
        page.locator("a", has_text="which, and why").click()
        assert page.url.endswith("#failed-cells")
        assert page.evaluate("typeof window.owned") == "undefined"
        assert page.locator("#figures figure svg").count() == 3
        for picture in page.locator("#figures figure svg").all():
            assert picture.bounding_box()["height"] > 200
            assert re.search("accuracy|heads", picture.text_content())
        for link in page.locator("nav a").all():
            assert page.locator(link.get_attribute("href")).count() == 1
        every = page.locator("[id]").evaluate_all("found => found.map((one) => one.id)")
        assert len(every) == len(set(every))
        listed = page.locator("#cells tbody th").all_text_contents()
        assert listed == [one["id"] for one in facts["cells"]]
