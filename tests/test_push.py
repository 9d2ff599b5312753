"""Pushing runs to a hub on this machine, through the real client, and fetching them back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_support import document, invoke
from huggingface_hub import constants
from loopback_hub import OWNER, READER, LoopbackHub
from push_support import MODEL, TEXTS, make_run

from abft_mlx import recipe as recipes
from abft_mlx.exchange.push import clean

NAME = "owner/mails"

# The hub's client uploads large files by a way of its HTTP library that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_run(folder)
    return folder


@pytest.fixture
def run(material: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(material / "run", tmp_path / "run"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub().serving() as server:
        server.enter(monkeypatch, tmp_path / "home", OWNER)
        yield server


def push(run: Path, *arguments: object, name: str = NAME) -> dict:
    done = invoke("push", run, name, "--json", *arguments)
    assert done.exit_code == 0, done.output
    assert OWNER not in done.output
    return document(done)


def test_what_a_dry_run_shows_is_what_is_sent(run: Path, hub: LoopbackHub) -> None:
    # Texts of prompts stay here, and what is drawn of them.
    for name in ("heads.npz", "demonstrations.jsonl", "eval.json"):
        assert (run / name).is_file()
    (run / "figures").mkdir()
    for name in ("notes.txt", "report.html", "figures/attention-1.svg"):
        (run / name).write_text("mine")
    shown = invoke("push", run, NAME, "--dry-run")
    assert shown.exit_code == 0
    report = push(run, "--dry-run")
    assert hub.requests == []
    done = push(run)
    sent = hub.repositories["model", NAME].files()
    sent.pop(".gitattributes")
    assert report["files"] == {path: len(content) for path, content in sent.items()}
    assert sorted(sent) == [
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
        "head_weights.safetensors",
        "metrics.jsonl",
        "recipe.yaml",
        "run.json",
    ]
    assert report["card"].encode() == sent["README.md"]
    assert all(path in shown.stdout for path in sent)
    assert report["card"].strip() in shown.stdout
    assert done["created"] is True
    assert sorted(done["sent"]) == sorted(sent)
    for path in ("adapters.safetensors", "adapter_config.json", "metrics.jsonl"):
        assert sent[path] == (run / path).read_bytes()


def test_a_second_push_commits_nothing_and_a_changed_run_only_its_changes(
    run: Path, hub: LoopbackHub
) -> None:
    push(run)
    repository = hub.repositories["model", NAME]
    commits = len(repository.commits)
    again = invoke("push", run, NAME)
    assert again.exit_code == 0
    assert "has all of this already: no commit was made" in again.stdout
    assert push(run)["commit"] is None
    assert len(repository.commits) == commits
    assert len(hub.sent("POST", "/commit/")) == 1
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3}\n')
    # What an earlier run of this repository had and this one has not.
    repository.commit("main", {**repository.files(), "lora.safetensors": b"old", "mine.md": b"x"})
    changed = push(run)
    assert (changed["sent"], changed["removed"]) == (["metrics.jsonl"], ["lora.safetensors"])
    assert "mine.md" in repository.files()
    assert "lora.safetensors" not in repository.files()


def test_private_and_branches(run: Path, hub: LoopbackHub) -> None:
    push(run, "--private", "--revision", "tried")
    repository = hub.repositories["model", NAME]
    assert repository.private
    assert list(repository.files()) == [".gitattributes"]
    assert "run.json" in repository.files("tried")
    push(run, name="owner/open")
    refused = invoke("push", run, "owner/open", "--private")
    assert refused.exit_code == 2
    assert "owner/open exists and is public, so nothing was sent" in refused.stderr


def test_an_interrupted_push_is_repeated(run: Path, hub: LoopbackHub) -> None:
    hub.fail("POST", "/commit/", 500)
    broken = invoke("push", run, NAME)
    assert broken.exit_code == 1
    assert "the hub is in trouble (500); try again later" in broken.stderr
    assert list(hub.repositories["model", NAME].files()) == [".gitattributes"]
    push(run)
    assert "run.json" in hub.repositories["model", NAME].files()
    stored = [request[1] for request in hub.sent("PUT", "/large/")]
    assert len(stored) == len(set(stored)) == 2, "adapter and head weights were stored already"


def texts(material: Path) -> list[str]:
    return [line.partition(",")[0] for line in (material / TEXTS).read_text().splitlines()[1:]]


def test_texts_are_sent_only_on_request(material: Path, run: Path, hub: LoopbackHub) -> None:
    shown = [
        json.loads(line)["text"] for line in (run / "demonstrations.jsonl").read_text().splitlines()
    ]
    assert set(shown) <= set(texts(material))
    push(run)
    repository = hub.repositories["model", NAME]
    everything = b"".join(repository.files().values())
    assert not [one for one in texts(material) if one.encode() in everything]
    card = repository.files()["README.md"].decode()
    assert f"predict --adapter {NAME} --model THE-BASE-MODEL --demonstrations labelled.csv" in card
    push(run, "--with-demonstrations")
    files = dict(repository.files())
    assert files.pop("demonstrations.jsonl") == (run / "demonstrations.jsonl").read_bytes()
    card = files["README.md"].decode()
    assert f"predict --adapter {NAME} --model THE-BASE-MODEL texts.txt" in card
    everything = b"".join(files.values())
    assert not [one for one in texts(material) if one.encode() in everything]
    # They are taken back by a push without them.
    assert push(run)["removed"] == ["demonstrations.jsonl"]


@pytest.mark.parametrize(
    ("against", "better"), [("better", True), ("no clear difference", False), ("worse", False)]
)
def test_the_card_claims_what_was_measured(against: str, better: bool, run: Path) -> None:
    path = run / "eval.json"
    measured = json.loads(path.read_text())
    verdict = measured["verdict"]
    assert verdict["n"] == 12
    facts = json.loads((run / "run.json").read_text())
    facts["classifier"]["calibration"] = {"ham": -0.5, "not spam": -1.0}
    (run / "run.json").write_text(json.dumps(facts))
    path.write_text(json.dumps(measured | {"verdict": verdict | {"against_prompting": against}}))
    card = push(run, "--dry-run")["card"]
    assert ("a better few-shot classifier" in card) is better
    assert "No evaluation results" not in card
    assert verdict["sentence"] in card
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ")]
    cells = {row[0].removeprefix("| "): row[1] for row in rows}
    classifier = measured["methods"]["classifier"]
    assert "subtracts" in card
    low, high = classifier["interval"]["accuracy"]
    assert cells["with this adapter"] == f"{classifier['accuracy']:.1%} ({low:.1%}–{high:.1%})"
    assert cells["prompting without it"].startswith(f"{verdict['before']:.1%} (")
    bag = next(one for title, one in cells.items() if "bag of words" in title)
    assert bag.startswith(f"{verdict['bag_of_words']:.1%} (")
    common = next(one for title, one in cells.items() if "most frequent" in title)
    assert common == f"{verdict['majority']:.1%}"
    assert "n = 12 test" in card
    for label, share in verdict["recall"].items():
        assert f"| {label} | {share:.1%} |" in card


def test_without_results_the_card_claims_nothing(run: Path) -> None:
    (run / "eval.json").unlink()
    facts = json.loads((run / "run.json").read_text())
    del facts["validation"]
    facts["classifier"]["calibration"] = None
    (run / "run.json").write_text(json.dumps(facts))
    card = push(run, "--dry-run")["card"]
    assert "No evaluation results were provided" in card
    assert "better" not in card
    assert "subtracts" not in card
    assert "model-index" not in card
    assert "the same" in card
    facts["classifier"]["nearest"] = True
    (run / "run.json").write_text(json.dumps(facts))
    assert "the same" not in push(run, "--dry-run")["card"]


def test_nothing_of_this_machine_is_sent(material: Path, run: Path, hub: LoopbackHub) -> None:
    push(run)
    files = hub.repositories["model", NAME].files()
    for path, content in files.items():
        for word in (str(material), MODEL, TEXTS, str(Path.home()), OWNER):
            assert word.encode() not in content, (path, word)
    bodies = b"".join(body for *_, body in hub.requests)
    assert str(material).encode() not in bodies
    recipe = recipes.loads(files["recipe.yaml"].decode())
    own = recipes.load(str(run / "recipe.yaml"))
    assert (recipe.model, recipe.data.source) == ("(a local folder)", "(a local file)")
    assert recipe.data.labels == ["ham", "not spam"]
    assert recipe.training == own.training
    assert recipe.prompt == own.prompt
    head = files["README.md"].decode().split("---")[1]
    assert "base_model" not in head
    assert "datasets" not in head


Prepare = Callable[[LoopbackHub, pytest.MonkeyPatch], object]
REPOSITORY = {".gitattributes": b""}
FAILURES: dict[str, tuple[int, str, Prepare]] = {
    "no token": (2, "there is no token for the hub; run hf auth login",
                 lambda _, patch: patch.delenv("HF_TOKEN")),
    "odd token": (2, "has characters that no token has",
                  lambda _, patch: patch.setenv("HF_TOKEN", "hf_very\x07Odd")),
    "wrong token": (2, "the hub does not accept the token; run hf auth login",
                    lambda _, patch: patch.setenv("HF_TOKEN", "hf_stolenAndRevoked")),
    "reader": (2, "owner/mails could not be sent: the token has no right to it",
               lambda hub, patch: (hub.add(NAME, REPOSITORY), patch.setenv("HF_TOKEN", READER))),
    "nobody's": (2, "owner/mails could not be sent: the token has no right to it",
                 lambda _, patch: patch.setenv("HF_TOKEN", READER)),
    "taken": (2, "owner/mails contains README.md, which no push of a run wrote",
              lambda hub, _: hub.add(NAME, {"README.md": b"theirs", "config.json": b"{}"})),
    "limit": (1, "too many requests (429); wait some minutes",
              lambda hub, _: hub.fail("GET", "whoami", 429)),
    "trouble": (1, "the hub is in trouble (503); try again later",
                lambda hub, _: hub.fail("POST", "repos/create", 503)),
    "offline": (1, "the hub cannot be reached",
                lambda _, patch: patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")),
    "storage": (1, "owner/mails could not be sent", lambda hub, _: hub.fail("PUT", "/large/", 400)),
    "raced": (1, "owner/mails changed in the meantime, so nothing was sent; push again",
              lambda hub, _: hub.fail("POST", "/commit/", 412)),
    "license": (2, "the hub refuses the card", lambda *_: None),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_one_line_and_tells_no_token(
    what: str, run: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, words, prepare = FAILURES[what]
    prepare(hub, monkeypatch)
    token = os.environ.get("HF_TOKEN", OWNER)
    license = "made-up" if what == "license" else "mit"
    result = invoke("push", run, NAME, "--json", "--license", license)
    assert result.exit_code == status, result.output
    assert words in document(result)["error"]["message"]
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    assert ("sending" in result.stderr) is (what not in ("no token", "odd token"))
    for secret in (token, repr(token)[1:-1]):
        assert secret not in result.output
    sent = [path for repository in hub.repositories.values() for path in repository.files()]
    assert "adapters.safetensors" not in sent


def test_what_may_not_be_pushed(run: Path, tmp_path: Path, material: Path) -> None:
    def refused(words: str, *arguments: object, folder: Path = run, name: str = NAME) -> None:
        done = invoke("push", folder, name, "--dry-run", *arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""

    refused("no such run folder", folder=tmp_path / "none")
    refused("has no adapters.safetensors", folder=tmp_path)
    refused("'mails' is not the name of a repository; give owner/name", name="mails")
    refused("'../mails' is not the name", name="../mails")
    refused("--base-model './x' is not a hub id", "--base-model", "./x")
    refused("--results", "--results", tmp_path / "none.json")
    (tmp_path / "eval.json").write_text('{"methods": {}, "adapter": "x", "data": "other"}')
    refused("was measured with data 'other'", "--results", tmp_path / "eval.json")
    (tmp_path / "eval.json").write_text("[" * 30_000)
    refused("eval.json is not JSON (nested too deeply)", "--results", tmp_path / "eval.json")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"note": "see /data/people/anna"}))
    report = push(run, "--dry-run")  # prose with a slash is no path of this machine that we know
    assert report["files"]
    for leak in ("/data/people/anna", "~/mails", str(Path.cwd() / "x"), f"in {Path.home()}/x"):
        (run / "run.json").write_text(json.dumps(facts | {"note": leak}))
        refused("run.json names", folder=run)
        (run / "run.json").write_text(json.dumps(facts | {"note": [{leak: 1}]}))
        refused("run.json names", folder=run)
    deep: dict = {"/data/people/anna/x": 1}
    for _ in range(300):  # too deep for some versions of Python, and for others not
        deep = {"in": [deep]}
    (run / "run.json").write_text(json.dumps(facts | {"note": deep}))
    refused("run.json", folder=run)
    (run / "run.json").write_text(json.dumps(facts | {"finished": False}))
    refused("finetune --resume")
    (run / "run.json").write_text(json.dumps(facts))
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(material / TEXTS)
    refused("metrics.jsonl is a link")


def test_what_is_on_the_hub_is_named_and_what_is_here_is_not() -> None:
    task = {"name": "/home/anna/spam.yaml", "data": {"source": "spam.csv"}}
    recipe = recipes.change(
        recipes.default(["model=made/base", "data.source=made/plain"]),
        [recipes.override("mixture", [task, {"name": "trec", "data": {"source": "made/trec"}}])],
    )
    run = {"mixture": {"/home/anna/spam.yaml": {"classes": {"ham": 3}}}}
    found, _ = clean(recipe, run)
    assert (found.base_model, found.datasets) == ("made/base", ("made/plain", "made/trec"))
    assert [one.name for one in found.recipe.mixture] == ["spam", "trec"]
    assert found.recipe.mixture[0].data.source == "(a local file)"
    assert found.facts == {"mixture": {"spam": {"classes": {"ham": 3}}}}
    # A relative folder looks like a hub id from anywhere but where the run was material.
    local, _ = clean(recipe, {"model": {"kind": "folder"}, "data": {"kind": "file"}})
    assert (local.base_model, local.datasets) == (None, ("made/trec",))
    assert (local.recipe.model, local.recipe.data.source) == ("(a local folder)", "(a local file)")
    assert clean(recipes.default(["model=demo"]), {})[0].base_model is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", {"labels": 3}),
        ("run.json", {"data": []}),
        ("run.json", {"note": float("inf")}),
        ("run.json", {"totals": {"seconds": "x"}}),
        ("run.json", {"validation": {"best": 1}}),
        ("adapter_config.json", None),
    ],
)
def test_a_broken_run_is_one_line(run: Path, name: str, change: dict | None) -> None:
    facts = json.loads((run / name).read_text())
    (run / name).write_text("[" * 30_000 if change is None else json.dumps(facts | change))
    done = invoke("push", run, NAME, "--dry-run")
    assert done.exit_code == 2, done.output
    assert name in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
