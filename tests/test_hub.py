"""Models, data sets and adapters by hub id, from a hub on this machine, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from cli_support import document, invoke
from huggingface_hub import ModelCard, constants, utils
from loopback_hub import OWNER, LoopbackHub
from push_support import MODEL, TEXTS, make_run

import abft_mlx
from abft_mlx import adapters, hub
from abft_mlx.errors import AdapterError, RunError
from abft_mlx.exchange import push as pushing

NAME, WITHOUT, BASE = "owner/mails", "owner/without-texts", "made/base"

# The hub's client uploads large files by a way of its HTTP library that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its base and texts, and what eval says of it from its folder."""
    folder = tmp_path_factory.mktemp("made")
    run = make_run(folder)
    measured_result = invoke("eval", "--adapter", run, "--json")
    assert measured_result.exit_code == 0, measured_result.output
    (folder / "eval.json").write_text(measured_result.stdout)
    return folder


@pytest.fixture
def server(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackHub]:
    """A hub with the run's base on it, and the run, pushed with and without demonstrations."""
    with LoopbackHub().serving() as found:
        found.enter(monkeypatch, tmp_path / "home", OWNER)
        found.add(BASE, material / MODEL)
        results = ("--results", material / "eval.json", "--base-model", BASE, "--license", "mit")
        for name, more in ((NAME, ["--with-demonstrations"]), (WITHOUT, [])):
            done = invoke("push", material / "run", name, *results, *more)
            assert done.exit_code == 0, done.output
        yield found


def test_what_comes_back_measures_the_same(
    material: Path, server: LoopbackHub, tmp_path: Path
) -> None:
    before = json.loads((material / "eval.json").read_text())
    report = invoke("eval", "--adapter", NAME, "--data", material / TEXTS, "--json")
    assert report.exit_code == 0, report.output
    after = document(report)
    assert (after["model"], after["adapter"]) == (BASE, NAME)
    for key in ("labels", "label_words", "prompts", "methods", "base"):
        assert after[key] == before[key], key
    found = [
        one["methods"]["classifier"]["true_label_probability"] for one in (after, after["base"])
    ]
    assert abs(found[0] - found[1]) > 1e-4, "the adapter changes something"
    first = server.repositories["model", NAME].refs["main"]
    server.repositories["model", NAME].commit("main", {"README.md": b"taken back"})
    pinned = f"{NAME}@{first}"
    again = invoke("eval", "--adapter", pinned, "--data", material / TEXTS, "--json")
    assert document(again)["methods"] == before["methods"]
    model, _ = abft_mlx.load(BASE, adapter=pinned)
    assert adapters.adapted(model)
    few = tmp_path / "few.csv"
    few.write_text("\n".join((material / TEXTS).read_text().splitlines()[:5]))
    own = invoke("predict", "--adapter", pinned, few, "-q")
    assert own.stdout == invoke("predict", material / "run", few, "-q").stdout
    for adapter in (pinned, WITHOUT):
        lines = invoke("predict", "--adapter", adapter, "--demonstrations", few, few, "-q")
        assert lines.exit_code == 0, lines.output
        assert set(json.loads(lines.stdout.splitlines()[0])["probabilities"]) == {"ham", "not spam"}
    refused = invoke("predict", "--adapter", WITHOUT, few)
    assert refused.exit_code == 2
    assert "--demonstrations FILE" in refused.stderr
    assert [line[:6] for line in refused.stderr.splitlines()].count("error:") == 1


def test_the_card_says_what_was_measured(material: Path, server: LoopbackHub) -> None:
    text = server.repositories["model", NAME].files()["README.md"].decode()
    head = ModelCard(text).data
    before = json.loads((material / "eval.json").read_text())
    facts = json.loads((material / "run" / "run.json").read_text())
    assert (head.base_model, head.to_dict()["base_model_relation"]) == (BASE, "adapter")
    assert (head.library_name, head.pipeline_tag) == ("mlx", "text-classification")
    assert (head.license, head.datasets) == ("mit", None)
    found = {(one.dataset_split, one.metric_type): one for one in head.eval_results or []}
    measured = before["methods"]["classifier"]
    assert found["test", "accuracy"].metric_value == pytest.approx(measured["accuracy"], abs=1e-6)
    assert found["test", "f1"].metric_value == pytest.approx(measured["macro_f1"], abs=1e-6)
    assert found["test", "accuracy"].metric_args == {"n": before["prompts"], "demonstrations": 2}
    kept = facts["validation"]
    assert found["validation", "accuracy"].metric_value == pytest.approx(kept["after"], abs=1e-6)
    assert found["validation", "accuracy"].metric_args["n"] == kept["prompts"]
    base = before["base"]["methods"]["classifier"]
    assert f"| prompting without it | {base['accuracy']:.1%} " in text
    assert f"| with this adapter | {measured['accuracy']:.1%} " in text
    for label, word in facts["labels"].items():
        assert f"| {label} | `{word!r}` |" in text
    assert "`'text: '`" in text


