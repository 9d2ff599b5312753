"""The typed recipe: every setting of a run, its meaning, its limits and its only default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from abft_mlx.recipe._fields import Int, Name, Number, Pair, Section
from abft_mlx.recipe._training import TrainingSection

Method = Literal["vanilla", "zero_shot", "contextual", "domain", "batch", "hidden", "knn"]
Protocol = Literal["accuracy", "robustness", "bias", "unseen", "transfer"]


def _no_trailing_space(prefix: str) -> str:
    if prefix.endswith(" "):
        raise ValueError(
            "it ends in a space, which belongs to the label that follows: leave it out"
        )
    return prefix


class DataSection(Section):
    """Which labelled texts, and how they are divided."""

    source: str = Field(
        default="demo",
        min_length=1,
        description="A built-in task (demo), a .jsonl, .csv or .parquet file (relative to the "
        "current folder), or a data set of the hub (owner/name).",
    )
    config: str | None = Field(default=None, description="Configuration of a hub data set.")
    split: str = Field(
        default="train", description="Split of a hub data set; train+test joins several."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    text: str = Field(
        default="text",
        min_length=1,
        description="Column of the texts; sentence|text reads the first of these that exists.",
    )
    label: str = Field(
        default="label", min_length=1, description="Column of the labels; a|b as for text."
    )
    labels: list[Name] | None = Field(
        default=None,
        min_length=2,
        description="Class names in order: the names of integer labels 0, 1, ..., or the only "
        "string labels that are allowed. Without it the distinct labels, sorted, are the names.",
    )
    empty_texts: Literal["refuse", "drop", "keep"] = Field(
        default="refuse",
        description="What to do with rows whose text is empty: refuse the data, drop those rows, "
        "or keep them (the paper's hate-speech set has seven).",
    )
    staicc_order: bool = Field(
        default=False,
        description="Hub data sets only: leave out texts over 1024 characters and permute once, "
        "as the StaICC benchmark does before it splits.",
    )
    holdout: Literal["protocol", "stratified", "none"] = Field(
        default="protocol",
        description="How rows are divided: protocol draws the parts below as the StaICC benchmark "
        "does; stratified holds out at most a quarter of the rows, by class, and demonstrations "
        "come from training rows; none trains on everything and measures nothing.",
    )
    training_rows: Int = Field(default=1024, ge=1, description="Rows that training may use.")
    validation_rows: Int = Field(default=0, ge=0, description="Rows held for validation queries.")
    demonstration_rows: Int = Field(
        default=4096, ge=1, description="Rows that evaluation takes its demonstrations from."
    )
    test_rows: Int = Field(default=512, ge=1, description="Rows held for test queries.")
    seed: Int = Field(default=42, ge=0, description="Seed of the division into these parts.")

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

    instruction: str = Field(default="", description="Text before the first demonstration.")
    input_prefix: str = Field(default="text: ", description="Text before each input.")
    input_affix: str = Field(default=" ", description="Text between an input and label_prefix.")
    label_prefix: str = Field(
        default="label:",
        description="Text before each label, without the space: the label brings its own.",
    )
    label_affix: str = Field(default="\n", description="Text after each demonstration's label.")
    query_prefix: str = Field(default="", description="Text before the query's input_prefix.")
    demonstrations: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        default=4,
        description="Demonstrations in a prompt (k); auto is the smallest multiple of the number "
        "of classes that is at least 4, or what fits into the model's context.",
    )
    selection: Literal["random", "balanced", "nearest"] = Field(
        default="random",
        description="Which texts a prompt demonstrates: random ones, as in the paper; balanced "
        "(classes in turn, in random order); or nearest, the texts most similar to the query.",
    )
    label_words: dict[Name, Name] | Literal["auto", "letters"] | None = Field(
        default=None,
        description="The word that stands for each label in a prompt: a map from labels to words, "
        "letters for A, B, C, or null or auto for the labels themselves.",
    )
    max_text_tokens: Int | None = Field(
        default=None, ge=1, description="Longer texts are shortened to this many tokens."
    )
    chat: bool = Field(
        default=False,
        description="For instruct models: texts as user turns and labels as assistant turns of the "
        "model's chat template, without label_affix; false is the paper's plain prompt. true holds "
        "for the tasks of mixture and transfer, too.",
    )

    @field_validator("label_prefix")
    @classmethod
    def _without_space(cls, prefix: str) -> str:
        return _no_trailing_space(prefix)


class VariantsSection(Section):
    """Other wordings of the prompt; with the prompt's own, three levels of each of four pieces."""

    instruction: Pair = Field(
        default=("Classify the following text. ", "Decide which label fits the text. "),
        description="Two other values of prompt.instruction.",
    )
    input_prefix: Pair = Field(
        default=("sentence: ", "input: "), description="Two other values of prompt.input_prefix."
    )
    label_prefix: Pair = Field(
        default=("class:", "Label:"), description="Two other values of prompt.label_prefix."
    )
    label_affix: Pair = Field(
        default=(" ", "\t"), description="Two other values of prompt.label_affix."
    )

    @field_validator("label_prefix")
    @classmethod
    def _without_space(cls, prefixes: Pair) -> Pair:
        return _no_trailing_space(prefixes[0]), _no_trailing_space(prefixes[1])


