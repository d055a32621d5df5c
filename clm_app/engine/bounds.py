"""What each set of weights makes of a row, asked once; and whether a place keeps every past task within its bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from clm_app.data.rows import Row
from clm_app.engine.measure import outcomes
from clm_app.engine.routed import Routed
from clm_app.judging import paired
from clm_app.judging.gate import CLIPPED
from clm_app.routes import BASE, Router

if TYPE_CHECKING:
    from clm_app.engine.line import Line
    from clm_app.engine.loop import Engine

BEFORE, TRAINED = "before", "trained"  # sources of an answer; of a routed version each past task's name is one, too
CHUNK = 50  # rows after which a bound is looked at: one that is broken already needs no more

Pairs = Callable[[list[Row]], list[tuple[dict, dict]]]  # each row's outcome with the version before, and at a place
UNCHANGED = ({"loss": 0.0, "tokens": 1, "exact": False},) * 2  # of a row that the same weights answer at both


class Answers:
    """Outcomes by source and item. A source is a set of weights that answers a prompt."""

    def __init__(self, engine: Engine, model: torch.nn.Module, line: Callable[[], Line | None]) -> None:
        """model: what answers as the candidate does. line: gives the line through both versions, None where there is none."""
        self.engine, self.model, self.line, self.task = engine, model, line, engine.order.task
        self.is_routed = isinstance(model, Routed)
        self.known: dict[str, dict[str, dict]] = {}
        self.tokens = 0  # read so far

    def of(self, source: str, rows: list[Row]) -> list[dict]:
        """Return what a source makes of each row, in order; asks for what is not known."""
        known = self.known.setdefault(source, {})
        if missing := [row for row in rows if row.key not in known]:
            known |= {line["item"]: line for line in self._asked(source, missing)}
        return [known[row.key] for row in rows]

    def now(self, rows: list[Row]) -> list[dict]:
        """Return what the model makes of each row with the weights it has at this moment."""
        return self._through(self.model, rows)

    def know(self, lines: Iterable[dict], is_before: bool) -> None:
        """Take what was measured already. is_before: with the version before; else with the candidate."""
        for line in lines:
            source = line.get("route", BEFORE if is_before else TRAINED)
            if not is_before and self.is_routed:
                if source != self.task:
                    continue  # of a task whose weights the candidate may have trained on
                source = TRAINED
            self.known.setdefault(source, {})[line["item"]] = line

    def source(self, task: str) -> str:
        """Return who answers a prompt that is routed to a task, where the new one has weights of its own."""
        if task == self.task:
            return TRAINED
        return task if self.is_routed or task == BASE else BEFORE

    def source_before(self, row: Row) -> str:
        """Return who answers a row in the version before."""
        if not self.is_routed:
            return BEFORE
        if row.key not in self._routes:
            self._routes[row.key] = self._router.route(row.prompt)
        return self._routes[row.key]

    def pairs(self, rows: list[Row], sources: list[str]) -> list[tuple[dict, dict]]:
        """Return each row's outcome with the version before, and as its source answers it."""
        before = self._grouped(rows, [self.source_before(row) for row in rows])
        return list(zip(before, self._grouped(rows, sources), strict=True))

    def _grouped(self, rows: list[Row], sources: list[str]) -> list[dict]:
        for source in dict.fromkeys(sources):
            self.of(source, [row for row, other in zip(rows, sources, strict=True) if other == source])
        return [self.known[source][row.key] for row, source in zip(rows, sources, strict=True)]

    @cached_property
    def _routes(self) -> dict[str, str]:
        return {}

    @cached_property
    def _router(self) -> Router:
        return Router.load(self.engine.order.adapter)

    @cached_property
    def _parent(self) -> torch.nn.Module:
        return self.engine.parent(self.engine.spare)

    @cached_property
    def _bare(self) -> torch.nn.Module:
        return self.engine.load_base().to(self.engine.spare)

    def _asked(self, source: str, rows: list[Row]) -> list[dict]:
        if source == BASE:
            return self._through(self._bare, rows)
        if self.is_routed:
            routed, task = (self.model, self.task) if source == TRAINED else (self._parent, source)
            with routed.using(task) as answering:
                return self._through(answering, rows)
        if line := self.line():
            line.go([float(source == TRAINED)] * line.groups)
            return self.now(rows)
        return self._through(self.model if source == TRAINED else self._parent, rows)

    def _through(self, model: torch.nn.Module, rows: list[Row]) -> list[dict]:
        self.tokens += sum(len(prompt) + len(answer) for prompt, answer in map(self.engine.encoded, rows))
        return outcomes(model, rows, self.engine.encoded, next(model.parameters()).device)


class Bound(NamedTuple):
    """What a past task loses at a place: the rise of its loss, in nats per answer token and clipped as the gate does."""

    items: int
    mean: float
    lower: float
    upper: float
    lost: float  # share of its answers that were right and are wrong, less those that turned right


class HeldOut:
    """Validation rows of every task, and what a place has to hold on them."""

    def __init__(self, rows: dict[str, list[Row]], new: str, tolerance: float, margin: float, alpha: float) -> None:
        """rows: of the past tasks and the new one. tolerance: most that an upper 1 - alpha bound of a rise may be; margin:
        most that the share of right answers may fall."""
        self.rows, self.new, self.tolerance, self.margin, self.alpha = rows, new, tolerance, margin, alpha
        self.bounds: dict[str, Bound] = {}  # of the place looked at last
        self.left = 0.0  # share of what was learned that is left at it

    def first_broken(self, pairs: Pairs, tasks: list[str], rows: dict[str, list[Row]]) -> str | None:
        """Return the first of the tasks whose bound does not hold at a place; None where all hold."""
        return next((task for task in tasks if not self._holds(task, pairs, rows[task])), None)

    def _holds(self, task: str, pairs: Pairs, rows: list[Row]) -> bool:
        """Say whether a task's loss and its right answers are kept; the loss is the finer measure, but not the whole."""
        found: list[tuple[dict, dict]] = []
        for start in range(0, len(rows), CHUNK):
            found += pairs(rows[start : start + CHUNK])
            rises = [max(-CLIPPED, min(CLIPPED, per_token(now) - per_token(then))) for then, now in found]
            lost = sum(then["exact"] - now["exact"] for then, now in found) / len(found)
            bound = self.bounds[task] = Bound(len(found), *paired.mean_bound(rises, self.alpha), lost)
            if bound.lower > self.tolerance:
                return False
        return bool(found) and bound.upper <= self.tolerance and bound.lost <= self.margin

    def gain_left(self, pairs: Pairs, trained: Pairs, most_rows: int | None = None) -> float:
        """Return the share of what was learned that is left at a place: of the fall of the loss or of the answers that
        turned right, whichever is less; 0 where nothing was learned. most_rows: for a first look."""
        rows = self.rows[self.new][:most_rows]
        shares = [left / whole if whole > 0 else 0.0 for left, whole in zip(_gain(pairs(rows)), _gain(trained(rows)), strict=True)
                  if whole]  # fmt: skip
        self.left = min(shares, default=0.0)
        return self.left


def _gain(pairs: list[tuple[dict, dict]]) -> tuple[float, int]:
    """Return (sum over rows of the fall of nats per answer token, how many more answers are right)."""
    return sum(per_token(then) - per_token(now) for then, now in pairs), sum(
        now["exact"] - then["exact"] for then, now in pairs
    )


def per_token(line: dict) -> float:
    """Return nats per answer token of an outcome."""
    return line["loss"] / max(line["tokens"], 1)
