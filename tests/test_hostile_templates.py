"""Chat templates that do not end, want too much, or try to leave Jinja's sandbox."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from cli_support import invoke, write_model
from made_tokenizers import gpt2

from abft_mlx.errors import PromptError
from abft_mlx.prompts import ChatTemplate, Template, chat

LOOP = "{% for i in range(99999) %}"
MACRO = "{% macro m() %}"
CODE = "__import__('pathlib').Path('ran').touch()"
HOSTILE = {
    "loops in loops": f"{LOOP * 4}{'{% endfor %}' * 4}",
    "output without end": f"{LOOP * 2}x{'{% endfor %}' * 2}",
    "a macro that calls itself": MACRO + "{{ m() }}{% endmacro %}{{ m() }}",
    "loops in a macro": f"{MACRO}{LOOP * 3}{'{% endfor %}' * 3}{{% endmacro %}}{{{{ m() }}}}",
    "a long range": "{% for i in range(10**12) %}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch ran') }}",
    "import": "{% include '/etc/passwd' %}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "code": "{{ raise_exception.__globals__ }}{{ " + CODE + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chat_template_is_refused_soon(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "LONGEST_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    tokenizer = gpt2()
    monkeypatch.setattr(tokenizer, "chat_template", HOSTILE[name])
    begun, tracer = time.monotonic(), sys.gettrace()
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(tokenizer, Template())
    assert time.monotonic() - begun < 10
    assert sys.gettrace() is tracer
    assert not (tmp_path / "ran").exists()


def test_a_whole_command_says_it_in_a_line(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "LONGEST_SECONDS", 0.5)
    folder = write_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": HOSTILE["loops in loops"]}
    path.write_text(json.dumps(settings))
    result = invoke("eval", "--model", folder, "--data", texts, "--set=prompt.chat=true")
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert "it ran for more than" in last
    assert "set prompt.chat=false" in last
    assert "Traceback" not in result.stderr
