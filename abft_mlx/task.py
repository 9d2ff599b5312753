"""A task: labelled texts in their parts, label words as tokens, and the prompts made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from abft_mlx import data, prompts
from abft_mlx.errors import RecipeError
from abft_mlx.recipe import EvaluationSection, TaskSection, TrainingSection

# The fewest demonstrations that auto takes; the paper's k.
LEAST_AUTO = 4
# Texts whose length shows how many demonstrations fit into the context.
_SAMPLE = 64


@dataclass(frozen=True)
class Task:
    """What a recipe says of its data and prompts, opened and checked against a tokenizer."""

    section: TaskSection  # data, prompt and variants as the recipe has them
    texts: data.LabelledTexts  # all of them
    splits: data.Splits
    template: prompts.Template  # the prompt's own words
    space: prompts.LabelSpace  # labels, their words and their tokens
    builder: prompts.PromptBuilder  # makes prompts; counts the texts it shortened
    tokenizer: Any
    context_tokens: int | None  # the longest prompt the model was made for, or None

    @property
    def name(self) -> str:
        """What reports call the task."""
        return self.section.name

    @property
    def chat_template(self) -> str | None:
        """What identifies the chat template around its prompts' turns; None in plain prompts."""
        wording = self.builder.template
        if not isinstance(wording, prompts.ChatTemplate):
            return None
        return wording.fingerprint(self.demonstrations)

    @property
    def demonstrations(self) -> int:
        """Demonstrations in a prompt, k."""
        k = self.section.prompt.demonstrations
        assert k != "auto", "auto must be resolved before a task is opened"
        return k

    def builder_for(
        self, template: prompts.Template | None = None, *, allow_empty: bool = False
    ) -> prompts.PromptBuilder:
        """A prompt builder with another wording, or one that lets an empty query pass.

        Raises:
            PromptError: a label word merges with its neighbours in that wording.
        """
        words = dict(zip(self.space.names, self.space.words, strict=True))
        template = template or self.template
        return _builder(
            self.section, template, self.space.names, words, self.tokenizer, self.context_tokens,
            allow_empty=allow_empty,
        )  # fmt: skip

    def training_prompts(self, training: TrainingSection) -> prompts.Prompts:
        """The training prompts: demonstrations and query from the training split."""
        return prompts.training_prompts(
            self.builder,
            self.splits.training,
            training.examples,
            self.demonstrations,
            training.seed,
            training.together,
            self.section.prompt.selection,
        )

    def validation_prompts(self, training: TrainingSection) -> prompts.Prompts:
        """Queries from the validation split, demonstrations from the training split."""
        validation, wanted = self.splits.validation, training.validation_prompts
        if not len(validation):
            raise RecipeError(
                f"training.validate_every is {training.validate_every}, but data.validation_rows "
                "is 0; set data.validation_rows to, say, 256, or training.validate_every to 0"
            )
        queries = min(len(validation), wanted)
        return prompts.evaluation_prompts(
            self.builder,
            self.splits.training,
            validation,
            queries,
            -(-wanted // queries),
            self.demonstrations,
            training.seed,
            selection=self.section.prompt.selection,
            limit=wanted,
        )

    def test_queries(self, evaluation: EvaluationSection) -> int:
        """Distinct test queries of an evaluation; prompt i has query i modulo this."""
        return min(evaluation.queries, len(self.splits.test))

    def test_rows(self, evaluation: EvaluationSection) -> list[tuple[int, ...]]:
        """For every test prompt its K rows of the demonstration split, in order."""
        return data.evaluation_draws(
            self.splits.demonstrations,
            self.splits.test.texts[: self.test_queries(evaluation)],
            evaluation.repeats,
            self.demonstrations,
            evaluation.seed,
            selection=self.section.prompt.selection,
            fixed=evaluation.demonstrations == "fixed",
        )

    def test_prompts(self, evaluation: EvaluationSection) -> prompts.Prompts:
        """The fixed, seeded prompts of an evaluation."""
        return prompts.evaluation_prompts(
            self.builder,
            self.splits.demonstrations,
            self.splits.test,
            self.test_queries(evaluation),
            evaluation.repeats,
            self.demonstrations,
            evaluation.seed,
            fixed=evaluation.demonstrations == "fixed",
            selection=self.section.prompt.selection,
        )


def open_task(
    section: TaskSection,
    texts: data.LabelledTexts,
    tokenizer: Any,
    context_tokens: int | None = None,
    splits: data.Splits | None = None,
) -> Task:
    """Fit a task's words to a tokenizer.

    Args:
        section: data, prompt and variants.
        texts: what ``data.load(section.data)`` read.
        tokenizer: anything with ``encode(text, add_special_tokens=False)`` and ``decode``.
        context_tokens: longer prompts are refused.
        splits: the texts' parts, where they are not those of ``data.split``.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    splits = splits or data.split(texts, section.data, least_demonstrations(section))
    builder = prompt_builder(section, texts.names, tokenizer, context_tokens)
    if section.prompt.demonstrations == "auto":
        k, note = demonstrations_that_fit(section, splits.training, builder)
        prompt = section.prompt.model_copy(update={"demonstrations": k})
        section = section.model_copy(update={"prompt": prompt})
        if note:
            splits = replace(splits, warnings=(*splits.warnings, note))
    template = prompts.Template.from_section(section.prompt)
    return Task(section, texts, splits, template, builder.space, builder, tokenizer, context_tokens)


def least_demonstrations(section: TaskSection) -> int:
    """Demonstrations for which parts must have rows; auto makes do with what there is."""
    k = section.prompt.demonstrations
    return 1 if k == "auto" else k


def demonstrations_that_fit(
    section: TaskSection, pool: data.LabelledTexts, builder: prompts.PromptBuilder
) -> tuple[int, str | None]:
    """Demonstrations of a balanced prompt, k: the recipe's number, or one that auto chooses.

    Auto is the smallest multiple of the number of classes that is at least 4; fewer where half of
    the texts, or the model's context, is less than that. Random selection counts as auto, too: its
    own k may leave out a class.

    Returns:
        k, and a line for the user where the prompts cannot show every class.
    """
    wanted = section.prompt.demonstrations
    if wanted != "auto" and section.prompt.selection != "random":
        return wanted, None
    classes = len(set(pool.labels))
    k = classes * -(-LEAST_AUTO // classes)
    fitting = max(1, len(pool) // 2)
    why = f"{len(pool)} training texts"
    if builder.context_tokens is not None:
        lengths = [len(builder.build([], text, 0).token_ids) for text in pool.texts[:_SAMPLE]]
        # Each has a label behind it, and what follows that.
        mean = sum(lengths) / len(lengths) + builder.space.longest + 2
        inside = int((builder.context_tokens - 2 * max(lengths)) / (1.1 * mean))
        if inside < fitting:
            fitting, why = max(1, inside), f"a context of {builder.context_tokens:,} tokens"
    if k > fitting:
        k = fitting // classes * classes or fitting
    if k >= classes:
        return k, None
    return k, (
        f"{classes} classes, and {k} demonstrations are what {why} allows: each prompt shows "
        f"{k} of the classes"
    )


def prompt_builder(
    section: TaskSection, names: Sequence[str], tokenizer: Any, context_tokens: int | None = None
) -> prompts.PromptBuilder:
    """What makes a task's prompts, from the names of its classes alone; otherwise as `open_task`.

    Raises:
        PromptError: label words cannot be told apart, or the tokenizer has no chat template.
    """
    template = prompts.Template.from_section(section.prompt)
    words = section.prompt.label_words
    return _builder(section, template, names, words, tokenizer, context_tokens)


def _builder(
    section: TaskSection,
    template: prompts.Template,
    names: Sequence[str],
    words: Any,
    tokenizer: Any,
    context_tokens: int | None,
    *,
    allow_empty: bool = False,
) -> prompts.PromptBuilder:
    """A prompt builder; the template's words plain, or in the turns of a chat."""
    wording: prompts.Wording = template
    if section.prompt.chat:
        wording = prompts.ChatTemplate(tokenizer, template)
    return prompts.PromptBuilder(
        tokenizer,
        wording,
        prompts.label_space(tokenizer, wording, names, words),
        max_text_tokens=section.prompt.max_text_tokens,
        context_tokens=context_tokens,
        allow_empty=allow_empty or section.data.empty_texts == "keep",
    )
