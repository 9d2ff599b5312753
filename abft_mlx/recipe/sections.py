"""The typed recipe: every setting of a run, its meaning, its limits and its only default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from abft_mlx.errors import RecipeError

Method = Literal["vanilla", "zero_shot", "contextual", "domain", "batch", "hidden", "knn"]
Protocol = Literal["accuracy", "robustness", "bias", "unseen", "transfer"]

LORA_LEARNING_RATE, FULL_LEARNING_RATE = 1e-4, 2e-5
# Prompts that share demonstrations: of eight, those are a third of all tokens at k = 4.
MOST_TOGETHER = 8
# A read-out's queries centre each other, so their mean should be steady.
MOST_CENTRED = 16


def _number(value: Any) -> Any:
    """Refuse booleans where a number belongs: pydantic would read ``true`` as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed here")
    return value


def _name(value: Any) -> Any:
    """Let people write class names such as 0 and 1 without quotes."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _label_prefix(prefix: str) -> str:
    """Refuse a space at the end."""
    if prefix.endswith(" "):
        raise ValueError(
            "it ends in a space, which belongs to the label that follows: leave it out"
        )
    return prefix


Int = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1)]
Natural = Annotated[Int, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Weight = Annotated[Number, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, BeforeValidator(_name)]
LabelPrefix = Annotated[str, AfterValidator(_label_prefix)]
Pair = tuple[str, str]


class Section(BaseModel):
    """Settings that cannot be changed after construction; unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


class DataSection(Section):
    """Which labelled texts, and how they are divided."""

    source: Text = "demo"
    """A built-in task (demo), a .jsonl, .csv or .parquet file (relative to the current folder), or
    a data set of the hub (owner/name)."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set; train+test joins several."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    text: Text = "text"
    """Column of the texts; sentence|text reads the first of these that exists."""
    label: Text = "label"
    """Column of the labels; a|b as for text."""
    labels: list[Name] | None = Field(default=None, min_length=2)
    """Class names in order: the names of integer labels 0, 1, ..., or the only string labels that
    are allowed. Without it the distinct labels, sorted, are the names."""
    empty_texts: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with rows whose text is empty: refuse the data, drop those rows, or keep them (the
    paper's hate-speech set has seven)."""
    staicc_order: bool = False
    """Hub data sets only: leave out texts over 1024 characters and permute once, as the StaICC
    benchmark does before it splits."""
    holdout: Literal["protocol", "stratified", "none"] = "protocol"
    """How rows are divided: protocol draws the parts below as the StaICC benchmark does; stratified
    holds out at most a quarter of the rows, by class, and demonstrations come from training rows;
    none trains on everything and measures nothing."""
    training_rows: Count = 1024
    """Rows that training may use."""
    validation_rows: Natural = 0
    """Rows held for validation queries."""
    demonstration_rows: Count = 4096
    """Rows that evaluation takes its demonstrations from."""
    test_rows: Count = 512
    """Rows held for test queries."""
    seed: Natural = 42
    """Seed of the division into these parts."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        stripped = [name.strip() for name in labels or []]
        if any(not name for name in stripped):
            raise ValueError("a class name is empty")
        if len(set(stripped)) < len(stripped):
            raise ValueError("a class name occurs twice")
        return stripped if labels else None


class PromptSection(Section):
    """The words around demonstrations and query."""

    instruction: str = ""
    """Text before the first demonstration."""
    input_prefix: str = "text: "
    """Text before each input."""
    input_affix: str = " "
    """Text between an input and label_prefix."""
    label_prefix: LabelPrefix = "label:"
    """Text before each label, without the space: the label brings its own."""
    label_affix: str = "\n"
    """Text after each demonstration's label."""
    query_prefix: str = ""
    """Text before the query's input_prefix."""
    demonstrations: Count | Literal["auto"] = 4
    """Demonstrations in a prompt (k); auto is the smallest multiple of the number of classes that
    is at least 4, or what fits into the model's context."""
    selection: Literal["random", "balanced", "nearest"] = "random"
    """Which texts a prompt demonstrates: random ones, as in the paper; balanced (classes in turn,
    in random order); or nearest, the texts most similar to the query."""
    label_words: dict[Name, Name] | Literal["auto", "letters"] | None = None
    """The word that stands for each label in a prompt: a map from labels to words, letters for A,
    B, C, or null or auto for the labels themselves."""
    max_text_tokens: Count | None = None
    """Longer texts are shortened to this many tokens."""
    chat: bool = False
    """For instruct models: texts as user turns and labels as assistant turns of the model's chat
    template, without label_affix; false is the paper's plain prompt. true holds for the tasks of
    mixture and transfer, too."""


