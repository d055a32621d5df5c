"""Retrain: a few more steps from the trained weights, with twice the rehearsal and half the rate.

Only rows that were kept are rehearsed, those of the hurt tasks alone. It stands last, since it costs the most and what it
leaves was never on a way between two versions that are known.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from clm_app.errors import BadSettings
from clm_app.repairs._base import Rung

if TYPE_CHECKING:
    from clm_app.data.rows import Row

LEAST_SHARE, MOST_SHARE = 0.25, 0.75  # of rehearsal in a batch, whatever twice the share of before would be


class Retrain(Rung):
    """Bounded training on a mix that leans on what was hurt."""

    title = "Retraining with more rehearsal"

    def refuse(self) -> None:
        """Refuse where no row of a hurt task is kept, or the base under the adapter is rounded.

        Raises:
            BadSettings: with the reason.
        """
        if self.climb.engine.method.base_bits:
            raise BadSettings(
                "The base was rounded in training and a version answers over the exact one; not retrained."
            )
        if not self._kept():
            raise BadSettings(f"No rows of {', '.join(self.climb.hurt)} are kept, so there is nothing to rehearse.")
        if self._steps() < 1:
            raise BadSettings("What is left of the budget is less than one step of training.")

    def search(self) -> dict | None:
        """Return {"steps": taken, "share": of rehearsal in each batch}; None where the bounds do not hold after them."""
        climb, share, steps = self.climb, self._share(), self._steps()
        climb.along([1.0] * climb.layers)
        climb.retrain(self._batches(steps, share))
        holds = climb.is_learned() and climb.first_broken() is None
        return {"steps": steps, "share": share} if holds else None

    def _kept(self) -> list[Row]:
        order, hurt = self.climb.order, set(self.climb.hurt)
        return [row for source, rows in sorted(self.climb.engine.kept.items())
                if order.kept_tasks.get(source) in hurt for row in rows]  # fmt: skip

    def _share(self) -> float:
        """Return twice the share of rehearsal that the training had, within bounds."""
        rehearsed = sum(self.climb.done.figures["rehearsed"].values())
        before = rehearsed / (rehearsed + len(self.climb.engine.new))
        return min(MOST_SHARE, max(LEAST_SHARE, 2 * before))

    def _steps(self) -> int:
        """Return how many steps the budget and the setting allow, whichever is less."""
        trained = self.climb.done.figures["steps"]
        return int(min(self.climb.settings.retrain_share, self.climb.budget_left) * trained)

    def _batches(self, steps: int, share: float) -> list[list[Row]]:
        """Return the rows of each step, so many of them kept ones; drawn from the seed of the run."""
        engine, kept = self.climb.engine, self._kept()
        rng, size = random.Random(f"{engine.knobs.seed}/retrain"), engine.knobs.batch_rows
        count = min(size, max(1, round(share * size)))
        return [rng.choices(kept, k=count) + rng.choices(engine.new, k=size - count) for _ in range(steps)]
