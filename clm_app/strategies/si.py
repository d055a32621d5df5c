"""Synaptic intelligence: each weight counts, while it learns, how much of the fall of the loss was its own doing.

Source: Zenke et al. 2017, arXiv:1703.04200, equations 3 to 5. What is counted is the gradient of the task's loss times
the step that was really taken, which with Adam is not the gradient's; the pull itself is never counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

FILE, IMPORTANCE, ANCHOR = "si.safetensors", "importance/", "anchor/"


class SiSettings(BaseModel):
    """How firmly weights are held, and what a weight that hardly moved may claim."""

    model_config = ConfigDict(extra="forbid")

    strength: float = Field(
        1.0, gt=0, le=1e6, description="this times the squared distance to the old weights, each times its importance "
        "in nats per squared distance, is added to the loss",
    )  # fmt: skip
    damping: float = Field(
        1e-3, gt=0, le=1e3, description="added to the squared distance a weight moved, before its share of the fall of "
        "the loss is divided by it",
    )  # fmt: skip


class Si(Strategy):
    """A spring on every trained parameter, as strong as its share of what was learned with this before.

    Under LoRA the parameters are the adapter's factors, which go on from version to version.
    """

    title = "SI (hold weights that did the work)"
    purpose = (
        "Keeps what was learned with SI before without old rows and without an extra pass; weak where tasks differ much"
    )
    needs = "no old rows; memory for five more copies of the trained parameters, two of them on disk; no extra pass"
    Settings = SiSettings

    def __init__(self, settings: SiSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.importance: dict[str, torch.Tensor] = {}
        self.anchor: dict[str, torch.Tensor] = {}

    def refuse(self, order: Order) -> None:
        """Refuse importances that are of other parameters than this run trains."""
        super().refuse(order)
        if order.state is None:
            return
        from safetensors import safe_open

        from clm_app.engine.effective import refuse_other_shapes, shapes

        with safe_open(order.state / FILE, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(ANCHOR)]  # noqa: SIM118
            found = {name.removeprefix(ANCHOR): tuple(file.get_slice(name).get_shape()) for name in names}
        refuse_other_shapes(found, shapes(order.base, order.adapter if order.method != "full" else None))

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Read importances and old weights, and note where the weights start."""
        from safetensors.torch import load_file

        parameters = _trained(model)
        if engine.order.state:
            state = load_file(engine.order.state / FILE, device=str(engine.device))
            self.importance = {n.removeprefix(IMPORTANCE): t for n, t in state.items() if n.startswith(IMPORTANCE)}
            self.anchor = {n.removeprefix(ANCHOR): t for n, t in state.items() if n.startswith(ANCHOR)}
        self.start = {name: p.detach().clone() for name, p in parameters.items()}
        self.path = {name: start.new_zeros(start.shape) for name, start in self.start.items()}

    def after_backward(self, model: torch.nn.Module) -> None:
        """Note weights and gradients before the step; then add the pull to the gradients, so that it is not counted."""
        self.noted = {}
        for name, p in _trained(model).items():
            if p.grad is not None:
                self.noted[name] = p.detach().clone(), p.grad.clone()
                if name in self.importance:
                    p.grad += 2 * self.settings.strength * self.importance[name] * (p.detach() - self.anchor[name])

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Count for each weight by how much its step has lowered the loss."""
        parameters = _trained(model)
        for name, (before, gradient) in self.noted.items():
            self.path[name] -= gradient * (parameters[name].detach() - before)
        self.noted = {}

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Turn the counts into importances, added to those of earlier tasks, and take the weights as anchor."""
        self.figures["held_tensors"] = len(self.importance)
        for name, p in _trained(model).items():
            moved = (p.detach() - self.start[name]).square()
            found = self.path[name].clamp(min=0) / (moved + self.settings.damping)
            self.importance[name] = found + self.importance.get(name, 0.0)
            self.anchor[name] = p.detach().clone()
        self.figures["path_nats"] = sum(t.sum().item() for t in self.path.values())

    def save(self, folder: Path) -> None:
        """Write importances and weights."""
        from safetensors.torch import save_file

        state = {IMPORTANCE + n: t.contiguous() for n, t in self.importance.items()}
        save_file(state | {ANCHOR + n: t.contiguous() for n, t in self.anchor.items()}, folder / FILE)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what each weight has counted so far."""
        return self.path

    def restore(self, found: dict[str, torch.Tensor]) -> None:
        """Go on counting."""
        for name, counted in found.items():
            self.path[name].copy_(counted)


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters; an adapter's factors by the names they have in its file."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
