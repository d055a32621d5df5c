"""Slow average: the mean over the line of accepted versions, in which a new one counts one part in all tasks so far.

Source: averaging over time, Dziadzio et al. 2024 (TIME, arXiv:2412.06712), in the space of weight changes. It lies on the
line of `interpolate` and needs no search: a step that is small by rule where a search finds none that its rows can show.
"""

from __future__ import annotations

from clm_app.repairs._base import Rung


class Average(Rung):
    """One place of the line, measured once."""

    title = "Slow average"

    def search(self) -> dict | None:
        """Return {"alpha": 1 / tasks learned, this one included}."""
        alpha = 1 / (1 + len(self.climb.past))
        self.climb.along([alpha] * self.climb.layers)
        holds = self.climb.is_learned() and self.climb.first_broken() is None
        return {"alpha": alpha} if holds else None
