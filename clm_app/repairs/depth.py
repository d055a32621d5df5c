"""Interpolate by depth: low layers, which every task uses, go further back than high ones.

Source: Wang et al. 2024 (LiNeS, arXiv:2410.17146): the coefficient of a layer is alpha + beta * layer / (layers - 1).
"""

from __future__ import annotations

from clm_app.errors import BadSettings
from clm_app.repairs._base import Rung


class Depth(Rung):
    """The largest ramp of coefficients: first the lowest layer gives way alone, then the highest one too."""

    title = "Interpolation by depth"

    def refuse(self) -> None:
        """Refuse a model of one layer, where a ramp has no slope."""
        if self.climb.layers < 2:
            raise BadSettings("A model of one layer has no depth to interpolate by. Interpolate as a whole.")

    def search(self) -> dict | None:
        """Return {"alpha": coefficient of the lowest layer, "beta": what the highest has more}."""
        found = self.climb.largest(lambda step: self.climb.along(self._coefficients(step)))
        if found is None:
            return None
        alpha, beta = _ramp(found)
        return {"alpha": alpha, "beta": beta}

    def _coefficients(self, step: float) -> list[float]:
        alpha, beta = _ramp(step)
        return [alpha + beta * layer / (self.climb.layers - 1) for layer in range(self.climb.layers)]


def _ramp(step: float) -> tuple[float, float]:
    """Return (alpha, beta) of a step 0..1: at a half the ramp is steepest, from 0 to 1; no coefficient ever falls."""
    alpha, highest = max(0.0, 2 * step - 1), min(1.0, 2 * step)
    return alpha, highest - alpha
