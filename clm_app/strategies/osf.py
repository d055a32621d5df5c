"""OSF: in each weight matrix the directions that matter most are frozen, and the new task learns in the rest.

Source: Nayak et al. 2025 (arXiv:2504.07097) as PEFT ships it (OSFConfig): a singular value decomposition of each linear
weight, its upper part frozen, the gradient of the lower part projected away from it; embeddings, norms and the output
layer are frozen whole. Two things are done here that PEFT leaves open. Its projection ends at the gradient, and Adam
scales each entry apart, so that a seventh of a layer's change went into the frozen directions (tests/test_osf.py sees
it): the factors are projected once more after each step. And its `unload`, which its guide calls between tasks, drops what
was learned: weights are merged. Its advice for the rate, 1e-5 to 1e-4, is what method full takes at the same width.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.errors import BadSettings
from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft.tuners.osf import OSFLayer

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

FILE, NAME = "osf.json", "default"  # {"tasks": names of the tasks learned}; PEFT's name of what is trained


class OsfSettings(BaseModel):
    """How much of each matrix is frozen, and how that grows with the tasks."""

    model_config = ConfigDict(extra="forbid")

    first_share: float = Field(
        0.0, ge=0, lt=1, description="share of each matrix's directions frozen before anything was learned, to keep what "
        "the base knows; 0 tunes every weight of the first task, as method full does",
    )  # fmt: skip
    share_per_task: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the directions frozen on top for each task learned; 1/n for n tasks in all",
    )
    most_share: float = Field(
        0.9, gt=0, lt=1, description="largest share that is ever frozen, so that something is left to learn with"
    )


class Osf(Strategy):
    """Full tuning inside a subspace that shrinks with each task; a version is an ordinary whole model."""

    title = "OSF (orthogonal subspace)"
    purpose = "Full tuning that leaves the strongest directions of each matrix alone, where no rows may be kept"
    needs = (
        "no old rows; 2.6 times the memory of full tuning while a tenth is frozen, 1.8 times at a half; two to three "
        "times the time"
    )
    methods = ("full",)
    promise = (
        "Frozen directions stay to float tolerance; it halves forgetting where share_per_task is 1/n for n tasks "
        "(test_it_halves_forgetting_where_the_share_per_task_is_one_part_of_the_tasks)"
    )
    Settings = OsfSettings

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._learned: set[str] = set()
        self._tuner, self._task = None, ""
        self._held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []  # U, V, frozen U, frozen V

    def refuse(self, order: Order) -> None:
        """Refuse another way to tune, weights of few bits, a partner that holds weights, and a state without a count."""
        super().refuse(order)
        if order.method not in self.methods:
            raise BadSettings(
                f"OSF tunes the weights themselves, and method {order.method} freezes them. Choose method full, or "
                "strategy olora, which keeps the ranks of an adapter apart."
            )
        config = json.loads((order.base / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            way = config["quantization_config"].get("quant_method", "few bits")
            raise BadSettings(
                f"The weights in {order.base} are quantised ({way}), and OSF has to decompose plain ones. Choose the same "
                "model in full precision, or method lora with another strategy."
            )
        if alone := [part for part in _partners(order.strategy) if part.mix is Strategy.mix]:
            raise BadSettings(
                f"{alone[0].name} looks at the plain weights or outputs of a run, which OSF splits in two while it trains. "
                "Join OSF with a strategy that chooses rows, such as replay+osf."
            )
        if order.state and not (order.state / FILE).exists():
            raise BadSettings(
                f"{order.state} holds no {FILE}, which a run of this strategy leaves. Start from a version that was "
                "learned with it, or from one that was not."
            )

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Split every linear layer in place; what is trained from here on is the lower part of each."""
        order, self._task = engine.order, engine.order.task
        self._learned = set(order.learned)
        if order.state:
            self._learned |= set(json.loads((order.state / FILE).read_text(encoding="utf-8"))["tasks"])
        learned, knobs = max(len(self._learned), order.has_learned), self.settings
        share = min(knobs.most_share, knobs.first_share + knobs.share_per_task * learned)
        self.figures = {"learned_tasks": learned, "frozen_share": share, "frozen_directions": 0}
        if share:
            self._split(model, share)

    def _split(self, model: torch.nn.Module, share: float) -> None:
        """Put PEFT's layers over all linear ones, and note what each may not leave."""
        from peft import OSFConfig
        from peft.tuners.osf import OSFLayer, OSFModel

        try:
            self._tuner = OSFModel(model, {NAME: OSFConfig(effective_rank=share, target_modules="all-linear")}, NAME)
        except ValueError as err:
            raise BadSettings(
                f"A share of {share:g} freezes no direction at all in one of the model's matrices, or it has none that is a "
                f"plain linear layer ({err}). Choose a larger share_per_task, or strategy replay."
            ) from err
        layers = [module for module in model.modules() if isinstance(module, OSFLayer)]
        for layer in layers:
            factors = layer.osf_svd_params[NAME]
            self._held.append((factors["U_low"], factors["V_low"], *_frozen(layer)))
            self.figures["frozen_directions"] += layer.effective_rank[NAME]

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Take out of the factors what the optimiser has moved into the frozen directions."""
        import torch

        with torch.no_grad():
            for left, right, frozen_left, frozen_right in self._held:
                left -= frozen_left @ (frozen_left.T @ left)
                right -= (right @ frozen_right.T) @ frozen_right

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Merge both parts into plain weights, so that an ordinary whole model is measured and written."""
        if self._tuner is None:
            return
        from peft.tuners.osf import OSFLayer

        weights = [module.get_base_layer().weight for module in model.modules() if isinstance(module, OSFLayer)]
        self._tuner.merge_and_unload()
        for weight in weights:
            weight.requires_grad_(True)  # what has been tuned, for whoever counts it
        self._tuner, self._held = None, []

    def save(self, folder: Path) -> None:
        """Write which tasks are learned now: a task that comes again freezes no more than before."""
        tasks = sorted(self._learned | {self._task})
        (folder / FILE).write_text(json.dumps({"tasks": tasks}), encoding="utf-8")


def _partners(strategy: str) -> list[type[Strategy]]:
    """Return the classes of what is joined with OSF in one run."""
    from clm_app.strategies._combined import JOINER, part_of

    names = [name.strip() for name in strategy.split(JOINER)]
    return [part_of(name) for name in names if name != Osf.name]


def _frozen(layer: OSFLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return orthonormal bases of what is frozen: columns (out, rank) and rows (rank, in).

    PEFT stores the one of the longer side alone; the other is what the lower part leaves of a square matrix.
    """
    import torch

    def rest(columns: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(columns, mode="complete").Q[:, columns.shape[1] :].contiguous()

    left, right = layer._osf_U_high, layer._osf_V_high
    return (
        left[NAME] if NAME in left else rest(layer._osf_U_low_init[NAME]),
        right[NAME] if NAME in right else rest(layer._osf_V_low_init[NAME].T).T.contiguous(),
    )
