"""Readers of what runs and studies leave: run folders, heads.npz, eval.json, study.json, cells."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as damage
from fuzz_readers import ROOT, Reader, every, yaml_case


def _study_sample(folder: Path) -> dict[str, Any]:
    from report_support import made_study

    made = made_study(folder / "made")
    return {
        "facts": json.loads((made / "study.json").read_text(encoding="utf-8")),
        "claims": [
            json.loads(gzip.decompress(path.read_bytes()))
            for path in sorted((ROOT / "docs" / "claims").glob("*unseen*.gz"))
        ],
    }


def _facts_case(rng: Random, sample: dict[str, Any], folder: Path) -> None:
    whole = sample["facts"] if rng.random() < 0.85 or not sample["claims"] else sample["claims"][0]
    if rng.random() < 0.6:
        content = damage.as_json(rng, damage.value(rng, whole))
    else:
        content = damage.octets(rng, json.dumps(whole).encode())
    if rng.random() < 0.3:
        content = gzip.compress(content, 1)
        if rng.random() < 0.4:
            content = damage.octets(rng, content)
    (folder / "study.json").write_bytes(content)


def _read_facts(_samples: Any, folder: Path) -> None:
    from abft_mlx import analysis
    from abft_mlx.analysis.report import write_report

    path = folder / "study.json"
    every(
        lambda: analysis.look(path),
        lambda: write_report(path, folder / "out.html", figures=False),
    )


def _cells_sample(_folder: Path) -> list[dict[str, Any]]:
    from made_cells import cell, failed

    return [cell("untrained", "0110" * 8), cell("abft", "0111" * 8, seed=1), failed()]


def _cells_case(rng: Random, cells: list[dict[str, Any]], folder: Path) -> None:
    (folder / "cells").mkdir()
    chosen = rng.randrange(len(cells) + 1)
    for n, one in enumerate(cells):
        path = folder / "cells" / f"{one['id']}.json"
        if n == chosen and rng.random() < 0.6:
            path.write_bytes(damage.as_json(rng, damage.value(rng, one)))
        elif n == chosen:
            path.write_bytes(damage.octets(rng, json.dumps(one).encode()))
        else:
            path.write_text(json.dumps(one), encoding="utf-8")
    if chosen == len(cells):
        yaml_case(rng, [b"name: made\nfigures: [accuracy]\npaper: {a: b}\n"], folder / "study.yaml")


def _read_cells(_samples: Any, folder: Path) -> None:
    from abft_mlx import analysis
    from abft_mlx.analysis.report import write_report

    every(
        lambda: analysis.look(folder),
        lambda: write_report(folder, folder / "out.html", figures=False),
    )


def _runs(folder: Path) -> list[Path]:
    from report_support import evaluation, made_heads, write_run

    return [
        write_run(folder / "one", made_heads(detected=True), measured=evaluation()),
        write_run(folder / "two", made_heads(2, 1, tokens=8, examples=1, without=(1,))),
    ]


def damaged_archive(rng: Random, content: bytes) -> bytes:
    """A .npz of which one array, or the text about them, is another."""
    import numpy as np

    if rng.random() < 0.35:
        return damage.octets(rng, content)
    with np.load(io.BytesIO(content)) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    if rng.random() < 0.5:
        about = json.loads(arrays["about"].tobytes())
        text = damage.as_json(rng, damage.value(rng, about))
        arrays["about"] = np.frombuffer(text, dtype=np.uint8)
    else:
        name = rng.choice(list(arrays))
        one = arrays[name]
        arrays[name] = rng.choice((
            one[:-1], one.T, one.reshape(-1), one[None], np.zeros(0), np.array(3.5),
            one.astype(str),
            one.astype(np.complex128), one.astype(bool), np.array([None, {}], dtype=object),
            one * 1e30,
            np.full(one.shape, -1), np.full(one.shape, 2**31 - 1), np.full(one.shape, 1e300),
            np.full(one.shape, np.nan),
            one.astype("M8[s]") if one.dtype.kind == "i" else one[..., :1],
            np.zeros(one.shape, dtype=[("a", "i4"), ("b", "f8")]), np.array(one.shape),
        ))  # fmt: skip
        if rng.random() < 0.15:
            del arrays[name]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, one in arrays.items():
            written = io.BytesIO()
            np.lib.format.write_array(written, np.asanyarray(one))
            packed = written.getvalue()
            if rng.random() < 0.03:
                packed = damage.octets(rng, packed, 1)
            archive.writestr(f"{name}.npy", packed)
    return out.getvalue()


def _damage_text(rng: Random, path: Path, raw: float) -> None:
    """Damage a file's bytes with a probability of ``raw``, else what it holds as JSON or YAML."""
    content = path.read_bytes()
    if rng.random() < raw:
        path.write_bytes(damage.octets(rng, content))
    elif path.name == "metrics.jsonl":
        lines = damage.value(rng, [json.loads(line) for line in content.splitlines()], 2)
        several = lines if isinstance(lines, list) else [lines]
        path.write_bytes(b"".join(damage.as_json(rng, one) + b"\n" for one in several))
    elif path.name == "recipe.yaml":
        yaml_case(rng, [content], path)
    else:
        path.write_bytes(damage.as_json(rng, damage.value(rng, json.loads(content))))


