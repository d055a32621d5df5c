"""Learning without forgetting: on the new prompts, answer much as the version before would have answered.

Source: Li & Hoiem 2016, arXiv:1606.09282, with the softened targets of Hinton et al. 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine


class LwfSettings(BaseModel):
    """How much the version before has to say, and how softly."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(
        1.0, gt=0, le=1000, description="this times the divergence from the version before, in nats per answer token "
        "of the new rows, is added to the loss",
    )  # fmt: skip
    temperature: float = Field(
        2.0, ge=0.1, le=100, description="both distributions are softened by this before they are compared; above 1, "
        "unlikely tokens count for more",
    )  # fmt: skip


class Lwf(Strategy):
    """Distillation from the version before on the new rows alone; before anything was learned, from the base."""

    title = "LwF (distil the version before)"
    purpose = (
        "Keeps habits that show on the new prompts when no old rows may be kept; prompts unlike the new ones are "
        "not held"
    )
    needs = "no old rows; memory for the version before beside the new one, and a third more time for its answers"
    needs_parent = True
    promise = (
        "halves how far answers to the new prompts move from the version before, and holds no others "
        "(test_lwf_stays_twice_as_near_to_the_version_before_on_the_new_prompts)"
    )
    Settings = LwfSettings

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Load the version before."""
        self.teacher = engine.parent()

    def loss(self, model, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss with `weight` times the divergence from the teacher on the new rows' answers added."""
        import torch

        from clm_app.engine.batches import IGNORED, answer_logits

        is_new = torch.tensor([source == "new" for source, _ in batch["rows"]], device=targets.device)
        here = (targets != IGNORED) & is_new[:, None]
        if not here.any():
            return loss
        with torch.no_grad():
            theirs, _ = answer_logits(self.teacher, batch)
        return loss + self.settings.weight * divergence(theirs[here], logits[here], self.settings.temperature)


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return KL(teacher || student) in nats, the mean over rows of logits (positions, vocabulary).

    It is multiplied by the square of the temperature, so that gradients stay as large whatever the temperature.
    """
    then, now = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher, student))
    return (then.exp() * (then - now)).sum(-1).mean() * temperature**2
