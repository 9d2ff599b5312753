"""The recipe's section on training: how long, how fast, in what pieces and in how much memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from abft_mlx.recipe._fields import Int, Number, Section

LORA_LEARNING_RATE = 1e-4
FULL_LEARNING_RATE = 2e-5


class TrainingSection(Section):
    """How long, how fast and in what pieces."""

    examples: Int = Field(default=512, ge=1, description="Distinct training prompts.")
    updates: Int = Field(
        default=32,
        ge=0,
        description="Optimizer steps. 0, for read_out, only fits head weights to the model as it "
        "is.",
    )
    prompts_per_update: Int = Field(default=32, ge=1, description="Prompts averaged in a step.")
    learning_rate: Number | None = Field(
        default=None,
        gt=0,
        description=f"Adam's learning rate; null means {LORA_LEARNING_RATE:g} for lora and "
        f"{FULL_LEARNING_RATE:g} for full.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Gradients in less memory and more time: each block's activations are "
        "computed again in the backward pass instead of being kept.",
    )
    shared_demonstrations: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Training prompts that share one set of demonstrations, which is computed once "
        "for them all; divides examples and prompts_per_update. auto is up to 8 where it can be "
        "(16 for read_out), 1 is the paper's.",
    )
    micro_batch_tokens: Annotated[Int, Field(ge=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="Tokens in a forward pass; auto chooses by memory, measures where that is "
        "short and takes fewer where it runs out; null only estimates.",
    )
    validate_every: Int = Field(
        default=0, ge=0, description="Updates between validations; 0 means never."
    )
    validation_prompts: Int = Field(default=256, ge=1, description="Prompts of a validation.")
    keep_best: bool = Field(
        default=True, description="With validation: save the adapter of the best one."
    )
    checkpoint_every: Int = Field(
        default=8, ge=1, description="Updates between checkpoints; the last update always has one."
    )
    census_prompts: Int = Field(
        default=64,
        ge=0,
        description="Test prompts whose attention is kept in heads.npz when training is done, "
        "before and after; 0 keeps none.",
    )
    seed: Int = Field(default=42, ge=0, description="Seed of prompts, their order and lora_a.")
    max_gradient_norm: Number | None = Field(
        default=None, gt=0, description="Clip the gradient to this norm; null means no clipping."
    )

    non_finite_updates: Int = Field(
        default=3,
        ge=1,
        description="Updates in a row whose loss or gradient is not finite, each left out, after "
        "which the run stops.",
    )

    @property
    def together(self) -> int:
        """Prompts that share their demonstrations; 1 while that is auto and nobody has chosen."""
        m = self.shared_demonstrations
        return 1 if m == "auto" else m

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, values: Any) -> Any:
        """Read recipes of runs that were made when there were more ways to train."""
        if not isinstance(values, dict) or values.get("gradient", "exact") != "exact":
            return values
        removed = ("gradient", "keep_hidden", "keep_hidden_bytes")
        return {name: value for name, value in values.items() if name not in removed}

    @model_validator(mode="after")
    def _whole_groups(self) -> TrainingSection:
        m = self.together
        for name in ("examples", "prompts_per_update"):
            if getattr(self, name) % m:
                raise ValueError(
                    f"shared_demonstrations {m} does not divide {name} {getattr(self, name)}; "
                    "choose one that does"
                )
        return self

    @model_validator(mode="after")
    def _kept_or_not(self) -> TrainingSection:
        if self.gradient_checkpointing and self.together > 1:
            raise ValueError(
                f"gradient_checkpointing does not go with shared_demonstrations "
                f"{self.together}, whose keys outlive their block; set it to 1"
            )
        return self
