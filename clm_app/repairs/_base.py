"""The contract of a rung: one way to give back what a candidate lost of past tasks and keep what it learned.

A rung searches on validation rows and takes the largest step whose bounds hold, never the best average: with many past
tasks and one new one the average is highest where nothing is learned. What it finds is judged once on TEST.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from clm_app.data.rows import Row
    from clm_app.engine.repairing import Climb

SHELF = "clm_app.repairs"
LADDER = ("interpolate", "depth", "intruders", "merge", "average", "route", "retrain")  # cheapest first


class RepairSettings(BaseModel):
    """What may be lost, what must be left of the learning, and what the search may cost."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(True, description="whether a candidate that learned and hurt a past task is repaired at all")
    rungs: tuple[str, ...] = Field(LADDER, description="ways to repair, in the order in which they are tried")
    val_rows: int = Field(
        300, ge=10, le=1_000_000, description="most validation rows of a task that a search in the weights measures; fewer "
        "where the budget asks for it",
    )  # fmt: skip
    tolerance: float | None = Field(
        None, ge=0, le=100, description="most that a past task's validation loss may rise, nats per answer token, as an upper "
        "bound; empty: the gate's loss_margin",
    )  # fmt: skip
    least_gain: float = Field(
        0.5, ge=0, le=1, description="least share of what the new task's validation loss fell by that must be left"
    )
    halvings: int = Field(5, ge=1, le=20, description="halvings of the way from nothing learned to all of it")
    most_share_of_training: float = Field(
        0.15, ge=0, le=100, description="most that the search may compute, as a share of what the training did; after that "
        "only a router is tried",
    )  # fmt: skip
    most_test_looks: int = Field(
        2, ge=1, le=10, description="most repaired weights that are judged on TEST; the gate's alpha is shared among them and "
        "the candidate",
    )  # fmt: skip
    retrain_share: float = Field(
        0.1, gt=0, le=1, description="most steps of retraining, as a share of the steps of the training"
    )


class Rung:
    """One way to repair. The climb asks `search`; what that found is answered, and written where it passes."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""
    is_in_weights: ClassVar[bool] = True  # it changes one set of weights; else it keeps both, and a router
    is_last_resort: ClassVar[bool] = False  # tried even with the budget spent, and one look at TEST is kept for it

    def __init__(self, climb: Climb) -> None:
        self.climb = climb

    @property
    def weights_kind(self) -> str:
        """What `write` leaves: adapter, full or routed."""
        return self.climb.done.weights_kind

    def refuse(self) -> None:
        """Raise where this rung cannot be tried at all.

        Raises:
            BadSettings: the sentence is the reason that the certificate gives.
        """

    def search(self) -> dict | None:
        """Return the coefficients of the place that was found, where the model is left; None where no place holds."""
        raise NotImplementedError

    def answer(self, rows: list[Row]) -> list[dict]:
        """Return what the place that was found makes of rows; see `outcomes`."""
        return self.climb.answers.now(rows)

    def write(self, folder: Path) -> None:
        """Write the weights of the place that was found as a version's into an empty folder."""
        self.climb.save(folder)


CONTRACT = Rung
