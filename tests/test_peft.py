"""Adapters to PEFT and from it: PEFT and transformers compute the same logits with them."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny_configs
import tiny_models
from mlx_lm.utils import load_model

from abft_mlx import adapters, exchange
from abft_mlx.adapters.peft import Settings, ending_alike
from abft_mlx.errors import AdapterError
from abft_mlx.exchange import peft
from abft_mlx.recipe import AdapterSection

# float32 on both sides; the logits themselves are of the order of 1 to 10.
TOLERANCE = 1e-4
SECTIONS = {
    "lora": AdapterSection(rank=4, scale=2.0),
    "layers": AdapterSection(rank=3, scale=0.75, layers=[0, 2]),
    "full": AdapterSection(kind="full"),
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "k_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "k_proj": 2},
            "alpha_pattern": {"layers.2.self_attn.q_proj": 3},
        },
    ),
    "every-linear-layer": ("qwen2", {"target_modules": "all-linear"}),
    "a-pattern": ("llama", {"target_modules": r".*\.[02]\.self_attn\.[qk]_proj"}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "fused": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


def peft_module() -> Any:
    """The peft module, or a skip that says what is missing."""
    tiny_models.torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft as module
    except ImportError as error:
        pytest.skip(f"the oracle needs {error.name}: pip install 'abft-mlx[bench]'")
    return module


class Pair:
    """One random model in transformers and in mlx-lm."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = tiny_models.save_reference(self.reference(), folder, name)

    def reference(self) -> Any:
        """The transformers model, new every time: PEFT changes what it is given."""
        return tiny_models.reference(self.name)

    def model(self) -> nn.Module:
        """The mlx-lm model, new every time."""
        return load_model(self.folder)[0]

    def theirs(self, adapter: Path) -> np.ndarray:
        """(B, T, V) logits of transformers with a PEFT adapter from a folder."""
        with strict():
            return logits(peft_module().PeftModel.from_pretrained(self.reference(), adapter))

    def ours(self, model: nn.Module) -> np.ndarray:
        """(B, T, V) logits of an mlx-lm model."""
        return np.array(model(mx.array(ids())))


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Warnings are errors, also those that PEFT gives where it leaves something out."""
    with warnings.catch_warnings():
        # A tensor without a place, or a layer without a tensor, is a mere warning to PEFT.
        warnings.simplefilter("error")
        # PEFT asks transformers by this name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


def ids() -> np.ndarray:
    """(B, T) tokens, no padding."""
    return np.array(mx.random.randint(1, tiny_models.VOCABULARY, (3, 20), key=mx.random.key(5)))


def logits(model: Any) -> np.ndarray:
    """(B, T, V) logits of a transformers model."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(ids().astype(np.int64))).logits.numpy()


def new_adapter(pair: Pair, folder: Path, **settings: Any) -> np.ndarray:
    """Write an adapter that PEFT itself made, all its tensors random; gives PEFT's own logits."""
    import torch

    given = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings
    with strict():
        model = peft_module().get_peft_model(pair.reference(), peft_module().LoraConfig(**given))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def far(left: np.ndarray, right: np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.abs(left - right).max())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    peft_module()
    folder = tmp_path_factory.mktemp("pairs")
    return {name: Pair(name, folder / name) for name in ("gpt2", "llama", "qwen2")}


def trained(pair: Pair, section: AdapterSection) -> nn.Module:
    model = pair.model()
    adapters.attach(model, section)
    tiny_models.train(model)
    return model


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_peft_gives_the_same_logits(
    pairs: dict[str, Pair], name: str, kind: str, tmp_path: Path
) -> None:
    pair = pairs[name]
    model = trained(pair, SECTIONS[kind])
    adapters.scale(model, 1.5)
    ours = pair.ours(model)
    peft.save(model, tmp_path, base_model="owner/name")
    assert far(pair.ours(pair.model()), ours) > 1e-2
    assert far(pair.theirs(tmp_path), ours) <= TOLERANCE
    settings = written(tmp_path)
    assert settings["base_model_name_or_path"] == "owner/name"
    assert settings["fan_in_fan_out"] == (name == "gpt2")
    short = ["c_attn"] if name == "gpt2" else ["k_proj", "q_proj"]
    targets = settings["target_modules"]
    assert targets == short if kind != "layers" else len(targets) == 2 * len(short)
    # And back: the reader makes of it what was written.
    again = pair.model()
    adapters.load(again, tmp_path)
    assert far(pair.ours(again), ours) <= TOLERANCE


