"""Adapter folders: stock mlx-lm loads them with the same logits; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from abft_mlx import adapters, ports
from abft_mlx.errors import AdapterError, OutputError, RunError
from abft_mlx.recipe import AdapterSection

LORA = AdapterSection(rank=4, scale=2.0)
HEAD = AdapterSection(rank=4, scale=2.0, head=True)
SECTIONS = {
    "lora": LORA,
    "some-layers": AdapterSection(rank=2, scale=0.5, dropout=0.1, layers=[0, 2]),
    "full": AdapterSection(kind="full", layers=[1, 2]),
    "head": HEAD,
    "full-head": AdapterSection(kind="full", layers=[1, 2], head=True),
}
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def train(model: nn.Module, updates: int = 3) -> None:
    """A few Adam updates on a loss that the head has a part in."""
    tokens, _ = tiny_models.tokens()
    optimizer = optim.Adam(1e-2, bias_correction=True)

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(tokens), tokens, reduction="mean")

    for _ in range(updates):
        gradients = nn.value_and_grad(model, loss)(model)[1]
        optimizer.update(model, adapters.mask_gradients(model, gradients))
        mx.eval(model.trainable_parameters(), optimizer.state)


def trained(folder: Path, section: AdapterSection) -> nn.Module:
    model, _ = load_model(folder)
    adapters.attach(model, section)
    train(model)
    return model


def label_logits(model: nn.Module, tokens: mx.array, last: mx.array, labels: mx.array) -> mx.array:
    """(B, C) logits at the last positions, as evaluation computes them."""
    port = ports.port_for(model)
    hidden = port.hidden(model, tokens)[mx.arange(len(tokens)), last]
    return port.logits(model, hidden, labels)


def difference(left: mx.array, right: mx.array) -> float:
    return float(mx.abs(left - right).max())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in SECTIONS),
        *((name, kind) for name in ("gpt2", "qwen2") for kind in ("lora", "some-layers", "full")),
    ],
)
def test_stock_mlx_lm_loads_it_with_the_same_logits(name: str, kind: str, tmp_path: Path) -> None:
    base, run = tiny_models.checkpoint(tmp_path / "base", name), tmp_path / "run"
    section = SECTIONS[kind]
    model = trained(base, section)
    tokens, _ = tiny_models.tokens()
    plain, expected = load_model(base)[0](tokens), model(tokens)
    assert difference(expected, plain) > 1e-2
    adapters.save(model, run, base_model=str(base))
    content = {path.name: path.read_bytes() for path in run.iterdir()}
    assert set(content) == {adapters.CONFIG, adapters.WEIGHTS} | (
        {adapters.FACTORS} if kind == "head" else set()
    )
    assert not any(str(tmp_path).encode() in file for file in content.values())
    stock, _ = mlx_lm.load(str(base), adapter_path=str(run))
    assert difference(stock(tokens), expected) <= 1e-4
    ours, _ = load_model(base)
    for _ in range(2):  # also over the adapter that is there
        adapters.load(ours, run)
        assert difference(ours(tokens), expected) <= 1e-5
    trainable = dict(tree_flatten(model.trainable_parameters()))
    assert [key for key, _ in tree_flatten(ours.trainable_parameters())] == list(trainable)
    assert set(adapters.tensors(ours)) == set(trainable)
    adapters.save(ours, run, base_model=str(base))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == content, "bit for bit"
    written = json.loads(content[adapters.CONFIG])
    assert written["num_layers"] == tiny_models.LAYERS
    assert written["fine_tune_type"] == ("lora" if kind in ("lora", "some-layers") else "full")
    if section.kind == "lora":
        parameters = written["lora_parameters"]
        assert (parameters["rank"], parameters["scale"]) == (section.rank, section.scale)
        assert parameters["dropout"] == section.dropout
    assert "model" not in written


@pytest.mark.parametrize(("name", "bits"), [("gpt2", 4), ("qwen3", 8)])
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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_over_a_quantized_base(bits: int, tmp_path: Path) -> None:
    """Ours loads it with the same logits; stock mlx-lm has no place for it and says so."""
    base, run = tiny_models.checkpoint(tmp_path / "base", "llama", bits=bits), tmp_path / "run"
    model = trained(base, HEAD)
    tokens, last = tiny_models.tokens()
    expected = model(tokens)
    adapters.save(model, run)
    assert set(mx.load(str(run / adapters.WEIGHTS))) == set(adapters.tensors(model))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        mlx_lm.load(str(base), adapter_path=str(run))
    ours, _ = load_model(base)
    adapters.load(ours, run)
    assert mx.array_equal(ours(tokens), expected)
    labels = label_logits(ours, tokens, last, mx.array([3, 80]))
    at_last = mx.take_along_axis(expected, last[:, None, None], axis=1)[:, 0]
    assert difference(labels, at_last[:, mx.array([3, 80])]) <= 1e-4
    adapters.detach(ours)
    assert isinstance(ours.lm_head, nn.QuantizedLinear)
    adapters.merge(model, dequantize=True)
    assert type(model.lm_head) is nn.Linear
    assert difference(model(tokens), expected) <= 1e-4


def test_without_its_lora_file_the_folder_is_still_the_same_model(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    model = trained(base, HEAD)
    adapters.save(model, tmp_path / "run")
    (tmp_path / "run" / adapters.FACTORS).unlink()
    ours, _ = load_model(base)
    adapters.load(ours, tmp_path / "run")
    tokens, _ = tiny_models.tokens()
    assert difference(ours(tokens), model(tokens)) <= 1e-4
    (tmp_path / "run" / adapters.FACTORS).write_bytes(b"not a safetensors file")
    with pytest.raises(AdapterError, match=r"lora\.safetensors is broken"):
        adapters.load(ours, tmp_path / "run")


def test_lora_on_the_head_by_stock_mlx_lm(tmp_path: Path) -> None:
    """Not ours, but mlx-lm trains it; its label logits are right, too."""
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    run = tmp_path / "run"
    run.mkdir()
    settings = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["lm_head"]}
    shapes = {"lm_head.lora_a": (64, 3), "lm_head.lora_b": (3, 96)}
    mx.save_safetensors(
        str(run / adapters.WEIGHTS),
        {n: mx.random.normal(s, key=mx.random.key(s[0])) for n, s in shapes.items()},
    )
    written = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (run / adapters.CONFIG).write_text(json.dumps(written), encoding="utf-8")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(run))
    ours, _ = load_model(base)
    adapters.load(ours, run)
    tokens, last = tiny_models.tokens()
    expected = stock(tokens)
    assert difference(ours(tokens), expected) <= 1e-5
    labels = label_logits(ours, tokens, last, mx.array([3, 80]))
    at_last = mx.take_along_axis(expected, last[:, None, None], axis=1)[:, 0]
    assert difference(labels, at_last[:, mx.array([3, 80])]) <= 1e-4


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
        ("a/b/c", None),
        ("~/name", None),
        (None, None),
    ):
        adapters.save(model, tmp_path / "run", base_model=name)
        written = json.loads((tmp_path / "run" / adapters.CONFIG).read_text(encoding="utf-8"))
        assert written.get("model") == kept, name
        assert adapters.base_model(tmp_path / "run") == kept
        assert adapters.base_model(str(tmp_path / "run")) == kept
    peft = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "model": "c/d"}
    (tmp_path / "run" / adapters.CONFIG).write_text(json.dumps(peft), encoding="utf-8")
    assert adapters.base_model(tmp_path / "run") == "a/b"


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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A saved adapter."""
    model = tiny_models.build("llama")
    adapters.attach(model, LORA)
    adapters.save(model, tmp_path / "run")
    return tmp_path / "run"


