"""Replay: rehearse a few kept rows of every past task between the new ones.

Source: experience replay with a reservoir per class, Rolnick et al. 2019 (arXiv:1811.11682) and Chaudhry et al. 2019
(arXiv:1902.10486). Plain replay beats every replay-free method in published figures on language-model streams.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict, Field

from clm_app.data.rows import Row
from clm_app.strategies._base import Strategy

CHARACTERS_PER_TOKEN = 4  # of English text, roughly; a budget needs no tokenizer


class ReplaySettings(BaseModel):
    """How much is kept and how much of the mix is rehearsal."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(0.5, ge=0.0, le=0.9, description="share of the final mix that is rehearsal, 0..0.9")
    rows_per_task: int = Field(1000, ge=1, le=1_000_000, description="most rows kept of one past task")
    tokens_per_task: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="most tokens kept of one past task, four characters each; empty: no such limit",
    )
    bytes_per_task: int | None = Field(
        None, ge=1, le=10**12, description="most bytes on disk kept of one past task; empty: no such limit"
    )


class Replay(Strategy):
    """A class-balanced reservoir per past task, drawn evenly over the tasks and interleaved with the new rows."""

    title = "Replay (rehearse kept rows)"
    purpose = "The simplest protection that works almost everywhere, as long as some old rows may be kept"
    needs = "kept rows of past tasks; the mix grows by share / (1 - share)"
    needs_old_rows = True
    Settings = ReplaySettings

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the new rows once, and so many kept rows that they are `share` of the whole, spread evenly."""
        sources = [source for source in sorted(kept) if kept[source]]
        wanted = rehearsal(len(new), self.settings.share) if sources else 0
        rows = [("new", row) for row in new]
        for index, source in enumerate(sources):
            count = wanted // len(sources) + (index < wanted % len(sources))
            rows += [(source, row) for row in draw_evenly(kept[source], count, rng)]
        rng.shuffle(rows)
        return rows

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return as many rows as every budget allows, every label as evenly as the labels allow."""
        labels = by_label(new)
        drawn = [reservoir(labels[label], len(new), rng)[::-1] for label in sorted(labels)]
        return within(in_turn(drawn), self.settings)


def rehearsal(new: int, share: float) -> int:
    """Return how many rehearsed rows beside so many new ones make up `share` of the whole."""
    return round(new * share / (1 - share))


def by_label(rows: list[Row]) -> dict[str, list[Row]]:
    """Return {label: its rows, in their order}."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.label].append(row)
    return found


def in_turn(groups: list[Iterable[Row]]) -> Iterator[Row]:
    """Yield the first row of each group, then the second of each that has one, and so on."""
    going = [iter(group) for group in groups]
    while going:
        still = []
        for group in going:
            if (row := next(group, None)) is not None:
                still.append(group)
                yield row
        going = still


def within(rows: Iterable[Row], budget: ReplaySettings) -> list[Row]:
    """Return the first rows that all budgets hold; a row too large for what is left is passed over."""
    kept: list[Row] = []
    tokens, size = budget.tokens_per_task or math.inf, budget.bytes_per_task or math.inf
    for row in rows:
        if len(kept) == budget.rows_per_task:
            break
        if tokens_of(row) <= tokens and bytes_of(row) <= size:
            tokens, size = tokens - tokens_of(row), size - bytes_of(row)
            kept.append(row)
    return kept


def tokens_of(row: Row) -> int:
    """Return about how many tokens a row has."""
    return math.ceil((len(row.prompt) + len(row.response)) / CHARACTERS_PER_TOKEN)


def bytes_of(row: Row) -> int:
    """Return the bytes of a row's line in a file of kept rows."""
    return len(row.model_dump_json().encode()) + 1


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
