"""Rules of the scores, against transformers' eager attention: caps, windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.utils import load_model
from test_attention import EXACT, eager, largest_difference

from abft_mlx import attention, ports
from abft_mlx.errors import UnsupportedArchitectureError


def test_rows_of_a_model_that_computes_its_pattern_itself(tmp_path: Path) -> None:
    """Gemma 2: scores are capped before the softmax, logits after the head."""
    torch = tiny_models.torch()
    import transformers

    settings: dict[str, Any] = tiny_models.CONFIGS["llama"] | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        # Low enough to bend the scores.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    theta = settings.pop("rope_theta")
    torch.manual_seed(0)
    chosen = transformers.AutoConfig.for_model(
        "gemma2",
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        sliding_window=256,
        **settings,
    )
    torch_model = transformers.AutoModelForCausalLM.from_config(chosen).eval()
    with torch.no_grad():
        for value in torch_model.parameters():
            value.copy_(torch.randn(value.shape) * 0.2)
    weights = {
        key: mx.array(value.detach().numpy())
        for key, value in torch_model.state_dict().items()
        if key != "lm_head.weight"
    }
    flat = settings | {"model_type": "gemma2", "rope_theta": theta}
    model, _ = load_model(tiny_models.write(tmp_path, flat, weights))
    tokens, last = tiny_models.tokens(batch=3, length=40)
    expected, logits = eager(torch_model, tokens, last)
    rows = attention.capture(model, tokens, last)
    for row, oracle in zip(rows, expected, strict=True):
        assert largest_difference(row, oracle) <= EXACT
    port = ports.port_for(model)
    some = np.array(port.logits(model, port.hidden(model, tokens), [3, 80]))
    real = np.array(mx.arange(tokens.shape[1]) <= last[:, None])
    assert largest_difference(some[real], logits[real][:, [3, 80]]) <= 2e-5


def test_rows_in_layers_with_a_sliding_window(tmp_path: Path) -> None:
    """A Llama with window layers, as mlx-lm runs them, is transformers' Ministral."""
    torch = tiny_models.torch()
    import transformers

    windows = {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 9,
    }
    settings = tiny_models.CONFIGS["llama"] | windows
    theta = settings.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    torch.manual_seed(0)
    chosen = transformers.AutoConfig.for_model(
        "ministral", attn_implementation="eager", rope_parameters=rope, head_dim=16, **settings
    )
    torch_model = transformers.AutoModelForCausalLM.from_config(chosen).eval()
    with torch.no_grad():
        for value in torch_model.parameters():
            value.copy_(torch.randn(value.shape) * 0.2)
    model, _ = load_model(tiny_models.save_reference(torch_model, tmp_path, "llama", **windows))
    tokens, last = tiny_models.tokens(batch=3, length=40)
    expected, _ = eager(torch_model, tokens, last)
    rows = attention.capture(model, tokens, last)
    assert (expected[0] > 0).sum(axis=-1).max() == 9
    assert (expected[1] > 0).sum(axis=-1).max() == 40
    for row, oracle in zip(rows, expected, strict=True):
        assert largest_difference(row, oracle) <= EXACT


@pytest.mark.parametrize("name", ["gear", "gemma2", "iquestloopcoder", "plamo2"])
def test_attention_is_found_where_a_model_has_it(
    benchmark: Callable[[str], ModuleType], name: str
) -> None:
    """In a function or a method of its own, by hand, or as ``mx.fast``'s."""
    checks, tiny = benchmark("support_checks"), benchmark("tiny_configs")
    model = tiny.build(name)
    pattern, output = checks.pattern_error(model)
    assert pattern <= EXACT
    assert output <= EXACT
    assert checks.padding_error(model) <= EXACT
    # Left, the functions that recorded find what they found before.
    tokens, last = tiny.tokens()
    calls = [attention.capture(model, tokens, last) for _ in range(2)]
    first, again = ([row for row in rows if row is not None] for rows in calls)
    assert all(mx.array_equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("name", "seam"), [("gear", "softmax"), ("llama", "scaled_dot_product_attention")]
)
def test_attention_that_is_no_python_is_refused(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, name: str, seam: str
) -> None:
    tiny = benchmark("tiny_configs")
    model = tiny.build(name)
    port = ports.port_for(model)
    kind = type(port.attention_module(port.layers(model)[0]))
    monkeypatch.setattr(kind, "__call__", partial(kind.__call__))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        attention.capture(model, *tiny.tokens())
    assert str(caught.value) == (
        f"architecture {name!r} does not call {seam} in its attention, so its patterns cannot be "
        "read; use another model"
    )