class VariantsSection(Section):
    """Other wordings of the prompt; with the prompt's own, three levels of each of four pieces."""

    instruction: Pair = ("Classify the following text. ", "Decide which label fits the text. ")
    """Two other values of prompt.instruction."""
    input_prefix: Pair = ("sentence: ", "input: ")
    """Two other values of prompt.input_prefix."""
    label_prefix: tuple[LabelPrefix, LabelPrefix] = ("class:", "Label:")
    """Two other values of prompt.label_prefix."""
    label_affix: Pair = (" ", "\t")
    """Two other values of prompt.label_affix."""


class TaskSection(Section):
    """Labelled texts with the words around them."""

    name: Text
    """What reports call this task."""
    data: DataSection = DataSection()
    prompt: PromptSection = PromptSection()
    variants: VariantsSection = VariantsSection()


class AdapterSection(Section):
    """What is trained: LoRA on W_Q and W_K, or these weights themselves; the LM head if asked."""

    kind: Literal["lora", "full", "paper"] = "lora"
    """lora, or full for W_Q and W_K themselves; paper is full for models of up to 10 billion
    parameters and lora for larger or quantized ones."""
    rank: Count = 16
    """Rank of lora_a and lora_b."""
    scale: Positive = 2.0
    """Multiplies B·A directly (PEFT's alpha is scale · rank)."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout before lora_a."""
    layers: list[Int] | Literal["auto"] | None = None
    """Layer numbers from 0; null means every layer; auto finds the layers that hold 90% of the
    induction heads in a few training prompts."""
    head: bool = False
    """Train the LM head, too, in full; for end_to_end, as the paper's baseline."""

    @field_validator("layers")
    @classmethod
    def _layer_numbers(cls, layers: Any) -> Any:
        if isinstance(layers, list) and (
            min(layers, default=-1) < 0 or len(set(layers)) < len(layers)
        ):
            raise ValueError("layer numbers start at 0 and occur once each")
        return layers


class ObjectiveSection(Section):
    """What is trained for: the paper's equation 1, the label, or the label-attention read-out."""

    kind: Literal["abft", "end_to_end", "read_out"] = "abft"
    """abft, the paper's; end_to_end: cross-entropy of the label word at the last position;
    read_out: cross-entropy of the answer that is read from the attention to the labels. The
    settings from punish on are for abft."""
    lm_head: Weight = 0.0
    """For read_out: weight of end_to_end's loss beside it, so that the adapter is good in programs
    that only know the LM head, too."""
    fit_prompts: Count = 512
    """For read_out: training prompts on which head weights are fitted first."""
    punish: Weight = 0.5
    """A0: weight of attention on labels other than the gold one."""
    reward: Weight = 1.0
    """B: weight of attention missing from the gold label."""
    filter: bool = True
    """Only induction heads count."""
    layers: Literal["all", "trained"] | None = None
    """Whose heads count: all layers', or those of the layers that train; null means trained where
    adapter.layers is auto, and all otherwise."""
    pid: bool = True
    """Steer A so that the number of induction heads holds."""
    cp: Weight = 0.03
    """Proportional constant of the controller."""
    ci: Weight = 0.005
    """Integral constant of the controller."""
    cd: Weight = 0.005
    """Differential constant of the controller."""


