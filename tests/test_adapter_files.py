"""Adapter folders: stock mlx-lm loads them with the same logits; what does not fit is all named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from abft_mlx import adapters
from abft_mlx.errors import AdapterError, OutputError, RunError
from abft_mlx.recipe import AdapterSection

LORA = AdapterSection(rank=4, scale=2.0)
SECTIONS = {
    "lora": LORA,
    "some-layers": AdapterSection(rank=2, scale=0.5, dropout=0.1, layers=[0, 2]),
    "full": AdapterSection(kind="full", layers=[1, 2]),
}

HEAD = AdapterSection(rank=4, scale=2.0, head=True)


def trained(folder: Path, section: AdapterSection) -> nn.Module:
    model, _ = load_model(folder)
    adapters.attach(model, section)
    tiny_models.train(model)
    return model


def difference(left: mx.array, right: mx.array) -> float:
    return float(mx.abs(left - right).max())


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_stock_mlx_lm_loads_it_with_the_same_logits(name: str, kind: str, tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", name)
    model = trained(base, SECTIONS[kind])
    tokens, _ = tiny_models.tokens()
    plain, expected = load_model(base)[0](tokens), model(tokens)
    adapters.save(model, tmp_path / "run", base_model="owner/name")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "run"))
    assert difference(expected, plain) > 1e-2
    assert difference(stock(tokens), expected) <= 1e-4
    ours, _ = load_model(base)
    adapters.load(ours, tmp_path / "run")
    assert difference(ours(tokens), expected) <= 1e-5
    assert adapters.trainable_parameters(ours) == adapters.trainable_parameters(model)
    names = [key for key, _ in tree_flatten(ours.trainable_parameters())]
    assert names == [key for key, _ in tree_flatten(model.trainable_parameters())]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_an_adapter_of_a_quantized_base(name: str, bits: int, tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", name, bits=bits)
    model = trained(base, LORA)
    tokens, _ = tiny_models.tokens()
    adapters.save(model, tmp_path / "run")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "run"))
    assert difference(stock(tokens), model(tokens)) <= 1e-4
    assert difference(stock(tokens), load_model(base)[0](tokens)) > 1e-2


def test_full_weights_of_a_bfloat16_base_give_the_same_logits_in_stock_mlx_lm(
    tmp_path: Path,
) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    model, _ = load_model(base)
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    model = trained(base, AdapterSection(kind="full"))
    adapters.save(model, tmp_path / "run")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "run"))
    tokens, _ = tiny_models.tokens()
    assert mx.array_equal(stock(tokens), model(tokens))


def test_what_the_files_hold(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    for kind, section in SECTIONS.items():
        model = trained(base, section)
        run = tmp_path / kind
        adapters.save(model, run, base_model=str(base))
        assert sorted(path.name for path in run.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
        text = (run / adapters.CONFIG).read_text(encoding="utf-8")
        content = (run / adapters.WEIGHTS).read_bytes()
        assert str(tmp_path) not in text
        assert str(tmp_path).encode() not in content
        saved: Any = mx.load(str(run / adapters.WEIGHTS))
        assert set(saved) == set(adapters.tensors(model))
        assert all(value.dtype == mx.float32 for value in saved.values())
        layers = {name.split(".")[2] for name in saved}
        assert layers == {str(n) for n in section.layers or range(tiny_models.LAYERS)}
        leaves = {"weight"} if kind == "full" else {"lora_a", "lora_b"}
        assert {name.rpartition(".")[2] for name in saved} == leaves
        assert {name.split(".")[4] for name in saved} == {"q_proj", "k_proj"}
        written = json.loads(text)
        assert "model" not in written
        if kind != "full":
            settings = written["lora_parameters"]
            assert (settings["rank"], settings["scale"]) == (section.rank, section.scale)
            assert settings["dropout"] == section.dropout
        adapters.save(model, run, base_model="owner/name")
        assert (run / adapters.WEIGHTS).read_bytes() == content, "the same adapter, bit for bit"
        assert json.loads((run / adapters.CONFIG).read_text())["model"] == "owner/name"


@pytest.mark.parametrize(
    ("section", "bits", "wanted"),
    [
        (SECTIONS["lora"], None, {"fine_tune_type": "lora", "num_layers": 3}),
        (SECTIONS["some-layers"], None, {"fine_tune_type": "lora", "num_layers": 3}),
        (SECTIONS["full"], None, {"fine_tune_type": "full", "num_layers": 3}),
        (HEAD, None, {"fine_tune_type": "full", "num_layers": 3}),
        (HEAD, 4, {"fine_tune_type": "lora", "num_layers": 3}),
    ],
)
def test_the_settings_as_mlx_lm_reads_them(
    section: AdapterSection, bits: int | None, wanted: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_models.build("llama")
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    adapters.attach(model, section)
    if section.kind == "lora":
        wanted = wanted | {
            "lora_parameters": {
                "keys": [
                    f"model.layers.{n}.self_attn.{name}"
                    for n in section.layers or range(3)
                    for name in ("k_proj", "q_proj")
                ],
                "rank": section.rank,
                "scale": section.scale,
                "dropout": section.dropout,
            }
        }
    adapters.save(model, tmp_path / "more" / "run")
    adapters.save(model, tmp_path / "more" / "run")
    text = (tmp_path / "more" / "run" / adapters.CONFIG).read_text(encoding="utf-8")
    assert json.loads(text) == wanted
    with (tmp_path / "more" / "run" / adapters.WEIGHTS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "mlx"}


def test_a_base_is_named_by_its_hub_id_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    model = tiny_models.build("llama")
    adapters.attach(model, LORA)
    for name, kept in (
        ("owner/na.me-1_b", "owner/na.me-1_b"),
        ("gpt2", "gpt2"),
        ("here/model", None),
        ("here", None),
        ("a/b/c", None),
        ("/owner/name", None),
        ("owner/name/", None),
        ("~/name", None),
        ("", None),
        (None, None),
    ):
        adapters.save(model, tmp_path / "run", base_model=name)
        written = json.loads((tmp_path / "run" / adapters.CONFIG).read_text(encoding="utf-8"))
        assert written.get("model") == kept, name
        assert ("model" in written) == (kept is not None)
        assert adapters.base_model(tmp_path / "run") == kept
        assert adapters.base_model(str(tmp_path / "run")) == kept


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ({"model": ""}, None),
        ({"model": 7}, None),
        ({"base_model_name_or_path": "a/b"}, None),
        ({"peft_type": "LORA", "base_model_name_or_path": "a/b", "model": "c/d"}, "a/b"),
        ({"peft_type": None, "model": "c/d"}, None),
    ],
)
def test_the_base_that_settings_name(
    written: dict[str, Any], wanted: str | None, tmp_path: Path
) -> None:
    (tmp_path / adapters.CONFIG).write_text(json.dumps(written), encoding="utf-8")
    assert adapters.base_model(tmp_path) == wanted


def test_an_adapter_that_stock_mlx_lm_trained(tmp_path: Path) -> None:
    """Keys relative to a layer, other projections than W_Q and W_K, the last layers only."""
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    model, _ = load_model(base)
    settings = {"rank": 3, "scale": 5.0, "dropout": 0.0}
    settings["keys"] = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
    linear_to_lora_layers(model, 2, settings)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        if name.endswith(("lora_a", "lora_b")):
            weights[name] = mx.random.normal(value.shape, key=mx.random.key(len(weights)))
    run = tmp_path / "run"
    run.mkdir()
    mx.save_safetensors(str(run / adapters.WEIGHTS), weights)
    written = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (run / adapters.CONFIG).write_text(json.dumps(written), encoding="utf-8")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(run))
    ours, _ = load_model(base)
    adapters.load(ours, run)
    tokens, _ = tiny_models.tokens()
    assert difference(ours(tokens), stock(tokens)) <= 1e-5


def test_loading_replaces_the_adapter_that_is_there(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "gpt2")
    model = trained(base, LORA)
    tokens, _ = tiny_models.tokens()
    expected = model(tokens)
    adapters.save(model, tmp_path / "run")
    tiny_models.train(model)
    assert difference(model(tokens), expected) > 1e-3
    adapters.load(model, tmp_path / "run")
    assert difference(model(tokens), expected) <= 1e-5


def test_a_full_adapter_does_not_fit_a_quantized_base(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    adapters.save(trained(base, SECTIONS["full"]), tmp_path / "run")
    model, _ = load_model(tiny_models.checkpoint(tmp_path / "quantized", "llama", bits=4))
    with pytest.raises(AdapterError, match=r"4 mismatches.*q_proj is quantized"):
        adapters.load(model, tmp_path / "run")


def break_files(run: Path, fault: str) -> None:
    settings, weights = run / adapters.CONFIG, run / adapters.WEIGHTS
    written = json.loads(settings.read_text(encoding="utf-8"))
    if fault == "no config":
        settings.unlink()
    elif fault == "no weights":
        weights.unlink()
    elif fault == "not json":
        settings.write_text("{", encoding="utf-8")
    elif fault == "a list":
        settings.write_text("[]", encoding="utf-8")
    elif fault == "peft":
        settings.write_text('{"peft_type": "LORA", "r": 8}', encoding="utf-8")
    elif fault == "dora":
        settings.write_text(json.dumps(written | {"fine_tune_type": "dora"}), encoding="utf-8")
    elif fault == "no scale":
        del written["lora_parameters"]["scale"]
        settings.write_text(json.dumps(written), encoding="utf-8")
    elif fault == "cut short":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif fault == "not safetensors":
        weights.write_bytes(b"PK\x03\x04 this is a zip file")
    elif fault == "empty":
        mx.save_safetensors(str(weights), {})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no config", r"has no adapter_config\.json"),
        ("no weights", r"has no adapters\.safetensors"),
        ("not json", r"adapter_config\.json cannot be read as JSON"),
        ("a list", r"adapter_config\.json is not a table"),
        ("peft", r"has no adapter_model\.safetensors"),
        ("dora", r"fine_tune_type 'dora' is not supported"),
        ("no scale", r"needs a number scale"),
        ("cut short", r"is broken: "),
        ("not safetensors", r"is broken: "),
        ("empty", r"holds no tensors"),
    ],
)
def test_broken_and_foreign_folders_are_one_clear_line(
    fault: str, message: str, tmp_path: Path
) -> None:
    model = tiny_models.build("llama")
    adapters.attach(model, LORA)
    adapters.save(model, tmp_path / "run")
    adapters.detach(model)
    break_files(tmp_path / "run", fault)
    with pytest.raises(AdapterError, match=message) as caught:
        adapters.load(model, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not adapters.adapted(model)


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with pytest.raises(AdapterError, match="nothing to save"):
        adapters.save(model, tmp_path / "run")
    adapters.attach(model, LORA)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputError) as caught:
        adapters.save(model, tmp_path / "file" / "run")
    assert str(caught.value) == (
        f"{tmp_path}/file/run: cannot be written (Not a directory); choose another folder"
    )


def test_a_failed_write_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("llama")
    adapters.attach(model, LORA)
    adapters.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapters.scale(model, 3.0)

    def fail(path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise RuntimeError("no space")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(RunError, match=rf"^{tmp_path / adapters.WEIGHTS}: .*no space"):
        adapters.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
