"""Replay: rehearse a few kept rows of every past task between the new ones.

Source: experience replay with a reservoir per class, Rolnick et al. 2019 (arXiv:1811.11682) and Chaudhry et al. 2019
(arXiv:1902.10486). Plain replay beats every replay-free method in published figures on language-model streams.
"""

from __future__ import annotations

import random
from collections import defaultdict

from pydantic import BaseModel, ConfigDict, Field

from clm_app.data.rows import Row
from clm_app.strategies._base import Strategy


class ReplaySettings(BaseModel):
    """How much is kept and how much of the mix is rehearsal."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(0.5, ge=0.0, le=0.9, description="share of the final mix that is rehearsal, 0..0.9")
    rows_per_task: int = Field(1000, ge=1, le=1_000_000, description="most rows kept of one past task")


class Replay(Strategy):
    """A class-balanced reservoir per past task, drawn evenly over the tasks and interleaved with the new rows."""

    title = "Replay (rehearse kept rows)"
    needs = "kept rows of past tasks; the mix grows by share / (1 - share)"
    Settings = ReplaySettings

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the new rows once, and so many kept rows that they are `share` of the whole, spread evenly."""
        sources = [source for source in sorted(kept) if kept[source]]
        share = self.settings.share
        wanted = round(len(new) * share / (1 - share)) if sources else 0
        rows = [("new", row) for row in new]
        for index, source in enumerate(sources):
            count = wanted // len(sources) + (index < wanted % len(sources))
            rows += [(source, row) for row in draw_evenly(kept[source], count, rng)]
        rng.shuffle(rows)
        return rows

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return at most `rows_per_task` rows, every label as evenly as the labels allow."""
        by_label: dict[str, list[Row]] = defaultdict(list)
        for row in new:
            by_label[row.label].append(row)
        reservoirs = [reservoir(by_label[label], len(new), rng) for label in sorted(by_label)]
        kept: list[Row] = []
        while len(kept) < self.settings.rows_per_task and any(reservoirs):
            for rows in reservoirs:
                if rows and len(kept) < self.settings.rows_per_task:
                    kept.append(rows.pop())
        return kept


def reservoir(stream: list[Row], size: int, rng: random.Random) -> list[Row]:
    """Return a uniform sample of at most `size` rows seen one by one (algorithm R, Vitter 1985), in random order."""
    sample: list[Row] = []
    for seen, row in enumerate(stream):
        if len(sample) < size:
            sample.append(row)
        elif (place := rng.randrange(seen + 1)) < size:
            sample[place] = row
    rng.shuffle(sample)
    return sample


def draw_evenly(rows: list[Row], count: int, rng: random.Random) -> list[Row]:
    """Return `count` rows; each is used once before any is used twice."""
    drawn: list[Row] = []
    while rows and len(drawn) < count:
        drawn += rng.sample(rows, min(len(rows), count - len(drawn)))
    return drawn
