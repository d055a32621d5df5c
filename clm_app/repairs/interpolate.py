"""Interpolate: go back from the trained weights towards the version before, all layers alike, as far as it takes.

Source: Wortsman et al. 2022 (WiSE-FT, arXiv:2109.01903). Under LoRA with nothing learned before, this scales the adapter.
"""

from __future__ import annotations

from clm_app.repairs._base import Rung


class Interpolate(Rung):
    """The largest coefficient of the line between both versions."""

    title = "Interpolation"

    def search(self) -> dict | None:
        """Return {"alpha": share of the way from the version before (0) to the trained weights (1)}."""
        alpha = self.climb.largest(lambda step: self.climb.along([step] * self.climb.layers))
        return None if alpha is None else {"alpha": alpha}
