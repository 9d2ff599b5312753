"""Chat templates that want too much, or try to leave Jinja's sandbox."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import write_model
from made_tokenizers import gpt2

from abft_mlx.errors import PromptError
from abft_mlx.prompts import ChatTemplate, Template

MACRO = "{% macro m() %}"
CODE = "__import__('pathlib').Path('ran').touch()"
HOSTILE = {
    "a macro that calls itself": MACRO + "{{ m() }}{% endmacro %}{{ m() }}",
    "a long range": "{% for i in range(10**12) %}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch ran') }}",
    "import": "{% include '/etc/passwd' %}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "code": "{{ raise_exception.__globals__ }}{{ " + CODE + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chat_template_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = gpt2()
    monkeypatch.setattr(tokenizer, "chat_template", HOSTILE[name])
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(tokenizer, Template())
    assert not (tmp_path / "ran").exists()


def with_code(folder: Path, marker: Path) -> Path:
    """A model whose tokenizer is of a class of its own, and that nothing else can open."""
    write_model(folder)
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    for name, classes in (
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}),
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
    ):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        settings |= {"auto_map": classes, "tokenizer_class": "Own"}
        (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return folder


def test_nobody_is_asked_whether_to_run_code(texts: Path, tmp_path: Path, checkout: Path) -> None:
    """A yes on standard input, as the first text to label, runs nothing."""
    folder = with_code(tmp_path / "model", tmp_path / "ran")
    words = ["predict", "--model", folder, "--data", texts, "-"]
    done = subprocess.run(
        [sys.executable, str(checkout / "cli.py"), *map(str, words)],
        input="y\nyes\n1\n" * 9, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert "Do you wish to run" not in done.stdout + done.stderr
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
