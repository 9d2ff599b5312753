"""PEFT and transformers as the oracle: what they compute with an adapter on the same weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx_lm.utils import load_model

# float32 on both sides; the logits themselves are of the order of 1 to 10.
TOLERANCE = 1e-4


def peft() -> Any:
    """The peft module, or a skip that says what is missing."""
    tiny_models.torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError as error:
        pytest.skip(f"the oracle needs {error.name}: pip install 'abft-mlx[bench]'")
    return peft


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
            return logits(peft().PeftModel.from_pretrained(self.reference(), adapter))

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
        model = peft().get_peft_model(pair.reference(), peft().LoraConfig(**given))
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
