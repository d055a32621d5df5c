"""Merge: of what training changed, keep the strongest changes, and none that goes against what was learned before.

Sources: trimming and the election of signs, Yadav et al. 2023 (TIES, arXiv:2306.01708), on whole weight changes and never
on the factors of adapters. Plain task arithmetic of two versions in one line of descent is the line of `interpolate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clm_app.repairs._base import Rung

if TYPE_CHECKING:
    from torch import Tensor


class Merge(Rung):
    """The largest share of the changed weights that may stay."""

    title = "Merge with the version before"

    def search(self) -> dict | None:
        """Return {"density": share of each weight's change that was kept before signs were elected}."""
        line = self.climb.line
        steps = {name: line.step(name) for name in line.names}
        learned = self.climb.learned_since_root()

        def go(density: float) -> None:
            self.climb.put({name: agreeing(step, learned.get(name), density) for name, step in steps.items()})

        density = self.climb.largest(go)
        return None if density is None else {"density": density}


def agreeing(step: Tensor, learned: Tensor | None, density: float) -> Tensor:
    """Return the largest share of a change, but for the entries that a larger opposite change before outvotes.

    learned: what the version before had changed since the root; None: nothing.
    """
    from clm_app.engine.merging import trim

    kept = trim(step, density)
    return kept if learned is None else kept * ((learned + kept).sign() == kept.sign())
