"""Real update chains: domains of CLINC150 learned one after the other over the starter, and each candidate that hurt an old
one repaired by the product's own ladder.

A finished candidate is one line of a file, and its outcomes stay in its folder: the simulation of the gate draws from them.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._learning import Arm
from benchmarks._streams import domains
from benchmarks._tasks import Learnable, order
from clm_app.data.rows import dump, load
from clm_app.engine.loop import Engine
from clm_app.engine.order import Order
from clm_app.engine.repairing import verdict
from clm_app.engine.settings import TrainingSettings
from clm_app.judging.gate import GateSettings
from clm_app.registry.versions import STARTER
from clm_app.repairs._base import RepairSettings
from clm_app.strategies._base import Situation
from clm_app.strategies._combined import choose, made

ARMS = {  # {arm: tasks learned in a row}
    "naive:full": 2, "replay@0.05:full": 3, "replay@0.01:full": 3, "naive:lora": 2, "auto:full": 3,
}  # fmt: skip
ROWS_PER_LABEL = 50
TOLD = ("tried", "passed", "rung", "certificate")  # of what the ladder says; folders tell of one machine alone
FIRST, AGAIN = (
    "first",
    "again",
)  # folders: a chain's first version, and the same rows learned once more with another seed


class Candidate(NamedTuple):
    """One update of one chain. Exact match on TEST, 0..1, by task; CPU seconds of the same process."""

    order: int
    arm: str
    position: int
    task: str
    past: list[str]
    verdict: str
    sentence: str
    before: dict[str, float]
    after: dict[str, float]
    repaired: dict[str, float]
    train_cpu: float
    climb_cpu: float
    repair: dict | None
    folder: str

    @property
    def is_failure(self) -> bool:
        """Say whether it learned its task and hurt an old one, so that the ladder was climbed."""
        return self.verdict == "repair"

    @property
    def is_recoverable(self) -> bool:
        """Say whether some place keeps every task on VALIDATION rows: one that a rung's own search found."""
        return any("coefficients" in step for step in (self.repair or {}).get("tried", ()))

    @property
    def is_repaired(self) -> bool:
        """Say whether what was repaired passed the gate on TEST."""
        return bool(self.repair and self.repair["passed"])


class Timed(Engine):
    """The product's engine, with the CPU seconds of its training and of its climb."""

    def train(self, model):
        """Train, timed."""
        began = time.process_time()
        done = super().train(model)
        self.train_cpu = time.process_time() - began
        return done

    def _noise(self, model):
        found = super()._noise(model)
        self.at_climb = time.process_time()
        return found


