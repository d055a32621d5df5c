"""The weights between two trainings: a place on the line from the version before to the trained weights, layer by layer.

Source: Wortsman et al. 2022 (WiSE-FT, arXiv:2109.01903); coefficients by depth as in LiNeS, Wang et al. 2024
(arXiv:2410.17146). Under LoRA the line is one of whole changes, since the factors of two adapters do not add up: exact
where nothing was learned before, for then B alone is scaled; else the nearest change that the adapter's rank can hold.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from clm_app.engine.merging import DEFAULT, PREFIX, as_lora, as_lower_rank, factors, lora_layers


class Line:
    """The weights between the version before (0) and the trained ones (1), with one coefficient for each group."""

    def __init__(self, model: torch.nn.Module, before: dict[str, Tensor], groups: int) -> None:
        """before: {name of each parameter that was trained: its value in the version before}."""
        self.residual = 0.0  # share of an adapter's change that its rank could not hold at the last place
        self.parameters = {n: p for n, p in model.named_parameters() if n in before}
        self.before = before
        self.trained = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
        self.layers = lora_layers(model)
        self.bases = {name: model.get_submodule(_module(name)).get_base_layer().weight for name in self.layers}
        self.names = list(self.layers or self.parameters)
        self.divide(groups)
        if self.layers:
            first, last = factors(before), factors(self.trained)
            self.pairs = {name: (first[name], last[name]) for name in self.layers}

    def divide(self, groups: int) -> None:
        """Give so many groups of layers, by depth, a coefficient each."""
        self.groups, self.at = groups, []
        self.group = dict(zip(self.names, by_depth(self.names, groups), strict=True))

    def go(self, alphas: list[float]) -> None:
        """Set the model's weights to this place of the line."""
        if alphas == self.at:
            return
        self.at = list(alphas)
        with torch.no_grad():
            if self.layers:
                self._go_adapter(alphas)
                return
            for name, parameter in self.parameters.items():
                alpha = alphas[self.group[name]]
                parameter.copy_(torch.lerp(self.before[name], self.trained[name], alpha))

    def _go_adapter(self, alphas: list[float]) -> None:
        """Set each layer to the nearest adapter of its rank; exact at both ends, and where there was none before."""
        held = _Held()
        for name, layer in self.layers.items():
            alpha = alphas[self.group[name]]
            (a0, b0), (a1, b1) = ((a.to(layer.a.device), b.to(layer.a.device)) for a, b in self.pairs[name])
            if alpha in (0.0, 1.0) and a0.shape == a1.shape:
                a, b = (a1, b1) if alpha else (a0, b0)
                held.add_whole(a, b)
            elif not b0.any():
                a, b = a1, alpha * b1
                held.add_whole(a, b)
            else:
                both = torch.cat([a0, a1]), torch.cat([(1 - alpha) * b0, alpha * b1], 1)
                a, b, residual = as_lower_rank(*both, rank=layer.a.shape[0])
                held.add(a, residual)
            layer.a.copy_(a)
            layer.b.copy_(b)
        self.residual = held.residual

    # --- beside the line ----------------------------------------------------------------------------------------------

    def step(self, name: str) -> Tensor:
        """Return what training added to a weight, dense and in its own shape."""
        if not self.layers:
            return self.trained[name] - self.before[name]
        (a0, b0), (a1, b1) = self.pairs[name]
        return self.layers[name].scale * (b1 @ a1 - b0 @ a0)

    def learned_before(self, name: str) -> Tensor:
        """Return what the adapter of the version before adds to a weight, dense; of full weights nothing can be told."""
        a, b = self.pairs[name][0]
        return self.layers[name].scale * (b @ a)

    def weight_before(self, name: str) -> Tensor:
        """Return a weight as the version before computes with it."""
        if not self.layers:
            return self.before[name]
        return self.bases[name].detach().cpu().float() + self.learned_before(name)

    def put(self, steps: dict[str, Tensor]) -> None:
        """Set each weight to that of the version before plus a step of its own, as near as an adapter's rank can hold it."""
        self.at, held = [], _Held()
        with torch.no_grad():
            for name, step in steps.items():
                if not self.layers:
                    self.parameters[name].copy_(self.before[name] + step)
                    continue
                layer = self.layers[name]
                a, b, residual = as_lora((self.learned_before(name) + step) / layer.scale, layer.a.shape[0])
                held.add(a, residual)
                layer.a.copy_(a)
                layer.b.copy_(b)
        self.residual = held.residual


class _Held:
    """How much of all changes the ranks could not hold, as a share of their norm."""

    def __init__(self) -> None:
        self.lost = self.total = 0.0

    def add_whole(self, a: Tensor, b: Tensor) -> None:
        """Count one layer that lost nothing."""
        self.total += ((a @ a.T) * (b.T @ b)).sum().item()

    def add(self, a: Tensor, residual: float) -> None:
        """Count one layer. a: its first factor, which holds half of the product as the second does."""
        kept = a.square().sum(1).square().sum().item()
        if residual < 1:
            self.lost += kept * residual**2 / (1 - residual**2)
            self.total += kept / (1 - residual**2)

    @property
    def residual(self) -> float:
        """0..1."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0


def adapter_before(layers: dict, pairs: dict[str, tuple[Tensor, Tensor]] | None) -> dict[str, Tensor]:
    """Return the parameters of a version's adapter by the names they have in a model of these layers.

    pairs: its factors by the name of the weight, as an adapter folder gives them; None: it had no adapter, so that
    nothing is added to any layer.
    """
    found = {}
    for name, layer in layers.items():
        a, b = pairs[name] if pairs else (layer.a.detach().cpu(), torch.zeros_like(layer.b, device="cpu"))
        for factor, value in (("A", a), ("B", b)):
            found[f"{PREFIX}{name.removesuffix('.weight')}.lora_{factor}.{DEFAULT}.weight"] = value
    return found


def depth(names: list[str]) -> int:
    """Return how many layers there are by the names of their weights; at least 1."""
    return 1 + max((int(found.group(1)) for name in names if (found := _LAYER.search(name))), default=0)


def by_depth(names: list[str], groups: int) -> list[int]:
    """Return each weight's group by depth: what lies before the layers is in the first, what follows in the last."""
    depths = [int(found.group(1)) if (found := _LAYER.search(name)) else None for name in names]
    layers, found, is_past_layers = depth(names), [], False
    for place in depths:
        is_past_layers |= place is not None
        found.append(place * groups // layers if place is not None else (groups - 1) * is_past_layers)
    return found


_LAYER = re.compile(r"\.(\d+)\.")


def _module(name: str) -> str:
    return PREFIX + name.removesuffix(".weight")
