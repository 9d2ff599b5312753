"""Readers of what comes with models: adapters of mlx-lm and PEFT, configs, weights, tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as damage
from fuzz_readers import Reader, every

_DTYPES = ("F32", "F16", "BF16", "I64", "U8", "BOOL", "F64", "F8_E4M3", "X9", "", "f32")


def safetensors(rng: Random, content: bytes) -> bytes:
    """A safetensors file with another header, or with other bytes."""
    if rng.random() < 0.35:
        return damage.octets(rng, content)
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one = header[rng.choice(names)]
    kind = rng.randrange(8)
    if kind == 0:
        one["dtype"] = rng.choice(_DTYPES)
    elif kind == 1:
        one["shape"] = rng.choice(([], [0], [2**62], [2**31, 2**31], [-1, -1], one["shape"][::-1],
                                   [*one["shape"], 1], [10**18] * 3, [1.5], "ab",
                                   [True]))  # fmt: skip
    elif kind == 2:
        start, end = one["data_offsets"]
        one["data_offsets"] = rng.choice(
            ([start, end + 4], [start - 4, end], [end, start], [0, end], [start, 10**16], [2**63,
            2**64],
             [-8, end], [start], [start, end, end], [str(start), str(end)], [0.0, 4.0])
        )  # fmt: skip
    elif kind == 3:
        header[
            rng.choice(("", "a", "../x", "\ud800", "model", "lm_head.weight", names[0] + "x"))
        ] = one
    elif kind == 4:
        del header[rng.choice(names)]
        body = body if rng.random() < 0.5 else body[: max(0, len(body) - 64)]
    elif kind == 5:
        header["__metadata__"] = rng.choice(
            ({"a": 1}, [], None, {"format": "pt"}, {"": "\x00"}, {"a": {}})
        )
    else:
        header = damage.value(rng, header)
    text = damage.as_json(rng, header)
    size = rng.choice((len(text),) * 12 + (len(text) + 1, 0, 2**63, 2**40))
    return size.to_bytes(8, "little") + text + body


def _base(folder: Path) -> tuple[Path, Any, list[Path]]:
    """A tiny model's folder, the model, and adapters of it."""
    import mlx.core as mx
    import tiny_models

    from abft_mlx import adapters
    from abft_mlx.loading import load_model
    from abft_mlx.recipe import AdapterSection

    base = tiny_models.checkpoint(folder / "base", "llama", hidden_size=32, intermediate_size=32,
                                  num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = load_model(str(base)).model
    adapters.attach(model, AdapterSection(rank=2))
    adapters.save(model, folder / "ours")
    shapes = {name: tuple(one.shape) for name, one in adapters.tensors(model).items()}
    adapters.detach(model)
    (folder / "peft").mkdir()
    arrays = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        arrays[f"base_model.model.{path}.{'lora_A' if leaf == 'lora_a' else 'lora_B'}.weight"] = (
            mx.ones(shape[::-1])
        )
    mx.save_safetensors(str(folder / "peft" / "adapter_model.safetensors"), arrays)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj"], "bias": "none", "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
        "exclude_modules": None,
        "base_model_name_or_path": "someone/tiny", "init_lora_weights": True,
        "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for one in (folder / "ours", folder / "peft"):
        adapters.load(model, one)
    adapters.detach(model)
    return base, model, [folder / "ours", folder / "peft"]


def _adapter_case(which: int) -> Any:
    def make(rng: Random, sample: Any, folder: Path) -> None:
        shutil.copytree(sample[2][which], folder / "adapter")
        config = folder / "adapter" / "adapter_config.json"
        (weights,) = (folder / "adapter").glob("*.safetensors")
        kind = rng.random()
        if kind < 0.45:
            weights.write_bytes(safetensors(rng, weights.read_bytes()))
        elif kind < 0.9:
            _json(rng, config)
        elif kind < 0.95:
            path = rng.choice((config, weights))
            path.unlink()
            if rng.random() < 0.6:
                path.symlink_to(rng.choice(("/dev/null", "/etc/passwd", "..", path.name)))
        else:
            weights.rename(weights.with_suffix(".bin"))

    return make


def _json(rng: Random, path: Path) -> None:
    content = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(damage.octets(rng, content))
    else:
        path.write_bytes(damage.as_json(rng, damage.value(rng, json.loads(content))))


def _read_adapter(sample: Any, folder: Path) -> None:
    from abft_mlx import adapters
    from abft_mlx.adapters import base_model

    path = folder / "adapter"
    try:
        every(lambda: base_model(path), lambda: adapters.load(sample[1], path))
    finally:
        adapters.detach(sample[1])


def _model_case(*names: str) -> Any:
    def make(rng: Random, sample: Any, folder: Path) -> None:
        shutil.copytree(sample[0], folder / "model")
        path = folder / "model" / rng.choice(names)
        if path.suffix == ".safetensors":
            path.write_bytes(safetensors(rng, path.read_bytes()))
        elif not path.exists():
            mapped = {"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}
            path.write_bytes(damage.as_json(rng, damage.value(rng, mapped)))
        else:
            _json(rng, path)

    return make


# What a chat template may hold: turns as they should be, and ways to hang, grow and break out.
_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m['role'] }}", "{{ m.content }}", "<|im_start|>",
    "{% if add_generation_prompt %}", "{% endif %}", "{% for i in range(99999) %}",
    "{% for i in range(10**12) %}", "{{ messages }}", "{{ bos_token }}", "\n", "{% set x = [] %}",
    "{% set x = namespace(n=0) %}", "{% set x.n = x.n + 1 %}", "{{ x.append(x) }}", "{{ x }}",
    "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch ran') }}", "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%d') }}", "{{ 'x' * 999 }}", "{{ x|tojson }}",
    "{{ '%s'|format(messages) }}", "{{ lipsum.__globals__ }}", "{% generation %}", "{{ self }}",
    "{{ messages|map('attr', '__class__')|list }}", "{% break %}", "{{ 1/0 }}", "{#", "{%",
)  # fmt: skip
_PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"


