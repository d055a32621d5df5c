"""One arm over one stream: its tasks learned one after the other by the product's engine, each training a line of a file."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import _peers
from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._streams import Kind
from benchmarks._tasks import Learnable, order, together
from clm_app.data.rows import load
from clm_app.engine.loop import Engine
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadSettings
from clm_app.events import Trained
from clm_app.judging.matrix import Matrix
from clm_app.provenance import code_version
from clm_app.strategies._base import Situation
from clm_app.strategies._combined import choose, made, part_of
from store.objects import file_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

JOINT, NAIVE = "joint", "naive"
SHARE_KNOBS = ("rows_share", "rows_per_task")  # how a strategy is told how much of a past task it may keep


class Arm(NamedTuple):
    """One way to learn the stream. share: of a past task's rows that may be kept, None where that is the strategy's own."""

    text: str
    strategy: str
    share: float | None
    method: str

    @classmethod
    def read(cls, text: str, method: str) -> Arm:
        """Read "strategy@share:method"; share and method may be left out."""
        name, _, own = text.partition(":")
        strategy, _, share = name.partition("@")
        return cls(text, strategy, float(share) if share else None, own or method)

    def settings(self, strategy: str, rows: int) -> dict:
        """Return the settings that give this arm its share of `rows`, each strategy of a combination its own.

        Raises:
            BadSettings: a share was given to a strategy that keeps no rows.
        """
        if self.share is None:
            return {}
        parts = strategy.split("+")
        found = {part: self._share_of(part, rows) for part in parts}
        if not any(found.values()):
            raise BadSettings(f"{strategy} keeps no rows, so {self.text!r} asks for what it cannot do. Leave out @.")
        return found if len(parts) > 1 else found[strategy]

    def _share_of(self, part: str, rows: int) -> dict:
        knob = next((k for k in SHARE_KNOBS if k in part_of(part).Settings.model_fields), None)
        return {} if knob is None else {knob: self.share if knob == "rows_share" else max(1, round(self.share * rows))}


class Cell(NamedTuple):
    """One finished training and its measurements, by task: exact match on TEST, 0..1, loss in nats per answer token, and
    token F1 where answers are sentences. Tasks seen, and the next one for forward transfer."""

    position: int
    task: str
    strategy: str
    scores: dict[str, float]
    seconds: float
    cpu_seconds: float
    kept_bytes: int
    weights_bytes: int
    figures: dict
    code: str
    losses: dict[str, float] = {}
    f1: dict[str, float] = {}


class Stream:
    """One arm over one order of the tasks, in a folder of its own."""

    def __init__(
        self,
        arm: Arm,
        seed: int,
        kind: Kind,
        tasks: list[Learnable],
        training: TrainingSettings,
        model: Path,
        root: Path,
    ) -> None:
        self.arm, self.seed, self.kind, self.model = arm, seed, kind, model
        self.training = training.model_copy(update={"seed": seed})
        start = (
            seed * max(1, len(tasks) // 3) % len(tasks) if kind.has_orders else 0
        )  # a third of the stream further on
        self.tasks = tasks[start:] + tasks[:start]
        self.names = list(dict.fromkeys(task.name for task in self.tasks))
        self.root = root / self._key()
        self.folder = self.root / f"{arm.text.partition(':')[0]}-{arm.method}-{seed}"
        self.lines = self.folder / "cells.jsonl"
        self.cells = self._read()

    def _key(self) -> str:
        """Return twelve digits over everything that decides a cell but the code, which each line names itself."""
        knobs = [
            self.training.model_dump(exclude={"seed"}, exclude_defaults=True), file_digest(self.model / "model.safetensors"),
            [
                (t.name, file_digest(t.file("train")), file_digest(t.file("test")), *[t.least_steps] * bool(t.least_steps))
                for t in self.tasks
            ],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:12]

    def _read(self) -> list[Cell]:
        if not self.lines.exists():
            return []
        whole, _, _ = self.lines.read_text(encoding="utf-8").rpartition("\n")  # a cut-off last line is no cell
        return [Cell(**json.loads(line)) for line in whole.splitlines()]

    @property
    def is_done(self) -> bool:
        """Say whether nothing is left to do."""
        return len(self.cells) == (1 if self.arm.strategy == JOINT else len(self.tasks))

    def go(self) -> None:
        """Do what is missing."""
        if self.is_done:
            return
        if self.cells and not (self._place(len(self.cells) - 1) / "weights").exists():
            self.cells = []  # the lines were kept and the weights were not: they cannot be gone on from
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines.write_text("".join(json.dumps(c._asdict()) + "\n" for c in self.cells), encoding="utf-8")
        if self.arm.strategy == JOINT:
            rows = together(self.tasks, self.folder / "rows.jsonl")
            exams = {task.name: task for task in self.tasks}.values()
            self.cell(0, "all", NAIVE, order(
                self._place(0), rows, self.training, method=self.arm.method, after=[t.exam("test") for t in exams],
                model=self.model,
            ))  # fmt: skip
            return
        for position in range(len(self.cells), len(self.tasks)):
            self.step(position)

    def step(self, position: int) -> None:
        """Learn one task from the weights of the one before."""
        if self.arm.strategy in _peers.NAMES:
            self._step_of_a_peer(position)
            return
        task, before, past = self.tasks[position], self._place(position - 1), self.tasks[:position]
        kind = json.loads((before / "kind.json").read_text()) if position else "base"
        rows = len(task.file("train").read_text(encoding="utf-8").splitlines())
        wanted = self.arm.settings(self.arm.strategy, rows)
        strategy, settings, _ = choose(self.arm.strategy, wanted, Situation(kind, 0, position, rows, self.arm.method))
        kept = {str(t.number): self._place(i) / "kept.jsonl" for i, t in enumerate(past)}
        kept = {number: file for number, file in kept.items() if file.exists()}
        way = made(strategy, settings, self.seed)
        training = self.training.model_copy(update={"least_steps": task.least_steps} if task.least_steps else {})
        asked = order(
            self._place(position), task.file("train"), training, strategy=strategy, method=self.arm.method,
            weights=before / "weights" if position else None, weights_kind=kind if position else "", kept=kept,
            after=[task.exam("validation"), *(t.exam("test") for t in self.measured_after(position))], model=self.model,
        ).model_copy(update={
            "strategy_settings": settings, "task": task.name, "learned": list(dict.fromkeys(t.name for t in past)),
            "kept_tasks": {str(t.number): t.name for t in past if str(t.number) in kept},
            "state": before / "state" if (before / "state").is_dir() and any((before / "state").iterdir()) else None,
            "held_out": {str(t.number): t.file("validation") for t in past} if way.needs_held_out_rows else {},
        })  # fmt: skip
        self.cell(position, task.name, strategy, asked)
        for spent in ("weights", "state"):
            shutil.rmtree(before / spent, ignore_errors=True)

    def _step_of_a_peer(self, position: int) -> None:
        """Learn one task as a peer's library does, with every weight, from the weights of the one before."""
        task, before = self.tasks[position], self._place(position - 1)
        rows = len(load(task.file("train")))
        peer = _peers.fitted(
            self.arm.strategy, self.tasks, self.model, self.training.max_tokens, round((self.arm.share or 0) * rows)
        )
        peer = _peers.tuned(peer, self.tasks, self.training, self.model, self.root / "tuned")
        asked = order(
            self._place(position), task.file("train"), self.training, method="full", model=self.model,
            after=[task.exam("validation"), *(t.exam("test") for t in self.measured_after(position))],
        ).model_copy(update={
            "base": before / "weights" if position else self.model, "root": self.model,
            "state": before / "state" if position else None, "task": task.name,
        })  # fmt: skip
        self.cell(position, task.name, self.arm.strategy, asked, lambda *two: _peers.PeerEngine(*two, peer))
        for spent in ("weights", "state"):
            shutil.rmtree(before / spent, ignore_errors=True)

    def measured_after(self, position: int) -> list[Learnable]:
        """Return the tasks whose TEST part is measured after this one: all seen, and the next for forward transfer."""
        if (position + 1) % self.kind.measured_every:
            return []
        ahead = 1 if self.kind.measured_every == 1 else 0
        return list({task.name: task for task in reversed(self.tasks[: position + 1 + ahead])}.values())[::-1]

    def cell(self, position: int, task: str, strategy: str, asked, engine: Callable = Engine) -> None:
        """Train and measure once, and add the line."""
        shutil.rmtree(asked.folder / "checkpoints", ignore_errors=True)  # half a cell would have half of its time
        asked.folder.mkdir(parents=True, exist_ok=True)
        at_trained: list[tuple[float, float]] = []
        clock = lambda: (time.process_time(), time.monotonic())  # noqa: E731
        say = lambda event: at_trained.append(clock()) if isinstance(event, Trained) else None  # noqa: E731
        cpu, began = clock()
        trained, measured = engine(asked, say).run()
        names = {t.number: t.name for t in self.tasks}
        tested = {names[m.snapshot_id]: m for m in measured if m.split == "test"}
        cell = Cell(
            position, task, strategy, {name: m.exact_match for name, m in tested.items()},
            round(at_trained[0][1] - began, 2), round(at_trained[0][0] - cpu, 2),
            self._kept(asked, trained), _bytes(asked.folder / "weights"), trained.figures, code_version(),
            {name: round(m.answer_loss, 5) for name, m in tested.items()},
            self._generated(asked, trained.weights_kind, task),
        )  # fmt: skip
        shutil.rmtree(asked.folder / "checkpoints", ignore_errors=True)
        (asked.folder / "kind.json").write_text(json.dumps(trained.weights_kind))
        with open(self.lines, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell._asdict()) + "\n")
        self.cells.append(cell)
        if tested:
            print(
                f"{self.arm.text}, order {self.seed}, {position + 1:3d} {task:<20} trained {cell.seconds:5.0f} s, "
                f"this task {cell.scores.get(task, mean(cell.scores.values())):.3f}, "
                f"all seen {mean(v for n, v in cell.scores.items() if n in self._seen(position)):.3f}", flush=True,
            )  # fmt: skip

    def _kept(self, asked, trained: Trained) -> int:
        """Return the bytes that this run keeps for the next: rows and state, of a peer what it says itself."""
        if self.arm.strategy in _peers.NAMES:
            return trained.figures["strategy"]["kept_bytes"]
        return _bytes(asked.folder / "kept.jsonl") + _bytes(asked.folder / "state")

    def _generated(self, asked, weights_kind: str, task: str) -> dict[str, float]:
        """Return {task: token F1 of generated answers} where answers are sentences: of this task, and of all at the end."""
        if not self.kind.is_text:
            return {}
        from benchmarks._answers import mean_f1

        chosen = self.tasks if task in ("all", self.tasks[-1].name) else [t for t in self.tasks if t.name == task]
        return mean_f1(asked, weights_kind, {t.name: load(t.file("test")) for t in chosen})

    def _seen(self, position: int) -> list[str]:
        return [t.name for t in (self.tasks if self.arm.strategy == JOINT else self.tasks[: position + 1])]

    def _place(self, position: int) -> Path:
        return self.folder / str(position)

    # --- what comes of it ---------------------------------------------------------------------------------------------

    @property
    def measured(self) -> list[Cell]:
        """The cells after which the tasks seen were measured."""
        return [cell for cell in self.cells if cell.scores]

    def matrix(self) -> Matrix:
        """Return the retention matrix, its rows and columns in the order learned; of a stream of updates, its last rounds."""
        values = [[cell.scores.get(name) for name in self.names] for cell in self.measured]
        return Matrix(tasks=self.names, versions=[cell.task for cell in self.measured], values=values)

    def outcomes(self) -> list[list[NDArray | None]]:
        """Return, for each measured cell and task, 0 or 1 for each TEST item; None where it was not measured."""
        return [
            [self._right(cell.position, name) if name in cell.scores else None for name in self.names]
            for cell in self.measured
        ]

    def _right(self, position: int, name: str) -> NDArray:
        import numpy

        for task in self.tasks:
            file = self._place(position) / "after" / f"{task.number}-test.jsonl"
            if task.name == name and file.exists():
                return numpy.array([json.loads(line)["exact"] for line in file.read_text().splitlines()], numpy.int8)
        raise FileNotFoundError(f"{self._place(position)} has no outcomes of {name}; do the stream again with --fresh.")

    @cached_property
    def untaught(self) -> dict[str, NDArray]:
        """0 or 1 for each TEST item of each task, by the model before it learned anything; measured once for all arms."""
        import numpy

        file = self.root / "untaught.json"
        if not file.exists():
            from benchmarks._answers import exact_match

            found = exact_match(self.model, {task.name: load(task.file("test")) for task in self.tasks})
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found), encoding="utf-8")
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: numpy.array(items, numpy.int8) for name, items in found.items()}

    def general(self) -> dict[str, float]:
        """Return what every probe reads of the weights at the end of the stream, by its name; read once."""
        file, last = self.folder / "general.json", self._place(self.cells[-1].position)
        if not file.exists():
            from clm_app.engine.probing import of_folder

            kind = json.loads((last / "kind.json").read_text(encoding="utf-8"))
            place = (last / "weights", None) if kind == "full" else (self.model, last / "weights")
            found = {event.probe: event.value for event in of_folder(last, *place)}
            file.write_text(json.dumps(found), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def right_at_once(self) -> list[NDArray]:
        """Return 0 or 1 for each TEST item of each task, of an arm that learns all at once."""
        return [self._right(0, name) for name in self.names]

    @property
    def kept_bytes(self) -> int:
        """Bytes kept at the end for later runs: rows of every task and the last state; of a peer what it says itself."""
        if self.arm.strategy in _peers.NAMES:
            return self.cells[-1].kept_bytes
        rows = sum(_bytes(self._place(cell.position) / "kept.jsonl") for cell in self.cells)
        return rows + _bytes(self._place(self.cells[-1].position) / "state")

    def summary(self) -> dict[str, float]:
        """Return the figures of this stream; accuracy and transfer as shares, times in seconds, sizes in bytes."""
        last = self.cells[-1]
        found = self.general() | {
            "seconds": sum(c.seconds for c in self.cells), "cpu_seconds": sum(c.cpu_seconds for c in self.cells)
        }  # fmt: skip
        if last.f1:
            found |= {"f1": mean(last.f1.values()), "loss": mean(last.losses[name] for name in self.names)}
        if self.arm.strategy == JOINT:
            return {"accuracy": mean(last.scores.values())} | found
        matrix = self.matrix()
        found |= {
            "accuracy": matrix.average_accuracy, "kept_kb": self.kept_bytes / 1000,
            "weights_mb": last.weights_bytes / 1e6,
        }  # fmt: skip
        if self.kind.measured_every > 1:
            rounds = [mean(cell.scores.values()) for cell in self.measured]
            return found | {"first_round": rounds[0], "worst_round": min(rounds)}
        found |= {
            "learned": matrix.just_learned, "bwt": matrix.backward_transfer, "forgetting": matrix.forgetting or 0.0,
            "fwt": matrix.forward_transfer([float(self.untaught[name].mean()) for name in self.names]) or 0.0,
        }  # fmt: skip
        if last.f1:
            own = {cell.task: cell for cell in self.cells}
            past = self.names[:-1]
            found |= {
                "f1_learned": mean(own[name].f1[name] for name in self.names),
                "f1_lost": mean(own[name].f1[name] - last.f1[name] for name in past),
                "loss_risen": mean(last.losses[name] - own[name].losses[name] for name in past),
            }
        first = self.names[0]
        if self.cells[0].scores[first]:
            then, now = self._right(0, first), self._right(last.position, first)
            found["first_kept"] = float((then & now).sum() / then.sum())
        return found


def mean(values) -> float:
    """Return the mean of any iterable."""
    found = list(values)
    return sum(found) / len(found)


def _bytes(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


__all__ = ["JOINT", "NAIVE", "Arm", "Cell", "Stream", "mean", "report"]
