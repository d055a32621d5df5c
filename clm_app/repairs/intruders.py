"""Weaken intruders: strong directions of the trained weights that are unlike any direction of the version before.

Source: Shuttleworth et al. 2024 (arXiv:2410.21228): a left singular vector among the strongest of the changed weight is
an intruder where its cosine to each one of the weight before is below a half; weakening these costs the new task less
than it gives back. As in PEFT's `reduce_intruder_dimension`, but for full weights too and against the version before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clm_app.errors import BadSettings
from clm_app.repairs._base import Rung

if TYPE_CHECKING:
    from torch import Tensor

STRENGTHS = (0.9, 0.75, 0.5)  # what is left of an intruder; the most that holds is taken
STRONGEST, UNLIKE = 10, 0.5  # PEFT's defaults: directions looked at, and the cosine below which one is an intruder


class Intruders(Rung):
    """What is left of each intruder: as much as the bounds allow."""

    title = "Intruders weakened"

    def search(self) -> dict | None:
        """Return {"strength": share of each intruder that is left, "intruders": how many there are in all weights}.

        Raises:
            BadSettings: no weight has an intruder.
        """
        climb, found, count = self.climb, {}, 0
        climb.pay_for_svd(2)  # of each weight before and after
        for name in climb.matrices:
            found[name], more = intruding(climb.line.weight_before(name), climb.line.step(name))
            count += more
        if not count:
            raise BadSettings("No strong direction of the trained weights is unlike those of the version before.")
        steps = {name: climb.line.step(name) for name in climb.line.names}
        for strength in STRENGTHS:
            climb.put({name: step - (1 - strength) * found.get(name, 0.0) for name, step in steps.items()})
            if not climb.is_learned():
                return None  # what is weaker has learned still less
            if climb.first_broken() is None:
                return {"strength": strength, "intruders": count}
        return None


def intruding(before: Tensor, step: Tensor) -> tuple[Tensor, int]:
    """Return the part of a changed weight that lies in intruding directions, and how many these are.

    before, step: (out, in), float32; the changed weight is their sum.
    """
    import torch

    old = torch.linalg.svd(before, full_matrices=False)[0]
    u, s, v = torch.linalg.svd(before + step, full_matrices=False)
    strongest = u[:, :STRONGEST]
    is_new = (strongest.T @ old).abs().amax(1) < UNLIKE
    places = torch.where(is_new)[0]
    return (u[:, places] * s[places]) @ v[places], len(places)
