"""Slow weights: the version is the moving average of the weights that training went through, from the old ones on.

Source: averaging towards the version before is the best simple trade of old against new in Lin et al. 2023
(arXiv:2309.06256); as a moving average over steps in Dziadzio et al. 2024 (arXiv:2412.06712).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine


class EmaSettings(BaseModel):
    """How slow the average is."""

    model_config = ConfigDict(extra="forbid")

    decay: float = Field(
        0.98, ge=0, lt=1, description="share of the average that stays at each step, 0..1; the weights of the version "
        "before are left in it with decay to the power of the steps",
    )  # fmt: skip


class Ema(Strategy):
    """The average starts at the version before, and is written in place of the last weights.

    Under LoRA each factor is averaged by itself: the best that one adapter of the same rank can hold cheaply.
    """

    title = "EMA (slow weights)"
    purpose = "Smooths an update and leaves part of the version before in it; a gentle help, best joined as replay+ema"
    needs = "no old rows; memory for one more copy of the trained parameters; no extra time"
    promise = (
        "leaves a known share of the version before in the weights, which halves nothing by itself "
        "(test_ema_writes_the_average_from_the_old_weights_on)"
    )
    Settings = EmaSettings

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Begin at the version before."""
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Move the average towards the weights."""
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.average[name].lerp_(p.detach(), 1 - self.settings.decay)

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Write the average into the model."""
        self.figures["old_share"] = self.settings.decay**engine.steps
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(self.average[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the average so far."""
        return self.average

    def restore(self, found: dict[str, torch.Tensor]) -> None:
        """Go on averaging."""
        for name, average in found.items():
            self.average[name].copy_(average)
