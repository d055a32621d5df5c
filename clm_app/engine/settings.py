"""The knobs of one training run, whatever the strategy and the method."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

SMALL_MODEL = (
    100_000_000  # parameters; below, every weight is tuned by default, which is as quick there and learns better
)


class TrainingSettings(BaseModel):
    """How a run trains. Measured defaults: LOG.md, "Training defaults"."""

    model_config = ConfigDict(extra="forbid")

    epochs: float | None = Field(
        None, gt=0, le=100, description="passes over the new rows; empty takes the method's own, more for narrow models"
    )
    least_steps: int = Field(
        160, ge=1, le=1_000_000, description="a small task is passed more often, up to this many steps"
    )
    least_steps_again: int = Field(
        32, ge=1, le=1_000_000, description="the same, of a task that the version to start from has learned before"
    )
    batch_rows: int = Field(32, ge=1, le=4096, description="rows in one step")
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="peak learning rate; empty takes the method's own, which falls with the model's width",
    )
    warmup_share: float = Field(0.1, ge=0, le=0.9, description="share of the steps in which the rate rises to its peak")
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled weight decay per step, times the rate")
    clip: float = Field(1.0, gt=0, le=1000, description="largest norm of a step's gradient")
    prompt_dropout: float | None = Field(
        None, ge=0, le=0.5,
        description="share of prompt tokens hidden in a step, so that no single word decides; empty: 0.1 for models of "
        "less than 100 M parameters, else 0",
    )  # fmt: skip
    max_tokens: int = Field(512, ge=8, le=131_072, description="tokens kept of a row; longer prompts lose their start")
    checkpoint_every_s: float = Field(30.0, ge=0.1, le=86_400, description="seconds between two committed checkpoints")
    checkpoints_kept: int = Field(2, ge=1, le=100, description="committed checkpoints kept of a running run")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of split, order, initial adapter and replay draw")
