"""The paper's nine models shape by shape, without a single weight: heads, LoRA, totals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import mlx.core as mx
import pytest
from paper_models import PAPER_MODELS, PaperModel

from abft_mlx import adapters, loading, memory_estimate, ports, runtime
from abft_mlx import recipe as recipes
from abft_mlx.recipe import AdapterSection

ALLOWED_BYTES = 2**20
UNITS = {"M": 10**6, "B": 10**9}


def as_printed(number: int, like: str) -> str:
    """A number in the unit and with the digits of another one, e.g. like 6.8M."""
    digits, unit = re.fullmatch(r"([\d.]+)([MB])", like).groups()
    places = len(digits.partition(".")[2])
    return f"{number / UNITS[unit]:.{places}f}{unit}"


@pytest.fixture(params=PAPER_MODELS.values(), ids=PAPER_MODELS)
def paper(request: pytest.FixtureRequest) -> PaperModel:
    return request.param


@pytest.fixture(autouse=True)
def nothing_is_allocated() -> Iterator[None]:
    active, process = mx.get_active_memory(), runtime.process_peak_bytes()
    runtime.reset_peak_memory()
    yield
    assert runtime.peak_memory_bytes() - active < ALLOWED_BYTES
    # The smallest of the models has 1.5 GB of weights.
    assert runtime.process_peak_bytes() - process < 500 * 2**20


def test_heads_and_totals(paper: PaperModel) -> None:
    model = loading.describe(paper.config, paper.hub)
    port = ports.port_for(model)
    assert ports.architecture(model) == paper.config["model_type"]
    layers = paper.config.get("num_hidden_layers", paper.config.get("n_layer"))
    assert ports.heads(model) == [ports.HeadShape(*paper.heads)] * layers
    H, G, D = paper.heads
    sizes = {"q": H * D, "k": G * D, "v": G * D}
    for projection in port.projections:
        parts = port.part_outputs(port.layers(model)[-1], projection)
        assert {part: len(s) for part, s in parts.items()} == {p: sizes[p] for p in parts}
    assert loading.parameter_count(model) == paper.total
    assert as_printed(paper.total + paper.buffers, paper.paper_total) == paper.paper_total


def test_lora_trains_as_many_as_the_paper_says(paper: PaperModel) -> None:
    model = loading.describe(paper.config, paper.hub)
    adapters.place(model, AdapterSection(rank=16))
    trained = adapters.trainable_parameters(model)
    # A fused c_attn's lora_b has the columns of V, too, which stay zero: see gradient_mask.
    assert trained == paper.lora
    if paper.paper_lora == "12M":
        # The only one that the paper does not round: 12,582,912 is 12.6M, or 12 x 2**20.
        assert as_printed(trained, "0M") == "13M"
        assert trained == 12 * 2**20
    elif paper.paper_lora is not None:
        assert as_printed(trained, paper.paper_lora) == paper.paper_lora


@pytest.mark.parametrize("name", [n for n, m in PAPER_MODELS.items() if m.paper_end_to_end])
def test_the_lm_head_trains_as_table_2_says(name: str) -> None:
    paper = PAPER_MODELS[name]
    assert paper.paper_end_to_end is not None
    model = loading.describe(paper.config | {"quantization": {"group_size": 64, "bits": 4}}, "")
    assert loading.parameter_count(model) == paper.total
    adapters.place(model, AdapterSection(rank=16, head=True))
    trained = adapters.trainable_parameters(model)
    assert as_printed(trained, paper.paper_end_to_end) == paper.paper_end_to_end


def test_llama_3_8b_in_4_bits_takes_what_its_parts_say() -> None:
    config = PAPER_MODELS["Llama3-8B"].config | {"quantization": {"group_size": 64, "bits": 4}}
    recipe = recipes.resolve(recipes.default(["training.micro_batch_tokens=512"]))
    model = loading.describe(json.loads(json.dumps(config)), "x")
    found = memory_estimate.estimate(model, recipe, 250)
    # 4 bits and, for 64 numbers, a scale and a bias of 2 bytes each; norms in bfloat16.
    matrices = 8_030_261_248 - 65 * 4096
    assert found["weights_bytes"] == matrices * 4 // 8 + matrices // 64 * 4 + 65 * 4096 * 2
    assert found["adapter_bytes"] == 4 * 6_815_744
    assert found["moments_bytes"] // 8 == pytest.approx(6_815_744, rel=1e-6)
    assert (found["rows"], found["tokens"], found["micro_batches"]) == (2, 256, 16)
    parts = ("weights", "adapter", "moments", "gradients", "activations")
    assert found["training_bytes"] == sum(found[f"{part}_bytes"] for part in parts)
