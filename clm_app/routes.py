"""Which task does a prompt belong to? A router over words that learns new tasks without old rows, and forgets nothing.

A version that has one adapter per task answers each prompt with the adapter of the task it most likely belongs to. The
router reads text alone, so it works before any model is loaded and with every backend alike. Two readers vote: naive
Bayes over several views of the words, and ridge regression over hashed words. Both are sums over rows: a new task adds
its own, the sums of past tasks stay, and the result is the very one that all rows at once would give. Taking a row's
share away again is as if it had never been learned, which is what happens to rows that were withdrawn.

Sources: multinomial naive Bayes, each view smoothed towards the background rate; recursive ridge regression without
old rows: Zhuang et al. 2022 (ACIL, arXiv:2205.14922); hashed features: Weinberger et al. 2009 (arXiv:0902.2206). How
the numbers here were chosen: LOG.md, "Routing".
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from clm_app.data.rows import Row

BASE = ""  # the name of no adapter: the model as it was before anything was learned
FILE, SUMS = "routes.json", "routes.npz"
VIEWS = {"word": 1.0, "pair": 0.5, "triple": 0.5, "near": 0.2, "letters": 0.2}  # votes of a view's features
SMOOTHING = 10.0  # rows of background that each task is smoothed with
HASHED = {"word": 1.0, "pair": 0.5, "letters": 0.3}  # views in the hashed vector
WIDTH, RIDGE = 2048, 0.3  # numbers in the hashed vector; weight of the ridge
BAYES = 0.02  # vote of one nat of naive Bayes beside ridge regression's 0..1


def views(text: str) -> dict[str, set[str]]:
    """Return the features of a text: words, neighbours by two and three, words up to five apart, and parts of words."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    framed = ["^", *words, "$"]
    return {
        "word": set(words),
        "pair": {f"{a} {b}" for a, b in zip(framed, framed[1:], strict=False)},
        "triple": {f"{a} {b} {c}" for a, b, c in zip(framed, framed[1:], framed[2:], strict=False)},
        "near": {f"{a} {b}" for i, a in enumerate(words) for b in words[i + 2 : i + 6]},
        "letters": {f"<{w}>"[i : i + n] for w in words for n in (3, 4, 5) for i in range(len(w) + 3 - n)},
    }


def hashed(seen: dict[str, set[str]]) -> np.ndarray:
    """Return a text's views as a float32 vector (WIDTH,) of length 1; each feature falls on one place with one sign."""
    found = np.zeros(WIDTH, np.float32)
    for view, features in seen.items():
        for feature in features if view in HASHED else ():
            place = zlib.crc32(f"{view}{feature}".encode())
            found[place % WIDTH] += HASHED[view] if place >> 31 else -HASHED[view]
    return found / max(float(np.linalg.norm(found)), 1e-9)


