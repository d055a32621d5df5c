"""Rehearse what is being forgotten: kept rows whose loss has risen since they were learned are drawn more often.

Source: prioritised replay (Schaul et al. 2015, arXiv:1511.05952) with measured forgetting as the priority, in the spirit
of maximally interfered retrieval (Aljundi et al. 2019, arXiv:1908.04742). The rise and not the loss: a row that was
never learned, because its answer is wrong or long, has a high loss and has forgotten nothing.
"""

from __future__ import annotations

import json
import math
import random
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from clm_app.data.rows import Row
from clm_app.errors import BadSettings
from clm_app.strategies.replay import Replay, ReplaySettings, rehearsal

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

FILE = "losses.json"  # {row key: nats per answer token when the row was learned}


class ForgottenSettings(ReplaySettings):
    """Replay's budgets, and how strongly forgetting decides."""

    temperature: float = Field(
        0.5, gt=0, le=100, description="nats per answer token: a rise by this much makes a row e times as likely"
    )
    floor: float = Field(
        0.5, ge=0, le=1, description="share of the rehearsal that is spread evenly, whatever was forgotten"
    )


class Forgotten(Replay):
    """Replay in which each row's chance grows with how far it has been forgotten, and none has no chance."""

    title = "Rehearse what is forgotten"
    purpose = "Replay that goes to the rows lost most so far; helps where a small share of rehearsal has many tasks"
    needs = "kept rows of past tasks; the mix grows by share / (1 - share); a look at all kept and new rows"
    Settings = ForgottenSettings

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._learned: dict[str, float] = {}  # nats per answer token at learning
        self._rise: dict[str, float] = {}  # nats per answer token since then
        self._new: dict[str, float] = {}
        self._kept: list[Row] = []

    def refuse(self, order: Order) -> None:
        """Refuse a state that says nothing of losses."""
        super().refuse(order)
        if order.state and not (order.state / FILE).exists():
            raise BadSettings(
                f"{order.state} holds no {FILE}, which a run of this strategy leaves. Start from a version that was learned "
                "with it, or from one that was not: losses are then recorded from this run on."
            )

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Measure every kept row with the version before, and how far its loss has risen since it was learned."""
        known = {}
        if engine.order.state:
            known = json.loads((engine.order.state / FILE).read_text(encoding="utf-8"))
        now = _losses(engine, model, [row for rows in engine.kept.values() for row in rows])
        self._learned = {key: known.get(key, nats) for key, nats in now.items()}
        self._rise = {key: nats - self._learned[key] for key, nats in now.items()}
        risen = [rise for rise in self._rise.values() if rise > 0]
        self.figures |= {
            "measured": len(now), "first_measured": sum(key not in known for key in now), "risen": len(risen),
            "mean_rise": sum(risen) / len(risen) if risen else 0.0, "largest_rise": max(risen, default=0.0),
        }  # fmt: skip

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the new rows once, and so many kept rows that they are `share` of the whole, the hurt ones more often.

        Each row comes as often as its chance says, rounded up or down by lot.
        """
        rows = [("new", row) for row in new]
        rehearsed = [(source, row) for source in sorted(kept) for row in kept[source]]
        if rehearsed:
            chances = self._chances(kept)
            order = rng.sample(range(len(rehearsed)), len(rehearsed))
            counts = _counts([chances[i] for i in order], rehearsal(len(new), self.settings.share), rng)
            rows += [rehearsed[i] for i, count in zip(order, counts, strict=True) for _ in range(count)]
        rng.shuffle(rows)
        return rows

    def _chances(self, kept: dict[str, list[Row]]) -> list[float]:
        """Return the chance of each kept row, in the order of sorted sources: they sum to one.

        Where nothing has risen, every task has the same part and every row of a task too.
        """
        sources = [source for source in sorted(kept) if kept[source]]
        even = [1 / len(sources) / len(kept[source]) for source in sources for _ in kept[source]]
        rises = [self._rise.get(row.key, 0.0) for source in sources for row in kept[source]]
        top = max(rises)
        tilted = [e * math.exp((rise - top) / self.settings.temperature) for e, rise in zip(even, rises, strict=True)]
        floor, total = self.settings.floor, sum(tilted)
        return [floor * e + (1 - floor) * t / total for e, t in zip(even, tilted, strict=True)]

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Measure the new rows with the trained model: what they cost when they were learned."""
        self._new = _losses(engine, model, engine.new)

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return what replay keeps."""
        self._kept = super().keep(new, rng)
        return list(self._kept)

    def save(self, folder: Path) -> None:
        """Write the loss at learning of every row that is kept now; of old ones as it was recorded."""
        losses = self._learned | {row.key: self._new[row.key] for row in self._kept if row.key in self._new}
        if losses:
            (folder / FILE).write_text(json.dumps(losses, sort_keys=True), encoding="utf-8")


def _losses(engine: Engine, model: torch.nn.Module, rows: list[Row]) -> dict[str, float]:
    """Return {row key: nats per answer token}."""
    from clm_app.engine.measure import outcomes

    found = outcomes(model, rows, engine.encoded, engine.device)
    return {line["item"]: line["loss"] / line["tokens"] for line in found}


def _counts(chances: list[float], wanted: int, rng: random.Random) -> list[int]:
    """Return how often each is drawn: its chance times `wanted`, rounded up or down so that they sum to `wanted`."""
    offset = rng.random()
    marks = [min(wanted, math.floor(wanted * total + offset)) for total in accumulate(chances, initial=0.0)]
    marks[-1] = wanted
    return [after - before for before, after in zip(marks, marks[1:], strict=False)]
