"""One adapter per task: what was learned is never trained again, and a router finds the adapter of each prompt.

Forgetting can come from the router alone, which keeps counts instead of rows (see routes.py). A task that comes again
is trained on from its own adapter, with its own kept rows rehearsed. A very small model is tuned whole for each task,
which learns better than LoRA there and takes no more room than a large model's LoRA adapter.

Source: modular continual learning with a learned router, as in Aljundi et al. 2017 (Expert Gate, arXiv:1611.06194),
with LoRA adapters as experts (Hu et al. 2021, arXiv:2106.09685) and naive Bayes as the gate.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from clm_app.catalog import pick
from clm_app.data.rows import Row, load
from clm_app.errors import BadSettings
from clm_app.routes import BASE, Router, Routing, is_routed, is_whole, routing
from clm_app.strategies._base import Strategy
from clm_app.strategies.replay import Replay, ReplaySettings

if TYPE_CHECKING:
    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order


class AdaptersSettings(BaseModel):
    """Where an adapter begins, what is kept of a task beside its adapter, and when two tasks are one."""

    model_config = ConfigDict(extra="forbid")

    rows_share: float = Field(
        0.05, ge=0, le=1, description="share of a task's rows kept, rehearsed where its adapter is trained again"
    )
    start: Literal["previous", "base"] = Field(
        "base",
        description="where a new task's adapter begins: with nothing learned, or as a copy of the last one trained",
    )
    same_above: float = Field(
        0.3, gt=0, le=1, description="a new task shares the adapter of a past one if more than this share of its "
        "held-out prompts would be routed there",
    )  # fmt: skip
    most_adapters: int | None = Field(
        None, ge=1, le=1_000_000, description="adapters of a version at most; then a new task shares the adapter of the "
        "past task whose prompts are likest to its own; empty: no such limit",
    )  # fmt: skip
    share: float = Field(
        0.5, ge=0, le=0.9, description="share of rehearsal in the mix where an adapter is trained again"
    )


class Adapters(Strategy):
    """A routed set of adapters over one base; adapters that are not trained are copied bit by bit."""

    title = "Task adapters with a router"
    purpose = (
        "Keeps each task in an adapter of its own: forgetting is what the router confuses, whatever the number of tasks"
    )
    needs = (
        "no old rows; on disk and in memory one adapter for each task, and beside the training a second copy of the model "
        "to answer through all of them; no extra training time"
    )
    needs_parent = True
    weights_kind = "routed"
    methods = ("lora", "full", "qlora")
    full_below = 20_000_000  # parameters; what is kept of a task is then 80 MB at most
    Settings = AdaptersSettings

    def __init__(self, settings: AdaptersSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.parent: Path | None = None
        self.router, self.task, self.folder = Router(), "", None  # folder: of the adapter trained on; None: a fresh one
        self.is_counted = False  # whether the router has this task's rows in its sums already
        self.rehearsed: set[str] = set()  # snapshot ids whose kept rows live in the adapter that is trained

    def refuse(self, order: Order) -> None:
        """Refuse a parent that is neither a bare base nor such a set."""
        super().refuse(order)
        is_learned = order.adapter is not None or (order.root is not None and order.base != order.root)
        if is_learned and not is_routed(order.adapter):  # a routed one may stand on any base: repair leaves it so
            raise BadSettings(
                "The version to start from holds what it learned in one set of weights, and task adapters stand on a bare "
                "base. Start from v0 or from a version learned with task adapters, or choose strategy replay."
            )

    def begin_from(self, order: Order) -> Path | None:
        """Return the adapter of the task, or of the past task it cannot be told from; else a copy of the last, or none."""
        self.parent, self.task = order.adapter, order.task
        self.router = self._counted(order)
        self.folder = self.router.folders.get(self.task) or self._shared(order)
        self.rehearsed = self._rows_of(order)
        known = self.folder
        if known is None and self.settings.start == "previous" and self.router.tasks:
            known = self.router.folders[self.router.tasks[-1]]
        if known and is_whole(self.parent / known) and pick("clm_app.methods", order.method).weights_kind == "adapter":
            raise BadSettings(
                f"{self.task} is trained on from a task's weights that were tuned whole, and method {order.method} trains an "
                "adapter. Choose method full, or leave the method empty."
            )
        return self.parent / known if known else None

    def _counted(self, order: Order) -> Router:
        """Return the parent's router, without the rows that were withdrawn since."""
        router = Router.load(order.adapter) if order.adapter else Router()
        self.figures["withdrawn"] = router.take_out(order.withdrawn, ((t, load(file)) for t, file in order.counted))
        return router

    def _shared(self, order: Order) -> str | None:
        """Return the folder of the adapter that this task shares; None where it gets its own."""
        if not self.router.tasks:
            return None
        held_out = next((exam.file for exam in order.after if exam.split == "validation"), order.rows)
        found = order.routing
        if found is None:
            found = routing(self.router, self.task, load(order.rows), load(held_out))
            self.is_counted = self.router.folders.pop(self.task, None) is not None
        self.figures["routed_to"] = found.routed_to
        past = shared(found, self.task, self.settings, len(set(self.router.folders.values())))
        return self.router.folders[past] if past else None

    def _rows_of(self, order: Order) -> set[str]:
        """Return the snapshot ids whose kept rows live in the adapter that is trained now."""
        if self.folder is None:
            return set()
        return {s for s, task in order.kept_tasks.items() if self.router.folders.get(task) == self.folder}

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the new rows, and with them rows kept of what the same adapter has learned before."""
        inside = {source: rows for source, rows in kept.items() if source in self.rehearsed}
        return Replay(ReplaySettings(share=self.settings.share), self.seed).mix(new, inside, rng)

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return a share of the rows, every label as evenly as the labels allow."""
        count = round(self.settings.rows_share * len(new))
        return Replay(ReplaySettings(rows_per_task=count), self.seed).keep(new, rng) if count else []

    def assemble(self, engine: Engine, weights: Path) -> None:
        """Put the trained adapter beside the parent's, which stay bit by bit the same, and add the task to the router."""
        trained = weights.with_name(".trained")
        shutil.rmtree(trained, ignore_errors=True)
        weights.rename(trained)
        weights.mkdir()
        folder = self.folder or f"adapters/{len(set(self.router.folders.values())):04d}"
        if self.parent:
            for kept in sorted(set(self.router.folders.values()) - {folder}):
                shutil.copytree(self.parent / kept, weights / kept, copy_function=shutil.copyfile)
        (weights / folder).parent.mkdir(exist_ok=True)
        trained.rename(weights / folder)
        self.router.folders.pop(self.task, None)  # the task learned last stands last
        self.router.folders[self.task] = folder
        if not self.is_counted:
            self.router.learn(self.task, engine.new)
        self.router.save(weights)
        self.figures["adapters"] = len(set(self.router.folders.values()))


def shared(found: Routing, task: str, settings: AdaptersSettings, adapters: int) -> str | None:
    """Return the past task whose adapter a new one shares; None where it gets its own.

    adapters: that there are already.
    """
    other, share = confused(found, task)
    if share > settings.same_above:
        return other
    return found.nearest if settings.most_adapters is not None and adapters >= settings.most_adapters else None


def confused(found: Routing, task: str) -> tuple[str, float]:
    """Return the past task that most of a new one's prompts would be sent to, and their share; ("", 0) for none."""
    return next(((name, share) for name, share in found.routed_to.items() if name not in (task, BASE)), ("", 0.0))
