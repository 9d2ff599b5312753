"""The nine wordings of a prompt in which a prediction ought to be the same (StaICC-DIAG).

Four pieces of a prompt have three levels each: the prompt's own and the two of ``variants``. The
rows of the orthogonal table L9 combine them so that every two levels of two pieces meet once.

StaICC writes a label prefix with the space that follows it ("sentiment: "), and applying one of its
templates undoes the form in which that space belongs to the label. Here the label always brings its
space, so a prefix has none ("sentiment:") and all nine prompts keep that form.
"""

from __future__ import annotations

from dataclasses import replace

from abft_mlx.errors import PromptError
from abft_mlx.prompts import Prompt, PromptBuilder, Template
from abft_mlx.recipe import EvaluationSection, TaskSection
from abft_mlx.task import Task

QUERIES = 100
FACTORS = ("instruction", "input_prefix", "label_prefix", "label_affix")
L9 = (
    (0, 0, 0, 0),
    (0, 1, 1, 1),
    (0, 2, 2, 2),
    (1, 0, 1, 2),
    (1, 1, 2, 0),
    (1, 2, 0, 1),
    (2, 0, 2, 1),
    (2, 1, 0, 2),
    (2, 2, 1, 0),
)


def templates(section: TaskSection) -> tuple[Template, ...]:
    """The nine templates of a task; the first is the prompt's own.

    Args:
        section: its ``prompt`` is level 0 of each piece, its ``variants`` are levels 1 and 2.
    """
    own = Template.from_section(section.prompt)
    levels = {f: (getattr(own, f), *getattr(section.variants, f)) for f in FACTORS}
    return tuple(
        replace(own, **{f: levels[f][level] for f, level in zip(FACTORS, row, strict=True)})
        for row in L9
    )


def variant_prompts(
    task: Task, section: EvaluationSection
) -> list[tuple[PromptBuilder, list[Prompt]]]:
    """For each template its builder and the prompts of the first test rows.

    Query q has the demonstrations of sampler row q in every template.

    Args:
        task: 100 of its test rows are asked, or as many as there are.
        section: ``queries`` limits them further; ``seed`` chooses the demonstrations.

    Raises:
        PromptError: a template makes no usable prompt; the message says which, and its wording.
    """
    size = {"queries": min(QUERIES, section.queries), "repeats": 1}
    asked = section.model_copy(update=size)
    made = []
    for number, template in enumerate(templates(task.section)):
        try:
            builder = task.builder_for(template)
            prompts = replace(task, builder=builder).test_prompts(asked)
        except PromptError as error:
            message = f"template {number} of variants ({_told(number, template)}): {error}"
            raise PromptError(message) from error
        made.append((builder, prompts))
    return made


def _told(number: int, template: Template) -> str:
    """The pieces in which a template differs from the prompt's own."""
    differing = [f for f, level in zip(FACTORS, L9[number], strict=True) if level]
    return ", ".join(f"{f} {getattr(template, f)!r}" for f in differing) or "the prompt's own"
