"""WiSE-FT repair: after training, go back towards the version before, just as far as no past task is hurt.

Source: Wortsman et al. 2022 (arXiv:2109.01903), weights between two trainings on one line. The objective differs: the
largest step whose cost on each past task stays within a tolerance, in nats on held-out rows. The best average accuracy
would be a degenerate aim: with many past tasks and one new one it is highest where nothing is learned, and accuracies
near 0 or 1 tie, so that the search picks noise. Coefficients by depth: as in LiNeS, Wang et al. 2024 (arXiv:2410.17146).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.data.rows import Row, load
from clm_app.errors import BadSettings
from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

NEW = "new"


class WiseSettings(BaseModel):
    """What may be lost, what must be learned, and how finely is searched."""

    model_config = ConfigDict(extra="forbid")

    tolerance: float = Field(
        0.05, ge=0, le=100, description="most that any past task's held-out loss may rise, nats per answer token"
    )
    least_gain: float = Field(
        0.5, ge=0, le=1, description="least share of what the new task's loss fell by that must be left"
    )
    steps: int = Field(10, ge=1, le=100, description="steps of the line from the version before to the trained weights")
    groups: int = Field(
        1, ge=1, le=3, description="groups of layers, by depth, that are searched apart after all of them together"
    )
    rows: int = Field(200, ge=1, le=1_000_000, description="most held-out rows of a task that the search measures")


class Wise(Strategy):
    """The largest step from the version before towards the trained weights that hurts no past task."""

    title = "WiSE-FT (step back after training)"
    purpose = "A repair without training: gives back what the last steps cost; add it to replay, it cannot stand for it"
    needs = "held-out rows of past tasks, two copies of what is trained in memory, and up to a dozen measurements"
    needs_held_out_rows = True
    methods = ("full", "lora")  # not over 4 bits: a version does not answer over these
    Settings = WiseSettings

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._parent: dict[str, torch.Tensor] = {}

    def refuse(self, order: Order) -> None:
        """Refuse a search without rows of the new task to measure."""
        super().refuse(order)
        if order.held_out and not any(exam.split == "validation" for exam in order.after):
            raise BadSettings(
                "No validation rows of the new task are given, so what it keeps of its learning cannot be measured. "
                "Add a validation exam of it, or choose a strategy without wise."
            )

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Remember the version before, where there is something to protect."""
        if engine.order.held_out:
            self._parent = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Find the coefficients and leave the model with them; without past tasks the trained weights stay."""
        from clm_app.engine.line import Line

        if not self._parent:
            self.figures = {"alpha": [1.0], "searched": False}
            return
        line = Line(model, self._parent, self.settings.groups)
        exams = self._exams(engine)

        def losses(alphas: list[float], of: list[str] | None = None) -> dict[str, float]:
            line.go(alphas)
            return {name: _loss(engine, model, exams[name]) for name in of or exams}

        count, groups = self.settings.steps, self.settings.groups
        before, trained = losses([0.0] * groups), losses([1.0] * groups)
        least = self.settings.least_gain * (before[NEW] - trained[NEW])

        def learns(alphas: list[float]) -> bool:
            return before[NEW] - losses(alphas, [NEW])[NEW] >= least

        def keeps(alphas: list[float]) -> bool:
            allowed = self.settings.tolerance
            return all(losses(alphas, [name])[name] - before[name] <= allowed for name in exams if name != NEW)

        grid = [step / count for step in range(count, -1, -1)]
        alphas = next(([a] * groups for a in grid if keeps([a] * groups) and learns([a] * groups)), None)
        is_kept = alphas is not None
        if alphas is None:
            alphas = next([a] * groups for a in reversed(grid) if learns([a] * groups))
        elif groups > 1:
            alphas = self._by_depth(alphas, grid, lambda tried: keeps(tried) and learns(tried))
        repaired = losses(alphas)
        self.figures = {
            "alpha": alphas, "searched": True, "within_tolerance": is_kept, "rank_residual": line.residual,
            "rows": {name: len(rows) for name, rows in exams.items()},
            "losses": {name: {"before": before[name], "trained": trained[name], "repaired": repaired[name]}
                       for name in exams},
        }  # fmt: skip

    def _by_depth(self, alphas: list[float], grid: list[float], holds) -> list[float]:
        """Raise each group's coefficient as far as the bounds allow, the last layers first: low layers matter most."""
        for group in reversed(range(len(alphas))):
            for higher in grid:
                tried = [*alphas[:group], higher, *alphas[group + 1 :]]
                if higher <= alphas[group] or holds(tried):
                    alphas = tried if higher > alphas[group] else alphas
                    break
        return alphas

    def _exams(self, engine: Engine) -> dict[str, list[Row]]:
        """Return the rows to measure: {"new": of the new task, snapshot id: of a past task}."""
        order = engine.order
        files = {NEW: next(exam.file for exam in order.after if exam.split == "validation")} | order.held_out
        rng = random.Random(f"{self.seed}/wise")
        found = {}
        for name in sorted(files):
            rows = load(files[name])
            found[name] = rng.sample(rows, min(self.settings.rows, len(rows)))
        return found


def _loss(engine: Engine, model: torch.nn.Module, rows: list[Row]) -> float:
    """Return nats per answer token."""
    from clm_app.engine.measure import outcomes

    found = outcomes(model, rows, engine.encoded, engine.device)
    return sum(line["loss"] for line in found) / sum(line["tokens"] for line in found)
