"""Make docs/gallery.md: every figure from runs made here, with the command under each.

python benchmarks/gallery.py --output docs/gallery.md

Runs the commands that the page names, in a temporary folder (``--runs DIR`` keeps them, and what
lies there is not made again), and copies the figures to docs/figures/gallery. Some minutes on two
cores.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FIGURES = Path("figures/gallery")
PROGRAM = (sys.executable, str(CHECKOUT / "cli.py"))


@dataclass(frozen=True)
class Source:
    """What figures are drawn from.

    Attributes:
        name: its folder under runs/, or a file of docs/claims.
        made_by: the commands that make it, without the program's name; none for what lies in docs.
    """

    name: str
    made_by: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """As the commands name it."""
        return f"runs/{self.name}" if self.made_by else f"docs/claims/{self.name}.json.gz"


DEMO = Source("demo", ("demo --output runs/demo", "heads runs/demo"))
END_TO_END = Source(
    "end-to-end",
    ("finetune demo --set objective.kind=end_to_end --output runs/end-to-end",),
)
VALIDATED = Source(
    "validated",
    (
        "finetune demo --set training.validate_every=4 --set data.validation_rows=64 "
        "--output runs/validated",
    ),
)
STUDY = Source("gallery", ("study gallery --output runs/gallery",))
CLAIMS = Source("claims-generated")
GRID = Source("claims-generated-grid")
PLANES = Source("claims-generated-planes")


@dataclass(frozen=True)
class Shown:
    """One figure of the page.

    Attributes:
        title: its heading.
        says: what is to be seen in it, in a sentence or two.
        source: what it is drawn from.
        figure: the name that ``plot --only`` takes.
        files: stems of the files to show.
        beside: another run drawn beside.
    """

    title: str
    says: str
    source: Source
    figure: str
    files: tuple[str, ...]
    beside: Source | None = None

    @property
    def command(self) -> str:
        """The ``plot`` command, without the program's name."""
        beside = f" --beside {self.beside.path}" if self.beside else ""
        return f"plot {self.source.path} --only {self.figure}{beside}"


SHOWN = [
    Shown("Training, figure 5's form",
          "The loss, its two terms, the induction heads in a prompt, the punish weight A as "
          "the controller sets it, and validation accuracy.",
          VALIDATED, "training", ("training",)),
    Shown("Attention over the prompt, figures 8 and 16",
          "Every head's last row: the first layer reads the query, the others look at "
          "labels; ABFT moves them to the labels equal to the gold one (▼) and off the "
          "others (✕).",
          DEMO, "attention", ("attention-1",)),
    Shown("The same, with end-to-end fine-tuning of the same weights beside it",
          "Trained on the label's cross-entropy the same heads move the same way, and leave "
          "more attention on wrong labels of this prompt.",
          DEMO, "attention", ("attention-1",), END_TO_END),
    Shown("Attention on labels layer by layer, figure 4",
          "All labels, and those equal to the gold one, before and after.",
          DEMO, "label_attention", ("label-attention",)),
    Shown("Layer × head: attention on labels",
          "Magnitude before, after, and the change.",
          DEMO, "magnitude", ("magnitude",)),
    Shown("Layer × head: right labels minus wrong ones",
          "Correctness: what ABFT trains.",
          DEMO, "correctness", ("correctness",)),
    Shown("Layer × head: above the filter",
          "The share of prompts in which a head counts as an induction head.",
          DEMO, "share", ("share",)),
    Shown("Layer × head: attention sink",
          "Attention on the prompt's first token: below 0.02% in every head of this model.",
          DEMO, "sink", ("sink",)),
    Shown("Two notions of an induction head",
          "Attention on labels against the induction score on repeated random tokens. This "
          "model's heads, which were taught to read labelled sentences, look at labels and "
          "hardly continue random repeats.",
          DEMO, "detectors", ("detectors-before",)),
    Shown("Parameter shift, appendix B",
          "How far W_Q and W_K moved in every layer, ABFT and end to end.",
          DEMO, "shift", ("shift",), END_TO_END),
    Shown("Confusion",
          "Gold labels down, answers across, before and after.",
          DEMO, "confusion", ("confusion",)),
    Shown("Reliability",
          "Accuracy at each confidence, and how many prompts are there: less overconfident "
          "after, still overconfident.",
          DEMO, "reliability", ("reliability",)),
    Shown("Time to accuracy",
          "Validation accuracy over the seconds spent in updates; seconds are this "
          "machine's, and it was busy.",
          VALIDATED, "time_to_accuracy", ("time-to-accuracy",)),
    Shown("Methods by tasks, table 1",
          "From the study of the paper's claims, four seeds.",
          CLAIMS, "accuracy", ("accuracy-demo",)),
    Shown("Consistency, table 3",
          "Answers that stay the same over wordings and over sets of demonstrations.",
          CLAIMS, "consistency", ("consistency-demo",)),
    Shown("Unseen labels, figure 3",
          "Accuracy where no demonstration has the query's label.",
          CLAIMS, "unseen", ("unseen-demo",)),
    Shown("Induction heads while training",
          "With and without the controller and the filter.",
          CLAIMS, "head_count", ("head-count-demo",)),
    Shown("Training curves of a study",
          "Means over tasks and seeds.",
          CLAIMS, "training", ("training-demo",)),
    Shown("Label attention of a study",
          "As figure 4, over tasks and seeds.",
          CLAIMS, "label_attention", ("label-attention-demo",)),
    Shown("Both weights, figure 6",
          "Accuracy over A and B.",
          GRID, "grid", ("grid-demo-abft",)),
    Shown("Between two fine-tunings, figure 7",
          "Accuracy on the straight line from ABFT's weights to end-to-end's.",
          PLANES, "interpolation", ("interpolation-demo-generated-question-abft-end_to_end",)),
    Shown("The plane of both, figures 7 and 9",
          "Accuracy at every combination of the two changes.",
          PLANES, "plane", ("plane-demo-generated-question-abft-end_to_end",)),
    Shown("Data efficiency, figure 2",
          "Accuracy over the number of training examples.",
          STUDY, "data_efficiency", ("data-efficiency-demo",)),
    Shown("Extrapolation",
          "Accuracy over the factor of an adapter, chosen on validation rows.",
          STUDY, "extrapolation", ("extrapolation-demo",)),
]  # fmt: skip


