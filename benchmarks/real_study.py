"""The study file of the paper's claims on real texts, for a base from ``make_real_base.py``.

python benchmarks/real_study.py --data ../shared/data --base runs/real-base > claims-real.yaml
abft-mlx study claims-real.yaml --output runs/claims-real

Other parts of the claims, on one set each: ``--part unseen --sets trec`` unseen labels (the paper's
figure 3), ``--part grid --sets sst2`` the weights A and B (figure 6), ``--part planes --sets sst2``
the weights between two methods (figure 7). ``--part modes``: what the fast modes of training cost.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SETS = ("sst2", "trec", "subjective", "financial_phrasebank")
HEAD = """\
name: {name}
description: The paper's claims on a small base that has read real texts.
models:
  - {{name: real-base, model: {base}}}
tasks:
"""
REST = """\
methods:
  - vanilla
  - contextual
  - domain
  - batch
  - hidden
  - knn
  - abft
  - name: end_to_end
    like: end_to_end
    settings: ["evaluation.protocols=[accuracy, transfer]"]
  - {name: no_pid, like: no_pid, settings: ["evaluation.protocols=[accuracy]"]}
  - {name: no_filter, like: no_filter, settings: ["evaluation.protocols=[accuracy]"]}
  - {name: no_punish, like: no_punish, settings: ["evaluation.protocols=[accuracy]"]}
  - {name: no_reward, like: no_reward, settings: ["evaluation.protocols=[accuracy]"]}
seeds: [42, 43, 44, 45]
protocols: [accuracy, robustness, transfer]
settings: [training.learning_rate=1e-3]
figures: [accuracy, consistency, head_count, shift]
"""

UNSEEN = """\
methods: [vanilla, abft]
seeds: [42, 43, 44, 45]
protocols: [unseen]
settings: [training.learning_rate=1e-3]
figures: [unseen]
"""
GRID = """\
methods: [abft, no_pid]
seeds: [42, 43, 44, 45]
protocols: [accuracy]
settings: [training.learning_rate=1e-3]
sweep:
  objective.punish: [0.25, 0.5, 1]
  objective.reward: [0.5, 1, 2]
figures: [grid]
"""
PLANES = """\
methods:
  - name: plane
    like: plane
    axes: [abft, end_to_end]
    factors: [-0.5, 0, 0.25, 0.5, 0.75, 1, 1.5]
seeds: [42, 43, 44, 45]
protocols: [accuracy]
settings: [training.learning_rate=1e-3]
figures: [plane]
"""
MODES = """\
methods:
  - vanilla
  - abft
  - name: local
    like: abft
    settings: ["training.gradient=local"]
  - name: shared
    like: abft
    settings: ["training.shared_demonstrations=8"]
  - name: local_shared
    like: abft
    settings: ["training.gradient=local", "training.shared_demonstrations=8"]
  - name: window
    like: abft
    settings: ["adapter.layers=auto"]
seeds: [42, 43, 44, 45]
protocols: [accuracy]
settings: [training.learning_rate=1e-3]
figures: [accuracy]
"""
PARTS = {"modes": MODES, "accuracy": REST, "unseen": UNSEEN, "grid": GRID, "planes": PLANES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the JSONL files")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--sets", nargs="*", default=list(SETS), help="recipes of the paper's sets")
    parser.add_argument("--part", choices=tuple(PARTS), default="accuracy", help="which claims")
    chosen = parser.parse_args()
    if not (chosen.base / "config.json").is_file():
        parser.error(f"--base {chosen.base} holds no model; make one with make_real_base.py")
    absent = [one for one in chosen.sets if not (chosen.data / f"{one}.jsonl").is_file()]
    if absent:
        parser.error(f"--data {chosen.data} has no {absent[0]}.jsonl; see --sets")
    study = "claims-real" if chosen.part == "accuracy" else f"claims-real-{chosen.part}"
    print(HEAD.format(name=study, base=json.dumps(str(chosen.base))), end="")
    for name in chosen.sets:
        source = chosen.data / f"{name}.jsonl"
        settings = [f"data.source={source}", "data.text=text", "data.label=label"]
        print(f"  - {{name: {name}, recipe: {name}, settings: {json.dumps(settings)}}}")
    print(PARTS[chosen.part], end="")


if __name__ == "__main__":
    main()