@pytest.mark.parametrize("name", [NAME, WITHOUT])
def test_the_cards_commands_run(
    name: str, material: Path, server: LoopbackHub, tmp_path: Path
) -> None:
    card = server.repositories["model", name].files()["README.md"].decode()
    blocks = re.findall(r"^```sh\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    few = (material / TEXTS).read_text().splitlines()[:9]
    (tmp_path / "labelled.csv").write_text("\n".join(few))
    (tmp_path / "texts.txt").write_text("the good film number 3\n")
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | server.environment(tmp_path / "fresh") | {"PYTHONPATH": str(root)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for word in ('"label": ', "Generation: "):
        assert word in done.stdout
    assert OWNER not in done.stdout + done.stderr


def test_a_broken_download_goes_on_where_it_stopped(
    material: Path, server: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    server.cut(f"{NAME}/resolve")
    server.cut("model.safetensors")
    folder = adapters.local_folder(NAME)
    weights = "adapters.safetensors"
    assert (folder / weights).read_bytes() == (material / "run" / weights).read_bytes()
    abft_mlx.load(BASE, adapter=NAME)
    asked = [one for one in server.requests if one[0] == "GET" and "model.safetensors" in one[1]]
    assert len(asked) == 2
    assert server.resumed, "the second request was for the rest only"


@pytest.mark.usefixtures("server")
def test_the_cache_serves_when_the_network_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = adapters.local_folder(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert adapters.local_folder(NAME) == there
    with pytest.raises(RunError, match=r"adapter owner/other is not in the local cache and the"):
        adapters.local_folder("owner/other")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder", "no such folder; give a run folder, or a hub id like owner/name"),
        ("../mails/run", "no such folder"),
        ("owner/..", "no such folder"),
        ("owner/mails@../../../x", "no such folder"),
        ("owner/mails@", "no such folder"),
        ("mails", "no such folder"),
        ("owner/none", "is neither a folder here nor a repository of the hub that you may read"),
        ("owner/mails@none", "adapter owner/mails has no revision 'none'"),
        ("closed/gated", "adapter closed/gated is gated: accept its terms"),
        ("closed/private", "run hf auth login if it is private"),
        ("made/empty", "the repository holds no adapter"),
    ],
)
def test_names_of_no_adapter(name: str, words: str, server: LoopbackHub) -> None:
    server.add("closed/gated", {"run.json": b"{}"}, gated=True)
    server.add("closed/private", {"run.json": b"{}"}, private=True)
    server.add("made/empty", {"README.md": b""})
    with pytest.raises(AdapterError, match=re.escape(words)) as caught:
        adapters.local_folder(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_adapter_and_a_folder_wins(
    material: Path, server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdapterError, match="is a file; give the folder"):
        adapters.local_folder(material / TEXTS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    asked = len(server.requests)
    assert adapters.local_folder(NAME) == Path(NAME)
    assert len(server.requests) == asked
    found = adapters.find(material / "run")
    assert adapters.find(found) is found
    assert str(found) == str(material / "run")


@pytest.mark.parametrize(
    ("status", "words"), [(500, "in trouble (500)"), (429, "too many requests (429)")]
)
def test_a_hub_in_trouble_is_no_missing_network(
    status: int, words: str, server: LoopbackHub
) -> None:
    server.fail("GET", "owner/mails/revision", status)
    with pytest.raises(RunError, match=re.escape(words)):
        adapters.local_folder(NAME)


def test_peft_goes_along(material: Path, server: LoopbackHub, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT (for development) loads what was sent")
    parcel = pushing.pack(material / "run", NAME, with_peft=True, base_model=BASE)
    assert {"peft/adapter_config.json", "peft/adapter_model.safetensors"} <= set(parcel.files)
    assert pushing.send(parcel).commit
    (code,) = re.findall(r"^```python\n(.*?)^```", parcel.card, flags=re.MULTILINE | re.DOTALL)
    code += "import torch\nprint(model(torch.tensor([[5, 9, 7]])).logits[0, -1, :40].tolist())\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | server.environment(tmp_path / "fresh"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    theirs = mx.array(json.loads(done.stdout.splitlines()[-1]))
    model, _ = abft_mlx.load(str(material / MODEL), adapter=material / "run")
    ours = model(mx.array([[5, 9, 7]]))[0, -1, :40]
    assert mx.abs(ours - theirs).max().item() < 1e-4
    adapters.detach(model)
    assert mx.abs(model(mx.array([[5, 9, 7]]))[0, -1, :40] - theirs).max().item() > 1e-4


@pytest.fixture
def enabled() -> Iterator[None]:
    """Bars as at the start of a program; transformers switches them off for the whole process."""
    before = utils.are_progress_bars_disabled()
    utils.enable_progress_bars()
    yield
    if before:
        utils.disable_progress_bars()


@pytest.mark.usefixtures("server", "enabled")
def test_a_watcher_hears_of_every_byte_and_no_bar_is_drawn(
    material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int, int]] = []
    with hub.watched(lambda *call: calls.append(call)):
        folder = hub.snapshot(BASE, ["*.json", "*.safetensors"])
        with pytest.raises(utils.RepositoryNotFoundError):
            hub.snapshot("made/none", ["*"])
    assert capsys.readouterr() == ("", "")
    size = sum((material / MODEL / path.name).stat().st_size for path in folder.iterdir())
    assert calls[-1] == (BASE, size, size)
    counts = [done for _, done, _ in calls]
    assert counts == sorted(set(counts))
    assert not utils.are_progress_bars_disabled()
    hub.snapshot(BASE, ["config.json"])
    assert "Fetching" in capsys.readouterr().err
    utils.disable_progress_bars()
    with hub.watched(lambda *_: None):
        hub.snapshot(BASE, ["config.json"])
    assert utils.are_progress_bars_disabled()
