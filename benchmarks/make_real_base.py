"""Train a small base on the real texts: ``make_real_base.py --data ../shared/data --output DIR``.

The weights stay out of the repository. Needs torch and scipy (the ``bench`` extra); runs on a GPU
where torch sees one. In-context labels come only from data sets that are not left out, and
attention is supervised while the base is made: readers look at an item's own text, inducers at
the labels of earlier items of the same class. A checkpoint is written every 200 updates.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import real_corpus
import real_texts
import torch
from real_corpus import Corpus, Stage
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

CONTEXT_TOKENS = 1024
READERS = ((0, 0), (1, 0))
MIX = {
    "words": 0.1,
    "keyword": 0.2,
    "near": 0.15,
    "side": 0.15,
    "first": 0.1,
    "real": 0.25,
    "plain": 0.05,
}
STAGES = (
    Stage(250, 64, 14, {"word": 1.0}),
    Stage(250, 128, 12, {"words": 1.0}),
    Stage(2000, 288, 10, MIX, (1.0, 0.3)),
    Stage(400, 288, 10, MIX, (0.3, 0.0)),
)


def configuration(vocabulary: int, chosen: argparse.Namespace) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": chosen.width,
        "num_hidden_layers": chosen.layers,
        "intermediate_size": 2 * chosen.width,
        "num_attention_heads": chosen.heads,
        "num_key_value_heads": chosen.heads,
        "head_dim": chosen.head_width,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


class Layer(nn.Module):
    """A Llama layer whose queries may be asked for at some positions only."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        width, inner = settings["hidden_size"], settings["intermediate_size"]
        self.heads = settings["num_attention_heads"]
        across = self.heads * settings["head_dim"]
        linear = {"q_proj": (width, across), "k_proj": (width, across), "v_proj": (width, across)}
        linear["o_proj"] = (across, width)
        self.self_attn = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in linear.items()})
        linear = {"gate_proj": (width, inner), "up_proj": (width, inner)}
        linear["down_proj"] = (inner, width)
        self.mlp = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in linear.items()})
        self.input_layernorm = nn.RMSNorm(width, eps=settings["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(width, eps=settings["rms_norm_eps"])

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, hidden, rotation, picks=None):
        """Hidden states (B, P, width) and patterns (B, H, P, T); P is T without picks (B, P)."""
        a, m = self.self_attn, self.mlp
        x = self.input_layernorm(hidden)
        places = torch.arange(x.shape[1], device=x.device)
        k, v = rotate(self._split(a["k_proj"](x)), rotation), self._split(a["v_proj"](x))
        if picks is None:
            q = rotate(self._split(a["q_proj"](x)), rotation)
            later = places > places[:, None]
        else:
            at = picks[..., None].expand(-1, -1, x.shape[-1])
            x, hidden = x.gather(1, at), hidden.gather(1, at)
            q = rotate(self._split(a["q_proj"](x)), [part[picks][:, None] for part in rotation])
            later = (places > picks[..., None])[:, None]
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        pattern = scores.masked_fill(later, -1e9).softmax(-1)
        hidden = hidden + a["o_proj"]((pattern @ v).transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(hidden)
        return hidden + m["down_proj"](
            functional.silu(m["gate_proj"](x)) * m["up_proj"](x)
        ), pattern


def rotate(x: torch.Tensor, rotation) -> torch.Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Base(nn.Module):
    """A Llama with the parameter names of its checkpoint."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        width, vocabulary = settings["hidden_size"], settings["vocab_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, width)
        self.model.layers = nn.ModuleList(
            Layer(settings) for _ in range(settings["num_hidden_layers"])
        )
        self.model.norm = nn.RMSNorm(width, eps=settings["rms_norm_eps"])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        half = settings["head_dim"] // 2
        rate = settings["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.arange(CONTEXT_TOKENS)[:, None] * rate
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens, picks):
        """Final hidden states at picks (B, P), every layer's patterns, the last layer's input.

        The last layer's patterns are those at picks.
        """
        hidden = self.model.embed_tokens(tokens)
        rotation = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        patterns = []
        for index, layer in enumerate(self.model.layers):
            last = index + 1 == len(self.model.layers)
            before = hidden
            hidden, pattern = layer(hidden, rotation, picks if last else None)
            patterns.append(pattern)
        return self.model.norm(hidden), patterns, before

    @torch.no_grad()
    def initialise(self, vectors: np.ndarray, std: float, company: float) -> None:
        """Start near matching and copying; words begin as the company they keep."""
        shared = torch.tensor(vectors)
        width = self.lm_head.in_features
        shared = shared @ torch.nn.init.orthogonal_(torch.empty(width, width))[: shared.shape[1]]
        known = (shared.abs().sum(1, keepdim=True) > 0) * company
        own = torch.randn(len(shared), width)
        embedding = (1 - known**2).sqrt() * own + known * shared * math.sqrt(width)
        self.model.embed_tokens.weight.copy_(embedding * std)
        self.lm_head.weight.copy_(embedding * 0.1)
        for index, layer in enumerate(self.model.layers):
            a = layer.self_attn
            for head in range(layer.heads):
                size = a["q_proj"].out_features // layer.heads
                rows = slice(head * size, (head + 1) * size)
                turn = torch.nn.init.orthogonal_(torch.empty(size, width))
                if index == 0 or (index, head) in READERS:
                    for name in ("q_proj", "k_proj"):
                        a[name].weight[rows] = torch.randn(size, width) * 0.05
                else:
                    a["q_proj"].weight[rows] = a["k_proj"].weight[rows] = turn
                turn = torch.nn.init.orthogonal_(torch.empty(size, width))
                a["v_proj"].weight[rows] = turn
                a["o_proj"].weight[:, rows] = turn.T * (2.0 * std / math.sqrt(layer.heads))
            for name, scale in (("gate_proj", 0.08), ("up_proj", 0.08), ("down_proj", 0.01)):
                layer.mlp[name].weight.normal_(0.0, scale)


def losses(
    base: Base, batch: dict, weight: float, chosen: argparse.Namespace, unseen: torch.Tensor, probe
):
    """The training loss of a batch (`Corpus.batch`), and its parts for the log."""
    count = batch["asker"].shape[1]
    picks = torch.cat([batch["asker"], batch["places"]], 1)
    hidden, patterns, before = base(batch["tokens"], picks)
    logits = base.lm_head(hidden)
    answers = logits[:, :count] + unseen
    answered, item = batch["answered"], batch["item"]
    n_answers, n_items = answered.sum().clamp(min=1), item.sum().clamp(min=1)
    nll = functional.cross_entropy(answers.transpose(1, 2), batch["target"], reduction="none")
    label = (nll * answered).sum() / n_answers
    accuracy = ((answers.argmax(-1) == batch["target"]) * answered).sum() / n_answers
    text = functional.cross_entropy(logits[:, count:].flatten(0, 1), batch["next"].flatten())
    looking = copying = mass = torch.zeros((), device=hidden.device)
    for index, pattern in enumerate(patterns):
        whole = pattern.shape[2] == pattern.shape[3]
        for head in range(pattern.shape[1]):
            rows = pattern[:, head]
            if (index, head) in READERS:
                for place in (batch["asker"], batch["label"]):
                    logs = (take(rows, place) + 1e-6).log()
                    looking = looking - ((batch["reader"] * logs).sum(-1) * item).sum() / n_items
            elif index:
                rows = take(rows, batch["asker"]) if whole else rows[:, :count]
                right = (rows * batch["inducer"]).sum(-1)
                copying = copying - ((right + 1e-6).log() * answered).sum() / n_answers
                mass = (right * answered).sum() / n_answers
    total = label + chosen.language * text
    total = total + weight * (0.5 * looking / len(READERS) + 0.5 * copying)
    topic, known = batch["topic"], batch["topic"] >= 0
    naming = torch.zeros((), device=hidden.device)
    if known.any() and chosen.probe:
        # Asker and label must carry the class into the last layer, which matches them.
        for place in (batch["asker"], batch["label"]):
            at = before.gather(1, place[..., None].expand(-1, -1, before.shape[-1]))
            naming = naming + functional.cross_entropy(probe(at[known]), topic[known]) / 2
        total = total + chosen.probe * naming
    return total, (label, text, looking, copying, accuracy, mass, naming)


def take(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows (B, T, T) at places (B, K): (B, K, T)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))


def with_share(stage: Stage, real: float) -> Stage:
    """The stage with this share of sequences from real labels, where it has any."""
    if "real" not in stage.kinds:
        return stage
    others = (1 - real) / (1 - stage.kinds["real"])
    kinds = {n: real if n == "real" else w * others for n, w in stage.kinds.items()}
    return replace(stage, kinds=kinds)


def train(base: Base, corpus: Corpus, chosen: argparse.Namespace, save) -> None:
    device = next(base.parameters()).device
    wordy = [base.model.embed_tokens.weight, base.lm_head.weight]
    rest = [p for p in base.parameters() if not any(p is w for w in wordy)]
    width = base.lm_head.in_features
    probe = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, corpus.topics)).to(device)
    rest += probe.parameters()
    groups = [{"params": rest, "times": 1.0}, {"params": wordy, "times": chosen.word_rate}]
    optimiser = torch.optim.Adam(groups, lr=chosen.rate, betas=(0.9, 0.98), fused=True)
    unseen = torch.zeros(corpus.size, device=device)
    unseen[corpus.reserved] = -1e9
    stages = [
        (n, with_share(s, chosen.real_share), max(1, round(s.steps * chosen.longer)))
        for n, s in enumerate(STAGES)
    ]
    total = sum(steps for _, _, steps in stages)
    done, start = 0, time.time()
    sums = np.zeros(7)
    for number, stage, steps in stages:
        for i in range(steps):
            scale = min(1.0, done / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * done / total)))
            for group in optimiser.param_groups:
                group["lr"] = chosen.rate * scale * group["times"]
            arrays = corpus.batch(stage, chosen.rows)
            batch = {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}
            low, high = stage.supervision
            weight = low + (high - low) * i / steps
            value, parts = losses(base, batch, weight, chosen, unseen, probe)
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(base.parameters(), 1.0)
            optimiser.step()
            done += 1
            sums += [float(part.detach()) for part in parts]
            if done % 50 == 0:
                names = ("label", "text", "looking", "copying", "accuracy", "mass", "naming")
                shown = " ".join(f"{n} {v / 50:.3f}" for n, v in zip(names, sums, strict=True))
                seconds = f"{time.time() - start:.0f}s, {time.process_time():.0f}s of a core"
                print(f"stage {number} update {done}/{total} {seconds}: {shown}", flush=True)
                sums[:] = 0
                if not math.isfinite(float(value.detach())):
                    raise SystemExit("the loss is no longer finite")
            if done % 200 == 0:
                save()
            if done == chosen.stop:
                return


def write(base: Base, settings: dict, made, folder: Path) -> None:
    """An ordinary Llama checkpoint; the weights appear under their name only when complete."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in base.named_parameters()}
    save_file(weights, folder / "new.safetensors", metadata={"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_tokenizer(made, folder, CONTEXT_TOKENS)


def save_tokenizer(made: Tokenizer, folder: Path, context_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as ``transformers`` reads them."""
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": real_corpus.END,
        "pad_token": real_corpus.END,
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the JSONL files")
    parser.add_argument("--output", type=Path, required=True, help="outside the repository")
    parser.add_argument(
        "--leave-out",
        nargs="*",
        choices=real_texts.SETS,
        default=["trec", "subjective", "sst2"],
        help="sets whose labels, and whose kin's, are never shown",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merges", type=int, default=5500)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16, help="sequences an update")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--word-rate", type=float, default=0.3, help="times the rate, for words")
    parser.add_argument("--language", type=float, default=0.1)
    parser.add_argument("--probe", type=float, default=0.0, help="weight of naming real classes")
    parser.add_argument("--odds", type=float, default=0.0, help="words begin with class odds")
    parser.add_argument("--std", type=float, default=0.2)
    parser.add_argument("--company", type=float, default=0.7)
    parser.add_argument("--real-share", type=float, default=MIX["real"], help="of real labels")
    parser.add_argument("--longer", type=float, default=1.0, help="multiplies every stage")
    parser.add_argument("--stop", type=int, help="updates after which to stop, mid-schedule")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    sets = real_texts.read(chosen.data, print)
    made = real_corpus.tokenizer(sets, chosen.merges)
    corpus = Corpus(sets, made, chosen.leave_out, chosen.seed)
    print("in-context labels from", ", ".join(one.name for one in corpus.labelled))
    settings = configuration(corpus.size, chosen)
    base = Base(settings)
    vectors = corpus.vectors
    if chosen.odds:
        odds = real_texts.class_odds(sets, corpus.size) * chosen.odds
        vectors = np.concatenate([vectors, odds], axis=1)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    base.initialise(vectors, chosen.std, chosen.company)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    size = sum(p.numel() for p in base.parameters())
    print(f"vocabulary {corpus.size}, {size} parameters, {time.process_time():.0f}s", flush=True)
    train(base, corpus, chosen, lambda: write(base, settings, made, chosen.output))
    write(base, settings, made, chosen.output)


if __name__ == "__main__":
    main()
