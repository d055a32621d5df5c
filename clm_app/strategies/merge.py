"""Merge the version before with what training made of it, in the space of weight changes since the root.

Sources of the rules: see clm_app/engine/merging.py. Task vectors are taken from the root, as their papers do, so that
"the version before" is itself one change and not the point to measure from. For an adapter the root is the base that it
stands on, since no adapter can change that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.merging import Delta


class MergeSettings(BaseModel):
    """The rule, and how much each side counts."""

    model_config = ConfigDict(extra="forbid")

    how: Literal["linear", "ties", "dare", "slerp", "max"] = Field(
        "linear", description="linear: weighted mean; ties: trim and elect signs; dare: drop by lot and rescale; "
        "slerp: along the arc; max: the larger change wins",
    )  # fmt: skip
    weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="how much the trained weights count, the version before counts the rest; not in max",
    )
    density: float = Field(
        0.5, gt=0, le=1, description="share of each change that ties keeps and dare does not drop; not in the others"
    )


class Merge(Strategy):
    """Training as usual, and then one set of weights out of the version before and the trained one."""

    title = "Merge with the version before"
    purpose = "Softens forgetting without old rows, and learning with it; the gate shows what is left of both"
    needs = "no old rows; with method full two more copies of the weights in memory, with lora next to nothing"
    promise = (
        "is exactly the chosen rule between the version before and the trained one, which gives up learning as well as "
        "forgetting (test_merge_leaves_the_merged_change_of_what_training_alone_would_leave)"
    )
    Settings = MergeSettings

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._parent: dict[str, torch.Tensor] = {}

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Remember the version before."""
        self._parent = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Merge, unless nothing was learned before: then there is nothing to merge with."""
        from clm_app.engine.merging import lora_layers

        self.figures = {"merged": engine.order.has_learned}
        if not engine.order.has_learned:
            return
        if layers := lora_layers(model):
            self._merge_adapters(model, layers)
        else:
            self._merge_weights(model, engine.order.root or engine.order.base)

    def _merge_weights(self, model: torch.nn.Module, root: Path) -> None:
        """Write root + merged change into every weight."""
        import torch
        from transformers import AutoModelForCausalLM

        roots = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, local_files_only=True).state_dict()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, trained in model.named_parameters():
                if name in self._parent:
                    first = roots[name]
                    changes = [{name: self._parent[name] - first}, {name: trained.detach().cpu() - first}]
                    trained.copy_(first + self._merged(changes, generator)[name])

    def _merge_adapters(self, model: torch.nn.Module, layers: dict) -> None:
        """Write the nearest adapter of the same rank to the merged change."""
        import torch

        from clm_app.engine.merging import as_lora, factors

        before = factors(self._parent)
        if not any(b.any() for _, b in before.values()):
            self.figures = {"merged": False}
            return
        generator, lost, total = torch.Generator().manual_seed(self.seed), 0.0, 0.0
        with torch.no_grad():
            for name, layer in layers.items():
                a, b = (part.to(layer.a.device) for part in before[name])
                changes = [{name: layer.scale * (b @ a)}, {name: layer.scale * (layer.b @ layer.a)}]
                merged = self._merged(changes, generator)[name]
                a, b, residual = as_lora(merged / layer.scale, layer.a.shape[0])
                layer.a.copy_(a)
                layer.b.copy_(b)
                size = merged.norm().item() ** 2
                lost, total = lost + residual**2 * size, total + size
        self.figures["residual_share"] = math.sqrt(lost / total) if total else 0.0

    def _merged(self, changes: list[Delta], generator: torch.Generator) -> Delta:
        """Return the merged change of [version before, trained]."""
        from clm_app.engine import merging

        weight, density = self.settings.weight, self.settings.density
        rules = {
            "linear": lambda: merging.linear(changes, [1 - weight, weight]),
            "ties": lambda: merging.ties(changes, density, [1 - weight, weight]),
            "dare": lambda: merging.dare(changes, [1 - weight, weight], density, generator),
            "slerp": lambda: merging.slerp(*changes, weight),
            "max": lambda: merging.largest(changes),
        }
        return rules[self.settings.how]()
