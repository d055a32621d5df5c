"""Elastic weight consolidation: hold each weight near its old value, as firmly as it mattered then.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3; one decaying Fisher diagonal for all past tasks, each
scaled alike, after Schwarz et al. 2018, arXiv:1805.06370; under LoRA on the dense change, arXiv:2602.17559. The
gradient is that of the given answer, one row at a time; answers drawn from the model held less (tests' stream: 0.91
instead of 0.25 nats forgotten at strength 1, of 2.99 without).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.data.rows import Row
from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

FILE, FISHER, ANCHOR = "ewc.safetensors", "fisher/", "anchor/"


class EwcSettings(BaseModel):
    """How firmly weights are held, what is measured of their importance, and how long that is remembered."""

    model_config = ConfigDict(extra="forbid")

    strength: float = Field(
        1.0, gt=0, le=1e9, description="half of this times the squared distance to the old weights, each times its "
        "importance (1 on average for a task), is added to the loss, in nats",
    )  # fmt: skip
    gamma: float = Field(
        1.0, ge=0, le=1, description="share of the importance for earlier tasks that is left after a new one, 0..1"
    )
    rows: int = Field(200, ge=1, le=1_000_000, description="most rows of a task that importance is measured on")


class Ewc(Strategy):
    """A spring on every weight, as strong as its Fisher information over all tasks learned with this."""

    title = "EWC (hold weights that mattered)"
    purpose = (
        "Keeps what was learned with EWC before when no old rows may be kept; its strength wants tuning, and it is "
        "surest joined as replay+ewc"
    )
    needs = (
        "no old rows; on disk and in memory two more copies of the tuned weights (under LoRA: of the adapted layers, "
        "dense), and at the end one backward pass for each of `rows` rows"
    )
    methods = ("full", "lora")  # not over 4 bits: importance is the gradient of the weights under the adapter
    Settings = EwcSettings

    def __init__(self, settings: EwcSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.fisher: dict[str, torch.Tensor] = {}  # {name in the base: importance}, of all weights ever tuned with EWC
        self.anchor: dict[str, torch.Tensor] = {}  # {name in the base: the weight, change included}

    def refuse(self, order: Order) -> None:
        """Refuse importances that are of another model's weights."""
        super().refuse(order)
        if order.state is None:
            return
        from safetensors import safe_open

        from clm_app.engine.effective import refuse_other_shapes, shapes

        with safe_open(order.state / FILE, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(FISHER)]  # noqa: SIM118
            found = {name.removeprefix(FISHER): tuple(file.get_slice(name).get_shape()) for name in names}
        refuse_other_shapes(found, shapes(order.base))

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Read importances and old weights; what is held is held where this run tunes it."""
        from safetensors.torch import load_file

        from clm_app.engine.effective import effective, frozen

        if engine.order.state:
            state = load_file(engine.order.state / FILE)
            self.fisher = {n.removeprefix(FISHER): t for n, t in state.items() if n.startswith(FISHER)}
            self.anchor = {n.removeprefix(ANCHOR): t for n, t in state.items() if n.startswith(ANCHOR)}
        now, under = effective(model), frozen(model)
        held = {name: self.anchor[name].to(weight.device) for name, weight in now.items() if name in self.fisher}
        self.then = {name: old - under[name].float() if name in under else old for name, old in held.items()}
        self.importance = {name: self.fisher[name].to(old.device) for name, old in self.then.items()}

    def loss(self, model, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss with the pull of the springs added; none on the first task."""
        if not self.then:
            return loss
        from clm_app.engine.effective import effective, squared_distance

        return loss + self.settings.strength / 2 * squared_distance(effective(model), self.then, self.importance)

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Measure what mattered for the new task, add it to what is left of the old, and take the weights as anchor."""
        from clm_app.engine.effective import fisher, whole

        rng = random.Random(f"{self.seed}/ewc")
        chosen = rng.sample(engine.new, min(self.settings.rows, len(engine.new)))
        was_training = model.training
        model.eval()  # dropout off: otherwise the gradient is not that of the dense change
        found = fisher(model, (negative_log_likelihood(engine, model, row) for row in chosen))
        model.train(was_training)
        mean = sum(t.sum().item() for t in found.values()) / sum(t.numel() for t in found.values())
        self.fisher = {name: self.settings.gamma * old for name, old in self.fisher.items()}
        for name, new in found.items():
            self.fisher[name] = new.cpu() / (mean or 1.0) + self.fisher.get(name, 0.0)
        self.anchor |= whole(model)
        self.figures |= {"held_tensors": len(self.then), "fisher_rows": len(chosen), "fisher_mean": mean}

    def save(self, folder: Path) -> None:
        """Write importances and weights."""
        from safetensors.torch import save_file

        state = {FISHER + n: t.contiguous() for n, t in self.fisher.items()}
        save_file(state | {ANCHOR + n: t.contiguous() for n, t in self.anchor.items()}, folder / FILE)


def negative_log_likelihood(engine: Engine, model: torch.nn.Module, row: Row) -> Callable[[], torch.Tensor]:
    """Return a function that computes the summed nats of a row's answer."""

    def compute() -> torch.Tensor:
        import torch

        from clm_app.engine.batches import IGNORED, answer_logits, tensors

        logits, targets = answer_logits(model, tensors([row], engine.encoded, engine.device))
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    return compute
