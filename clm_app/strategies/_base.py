"""The contract of a strategy: named moments of a run, all of them empty here, called by the engine in this order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from clm_app.data.rows import Row

if TYPE_CHECKING:
    import torch


class NoSettings(BaseModel):
    """A strategy without a knob."""

    model_config = ConfigDict(extra="forbid")


class Strategy:
    """One way against forgetting. A subclass overrides the moments it needs and declares what it costs."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""
    needs: ClassVar[str] = "nothing beyond the new rows"  # old rows, old model, memory, time; shown before the run
    Settings: ClassVar[type[BaseModel]] = NoSettings

    def __init__(self, settings: BaseModel, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the training rows of one epoch as (source, row), in the order they are trained.

        new: training rows of this task; kept: {snapshot id: rows kept of a past task}. source is "new" or that id.
        """
        rows = [("new", row) for row in new]
        rng.shuffle(rows)
        return rows

    def loss(self, model: torch.nn.Module, batch: dict, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to descend, given the mean loss per answer token of this batch."""
        return loss

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return the rows of this task to keep for later runs; none here."""
        return []


CONTRACT = Strategy