def sources(shown: list[Shown]) -> list[Source]:
    """What has to be made first, each once."""
    found = [one for each in shown for one in (each.source, each.beside) if one is not None]
    return [one for one in dict.fromkeys(found) if one.made_by]


def run(command: str, folder: Path) -> None:
    """Run a command of abft-mlx in a folder; its failure ends this script."""
    print(f"abft-mlx {command}", file=sys.stderr, flush=True)
    subprocess.run([*PROGRAM, *shlex.split(command), "--quiet"], cwd=folder, check=True)


def draw(one: Shown, folder: Path, target: Path) -> list[str]:
    """Draw a figure; returns the names of its pictures."""
    with tempfile.TemporaryDirectory() as drawn:
        run(f"{one.command} --output {shlex.quote(drawn)} --format png", folder)
        names = []
        for stem in one.files:
            name = f"{one.source.name}-{stem}{'-beside' if one.beside else ''}.png"
            shutil.copyfile(Path(drawn) / f"{stem}.png", target / name)
            names.append(name)
    return names


def page(shown: list[Shown], pictures: list[list[str]]) -> str:
    """The page's Markdown."""
    lines = [
        "# Gallery",
        "",
        "Every figure that `abft-mlx plot` draws, from runs made here on the bundled model and its",
        "generated texts, with the command under each; the function behind each is in",
        "[figures.md](figures.md). `plot` writes SVG beside PNG. "
        f"Made by `python benchmarks/gallery.py` on {date.today().isoformat()} (Linux, two AMD",
        "EPYC cores); nothing here was run on a Mac. The runs:",
        "",
        "```sh",
        *(f"abft-mlx {command}" for one in sources(shown) for command in one.made_by),
        "```",
        "",
        "The studies under `docs/claims` are those of [claims.md](claims.md).",
    ]
    for one, names in zip(shown, pictures, strict=True):
        lines += ["", f"## {one.title}", "", one.says, ""]
        lines += [f"![{one.title}]({(FIGURES / name).as_posix()})" for name in names]
        lines += ["", "```sh", f"abft-mlx {one.command}", "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs" / "gallery.md")
    parser.add_argument("--runs", type=Path, help="a folder for the runs, which stays")
    given = parser.parse_args()
    target = given.output.parent / FIGURES
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.runs or Path(temporary)
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        docs = folder / "docs"
        if not docs.exists():
            docs.symlink_to(CHECKOUT / "docs")
        for one in sources(SHOWN):
            if not (folder / one.path).exists():
                for command in one.made_by:
                    run(command, folder)
        pictures = [draw(one, folder, target) for one in SHOWN]
    given.output.write_text(page(SHOWN, pictures), encoding="utf-8")


if __name__ == "__main__":
    main()
