"""What the training child is told: everything it needs in one file, and nothing it has to look up."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from clm_app.engine.settings import TrainingSettings
from clm_app.routes import Routing


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
    root: Path | None = Field(None, description="the base at the root of the lineage, before anything was learned")
    task: str = Field("", description="name of the task that is learned")
    rows: Path = Field(description="training rows of the new task")
    kept: dict[str, Path] = Field(description="{snapshot id: rows kept of a past task}")
    held_out: dict[str, Path] = Field(
        default_factory=dict, description="{snapshot id: validation rows of a past task}, for a strategy that asks"
    )
    kept_tasks: dict[str, str] = Field(default_factory=dict, description="{snapshot id in `kept`: name of its task}")
    learned: list[str] = Field(default_factory=list, description="names of the tasks that the parent has learned")
    routing: Routing | None = Field(None, description="what the router says of this task, where the choice asked it")
    withdrawn: list[str] = Field(
        default_factory=list, description="keys of withdrawn rows, for a parent whose router counts rows"
    )
    counted: list[tuple[str, Path]] = Field(
        default_factory=list, description="(task, training rows) of every run whose rows the parent's router counts"
    )
    vocabulary: str = Field("", description="digest of the tokens that the parent was trained with; empty: not known")
    state: Path | None = Field(None, description="what the parent's run of the same strategy saved for this one")
    strategy: str
    strategy_settings: dict
    method: str
    method_settings: dict
    training: TrainingSettings
    at_root: list[Exam] = Field(default_factory=list, description="measured with the base at `root`, before all else")
    before: list[Exam] = Field(description="measured with the parent's weights, before the first step")
    after: list[Exam] = Field(description="measured with the trained weights")
    probes: dict[str, dict] = Field(default_factory=dict, description="{probe: its knobs}, read on the trained weights")
    probes_before: list[str] = Field(
        default_factory=list, description="those of `probes` that are read on the parent's weights too"
    )
    repair: dict | None = Field(
        None, description="knobs of the repair of a candidate that hurt a past task; None: it is left as it is"
    )
    gate: dict = Field(default_factory=dict, description="knobs of the gate that says whether repair is needed")
    live_outcomes: dict[str, Path] = Field(
        default_factory=dict, description="{snapshot id: the parent's TEST outcomes}, of what is not measured before"
    )
    search: dict[str, Path] = Field(
        default_factory=dict, description="{snapshot id: validation rows} that repair searches on, the new task's too"
    )
    taught: list[tuple[str, Path]] = Field(
        default_factory=list, description="(task, training rows) of the whole lineage, for a router that repair makes"
    )
    threads: int = Field(description="CPU threads; 0 takes all cores")

    @property
    def has_learned(self) -> bool:
        """Say whether the version to start from has learned anything since the root of its lineage."""
        return self.adapter is not None or (self.root is not None and self.base != self.root)
