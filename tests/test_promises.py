"""The matrix of promises: what every way against forgetting holds with every way to tune that it claims.

A new file on the shelf of strategies is in here by lying there. It halves what naive training forgets of a first task, or
its `promise` says what it is for instead and names the test of that; and a run of it that was killed ends as one that was
not, bit by bit.
"""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clm_app.catalog import pick, shelf
from clm_app.data.rows import Row, dump
from clm_app.engine.loop import Engine
from clm_app.engine.order import Exam, Order
from clm_app.engine.settings import TrainingSettings
from clm_app.events import AnyEvent, heard
from clm_app.strategies._base import HALVES, Situation
from clm_app.strategies._combined import choose, part_of
from store.objects import folder_digest
from tests.smallest import ROOT, TASKS, Stopped, make_rows

TOGETHER = ("replay+ewc", "replay+lwf", "replay+ema", "olora+wise")
CELLS = [
    (name, method) for name in (*sorted(shelf("clm_app.strategies")), *TOGETHER) for method in part_of(name).methods
]
RATES = {"full": 4e-3, "lora": 6e-3, "qlora": 6e-3}
SETTINGS = {
    "auto": {"rows_share": 0.5},  # a twentieth of 24 rows is one, and there are four answers
    # An adapter under a random output layer is never surer than half a nat per token.
    "synthesised": {"rows": 40, "prompt_weight": 1.0, "least_certainty": -1.5},
}
TRAINING = {"epochs": 14, "least_steps": 1, "batch_rows": 12, "prompt_dropout": 0.1, "checkpoint_every_s": 3600}
FIRST, SECOND = ("Colours", "Animals")