class Router:
    """Sums over the rows of every task, and the adapter folder of each."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.folders: dict[str, str] = {}
        self.counts: dict[str, dict[str, Counter[str]]] = {
            view: {} for view in VIEWS
        }  # {view: {feature: {task: rows}}}
        self.gram = np.zeros((WIDTH, WIDTH), np.float32)  # sum of x x' over all rows
        self.sums: dict[str, np.ndarray] = {}  # {task: sum of x over its rows}
        self.withdrawn: set[str] = set()  # keys of rows that are in no sum, however often they were learned
        self.bias: dict[str, float] = {}  # {task: added to its scores}; below 0 it gets only what is clearly its own

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order they were last learned."""
        return list(self.folders)

    def add(self, task: str, prompts: Iterable[str], sign: int = 1) -> None:
        """Count prompts as belonging to a task; sign -1 takes them away again."""
        seen = [views(prompt) for prompt in prompts]
        self.__dict__.pop("weights", None)
        vectors = np.stack([hashed(one) for one in seen]) if seen else np.zeros((0, WIDTH), np.float32)
        self.gram += sign * (vectors.T @ vectors)
        self.sums[task] = self.sums.get(task, np.zeros(WIDTH, np.float32)) + sign * vectors.sum(0)
        self.rows[task] += sign * len(seen)
        for one in seen:
            for view, features in one.items():
                for feature in features:
                    self._count(view, feature, task, sign)

    def learn(self, task: str, rows: Iterable[Row]) -> None:
        """Count a task's rows, but for the withdrawn ones."""
        self.add(task, [row.prompt for row in rows if row.key not in self.withdrawn])

    def take_out(self, withdrawn: Iterable[str], learned: Iterable[tuple[str, Iterable[Row]]]) -> int:
        """Leave the sums as if rows of these keys had never been learned; a row that is out already is not counted twice.

        learned: (task, rows) of every time that rows were learned into these sums. Returns how many were taken out.
        """
        now, count = set(withdrawn) - self.withdrawn, 0
        for task, rows in learned if now else ():
            prompts = [row.prompt for row in rows if row.key in now]
            if prompts:
                self.add(task, prompts, sign=-1)
            count += len(prompts)
        self.withdrawn |= now
        return count

    def _count(self, view: str, feature: str, task: str, sign: int) -> None:
        found = self.counts[view].get(feature)
        if found is None:  # not setdefault: it would make an unused Counter for each of 100,000 features
            found = self.counts[view][feature] = Counter()
        found[task] += sign
        if found[task] <= 0:
            del found[task]
        if not found:
            del self.counts[view][feature]

    @cached_property
    def weights(self) -> np.ndarray:
        """The ridge solution (WIDTH, tasks): what each place of a hashed vector says for each task.

        A task with few rows is raised by the root of how few, or the large ones would take its prompts.
        """
        targets = np.stack([self.sums[task] for task in self.tasks], 1)
        solved = np.linalg.solve(self.gram + RIDGE * np.eye(WIDTH, dtype=np.float32), targets)
        rows = np.array([max(self.rows[task], 1) for task in self.tasks], np.float32)
        return solved * np.sqrt(rows.mean() / rows)

    def bayes(self, seen: dict[str, set[str]]) -> dict[str, float]:
        """Return {task: log-likelihood ratio of a text's views against the background of all tasks}, in nats."""
        total = sum(self.rows.values())
        found = dict.fromkeys(self.tasks, 0.0)
        for view, features in seen.items():
            for feature in features:
                counts = self.counts[view].get(feature)
                if counts is None:
                    continue
                rate = (sum(counts.values()) + 1) / total
                for task in found:
                    share = (counts[task] + SMOOTHING * rate) / (self.rows[task] + SMOOTHING)
                    found[task] += VIEWS[view] * math.log(share / rate)
        return found

    def scores(self, seen: dict[str, set[str]]) -> dict[str, float]:
        """Return {task: how much speaks for it} for a text's views, higher is likelier; only differences count."""
        ridge, bayes = hashed(seen) @ self.weights, self.bayes(seen)
        return {
            task: float(ridge[i]) + BAYES * bayes[task] + self.bias.get(task, 0.0) for i, task in enumerate(self.tasks)
        }

    def route(self, prompt: str) -> str:
        """Return the likeliest task; BASE where no word of the prompt was ever seen."""
        seen = views(prompt)
        if not self.knows(seen):
            return BASE
        found = self.scores(seen)
        return max(found, key=found.__getitem__)

    def knows(self, seen: dict[str, set[str]]) -> bool:
        """Say whether any word of a text was ever seen."""
        return not seen["word"].isdisjoint(self.counts["word"])

    def save(self, folder: Path) -> None:
        """Write `routes.json` with the counts and `routes.npz` with the sums; equal routers give equal bytes."""
        counts = {
            view: {feature: dict(sorted(by_task.items())) for feature, by_task in sorted(features.items())}
            for view, features in self.counts.items()
        }
        rows = {task: self.rows[task] for task in self.tasks}
        told = {"folders": self.folders, "rows": rows, "counts": counts, "withdrawn": sorted(self.withdrawn)}
        if self.bias:
            told["bias"] = self.bias
        (folder / FILE).write_text(json.dumps(told), encoding="utf-8")
        upper = self.gram[np.triu_indices(WIDTH)]
        sums = np.array([self.sums[task] for task in self.tasks], np.float32).reshape(-1, WIDTH)
        np.savez(folder / SUMS, gram=upper, sums=sums)

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Read what `save` wrote."""
        found, self = json.loads((folder / FILE).read_text(encoding="utf-8")), cls()
        self.folders, self.rows = found["folders"], Counter(found["rows"])
        self.withdrawn = set(found.get("withdrawn", ()))  # sums of earlier releases have none
        self.bias = found.get("bias", {})  # only of a router that was repaired
        for view, features in found["counts"].items():
            self.counts[view] = {feature: Counter(by_task) for feature, by_task in features.items()}
        with np.load(folder / SUMS) as sums:
            self.gram[np.triu_indices(WIDTH)] = sums["gram"]
            self.sums = dict(zip(self.tasks, sums["sums"], strict=True))
        self.gram += np.triu(self.gram, 1).T
        return self


class Routing(NamedTuple):
    """Where a new task's held-out prompts would be sent, had it an adapter of its own."""

    routed_to: dict[str, float]  # {task, the new one included, or BASE: share of the prompts}, the largest first
    nearest: str  # the past task that most of them are likest to


def routing(router: Router, task: str, rows: Iterable[Row], held_out: Iterable[Row]) -> Routing:
    """Learn the rows into the router, which is changed by it, and see which task each held-out prompt is sent to.

    Text alone decides, so that no model is loaded. With nine tasks of 1,500 rows known and 300 prompts held out it took
    two seconds, and loading such a router two more (LOG.md, "Routing").
    """
    past = router.tasks
    router.folders[task] = ""
    router.learn(task, rows)
    routed, nearest = Counter(), Counter()
    for row in held_out:
        seen = views(row.prompt)
        scores = router.scores(seen)
        routed[max(scores, key=scores.__getitem__) if router.knows(seen) else BASE] += 1
        nearest[max(past, key=scores.__getitem__)] += 1
    return Routing({name: n / routed.total() for name, n in routed.most_common()}, nearest.most_common(1)[0][0])


def is_routed(weights: Path | None) -> bool:
    """Say whether a folder of weights holds one adapter per task."""
    return weights is not None and (weights / FILE).exists()


def is_whole(folder: Path) -> bool:
    """Say whether what is kept of a task is every weight, and not a LoRA adapter over the base."""
    return not (folder / "adapter_config.json").exists()


def asked(messages: Iterable) -> str:
    """Return the text of a conversation that is routed: everything that the person said."""
    return "\n".join(m.content for m in messages if m.role == "user")