def _run_case(rng: Random, runs: list[Path], folder: Path) -> None:
    source = rng.choice(runs)
    shutil.copytree(source, folder / "run")
    name = rng.choice(("run.json", "metrics.jsonl", "recipe.yaml", "eval.json", "heads.npz"))
    path = folder / "run" / name
    if not path.exists():
        path.symlink_to(rng.choice(("/dev/null", "/etc/hostname", "..", "run.json", "eval.json")))
        return
    if name == "heads.npz":
        path.write_bytes(damaged_archive(rng, path.read_bytes()))
    else:
        _damage_text(rng, path, 0.4)


def _read_run(_samples: Any, folder: Path) -> None:
    from abft_mlx import analysis
    from abft_mlx.analysis.report import write_report

    run = folder / "run"
    every(
        lambda: analysis.look(run),
        lambda: write_report(run, folder / "out.html", figures=False),
    )


def _draw_case(rng: Random, runs: list[Path], folder: Path) -> None:
    _run_case(rng, runs, folder)
    from abft_mlx.analysis.run_plots import run_figure_names

    (folder / "only.txt").write_text(rng.choice(list(run_figure_names())), encoding="utf-8")


def _draw_run(_samples: Any, folder: Path) -> None:
    from abft_mlx import analysis

    only = (folder / "only.txt").read_text(encoding="utf-8")
    seen = analysis.look(folder / "run", only=[only])
    analysis.draw(seen, folder / "figures", formats=("svg",))


def _heads_case(rng: Random, runs: list[Path], folder: Path) -> None:
    content = (rng.choice(runs) / "heads.npz").read_bytes()
    (folder / "heads.npz").write_bytes(damaged_archive(rng, content))


def _read_heads(_samples: Any, folder: Path) -> None:
    from abft_mlx import analysis
    from abft_mlx.induction import read_heads

    path = folder / "heads.npz"
    every(lambda: read_heads(path), lambda: analysis.look(path))


def _finished(folder: Path) -> Path:
    """A run that could be pushed, and what eval measured of it."""
    from cli_support import document, invoke
    from push_support import make_run

    run = make_run(folder)
    done = invoke("eval", "--adapter", run, "--json", "-q")
    (run / "eval.json").write_text(json.dumps(document(done)), encoding="utf-8")
    return run


def _push_case(rng: Random, source: Path, folder: Path) -> None:
    shutil.copytree(source, folder / "run")
    name = rng.choice((
        "run.json", "run.json", "eval.json", "metrics.jsonl", "recipe.yaml",
        "adapter_config.json", "adapters.safetensors",
    ))  # fmt: skip
    path = folder / "run" / name
    _damage_text(rng, path, 1.0 if name == "adapters.safetensors" else 0.3)


def _pack(_samples: Any, folder: Path) -> None:
    from abft_mlx.exchange import card, push

    run = folder / "run"

    def measured() -> None:
        options = card.Options(results=push.read_results(run / "eval.json"))
        push.pack(run, "owner/name", options=options)

    every(lambda: push.pack(run, "owner/name"), measured)


RUN_READERS = (
    Reader("run folder", 1500, _runs, _run_case, _read_run),
    Reader("drawing", 200, _runs, _draw_case, _draw_run),
    Reader("heads.npz", 1200, _runs, _heads_case, _read_heads),
    Reader("study.json", 1500, _study_sample, _facts_case, _read_facts),
    Reader("push", 1000, _finished, _push_case, _pack),
    Reader("study folder", 600, _cells_sample, _cells_case, _read_cells),
)  # fmt: skip