class TaskSection(Section):
    """Labelled texts with the words around them."""

    name: str = Field(min_length=1, description="What reports call this task.")
    data: DataSection = Field(default_factory=DataSection, description="Labelled texts.")
    prompt: PromptSection = Field(default_factory=PromptSection, description="Prompts.")
    variants: VariantsSection = Field(
        default_factory=VariantsSection, description="Other wordings of the prompt."
    )


class AdapterSection(Section):
    """What is trained: LoRA on W_Q and W_K, or these weights themselves; the LM head if asked."""

    kind: Literal["lora", "full", "paper"] = Field(
        default="lora",
        description="lora, or full for W_Q and W_K themselves; paper is full for models of up to "
        "10 billion parameters and lora for larger or quantized ones.",
    )
    rank: Int = Field(default=16, ge=1, description="Rank of lora_a and lora_b.")
    scale: Number = Field(
        default=2.0, gt=0, description="Multiplies B·A directly (PEFT's alpha is scale · rank)."
    )
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="Dropout before lora_a.")
    layers: Annotated[list[Int], Field(min_length=1)] | Literal["auto"] | None = Field(
        default=None,
        description="Layer numbers from 0; null means every layer; auto finds the layers that hold "
        "90% of the induction heads in a few training prompts.",
    )
    head: bool = Field(
        default=False,
        description="Train the LM head, too, in full; for end_to_end, as the paper's baseline.",
    )

    @field_validator("layers")
    @classmethod
    def _layer_numbers(
        cls, layers: list[int] | Literal["auto"] | None
    ) -> list[int] | Literal["auto"] | None:
        if isinstance(layers, list) and (min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError("layer numbers start at 0 and occur once each")
        return layers


class ObjectiveSection(Section):
    """What is trained for: the paper's equation 1, the label, or the label-attention read-out."""

    kind: Literal["abft", "end_to_end", "read_out"] = Field(
        default="abft",
        description="abft, the paper's; end_to_end: cross-entropy of the label word at the last "
        "position; read_out: cross-entropy of the answer that is read from the attention to the "
        "labels. The settings from punish on are for abft.",
    )
    lm_head: Number = Field(
        default=0.0,
        ge=0,
        description="For read_out: weight of end_to_end's loss beside it, so that the adapter is "
        "good in programs that only know the LM head, too.",
    )
    fit_prompts: Int = Field(
        default=512,
        ge=1,
        description="For read_out: training prompts on which head weights are fitted first.",
    )

    punish: Number = Field(
        default=0.5, ge=0, description="A0: weight of attention on labels other than the gold one."
    )
    reward: Number = Field(
        default=1.0, ge=0, description="B: weight of attention missing from the gold label."
    )
    filter: bool = Field(default=True, description="Only induction heads count.")
    layers: Literal["all", "trained"] | None = Field(
        default=None,
        description="Whose heads count: all layers', or those of the layers that train; null means "
        "trained where adapter.layers is auto, and all otherwise.",
    )
    pid: bool = Field(
        default=True, description="Steer A so that the number of induction heads holds."
    )
    cp: Number = Field(default=0.03, ge=0, description="Proportional constant of the controller.")
    ci: Number = Field(default=0.005, ge=0, description="Integral constant of the controller.")
    cd: Number = Field(default=0.005, ge=0, description="Differential constant of the controller.")


class EvaluationSection(Section):
    """How accuracy is measured."""

    queries: Int = Field(default=512, ge=1, description="Test queries.")
    repeats: Int = Field(
        default=2, ge=1, description="Sets of demonstrations for each; prompts = queries · repeats."
    )
    batch_tokens: Int = Field(
        default=16384, ge=1, description="Tokens in a forward pass; at most 4096 on a CPU."
    )
    seed: Int = Field(default=42, ge=0, description="Seed of the choice of demonstrations.")
    demonstrations: Literal["per_query", "fixed", "classifier"] = Field(
        default="per_query",
        description="per_query, the protocol's, draws anew for every prompt; fixed draws once for "
        "all queries of a repeat; classifier measures what predict uses: the demonstrations and "
        "the calibration that are stored with a run.",
    )
    protocols: list[Protocol] = Field(
        default=["accuracy"],
        min_length=1,
        description="What is measured: accuracy, robustness, bias, unseen, transfer.",
    )
    methods: list[Method] = Field(
        default=["vanilla"],
        min_length=1,
        description="Ways to predict: vanilla, zero_shot, contextual, domain, batch, hidden, knn.",
    )
    calibration_prompts: Int = Field(
        default=512, ge=1, description="Prompts of contextual and domain calibration."
    )
    anchor_prompts: Int = Field(
        default=128, ge=1, description="Prompts of hidden calibration and kNN-prompting."
    )
    bootstrap_samples: Int = Field(
        default=1000, ge=0, description="Resamples behind each 95% interval; 0 leaves them out."
    )
    compat: bool = Field(
        default=False,
        description="Repeat the faults of the StaICC benchmark (probabilities softmaxed twice, "
        "GLER's x values) to compare with numbers that were published with them.",
    )
    transfer: list[TaskSection] = Field(
        default=[],
        description="Other tasks to measure on; a recipe's name or file, or a map with name, data "
        "and prompt.",
    )


class PredictionSection(Section):
    """The classifier that a run ships: its demonstrations and its calibration."""

    draws: Int = Field(
        default=4,
        ge=1,
        description="Balanced sets of demonstrations to try; the best on validation rows is kept.",
    )
    calibration_texts: Int = Field(
        default=32,
        ge=0,
        description="Training texts whose mean log-probability of each class is subtracted, with "
        "that of the validation texts (batch calibration); 0 switches it off.",
    )


class Recipe(Section):
    """One run, completely: model, data, prompts, adapter, objective, training, evaluation."""

    name: str | None = Field(default=None, description="A short name for reports.")
    description: str | None = Field(default=None, description="One line for people.")
    model: str = Field(
        default="demo",
        min_length=1,
        description="demo (bundled), a folder, or a model of the hub (owner/name).",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the model.")
    data: DataSection = Field(default_factory=DataSection, description="Labelled texts.")
    prompt: PromptSection = Field(default_factory=PromptSection, description="Prompts.")
    variants: VariantsSection = Field(
        default_factory=VariantsSection, description="Other wordings of the prompt."
    )
    mixture: list[TaskSection] = Field(
        default=[],
        description="Train on these tasks at once, in turn, and measure on data; entries as for "
        "evaluation.transfer. A list under data: is a mixture, measured on its first task.",
    )
    adapter: AdapterSection = Field(default_factory=AdapterSection, description="Trained part.")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="The loss.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="Training.")
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection, description="Evaluation."
    )
    prediction: PredictionSection = Field(
        default_factory=PredictionSection, description="The classifier that a run ships."
    )

    @model_validator(mode="after")
    def _read_out_in_groups(self) -> Recipe:
        if self.objective.kind != "read_out":
            if not self.training.updates:
                raise ValueError(
                    f"training.updates 0 trains nothing, and objective.kind "
                    f"{self.objective.kind} has nothing else; set updates to 1 or more, or kind to "
                    "read_out"
                )
            return self
        if self.training.gradient_checkpointing:
            raise ValueError(
                "objective.kind read_out does not go with gradient checkpointing; set "
                "training.gradient_checkpointing to false"
            )
        if self.prompt.selection == "nearest":
            raise ValueError(
                "objective.kind read_out needs prompts that share demonstrations, and with "
                "prompt.selection nearest none do; set objective.kind to end_to_end, or selection "
                "to balanced"
            )
        if self.training.shared_demonstrations == 1:
            raise ValueError(
                "objective.kind read_out needs prompts that share demonstrations; set "
                "training.shared_demonstrations to auto or 16"
            )
        return self

    @model_validator(mode="after")
    def _same_numbers_again(self) -> Recipe:
        if self.training.gradient_checkpointing and self.adapter.dropout:
            raise ValueError(
                f"training.gradient_checkpointing does not go with adapter.dropout "
                f"{self.adapter.dropout:g}: what is computed again would drop other numbers; set "
                "dropout to 0"
            )
        return self


def task(recipe: Recipe) -> TaskSection:
    """The task that a recipe measures on, and trains on unless it names a mixture."""
    name = recipe.name or recipe.data.source
    return TaskSection(name=name, data=recipe.data, prompt=recipe.prompt, variants=recipe.variants)
