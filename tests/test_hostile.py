"""Templates that try to leave Jinja's sandbox, code in models, links and names that lead out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import invoke, write_model
from loopback_hub import LoopbackHub
from made_tokenizers import gpt2
from push_support import make_run

from abft_mlx import loading
from abft_mlx.errors import ModelError, PromptError
from abft_mlx.exchange import push
from abft_mlx.prompts import ChatTemplate, Template

NAME = "owner/mails"


@pytest.mark.parametrize(
    "template",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch ran') }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__ }}{{ __import__('pathlib').Path('ran').touch() }}",
    ],
)
def test_a_hostile_chat_template_is_refused(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = gpt2()
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(tokenizer, Template())
    assert not (tmp_path / "ran").exists()


def test_nobody_is_asked_whether_to_run_code(texts: Path, tmp_path: Path, checkout: Path) -> None:
    """A yes on standard input, as the first text to label, runs nothing."""
    folder, ran = write_model(tmp_path / "model"), tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    for name, classes in (
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}),
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
    ):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        settings |= {"auto_map": classes, "tokenizer_class": "Own"}
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    words = ["predict", "--model", folder, "--data", texts, "-"]
    done = subprocess.run(
        [sys.executable, str(checkout / "cli.py"), *map(str, words)],
        input="y\nyes\n1\n" * 9, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not ran.exists()
    assert "Do you wish to run" not in done.stdout + done.stderr
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("name", [*push.ALLOWED, "demonstrations.jsonl"])
def test_no_file_that_is_sent_may_be_a_link(name: str, run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    done = invoke("push", run, NAME, "--dry-run", "--with-demonstrations")
    assert done.exit_code == 2, done.output
    assert f"{name} is a link" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_linked_folder_is_the_users_word_and_one_within_is_not_looked_into(
    run: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "adapter_model.safetensors").write_bytes(b"private")
    (run / "peft").symlink_to(outside)
    (tmp_path / "link").symlink_to(run)
    sent = push.pack(run, NAME)
    assert push.pack(tmp_path / "link", NAME).sizes() == sent.sizes()
    assert not [file for file in sent.files if file.startswith("peft")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub().serving() as server:
        server.enter(monkeypatch, tmp_path / "deep" / "home")
        yield server


@pytest.mark.parametrize(
    ("number", "name"), list(enumerate(["../x", "/etc/x", "a/../../x", "x\0"]))
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_repositorys_names_lead_nowhere_else(
    number: int, name: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    # A cache knows a repository by its name and commit, so each has its own.
    own = f"owner/set{number}"
    hub.add(own, {"config.json": b'{"model_type": "llama"}', f"{name}.json": b"{}"})
    with pytest.raises(ModelError, match=f"model {own} could not be fetched: "):
        loading.load_model(own)
    hub.add(own, {f"{name}.csv": b"text,label\na,b\n"}, repo_type="dataset")
    for words in (["--model", own, "--data", "emotion"], ["--model", "demo", "--data", own]):
        result = invoke("eval", *words)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("error: ") == 1
        assert "Traceback" not in result.stderr
    assert hub.sent("GET", f"/api/datasets/{own}")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    outside = [path for path in (tmp_path / "deep").rglob("*") if "hub" not in path.parts]
    assert {path.name for path in outside} <= {"home"}
    assert not list(Path("/etc").glob("x.*"))