class Toy:
    """A stream of two tasks of 24 rows, learned once by each strategy with each method."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.known: dict[tuple[str, str], SimpleNamespace] = {}
        for task in (FIRST, SECOND):
            dump([Row(**row) for row in make_rows(24, TASKS[task])], self.file(task))

    def file(self, task: str) -> Path:
        """Return the rows of a task."""
        return self.folder / f"{task}.jsonl"

    def order(self, folder: str, name: str, method: str, task: str, **changes) -> Order:
        """Return the order of one run; the strategy is chosen as the product does it."""
        place = self.folder / name / method / folder
        place.mkdir(parents=True)
        asked = Situation("base", 10**5, learned_tasks=0, new_rows=24, method=method)
        choice = choose(name, SETTINGS.get(name, {}), asked)
        exams = [
            Exam(snapshot_id=1, task=FIRST, split="test", file=self.file(FIRST)),
            Exam(snapshot_id=2, task=SECOND, split="validation", file=self.file(SECOND)),
        ]
        fields = {
            "folder": place, "base": self.base, "root": self.base, "adapter": None, "task": task, "kept": {},
            "rows": self.file(task), "strategy": choice.strategy, "strategy_settings": choice.settings, "method": method,
            "method_settings": {}, "before": [], "after": exams, "threads": 1,
            "training": TrainingSettings(**TRAINING, learning_rate=RATES[method]),
        }  # fmt: skip
        return Order(**fields | changes)

    def done(self, order: Order, engine: type[Engine] = Engine) -> SimpleNamespace:
        """Do an order in this process, and return what it left and what it measured."""
        torch.set_num_threads(1)
        trained, measured = engine(order, lambda event: None).run()
        first, new = (found.answer_loss for found in measured[-2:])
        return SimpleNamespace(order=order, trained=trained, first=first, new=new, **left_by(order.folder))

    def learned(self, name: str, method: str) -> SimpleNamespace:
        """Return both runs of a stream, and how to do the second again."""
        if (name, method) not in self.known:
            first = self.done(self.order("first", name, method, FIRST))
            weights, memory = Path(first.trained.folder), first.trained.memory
            more = {"base": weights} if first.trained.weights_kind == "full" else {"adapter": weights}
            more |= {"learned": [FIRST], "held_out": {"1": self.file(FIRST)}}
            if "new" in memory:
                more |= {"kept": {"1": Path(memory["new"])}, "kept_tasks": {"1": FIRST}}
            if "state" in memory:
                more["state"] = Path(memory["state"])
            second = self.done(self.order("second", name, method, SECOND, **more))
            self.known[name, method] = SimpleNamespace(first=first, second=second, more=more)
        return self.known[name, method]


def left_by(folder: Path) -> dict:
    """Return the digests of what a run leaves to the next one: weights, state, and the rows kept."""
    kept, state = folder / "kept.jsonl", folder / "state"
    return {
        "weights": folder_digest(folder / "weights"), "state": sorted(p.name for p in state.rglob("*")),
        "digests": (folder_digest(state), kept.read_bytes() if kept.exists() else b""),
    }  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory, tiny_model) -> Toy:
    """The stream, in a folder of its own."""
    return Toy(tmp_path_factory.mktemp("toy"), tiny_model)


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(shelf("clm_app.methods")))
def test_without_protection_the_first_task_is_forgotten(method, toy):
    seen = toy.learned("naive", method)
    assert seen.first.first < 1 and seen.second.new < 0.25 * seen.first.new, "both were learned"
    assert seen.second.first - seen.first.first > 2, "nats per token"


@pytest.mark.parametrize(
    "name, method", [(name, method) for name, method in CELLS if part_of(name).promise == HALVES]
)  # fmt: skip
def test_it_forgets_at_most_half_of_what_naive_forgets_and_still_learns(name, method, toy):
    seen, naive = toy.learned(name, method), toy.learned("naive", method)
    rise, without = (found.second.first - found.first.first for found in (seen, naive))
    assert rise < 0.5 * without
    assert seen.second.first < naive.first.first + 0.5 * without, "it had learned what it did not forget"
    assert seen.second.new < 0.6 * seen.first.new, "two fifths of what the new task cost are gone"


@pytest.mark.parametrize("name", sorted(n for n, cls in shelf("clm_app.strategies").items() if cls.promise != HALVES))
def test_what_promises_something_else_names_the_test_of_it(name):
    promise = pick("clm_app.strategies", name).promise
    (named,) = re.findall(r"\btest_\w+", promise)
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in Path(__file__).parent.glob("test_*.py")]
    found = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == named]
    assert len(found) == 1, f"{name} promises {promise!r}, and no such test is here"
    assert len(promise.split()) > 5, "a sentence"


# --- killed and started again ----------------------------------------------------------------------------------------


class Killed(Engine):
    """Commits after the third step and ends two steps later, as if the power failed."""

    def step(self, model, optimiser, step: int):
        """Take a step, unless the power fails."""
        if step == 5:
            raise Stopped
        self.knobs = self.knobs.model_copy(update={"checkpoint_every_s": -1.0 if step == 2 else 3600.0})
        return super().step(model, optimiser, step)


def assert_same(again: dict, whole: SimpleNamespace) -> None:
    """Weights, memory and figures are those of the run that nothing happened to."""
    assert again["weights"] == whole.weights
    assert (again["state"], again["digests"]) == (whole.state, whole.digests)


@pytest.mark.parametrize("name, method", CELLS)
def test_a_killed_run_ends_as_one_that_was_not_killed_bit_by_bit(name, method, toy):
    seen = toy.learned(name, method)
    short = TrainingSettings(**TRAINING | {"epochs": 3}, learning_rate=RATES[method])
    whole, order = (toy.order(f, name, method, SECOND, training=short, **seen.more) for f in ("unhurt", "killed"))
    whole = toy.done(whole)
    with pytest.raises(Stopped):
        toy.done(order, Killed)
    assert [place.name for place in order.folder.glob("checkpoints/step-*")] == ["step-000000003"]
    assert not (order.folder / "weights").exists()
    again = toy.done(order)
    assert_same(vars(again), whole)
    assert again.trained.figures["strategy"] == whole.trained.figures["strategy"]
    assert (again.first, again.new) == (whole.first, whole.new)


def said(child: subprocess.Popen) -> Iterator[AnyEvent]:
    """Yield the events that a child says; libraries may print beside them."""
    return filter(None, map(heard, child.stdout))


@pytest.mark.parametrize("name, method", [("der", "full"), ("replay+ewc", "lora"), ("adapters", "qlora")])
def test_a_child_that_gets_sigkill_is_started_again_and_ends_with_the_very_same_files(name, method, toy):
    seen = toy.learned(name, method)
    long = TrainingSettings(**TRAINING | {"epochs": 40, "checkpoint_every_s": 0.1}, learning_rate=RATES[method])
    whole, order = (toy.order(f, name, method, SECOND, training=long, **seen.more) for f in ("whole", "child"))
    whole = toy.done(whole)
    file = order.folder / "order.json"
    file.write_text(order.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "clm_app.engine.child", str(file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    with subprocess.Popen(command, **pipes) as child:
        next(event for event in said(child) if event.kind == "checkpointed")
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and not (order.folder / "result.json").exists()
    with subprocess.Popen(command, **pipes) as child:
        events = list(said(child))
    assert child.returncode == 0 and (order.folder / "result.json").exists()
    assert next(event for event in events if event.kind == "started").step > 0, "it goes on from the commit"
    assert_same(left_by(order.folder), whole)
