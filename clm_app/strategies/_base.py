"""The contract of a strategy: named moments of a run, all of them empty here, called by the engine in this order.

begin_from → prepare → [restore] → (mix → loss → after_backward → after_step)* → finish → assemble → keep → save
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from clm_app.data.rows import Row
from clm_app.errors import BadSettings

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order


class NoSettings(BaseModel):
    """A strategy without a knob."""

    model_config = ConfigDict(extra="forbid")


class Situation(NamedTuple):
    """What is known before a run, without loading a model."""

    parent_kind: str  # base, adapter, routed or full
    parameters: int  # of the whole model
    learned_tasks: int  # that the parent has learned
    new_rows: int  # training rows of this task
    method: str  # way to tune that was asked for; empty: free to choose


class Choice(NamedTuple):
    """A strategy by name, its settings, and one sentence that says why."""

    strategy: str
    settings: dict
    why: str


class Strategy:
    """One way against forgetting. A subclass overrides the moments it needs and declares what it costs."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""
    needs: ClassVar[str] = "nothing beyond the new rows"  # old rows, old model, memory, time; shown before the run
    purpose: ClassVar[str] = ""  # what it is for and what to expect of it, one sentence; shown where it is chosen
    needs_old_rows: ClassVar[bool] = False  # rows kept of past tasks are read
    needs_held_out_rows: ClassVar[bool] = False  # validation rows of past tasks are read
    needs_parent: ClassVar[bool] = False  # the version before is loaded a second time: about twice the memory
    weights_kind: ClassVar[str | None] = None  # what `assemble` leaves; None: what the method saves
    methods: ClassVar[tuple[str, ...]] = ("full", "lora")  # ways to tune that it works with
    Settings: ClassVar[type[BaseModel]] = NoSettings

    def __init__(self, settings: BaseModel, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.figures: dict = {}  # what the run's row shall say of it: counts, strengths, times

    @classmethod
    def choose(cls, situation: Situation, settings: BaseModel) -> Choice:
        """Return the strategy that shall do the work, with its settings and the reason: itself, for all but auto."""
        return Choice(cls.name, settings.model_dump(), "")

    def refuse(self, order: Order) -> None:
        """Raise before anything is loaded where what this strategy needs is not there.

        One set of weights cannot go on from a set of task adapters: that is refused here, for every strategy alike.

        Raises:
            BadSettings: the sentence says what is missing and what to do.
        """
        from clm_app.routes import is_routed

        if self.weights_kind != "routed" and is_routed(order.adapter):
            raise BadSettings(
                f"The version to start from has an adapter for each task, and {self.title} works on one set of weights. "
                "Go on with strategy adapters, or start from v0."
            )

    def begin_from(self, order: Order) -> Path | None:
        """Return the folder of the adapter to train on; None begins a fresh one, or goes on from full weights."""
        return order.adapter

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Load what is needed beside the model, before the first step."""

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the training rows of one epoch as (source, row), in the order they are trained.

        new: training rows of this task; kept: {snapshot id: rows kept of a past task}. source is "new", that id, or
        "self" for a row that the version before wrote.
        """
        rows = [("new", row) for row in new]
        rng.shuffle(rows)
        return rows

    def loss(
        self, model: torch.nn.Module, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss to descend, given `loss`, the mean per answer token of this batch.

        batch: see `tensors`, and under "rows" its (source, Row) pairs. logits: float32 (rows, answer, vocabulary);
        targets: (rows, answer), IGNORED where nothing is predicted.
        """
        return loss

    def after_backward(self, model: torch.nn.Module) -> None:
        """Look at or add to the gradients, before they are clipped."""

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Look at the weights after step `step` (0-based) was taken."""

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Change the trained weights in place, or measure with them, before they are written."""

    def assemble(self, engine: Engine, weights: Path) -> None:
        """Change the folder of written weights, before it is moved to its place."""

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return the rows of this task to keep for later runs; none here."""
        return []

    def save(self, folder: Path) -> None:
        """Write what the next run of this strategy shall find in `order.state`; an empty folder is not kept."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint has to hold so that a killed run ends as an uninterrupted one would."""
        return {}

    def restore(self, found: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave, after `prepare`."""


CONTRACT = Strategy
