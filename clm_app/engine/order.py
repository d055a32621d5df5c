"""What the training child is told: everything it needs in one file, and nothing it has to look up."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from clm_app.engine.settings import TrainingSettings


class Exam(BaseModel):
    """One split of one snapshot to measure, before or after the training."""

    model_config = ConfigDict(extra="forbid")

    snapshot_id: int
    task: str
    split: str
    file: Path


class Order(BaseModel):
    """One training run: from these weights, on these rows, in this way, then these measurements."""

    model_config = ConfigDict(extra="forbid")

    folder: Path = Field(description="the run's folder: checkpoints, weights, outcomes and result.json go here")
    base: Path
    adapter: Path | None
    rows: Path = Field(description="training rows of the new task")
    kept: dict[str, Path] = Field(description="{snapshot id: rows kept of a past task}")
    strategy: str
    strategy_settings: dict
    method: str
    method_settings: dict
    training: TrainingSettings
    before: list[Exam] = Field(description="measured with the parent's weights, before the first step")
    after: list[Exam] = Field(description="measured with the trained weights")
    threads: int = Field(description="CPU threads; 0 takes all cores")