def _chat_case(rng: Random, sample: Any, folder: Path) -> None:
    model = folder / "model"
    shutil.copytree(sample[0], model)
    if rng.random() < 0.3:
        template = damage.octets(rng, _PLAIN.encode()).decode(errors="replace")
    else:
        template = "".join(rng.choice(_PIECES) for _ in range(rng.randrange(1, 12)))
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if rng.random() < 0.3:
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        settings["chat_template"] = template
    if rng.random() < 0.4:  # code beside it, which must never run
        (model / "own.py").write_text(
            "import pathlib\npathlib.Path('ran').touch()\nclass Own: pass\n"
        )
        settings["auto_map"] = {"AutoTokenizer": rng.choice((["own.Own", None], "own.Own", [None]))}
        settings["tokenizer_class"] = "Own"
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path.write_text(json.dumps(settings), encoding="utf-8")


def _read_chat(_sample: Any, folder: Path) -> None:
    from abft_mlx.loading import load_model
    from abft_mlx.prompts import ChatTemplate, Template

    try:
        tokenizer = load_model(str(folder / "model")).tokenizer
        ChatTemplate(tokenizer, Template()).frame(2)
    finally:
        ran = [
            one for one in (Path("ran"), folder / "ran", folder / "model" / "ran") if one.exists()
        ]
        for one in ran:
            one.unlink()
        if ran:
            raise RuntimeError("code of a model's folder was run")


def _read_model(_sample: Any, folder: Path) -> None:
    from abft_mlx.loading import load_model

    load_model(str(folder / "model"))


def _read_config(_sample: Any, folder: Path) -> None:
    from abft_mlx.loading import load_model, skeleton

    name = str(folder / "model")
    every(lambda: skeleton(name, bits=4), lambda: load_model(name))


MODEL_READERS = (
    Reader("mlx-lm adapter", 1300, _base, _adapter_case(0), _read_adapter),
    Reader("PEFT adapter", 1300, _base, _adapter_case(1), _read_adapter),
    Reader("config.json", 700, _base, _model_case("config.json"), _read_config),
    Reader("weights", 700, _base,
           _model_case("model.safetensors", "model.safetensors", "model.safetensors.index.json"),
           _read_model),
    Reader("tokenizer", 700, _base, _model_case("tokenizer.json", "tokenizer_config.json"),
           _read_model),
    Reader("chat template", 300, _base, _chat_case, _read_chat),
)  # fmt: skip