class Chains:
    """Every chain of some orders; `go` does what is missing."""

    def __init__(
        self, root: Path, data: Path, orders: list[int], per_label: int, training: TrainingSettings, arms: dict
    ) -> None:
        self.root, self.orders, self.training, self.arms = root, orders, training, arms
        self.tasks = domains(data, None, per_label, report.WORK / "rows")
        self.lines = root / "chains.jsonl"
        self.found = (
            [Candidate(**json.loads(line)) for line in self.lines.read_text().splitlines()]
            if self.lines.exists()
            else []
        )

    def go(self) -> list[Candidate]:
        """Do what is missing and return every candidate of these orders and arms."""
        self.root.mkdir(parents=True, exist_ok=True)
        for number in self.orders:
            for text, length in self.arms.items():
                self.chain(number, Arm.read(text, "full"), length)
        return [one for one in self.found if one.order in self.orders and one.arm in self.arms]

    def chain(self, number: int, arm: Arm, length: int) -> None:
        """Learn so many tasks in a row; each candidate is gone on from as it was trained, whatever the gate says of it."""
        start = 3 * number % len(self.tasks)
        tasks = (self.tasks[start:] + self.tasks[:start])[:length]
        done = {one.position for one in self.found if (one.order, one.arm) == (number, arm.text)}
        if len(done) == length - 1:
            return
        before = self.first(number, arm, tasks[0])
        for position in range(1, length):
            place = self.root / f"{arm.text.replace(':', '-')}-{number}" / str(position)
            if position not in done:
                self.step(number, arm, position, tasks, before, place)
            before = place

    def first(self, number: int, arm: Arm, task: Learnable) -> Path:
        """Return the folder of the chain's first version, whose learning arms share where it is the same."""
        kind = "routed" if arm.strategy == "auto" else arm.method
        place = self.root / f"{FIRST}-{kind}-{number}"
        if not (place / "kind.json").exists():
            self.learn(self._order(arm, place, [task], None), place)
        return place

    def again(self, number: int) -> Path:
        """Return the folder of the first version's rows learned once more, with another seed: an equal model."""
        place, task = self.root / f"{AGAIN}-{number}", self.tasks[3 * number % len(self.tasks)]
        if not (place / "kind.json").exists():
            asked = self._order(Arm.read("naive:full", "full"), place, [task], None)
            self.learn(asked.model_copy(update={"training": self.training.model_copy(update={"seed": 1})}), place)
        return place

    def step(self, number: int, arm: Arm, position: int, tasks: list[Learnable], before: Path, place: Path) -> None:
        """Learn the task at a position from the version before, let the gate and the ladder speak, and add the line."""
        seen = tasks[: position + 1]
        asked = self._order(arm, place, seen, before)
        engine, climb_cpu = self.learn(asked, place)
        first, repair = verdict(asked, "after"), engine.repaired and {name: engine.repaired[name] for name in TOLD}
        names = {task.number: task.name for task in seen}
        told = {when: _exact(place / when, names) for when in ("after", "repaired")}
        past = {task.name: share(asked.live_outcomes[str(task.number)]) for task in seen[:-1]}
        one = Candidate(
            number, arm.text, position, seen[-1].name, [task.name for task in seen[:-1]], first.verdict, first.sentence,
            past | {seen[-1].name: share(place / "before" / f"{seen[-1].number}-test.jsonl")}, told["after"],
            told["repaired"], round(engine.train_cpu, 2), round(climb_cpu, 2), repair, str(place.relative_to(self.root)),
        )  # fmt: skip
        with open(self.lines, "a", encoding="utf-8") as out:
            out.write(json.dumps(one._asdict()) + "\n")
        self.found.append(one)
        passed = f"repaired by {repair['rung']}" if one.is_repaired else "not repaired" if one.is_failure else ""
        report.console.print(
            f"{arm.text}, order {number}, {position + 1} {one.task:<18} trained {one.train_cpu:4.0f} CPU s, "
            f"{one.verdict} {passed} {climb_cpu:.1f} CPU s"
        )

    def learn(self, asked: Order, place: Path) -> tuple[Timed, float]:
        """Do an order; return its engine and the CPU seconds that followed the measuring."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        engine = Timed(asked, lambda event: None)
        done, _ = engine.run()
        after = time.process_time() - engine.at_climb
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        shutil.rmtree(place / "repaired" / "weights", ignore_errors=True)
        (place / "kind.json").write_text(json.dumps(done.weights_kind))
        return engine, after

    def _order(self, arm: Arm, place: Path, seen: list[Learnable], before: Path | None) -> Order:
        """Return what the product's cycle would tell a training child: measured before and after, judged and repaired."""
        *past, task = seen
        rows = len(load(task.file("train")))
        kind = json.loads((before / "kind.json").read_text()) if before else "base"
        strategy, settings, _ = choose(arm.strategy, arm.settings(arm.strategy, rows) if arm.share else {},
                                       Situation(kind, 0, len(past), rows, arm.method))  # fmt: skip
        made_order = order(
            place, task.file("train"), self.training, strategy=strategy, method=arm.method, model=STARTER,
            weights=before / "weights" if before else None, weights_kind=kind if before else "",
            kept={str(t.number): self._kept(strategy, settings, t) for t in past} if arm.share else {},
            after=(task.exam("validation"), *(t.exam("test") for t in seen)),
        )  # fmt: skip
        answered = {str(t.number): before / "after" / f"{t.number}-test.jsonl" for t in past} if before else {}
        return made_order.model_copy(update={
            "strategy_settings": settings, "task": task.name, "learned": [t.name for t in past],
            "kept_tasks": {str(t.number): t.name for t in past} if arm.share else {},
            "before": [task.exam("test")] if before else [], "live_outcomes": answered,
            "search": {str(t.number): t.file("validation") for t in seen},
            "taught": [(t.name, t.file("train")) for t in seen],
            "gate": GateSettings().model_dump(), "repair": RepairSettings().model_dump() if before else None,
        })  # fmt: skip

    def _kept(self, strategy: str, settings: dict, task: Learnable) -> Path:
        """Return the rows that the strategy keeps of a task, drawn as the engine draws them."""
        seed = self.training.seed
        file = self.root / "kept" / f"{strategy}-{settings.get('rows_per_task')}-{task.number}.jsonl"
        dump(made(strategy, settings, seed).keep(load(task.file("train")), random.Random(f"{seed}/keep")), file)
        return file


def share(file: Path) -> float:
    """Return the share of right answers in a file of outcomes."""
    found = [json.loads(line)["exact"] for line in file.read_text(encoding="utf-8").splitlines()]
    return sum(found) / len(found)


def _exact(folder: Path, names: dict[int, str]) -> dict[str, float]:
    return {name: share(file) for number, name in names.items() if (file := folder / f"{number}-test.jsonl").exists()}