class TrainingSection(Section):
    """How long, how fast and in what pieces."""

    examples: Count = 512
    """Distinct training prompts."""
    updates: Natural = 32
    """Optimizer steps. 0, for read_out, only fits head weights to the model as it is."""
    prompts_per_update: Count = 32
    """Prompts averaged in a step."""
    learning_rate: Positive | None = None
    """Adam's learning rate; null means 0.0001 for lora and 2e-05 for full."""
    gradient_checkpointing: bool = False
    """Gradients in less memory and more time: each block's activations are computed again in
    the backward pass instead of being kept."""
    shared_demonstrations: Count | Literal["auto"] = "auto"
    """Training prompts that share one set of demonstrations, which is computed once for them all;
    divides examples and prompts_per_update. auto is up to 8 where it can be (16 for read_out), 1 is
    the paper's."""
    micro_batch_tokens: Count | Literal["auto"] | None = "auto"
    """Tokens in a forward pass; auto chooses by memory, measures where that is short and takes
    fewer where it runs out; null only estimates."""
    validate_every: Natural = 0
    """Updates between validations; 0 means never."""
    validation_prompts: Count = 256
    """Prompts of a validation."""
    keep_best: bool = True
    """Save the adapter of the best validation; none if prompting without it is clearly better."""
    checkpoint_every: Count = 8
    """Updates between checkpoints; the last update always has one."""
    census_prompts: Natural = 64
    """Test prompts whose attention is kept in heads.npz when training is done, before and after; 0
    keeps none."""
    seed: Natural = 42
    """Seed of prompts, their order and lora_a."""
    max_gradient_norm: Positive | None = None
    """Clip the gradient to this norm; null means no clipping."""
    non_finite_updates: Count = 3
    """Updates in a row whose loss or gradient is not finite, each left out, after which the run
    stops."""

    @property
    def together(self) -> int:
        """Prompts that share their demonstrations; 1 while that is still auto."""
        m = self.shared_demonstrations
        return 1 if m == "auto" else m

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, values: Any) -> Any:
        """Read recipes of runs that were made when there were more ways to train."""
        if not isinstance(values, dict):
            return values
        removed = {"gradient": "exact", "keep_hidden": True, "keep_hidden_bytes": None}
        return {
            name: value
            for name, value in values.items()
            if name not in removed or value != removed[name]
        }

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        m = self.together
        for name in ("examples", "prompts_per_update"):
            if getattr(self, name) % m:
                raise ValueError(
                    f"shared_demonstrations {m} does not divide {name} {getattr(self, name)}; "
                    "choose one that does"
                )
        if self.gradient_checkpointing and m > 1:
            raise ValueError(
                f"gradient_checkpointing does not go with shared_demonstrations {m}, whose keys "
                "outlive their block; set it to 1"
            )
        return self


class EvaluationSection(Section):
    """How accuracy is measured."""

    queries: Count = 512
    """Test queries."""
    repeats: Count = 2
    """Sets of demonstrations for each; prompts = queries · repeats."""
    batch_tokens: Count = 16384
    """Tokens in a forward pass; at most 4096 on a CPU."""
    seed: Natural = 42
    """Seed of the choice of demonstrations."""
    demonstrations: Literal["per_query", "fixed", "classifier"] = "per_query"
    """per_query, the protocol's, draws anew for every prompt; fixed draws once for all queries of a
    repeat; classifier measures what predict uses: the demonstrations and the calibration that are
    stored with a run."""
    protocols: list[Protocol] = Field(default=["accuracy"], min_length=1)
    """What is measured: accuracy, robustness, bias, unseen, transfer."""
    methods: list[Method] = Field(default=["vanilla"], min_length=1)
    """Ways to predict: vanilla, zero_shot, contextual, domain, batch, hidden, knn."""
    calibration_prompts: Count = 512
    """Prompts of contextual and domain calibration."""
    anchor_prompts: Count = 128
    """Prompts of hidden calibration and kNN-prompting."""
    bootstrap_samples: Natural = 1000
    """Resamples behind each 95% interval; 0 leaves them out."""
    compat: bool = False
    """Repeat the faults of the StaICC benchmark (probabilities softmaxed twice, GLER's x values) to
    compare with numbers that were published with them."""
    transfer: list[TaskSection] = []
    """Other tasks to measure on; a recipe's name or file, or a map with name, data and prompt."""


class PredictionSection(Section):
    """The classifier that a run ships: its demonstrations and its calibration."""

    draws: Count = 4
    """Balanced sets of demonstrations to try; the best on validation rows is kept."""
    calibration_texts: Natural = 32
    """Training texts whose mean log-probability of each class is subtracted, with that of the
    validation texts (batch calibration); 0 switches it off."""