def refused(run: Path, message: str, bits: int | None = None) -> None:
    """Loading is refused in one line and leaves the model alone."""
    model = tiny_models.build("llama")
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    with pytest.raises(AdapterError, match=message) as caught:
        adapters.load(model, run)
    assert "\n" not in str(caught.value)
    assert not adapters.adapted(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (adapters.CONFIG, None, r"has no adapter_config\.json"),
        (adapters.CONFIG, b"{", "cannot be read as JSON"),
        (adapters.CONFIG, b"[]", "is not a table"),
        (adapters.CONFIG, b'{"peft_type": "LORA", "r": 8}', r"has no adapter_model\.safetensors"),
        (adapters.CONFIG, b'{"fine_tune_type": "dora"}', "'dora' is not supported"),
        (adapters.CONFIG, b'{"lora_parameters": {}}', "needs a number scale"),
        (adapters.CONFIG, b'{"lora_parameters": {"scale": NaN}}', "needs a number scale"),
        (adapters.CONFIG, b'{"lora_parameters": {"scale": 1, "dropout": 1}}', "a dropout of 0"),
        (adapters.WEIGHTS, None, r"has no adapters\.safetensors"),
        (adapters.WEIGHTS, b"PK\x03\x04 this is a zip file", "is broken: "),
    ],
)
def test_broken_and_foreign_folders_are_one_clear_line(
    run: Path, name: str, content: bytes | None, message: str
) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    refused(run, message)


def change(run: Path, change: dict[str, tuple[int, ...] | None]) -> None:
    """Give tensors of an adapter another shape, or drop them."""
    tensors: Any = mx.load(str(run / adapters.WEIGHTS))
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = mx.zeros(shape)
    mx.save_safetensors(str(run / adapters.WEIGHTS), tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_a": (65, 4)}, r"q_proj: shapes .*\(65, 4\).*the model needs .*\(64, 4\)"),
        ({f"{Q}.lora_a": (64,)}, r"\(1 mismatches\): .*q_proj: shapes"),
        ({f"{K}.lora_b": (3, 32)}, r"k_proj: shapes .*\(3, 32\).*needs .*\(4, 32\)"),
        ({f"{Q}.lora_b": None}, "q_proj: shapes"),
        ({f"{Q}.m": (3,)}, "q_proj: shapes"),
        ({f"{Q}.weight": (64, 64)}, "q_proj: shapes"),
        ({"lm_head.weight": (95, 64)}, r"lm_head: .*\(95, 64\).*needs .*\(96, 64\)"),
        ({"lora_a": (64, 4)}, "has no linear layer ''"),
        ({"x.y.lora_a": (64, 4)}, r"has no linear layer 'x\.y'"),
        ({"model.norm.lora_a": (64, 4)}, r"has no linear layer 'model\.norm'"),
        ({f"x{n}.weight": (1, 1) for n in range(7)}, r"\(7 mismatches\).*and 2 more"),
    ],
)
def test_tensors_that_do_not_fit(
    run: Path, changes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    change(run, changes)
    refused(run, message)
    mx.save_safetensors(str(run / adapters.WEIGHTS), {})
    refused(run, "holds no tensors")


def test_weights_do_not_fit_a_quantized_base(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    adapters.attach(model, SECTIONS["full"])
    adapters.save(model, tmp_path)
    refused(tmp_path, r"4 mismatches.*q_proj: a weight, but the model's is quantized", bits=4)


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with pytest.raises(AdapterError, match="carries no adapter"):
        adapters.save(model, tmp_path / "run")
    adapters.attach(model, LORA)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\)"):
        adapters.save(model, tmp_path / "file" / "run")


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
