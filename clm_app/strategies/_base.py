"""The contract of a strategy: named moments of a run, all of them empty here, called by the engine in this order.

begin_from → prepare → [restore] → (mix → retarget → loss → after_backward → after_step)* → finish → assemble → keep
→ save
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from clm_app.data.rows import Row, load
from clm_app.data.vocabulary import refuse_other_tokens
from clm_app.engine.settings import SMALL_MODEL
from clm_app.errors import BadData, BadSettings
from clm_app.routes import Routing, is_routed

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order


HALVES = "halves forgetting"


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
    task: str = ""  # its name
    parent: str = "the version to start from"  # its name
    kept: dict[str, int] | None = None  # {task learned: its rows that may be rehearsed}; None: nobody has looked
    folders: dict[str, str] | None = None  # {past task: folder of its adapter}, of a routed parent
    routing: Routing | None = None  # of a routed parent and a task it has not learned
    adapter_gb: float = 0.0  # that one more adapter takes, on disk and in memory
    room: float = math.inf  # adapters that memory and disk hold in all, beside what training takes


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
    needs_parent: ClassVar[bool] = False  # the model is loaded a second time, beside the one that is trained
    weights_kind: ClassVar[str | None] = None  # what `assemble` leaves; None: what the method saves
    methods: ClassVar[tuple[str, ...]] = ("full", "lora", "qlora")  # ways to tune that it works with
    full_below: ClassVar[int] = SMALL_MODEL  # parameters; below, every weight is tuned where nobody chooses a method
    promise: ClassVar[str] = HALVES  # with each of `methods`, set beside naive; else a sentence, and its test
    Settings: ClassVar[type[BaseModel]] = NoSettings

    def __init__(self, settings: BaseModel, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.figures: dict = {}  # what the run's row shall say of it: counts, strengths, times

    @classmethod
    def choose(cls, situation: Situation, settings: BaseModel) -> Choice:
        """Return the strategy that shall do the work, with its settings and the reason: itself, for all but auto."""
        return Choice(cls.name, settings.model_dump(), "")

    @classmethod
    def refuse_situation(cls, situation: Situation) -> None:
        """Raise as soon as a run is asked for where what this strategy needs is not there, for every strategy alike.

        Raises:
            BadSettings: the sentence says what is missing and what to do.
        """
        name, kind, is_routed_here = situation.parent, situation.parent_kind, cls.weights_kind == "routed"
        if kind == "routed" and not is_routed_here:
            raise BadSettings(
                f"{name} has one adapter per task, and {cls.name} trains one set of weights. "
                "Choose strategy adapters, or start from v0."
            )
        if kind in ("adapter", "full") and is_routed_here:
            raise BadSettings(
                f"{name} holds what it learned in one set of weights, and {cls.name} needs a bare base or task adapters. "
                "Start from v0, or choose strategy replay, which goes on from it."
            )
        cls.unprotected({task: n for task, n in (situation.kept or {}).items() if task != situation.task}, name)

    @classmethod
    def unprotected(cls, kept: dict[str, int], parent: str) -> list[str]:
        """Return the past tasks of which no row can be rehearsed, where rows are what this strategy protects by.

        kept: {past task: its rows that may be rehearsed}.

        Raises:
            BadSettings: that is so for every one of them.
        """
        missing = [task for task, rows in kept.items() if not rows] if cls.needs_old_rows else []
        if missing and len(missing) == len(kept):
            raise BadSettings(
                f"{cls.title} needs rows of past tasks, and of {listed(missing)}, which {parent} has learned, none are "
                "kept: they were learned without keeping any, or were withdrawn. Choose strategy auto, which then takes "
                "what needs no old rows; start from another version; or learn their rows again as a task."
            )
        return missing

    def refuse(self, order: Order) -> None:
        """Raise before anything is loaded where what this strategy needs is not there, for every strategy alike.

        Raises:
            BadData: a file of rows is gone.
            BadSettings: the sentence says what is missing and what to do.
        """
        if self.weights_kind != "routed" and is_routed(order.adapter):
            raise BadSettings(
                f"The version to start from has an adapter for each task, and {self.title} works on one set of weights. "
                "Go on with strategy adapters, or start from v0."
            )
        for file in (order.rows, *order.kept.values(), *order.held_out.values()):
            if not file.exists():
                raise BadData(f"The rows in {file} are gone. Put the file back from a backup, or start the job again.")
        if order.vocabulary:
            refuse_other_tokens(order.base, order.vocabulary, "The version to start from")
        kept = {task: 0 for task in order.learned if task != order.task}
        for source, file in order.kept.items():
            if (task := order.kept_tasks.get(source)) in kept:
                kept[task] += len(load(file))
        if missing := self.unprotected(kept, "the version to start from"):
            self.figures["not_protected"] = missing
        is_relearned = bool(order.after) and all(exam.task == order.task for exam in order.after)
        if self.needs_held_out_rows and order.has_learned and not order.held_out and not is_relearned:
            raise BadSettings(
                f"The version to start from has learned tasks, and no held-out rows of them are given, which {self.title} "
                f"measures by. Add validation rows of past tasks, or choose a strategy without {self.name}."
            )

    def begin_from(self, order: Order) -> Path | None:
        """Return the folder of the adapter to train on; None begins a fresh one, or goes on from full weights."""
        return order.adapter

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Load what is needed beside the model, before the first step; change which of its parameters are trained."""

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the training rows of one epoch as (source, row), in the order they are trained.

        new: training rows of this task; kept: {snapshot id: rows kept of a past task}. source is "new", that id, or
        "self" for a row that the version before wrote.
        """
        rows = [("new", row) for row in new]
        rng.shuffle(rows)
        return rows

    def retarget(self, source: str, row: Row) -> Row:
        """Return the row to train on in the place of one of the mix: the same prompt, and perhaps another answer."""
        return row

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


def listed(names: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


CONTRACT = Strategy
