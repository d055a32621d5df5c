"""Several strategies in one run: "replay+ewc" rehearses and holds weights at once; their moments follow one another."""

from __future__ import annotations

import random
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, create_model

from clm_app.catalog import pick
from clm_app.data.rows import Row
from clm_app.errors import BadSettings
from clm_app.strategies._base import Choice, Situation, Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

SHELF, JOINER = "clm_app.strategies", "+"


def made(name: str, settings: dict, seed: int) -> Strategy:
    """Return the strategy of this name, or several joined by "+"; the settings of several are {name: {knob: value}}.

    Raises:
        BadSettings: an unknown name, one named twice, or two that cannot work together.
    """
    cls = part_of(name)
    return cls(cls.Settings(**settings), seed)


def choose(name: str, settings: dict, situation: Situation) -> Choice:
    """Return what shall do the work when this was asked for: the same, unless it is auto."""
    cls = part_of(name)
    chosen = cls.choose(situation, cls.Settings(**settings))
    return chosen if chosen.why else Choice(name, settings, "")


def part_of(name: str) -> type[Strategy]:
    """Return the class of a strategy, or a class made of several that are joined by "+"."""
    names = [part.strip() for part in name.split(JOINER)]
    parts = [pick(SHELF, part) for part in names]
    if len(parts) == 1:
        return parts[0]
    if len(set(names)) < len(names):
        raise BadSettings(f"{name!r} names one strategy twice. Name each once.")
    if alone := [
        part.name for part in parts if part.weights_kind or part.choose.__func__ is not Strategy.choose.__func__
    ]:
        raise BadSettings(f"{alone[0]} decides how a version is built and works alone. Choose it without {JOINER}.")
    mixing = [part.name for part in parts if part.mix is not Strategy.mix]
    if len(mixing) > 1:
        raise BadSettings(f"{' and '.join(mixing)} both decide which rows are trained. Choose one of them.")
    methods = tuple(m for m in parts[0].methods if all(m in part.methods for part in parts))
    if not methods:
        raise BadSettings(f"No way to tune suits all of {', '.join(names)}. Choose others.")
    knobs = create_model(
        "CombinedSettings", __config__={"extra": "forbid"},
        **{part.name: (part.Settings, part.Settings()) for part in parts},
    )  # fmt: skip
    return type("Combined", (Combined,), {
        "name": name, "parts": tuple(parts), "Settings": knobs, "methods": methods,
        "title": " + ".join(part.title for part in parts), "needs": "; ".join(part.needs for part in parts),
        **{flag: any(getattr(part, flag) for part in parts) for flag in
           ("needs_old_rows", "needs_held_out_rows", "needs_parent")},
    })  # fmt: skip


class Combined(Strategy):
    """Each moment of the parts in the order they were named."""

    parts: tuple[type[Strategy], ...] = ()

    def __init__(self, settings: BaseModel, seed: int) -> None:
        super().__init__(settings, seed)
        self.all = [part(getattr(settings, part.name), seed) for part in self.parts]

    def refuse(self, order: Order) -> None:
        """Refuse what any part refuses."""
        for part in self.all:
            part.refuse(self._own(order, part))

    def _own(self, order: Order, part: Strategy) -> Order:
        """Return the order as one part sees it: with its own folder of state."""
        state = order.state / part.name if order.state else None
        return order.model_copy(update={"state": state if state and state.exists() else None})

    def begin_from(self, order: Order) -> Path | None:
        """Return where the one part begins that has a say in it, else at the parent's adapter."""
        deciding = next((part for part in self.all if type(part).begin_from is not Strategy.begin_from), self.all[0])
        return deciding.begin_from(order)

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Prepare each part, each with its own state."""
        whole = engine.order
        for part in self.all:
            engine.order = self._own(whole, part)
            part.prepare(engine, model)
        engine.order = whole

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the mix of the one part that mixes."""
        mixing = next((part for part in self.all if type(part).mix is not Strategy.mix), self.all[0])
        return mixing.mix(new, kept, rng)

    def retarget(self, source: str, row: Row) -> Row:
        """Let each part replace the row that the one before it left."""
        return reduce(lambda found, part: part.retarget(source, found), self.all, row)

    def loss(self, model, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Let each part change the loss that the one before it left."""
        return reduce(lambda found, part: part.loss(model, batch, logits, targets, found), self.all, loss)

    def after_backward(self, model: torch.nn.Module) -> None:
        """Let each part see the gradients."""
        for part in self.all:
            part.after_backward(model)

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Let each part see the weights."""
        for part in self.all:
            part.after_step(model, step)

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Let each part change the weights."""
        for part in self.all:
            part.finish(engine, model)
        self.figures = {part.name: part.figures for part in self.all if part.figures}

    def assemble(self, engine: Engine, weights: Path) -> None:
        """Let each part change the folder of written weights."""
        for part in self.all:
            part.assemble(engine, weights)
        self.figures = {part.name: part.figures for part in self.all if part.figures}

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return all rows that a part wants to keep, each once."""
        kept = [row for part in self.all for row in part.keep(new, random.Random(rng.random()))]
        return list(dict.fromkeys(kept))

    def save(self, folder: Path) -> None:
        """Let each part write into a folder of its own."""
        for part in self.all:
            (folder / part.name).mkdir()
            part.save(folder / part.name)
            if not any((folder / part.name).iterdir()):
                (folder / part.name).rmdir()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of all parts, each under its part's name."""
        return {f"{part.name}/{name}": t for part in self.all for name, t in part.tensors().items()}

    def restore(self, found: dict[str, torch.Tensor]) -> None:
        """Give each part its own tensors back."""
        for part in self.all:
            ours = {n.removeprefix(f"{part.name}/"): t for n, t in found.items() if n.startswith(f"{part.name}/")}
            if ours:
                part.restore(ours)
