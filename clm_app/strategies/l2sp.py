"""L2-SP: hold every weight near where the version before had it, all of them equally firmly.

Source: Li et al. 2018, arXiv:1802.01483, equation 2, with the version before as the starting point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine


class L2spSettings(BaseModel):
    """How firmly weights are held."""

    model_config = ConfigDict(extra="forbid")

    strength: float = Field(
        0.3, gt=0, le=1e6, description="half of this times the squared distance to the old weights is added to the "
        "loss, in nats",
    )  # fmt: skip


class L2sp(Strategy):
    """A spring of one strength on every weight; under LoRA on the dense change of each layer."""

    title = "L2-SP (hold all weights)"
    purpose = (
        "Keeps a version close to the one before when nothing at all may be stored; learns the new task more slowly"
    )
    needs = (
        "no old rows; memory for one more copy of the tuned weights (under LoRA: of the adapted layers), a little time"
    )
    promise = (
        "halves how far the weights move, and under an adapter saves a third to a half of what would be forgotten "
        "(test_l2sp_stays_twice_as_near_to_the_version_before)"
    )
    Settings = L2spSettings

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Copy the weights of the version before."""
        from clm_app.engine.effective import effective

        self.start = {name: weight.detach().float().clone() for name, weight in effective(model).items()}

    def loss(self, model, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss with half of `strength` times the squared distance added."""
        from clm_app.engine.effective import effective, squared_distance

        return loss + self.settings.strength / 2 * squared_distance(effective(model), self.start)

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Say how far the weights have moved."""
        from clm_app.engine.effective import effective, squared_distance

        self.figures["distance"] = squared_distance(effective(model), self.start).sqrt().item()
