"""What SECURITY.md promises: nothing that is read is run, nothing private is sent."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from cli_support import invoke, write_model

from abft_mlx import loading
from abft_mlx import recipe as recipes
from abft_mlx.errors import OutputError, RecipeError, UsageError
from abft_mlx.induction import read_heads


def test_the_package_has_no_way_to_run_what_it_reads(checkout: Path) -> None:
    """Beside what Ruff forbids: pickle, eval, exec and shells (pyproject.toml)."""
    for path in sorted((checkout / "abft_mlx").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for option, value in re.findall(r"\b(allow_pickle|trust_remote_code)\W+(\w+)", text):
            assert value == "False", f"{path}: {option}"
        assert "yaml.load(" not in text.replace("yaml.load(text, Loader=_Loader)", ""), path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path


def test_yaml_that_names_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = f"name: !!python/object/apply:pathlib.Path.touch [!!python/name:x '{marker}']\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        recipes.load(tmp_path / "mine.yaml")
    for command in ("finetune", "study"):
        result = invoke(command, tmp_path / "mine.yaml")
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1, result.stderr
    assert not marker.exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_heads_are_refused_unopened(tmp_path: Path) -> None:
    about = np.empty(1, dtype=object)
    about[0] = Touch(tmp_path / "ran")
    np.savez(tmp_path / "heads.npz", about=about)
    with pytest.raises(OutputError, match="is no file of heads"):
        read_heads(tmp_path / "heads.npz")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_is_refused_unopened(model: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    result = invoke("eval", "--model", model, "--data", texts, "--adapter", folder)
    assert result.exit_code == 2, result.stderr
    assert "adapter" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder, marker = write_model(tmp_path / "model"), tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with contextlib.suppress(UsageError):  # whether it opens is the tokenizer's business
        loading.load_model(str(folder))
    assert not marker.exists()
