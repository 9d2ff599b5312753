"""Opening models: what is read, and one clear line for each thing that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from mlx.utils import tree_flatten

from abft_mlx import adapters, loading
from abft_mlx.errors import AdapterError, ModelError, UnsupportedArchitectureError
from abft_mlx.recipe import AdapterSection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.checkpoint(tmp_path / "model", "llama")


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_a_folder_opens(name: str, tmp_path: Path) -> None:
    folder = tiny_models.checkpoint(tmp_path, name)
    loaded = loading.load_model(str(folder))
    assert (loaded.source, loaded.path) == (str(folder), folder)
    assert loaded.config["model_type"] == name
    assert loaded.context_tokens == 256
    assert not tree_flatten(loaded.model.trainable_parameters())
    tokens, _ = tiny_models.tokens()
    assert mx.array_equal(loaded.model(tokens), tiny_models.build(name)(tokens))


def test_an_adapter_comes_along(folder: Path, tmp_path: Path) -> None:
    model = loading.load_model(str(folder)).model
    adapters.attach(model, AdapterSection(rank=2))
    tiny_models.train(model)
    adapters.save(model, tmp_path / "run")
    tokens, _ = tiny_models.tokens()
    again = loading.load_model(str(folder), adapter=tmp_path / "run").model
    assert mx.abs(again(tokens) - model(tokens)).max().item() <= 1e-5
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        loading.load_model(str(folder), adapter=folder)


def set_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs spec/v1\noid sha256:0\n")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(folder: Path) -> None:
    weights = dict(tree_flatten(tiny_models.build("llama").parameters()))
    del weights["model.norm.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    set_config(folder, model_file="evil.py")


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), r"names no model_type"),
    (lambda f: set_config(f, model_type=None), r"names no model_type"),
    (lambda f: set_config(f, hidden_size=None), r"cannot be opened as a llama model"),
    (lambda f: set_config(f, intermediate_size=64), r"cannot be opened as a llama model.*shape"),
    (no_weights, r"has no model\*\.safetensors \(found pytorch_model\.bin\).*mlx_lm\.convert"),
    (cut_short, r"is broken: .*; fetch it again"),
    (git_lfs_pointer, r"is broken: .*header too large"),
    (missing_shard, r"lacks 1 of its weight files, model-00001-of-00002\.safetensors first"),
    (missing_tensor, r"Missing 1 parameters"),
    (own_code, r"model code of its own, .evil\.py., which is never run"),
    (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer in .* cannot be opened"),
]


@pytest.mark.parametrize(("breaking", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_a_broken_folder_is_one_clear_line(
    breaking: Callable[[Path], object], message: str, folder: Path
) -> None:
    breaking(folder)
    with pytest.raises(ModelError, match=message) as caught:
        loading.load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value)


@pytest.mark.parametrize("model_type", ["no_such_model", "mamba2x"])
def test_an_architecture_that_mlx_lm_does_not_know(model_type: str, folder: Path) -> None:
    set_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedArchitectureError, match=f"'{model_type}'.*llama") as caught:
        loading.load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nothing", "no such folder"),
        ("what is this?", "no such folder"),
        ("a/b/c", "no such folder"),
        ("owner/name", "not in the local cache and the hub cannot be reached"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        loading.load_model(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_sees_every_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loading.fingerprint(folder)
    assert first == loading.fingerprint(tiny_models.checkpoint(tmp_path / "copy", "llama"))
    other = tiny_models.checkpoint(tmp_path / "other", "llama", seed=1)
    assert loading.fingerprint(other) != first
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    second = loading.fingerprint(folder)
    assert second != first
    set_config(folder, rope_theta=1.0)
    assert loading.fingerprint(folder) not in (first, second)
    assert first.startswith("sha256:")
    monkeypatch.setattr(loading, "HASHED_WHOLE_BYTES", 1000)
    sampled = loading.fingerprint(folder)
    assert sampled.startswith("sha256-sampled:")
    content[-1] ^= 1
    weights.write_bytes(content)
    assert loading.fingerprint(folder) != sampled, "the last bytes are among the samples"


def test_a_hub_model_is_fetched_once_and_then_works_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files["malicious.py"] = b"raise SystemExit('ran')"
    fingerprint = loading.fingerprint(folder)

    def refused(words: str, name: str, revision: str | None = None) -> None:
        with pytest.raises(ModelError, match=words):
            loading.load_model(name, revision)

    with LoopbackHub().serving() as server:
        server.enter(monkeypatch, tmp_path / "home")
        server.add("owner/small", files)
        server.add("owner/gated", files, gated=True)
        loaded = loading.load_model("owner/small")
        assert (loaded.source, loaded.fingerprint) == ("owner/small", fingerprint)
        assert "malicious.py" not in {path.name for path in loaded.path.iterdir()}
        refused("has no revision 'no-such-revision'", "owner/small", "no-such-revision")
        refused("is gated", "owner/gated")
        refused("neither a folder here nor a model on the hub", "owner/absent")
    # The network is gone but nobody said so: nothing listens at this address.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert loading.load_model("owner/small").fingerprint == fingerprint
    refused("not in the local cache and the hub cannot be reached", "owner/other")