def round_trip(pair: Pair, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write for PEFT; PEFT and this package's reader give the same logits. The settings."""
    ours = pair.ours(model)
    peft.save(model, folder, base_model=None)
    assert far(pair.theirs(folder), ours) <= TOLERANCE
    again = pair.model()
    adapters.load(again, folder)
    assert far(pair.ours(again), ours) <= TOLERANCE
    return written(folder)


def test_alpha_is_scale_times_rank(pairs: dict[str, Pair], tmp_path: Path) -> None:
    settings = round_trip(pairs["llama"], trained(pairs["llama"], SECTIONS["layers"]), tmp_path)
    assert (settings["r"], settings["lora_alpha"]) == (3, 2.25)
    assert settings["base_model_name_or_path"] is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_trained_head_is_a_module_to_save(
    pairs: dict[str, Pair], kind: str, tmp_path: Path
) -> None:
    model = trained(pairs["llama"], AdapterSection(rank=4, kind=kind, head=True))
    head = model.lm_head
    head.weight = head.weight + 0.1 * mx.random.normal(head.weight.shape, key=mx.random.key(1))
    assert round_trip(pairs["llama"], model, tmp_path)["modules_to_save"] == ["lm_head"]


def test_layers_that_differ_in_what_trains_are_named_in_full(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    """W_Q of one layer and W_K of another: no list of ends and numbers says that."""
    run = tmp_path / "run"
    adapters.save(trained(pairs["llama"], SECTIONS["lora"]), run)
    tensors: Any = mx.load(str(run / adapters.WEIGHTS))
    dropped = ("model.layers.0.self_attn.k_proj", "model.layers.2.self_attn.q_proj")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    mx.save_safetensors(str(run / adapters.WEIGHTS), kept)
    model = pairs["llama"].model()
    adapters.load(model, run)
    assert len(round_trip(pairs["llama"], model, tmp_path)["target_modules"]) == 4


def test_a_mixture_of_full_and_low_rank(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Layers of different ranks and alphas, in one PEFT folder."""
    pair = pairs["llama"]
    for kind, layers in (("lora", [0, 1]), ("full", [2])):
        section = AdapterSection(rank=4, kind=kind, layers=layers)
        adapters.save(trained(pair, section), tmp_path / kind)
    model = pair.model()
    adapters.combine(model, [(tmp_path / "lora", 1.0), (tmp_path / "full", 0.5)])
    assert set(round_trip(pair, model, tmp_path)["rank_pattern"].values()) == {64, 32}


def test_names_that_were_never_compared_are_refused(tmp_path: Path) -> None:
    from mlx_lm.models.mimo import Model, ModelArgs

    settings = tiny_models.config("qwen2") | {"model_type": "mimo", "num_nextn_predict_layers": 0}
    model = Model(ModelArgs.from_dict(settings))
    adapters.attach(model, SECTIONS["lora"])
    with pytest.raises(AdapterError, match=r"model\.layers\.0.*mimo.*--to mlx or --to fus"):
        peft.save(model, tmp_path, base_model=None)
    assert not list(tmp_path.iterdir())


def test_what_stock_mlx_lm_cannot_load_is_refused(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama", bits=4)
    model, _ = load_model(base)
    adapters.attach(model, AdapterSection(rank=4, head=True))
    adapters.save(model, tmp_path / "run")
    with pytest.raises(AdapterError, match=r"lm_head.*--to fused"):
        exchange.export(tmp_path / "run", "mlx", tmp_path / "out", model=str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "gptj", "phi3", "qwen3_moe", "qwen3_vl"])
def test_layers_that_have_other_names_or_are_fused_in_transformers(
    name: str, tmp_path: Path
) -> None:
    theirs = peft_module()
    import torch
    import transformers_oracle as oracle

    tiny = tiny_configs
    with warnings.catch_warnings():
        # What transformers says of tiny configurations.
        warnings.simplefilter("ignore")
        reference, settings = oracle.reference(name)
        model = oracle.load(name, reference, settings, tmp_path)
    tokens, _ = tiny.tokens()
    base = tiny.logits(model, tokens)
    adapters.attach(model, AdapterSection(rank=3, scale=2.0, layers=[0, 2]))
    masks = adapters.gradient_mask(model)
    for n, (path, module) in enumerate(adapters.adapted(model).items()):
        random = mx.random.normal(module.lora_b.shape, key=mx.random.key(n))
        module.lora_b = random * masks.get(f"{path}.lora_b", 1)
    ours = tiny.logits(model, tokens)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    peft.save(model, adapter, base_model=None)
    with strict():
        changed = theirs.PeftModel.from_pretrained(reference, adapter).eval()
    with torch.no_grad():
        found = changed(input_ids=torch.tensor(np.array(tokens).astype(np.int64)), use_cache=False)
    assert np.abs(ours - base).max() > 1e-2
    assert np.abs(found.logits.numpy() - ours).max() <= TOLERANCE
    adapters.detach(model)
    adapters.load(model, adapter)
    assert np.abs(tiny.logits(model, tokens) - ours).max() <= TOLERANCE


@pytest.mark.parametrize("kind", SETTINGS)
def test_logits_equal_pefts(pairs: dict[str, Pair], kind: str, tmp_path: Path) -> None:
    name, settings = SETTINGS[kind]
    pair = pairs[name]
    theirs = new_adapter(pair, tmp_path / "peft", **settings)
    model = pair.model()
    assert far(pair.ours(model), theirs) > 1e-1
    adapters.load(model, tmp_path / "peft")
    ours = pair.ours(model)
    assert far(ours, theirs) <= TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    # One rank and one scale for all layers, so that it can be saved, and stock mlx-lm loads that.
    adapters.save(model, tmp_path / "mlx")
    stock, _ = mlx_lm.load(str(pair.folder), adapter_path=str(tmp_path / "mlx"))
    assert far(pair.ours(stock), ours) <= TOLERANCE * max(1.0, float(np.abs(theirs).max()))


def test_half_of_it_and_its_shift(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["llama"]
    new_adapter(pair, tmp_path, **SETTINGS["patterns"][1])
    model = pair.model()
    adapters.load(model, tmp_path)
    shift = adapters.shift_norms(model)
    adapters.scale(model, 0.5)
    half = pair.ours(model)
    mixed = pair.model()
    adapters.combine(mixed, [(tmp_path, 0.25), (tmp_path, 0.25)])
    assert far(pair.ours(mixed), half) <= TOLERANCE
    tensors: Any = mx.load(str(tmp_path / "adapter_model.safetensors"))
    for layer, alpha in enumerate((8, 8, 3)):
        rank = 7 if layer == 1 else 4
        found = [
            np.array(tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.{one}.weight"],
                     dtype=np.float64) for one in ("lora_B", "lora_A")
        ]  # fmt: skip
        assert shift["q"][layer] == pytest.approx(
            alpha / rank * np.linalg.norm(found[0] @ found[1])
        )


@pytest.fixture(scope="module")
def plain(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    new_adapter(pairs["llama"], folder, target_modules=["q_proj", "k_proj"])
    return folder


def refused(pair: Pair, folder: Path, message: str) -> None:
    model = pair.model()
    with pytest.raises(AdapterError) as caught:
        adapters.load(model, folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not adapters.adapted(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is [1, 2]"),
        ({"target_parameters": ["w"]}, "target_parameters is ['w']"),
        ({"something_of_next_year": 3}, "something_of_next_year is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many', which cannot be read"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, which cannot be read"),
        ({"r": 0}, "r is 0, which cannot be read"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, which cannot be read"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern is {'(': 3}, which cannot be read"),
        ({"r": 5}, "lora_A (4, 64) and lora_B (64, 4) are not of the rank 5"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    plain: Path, pairs: dict[str, Pair], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / adapters.CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(settings), encoding="utf-8")
    refused(pairs["llama"], tmp_path, message)


Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half a pair", "layers.1.self_attn.q_proj: needs lora_A and lora_B"),
        ("another model", "layers.9.self_attn.q_proj.lora_A.weight: this model has no place"),
        ("a tower", "vision_tower.layers.0.self_attn.q_proj.lora_A.weight: this model has no"),
        ("magnitudes", "lora_magnitude_vector: this model has no place"),
        ("twice", "model.layers.0.self_attn.q_proj is the same layer of this model"),
        ("another width", "(4, 63)}, the model needs"),
        ("pickled", "but adapter_model.bin, which is not opened because it can run code"),
        ("cut short", "is broken: "),
    ],
)
def test_tensors_that_do_not_fit(
    plain: Path, pairs: dict[str, Pair], fault: str, message: str, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors: Any = mx.load(str(file))
    if fault == "half a pair":
        del tensors[Q.format(1, "B")]
    elif fault == "another model":
        tensors[Q.format(9, "A")] = tensors[Q.format(1, "A")]
    elif fault == "a tower":
        tensors[Q.format(0, "A").replace("model.layers", "vision_tower.layers")] = mx.zeros((4, 64))
    elif fault == "magnitudes":
        tensors[Q.format(0, "magnitude_vector").replace(".weight", "")] = mx.zeros((64,))
    elif fault == "twice":
        tensors[Q.format(0, "A").replace("model.layers", "language_model.layers")] = mx.zeros(
            (4, 4)
        )
    elif fault == "another width":
        tensors[Q.format(1, "B")] = mx.zeros((63, 4))
    if fault == "pickled":
        file.rename(tmp_path / "adapter_model.bin")
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        mx.save_safetensors(str(file), tensors)
    refused(pairs["llama"], tmp_path, message)


def test_names_of_other_programs_are_matched_from_their_ends() -> None:
    paths = [f"language_model.model.layers.{n}.self_attn.q_proj" for n in range(12)]
    assert ending_alike("model.language_model.layers.1.self_attn.q_proj", paths) == paths[1]
    assert ending_alike("layers.11.self_attn.q_proj", paths) == paths[11]
    assert ending_alike("transformer.layers.2.self_attn.q_proj", paths) == paths[2]
    assert ending_alike("model.visual.layers.1.self_attn.q_proj", paths) is None
    assert ending_alike("self_attn.q_proj", paths) is None
    assert ending_alike("layers.1.q_proj", paths) is None
    assert (
        ending_alike("model.layers.1.self_attn.q_proj", [*paths, "layers.1.self_attn.q_proj"])
        is None
    )


def test_ranks_and_scales_of_layers() -> None:
    q, k = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"
    settings = Settings(
        r=4,
        lora_alpha=6,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 16},
        alpha_pattern={"k_proj": 3, r".*\.2\..*": 5},
    )
    for name, rank, alpha in (
        (q.format(0), 16, 6),
        (q.format(1), 2, 6),  # the first pattern that fits
        (q.format(2), 16, 5),
        (k.format(0), 4, 3),
        (k.format(2), 4, 3),
        ("q_proj", 16, 6),
        ("model.qq_proj", 4, 6),  # no part of a name
        ("model.q_proj.inner", 4, 6),
    ):
        assert settings.rank(name) == rank, name
        assert settings.scale(name) == alpha / rank, name
    assert Settings(r=4, lora_alpha=6, use_rslora=True).scale(q.format(0)) == 3