class Recipe(Section):
    """One run, completely: model, data, prompts, adapter, objective, training, evaluation."""

    name: str | None = None
    """A short name for reports."""
    description: str | None = None
    """One line for people."""
    model: Text = "demo"
    """demo (bundled), a folder, or a model of the hub (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    data: DataSection = DataSection()
    prompt: PromptSection = PromptSection()
    variants: VariantsSection = VariantsSection()
    mixture: list[TaskSection] = []
    """Train on these tasks at once, in turn, and measure on data; entries as for
    evaluation.transfer. A list under data: is a mixture, measured on its first task."""
    adapter: AdapterSection = AdapterSection()
    objective: ObjectiveSection = ObjectiveSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    prediction: PredictionSection = PredictionSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        training, objective = self.training, self.objective
        if training.gradient_checkpointing and self.adapter.dropout:
            raise ValueError(
                f"training.gradient_checkpointing does not go with adapter.dropout "
                f"{self.adapter.dropout:g}: what is computed again would drop other numbers; set "
                "dropout to 0"
            )
        if objective.kind != "read_out":
            if not training.updates:
                raise ValueError(
                    f"training.updates 0 trains nothing, and objective.kind {objective.kind} has "
                    "nothing else; set updates to 1 or more, or kind to read_out"
                )
            return self
        if training.gradient_checkpointing:
            raise ValueError(
                "objective.kind read_out does not go with gradient checkpointing; set "
                "training.gradient_checkpointing to false"
            )
        if self.prompt.selection == "nearest" or training.shared_demonstrations == 1:
            raise ValueError(
                "objective.kind read_out needs prompts that share demonstrations; set "
                "training.shared_demonstrations to auto or 16, and prompt.selection to balanced or "
                "random (nearest demonstrations are never shared)"
            )
        return self


def task(recipe: Recipe) -> TaskSection:
    """The task that a recipe measures on, and trains on unless it names a mixture."""
    name = recipe.name or recipe.data.source
    return TaskSection(name=name, data=recipe.data, prompt=recipe.prompt, variants=recipe.variants)


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what depends on other settings, so that the recipe alone reproduces the run."""
    training, objective = recipe.training, recipe.objective
    changes: dict[str, Any] = {}
    # Which of the two rates paper means is known once the model is open.
    if training.learning_rate is None and recipe.adapter.kind != "paper":
        rate = LORA_LEARNING_RATE if recipe.adapter.kind == "lora" else FULL_LEARNING_RATE
        changes["training"] = training.model_copy(update={"learning_rate": rate})
    if objective.layers is None:
        counting = "trained" if recipe.adapter.layers == "auto" else "all"
        changes["objective"] = objective.model_copy(update={"layers": counting})
    if recipe.prompt.chat:
        transfer = [_in_turns(task) for task in recipe.evaluation.transfer]
        changes["evaluation"] = recipe.evaluation.model_copy(update={"transfer": transfer})
        changes["mixture"] = [_in_turns(task) for task in recipe.mixture]
    return recipe.model_copy(update=changes)


def _in_turns(section: TaskSection) -> TaskSection:
    """A task whose prompts are chats."""
    prompt = section.prompt.model_copy(update={"chat": True})
    return section.model_copy(update={"prompt": prompt})


def share(recipe: Recipe, processes: int = 1, able: bool = True) -> Recipe:
    """Make ``training.shared_demonstrations`` auto into a number.

    It is the largest one up to 8 (16 for a read-out) that divides what it must, and leaves every
    process a group. Without a read-out it is 1 with gradient checkpointing and with
    ``prompt.selection: nearest``.

    Args:
        recipe: the run.
        processes: that share every update.
        able: False makes it 1, as it is in the paper: for a model that cannot share.
    """
    training = recipe.training
    if training.shared_demonstrations != "auto":
        return recipe
    read_out = recipe.objective.kind == "read_out"
    prompts = [recipe.prompt, *(task.prompt for task in recipe.mixture)]
    nearest = any(prompt.selection == "nearest" for prompt in prompts)
    alone = not able or training.gradient_checkpointing
    most = MOST_CENTRED if read_out else 1 if alone or nearest else MOST_TOGETHER
    whole = math.gcd(training.examples, training.prompts_per_update)
    sizes = [m for m in range(2, most + 1) if whole % m == 0]
    fitting = [m for m in sizes if training.prompts_per_update // m >= processes]
    if read_out and not fitting:
        raise RecipeError(
            f"training.examples {training.examples} and training.prompts_per_update "
            f"{training.prompts_per_update} have no groups of 2 to {most} prompts, which "
            "objective.kind read_out needs; choose multiples of 16"
        )
    training = training.model_copy(update={"shared_demonstrations": max(fitting, default=1)})
    return recipe.model_copy(update={"training": training})


def check_mixture(demonstrations: int | str, mixed: Sequence[TaskSection]) -> None:
    """Check that the prompts of a mixture's tasks can share a batch.

    Raises:
        RecipeError: one has another number of demonstrations than the recipe.
    """
    for task in mixed:
        if task.prompt.demonstrations != demonstrations:
            raise RecipeError(
                f"mixture: {task.name} has {task.prompt.demonstrations} demonstrations, the "
                f"recipe {demonstrations}; give all tasks of a mixture the same "
                "prompt.demonstrations"
            )
