"""Joint training: rehearse every training row of every past task, in each pass once.

The ceiling that benchmarks of continual learning name "joint" or "multi-task": nothing is left out, so what still gets
lost is lost for other reasons. It is exact only where every past task was learned this way, since others keep fewer rows.
"""

from __future__ import annotations

import random

from clm_app.data.rows import Row
from clm_app.strategies._base import Strategy


class Joint(Strategy):
    """All rows, old and new, in each pass."""

    title = "Joint (rehearse every old row)"
    purpose = "The ceiling that other ways are compared with; its time grows with the number of tasks"
    needs = "all training rows of all past tasks; each pass takes as long as all tasks together"
    needs_old_rows = True

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return every row once."""
        rows = [("new", row) for row in new] + [(source, row) for source in sorted(kept) for row in kept[source]]
        rng.shuffle(rows)
        return rows

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return every row."""
        return list(new)
