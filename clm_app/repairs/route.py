"""Route: keep both sets of weights; the new ones answer the new task's prompts alone, and a router tells which these are.

What can still be lost is what the router confuses, so it is held back from the new task by the smallest bias with which
the past tasks keep their prompts. A candidate that is routed already gets weights of its own where it shared some, and
the same bias. Almost nothing is computed: a row's answer is one of two that are known.
"""

from __future__ import annotations

import bisect
import math
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from clm_app.data.rows import Row, load
from clm_app.errors import BadSettings
from clm_app.repairs._base import Rung
from clm_app.routes import BASE, Router, views

OLD, NEW = "adapters/0000", "adapters/0001"  # folders, where there was one set of weights before
EDGE = 1e-9  # below a tie, which rounding would otherwise decide
NOT_ANSWERED_WITH = (
    "tokenizer*",
    "special_tokens*",
    "chat_template*",
)  # of a whole model, but the base under it has them


class Route(Rung):
    """A router over the weights of before and the trained ones."""

    title = "Weights of its own, and a router"
    is_in_weights = False
    is_last_resort = True
    weights_kind = "routed"

    def refuse(self) -> None:
        """Refuse where no rows can teach a router which prompts are whose."""
        order = self.climb.order
        missing = [task for task in self.climb.past if task not in {task for task, _ in order.taught}]
        if not self.climb.is_routed and missing:
            raise BadSettings(
                f"A router learns from training rows of every task, and of {', '.join(missing)} none are there. "
                "Give their rows again."
            )

    def search(self) -> dict | None:
        """Return {"bias": added to the new task's scores, "own_weights": whether it got some of its own just now}.

        The bias is the closest to 0 that holds; a stronger one leaves every past task at least as many of its prompts.
        """
        self.router = self._router()
        biases = [0.0] if self._keeps(0.0) else self._biases()
        place = bisect.bisect_left(biases, True, key=self._keeps) if len(biases) > 1 else 0
        if place == len(biases) or not (self._keeps(biases[place]) and self.climb.is_learned(self._pairs)):
            return None
        return {"bias": biases[place], "own_weights": self.folder != self.folder_before}

    def _keeps(self, bias: float) -> bool:
        """Hold the new task back by this much, and say whether every past task's bound holds."""
        self.router.bias.pop(self.climb.task, None)
        if bias:
            self.router.bias[self.climb.task] = bias
        return self.climb.first_broken(self._pairs, self.climb.whole) is None

    def answer(self, rows: list[Row]) -> list[dict]:
        """Return what the router's choice of weights makes of rows; `route` names the task chosen."""
        found: list[dict] = [{}] * len(rows)
        for task, places in self._by_route(rows):
            answered = self.climb.answers.of(self._source(task), [rows[i] for i in places])
            for i, line in zip(places, answered, strict=True):
                found[i] = line | {"route": task}
        return found

    def write(self, folder: Path) -> None:
        """Write the router, the weights of before in their folders, and the trained ones in a folder of their own."""
        (folder / "adapters").mkdir()
        before = self.climb.order.adapter
        if self.climb.is_routed:
            for kept in sorted(set(self.router.folders.values()) - {self.folder}):
                shutil.copytree(before / kept, folder / kept, copy_function=shutil.copyfile)
        else:
            self.climb.save_before(folder / OLD)
        trained = Path(self.climb.done.folder) / (self.folder_before if self.climb.is_routed else "")
        shutil.copytree(
            trained, folder / self.folder, copy_function=shutil.copyfile,
            ignore=shutil.ignore_patterns(*NOT_ANSWERED_WITH),
        )  # fmt: skip
        self.router.save(folder)

    # --- the router ---------------------------------------------------------------------------------------------------

    def _router(self) -> Router:
        """Return the candidate's router, the new task's folder its own; or one that learns every row of the lineage."""
        order, task = self.climb.order, self.climb.task
        if self.climb.is_routed:
            router = Router.load(Path(self.climb.done.folder))
            router.bias.pop(task, None)  # of when it was learned before
            self.folder_before = self.folder = router.folders[task]
            if sum(folder == self.folder for folder in router.folders.values()) > 1:
                taken = {int(Path(folder).name) for folder in router.folders.values()}
                self.folder = router.folders[task] = f"adapters/{max(taken) + 1:04d}"
            return router
        router, self.folder_before, self.folder = Router(), "", NEW
        router.withdrawn = set(order.withdrawn)
        past = [(name, file) for name, file in order.taught if file != order.rows]
        for name, file in past:
            router.folders[name] = OLD
            router.learn(name, load(file))
        router.folders.pop(task, None)  # the task learned last stands last
        router.folders[task] = NEW
        router.learn(task, self.climb.engine.new)
        return router

    def _biases(self) -> list[float]:
        """Return what just leaves one more past task's row to it, the smallest step first."""
        task, stolen = self.climb.task, set()
        for past in self.climb.past:
            for row in self.climb.whole[past]:
                scores = self._scores(row)
                other = max((score for name, score in scores.items() if name != task), default=0.0)
                if scores.get(task, -math.inf) > other:
                    stolen.add(other - scores[task] - EDGE)
        return sorted(stolen, reverse=True)

    def _scores(self, row: Row) -> dict[str, float]:
        """Return the router's scores for a row but for the bias that is searched, once computed; empty: it knows no word."""
        if row.key not in self._known:
            seen, held = views(row.prompt), self.router.bias.pop(self.climb.task, None)
            self._known[row.key] = self.router.scores(seen) if self.router.knows(seen) else {}
            if held:
                self.router.bias[self.climb.task] = held
        return self._known[row.key]

    @cached_property
    def _known(self) -> dict[str, dict[str, float]]:
        return {}

    def _route(self, row: Row) -> str:
        """Return what the router answers for a row's prompt, with its bias."""
        scores, task = self._scores(row), self.climb.task
        if not scores:
            return BASE
        held = scores | {task: scores[task] + self.router.bias.get(task, 0.0)}
        return max(held, key=held.__getitem__)

    def _by_route(self, rows: list[Row]) -> Iterator[tuple[str, list[int]]]:
        found: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            found.setdefault(self._route(row), []).append(i)
        yield from found.items()

    def _source(self, task: str) -> str:
        return self.climb.answers.source(task)

    def _pairs(self, rows: list[Row]) -> list[tuple[dict, dict]]:
        """Return what was and what is of each row; nothing is asked where the same weights answer it."""
        from clm_app.engine.bounds import UNCHANGED

        answers, found = self.climb.answers, [UNCHANGED] * len(rows)
        now = [self._source(self._route(row)) for row in rows]
        changed = [i for i, row in enumerate(rows) if answers.source_before(row) != now[i]]
        pairs = answers.pairs([rows[i] for i in changed], [now[i] for i in changed])
        for i, pair in zip(changed, pairs, strict=True):
            found[i] = pair
        return found
