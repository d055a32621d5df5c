"""Does the stream stay known? Domains learned one by one, with every way against forgetting, and all at once (joint).

Each task is trained from the weights after the one before, by the product's own engine with its defaults, and the TEST
part of every task seen is measured after each. An arm is a strategy, written `strategy@share:method`: "replay@0.05"
keeps 5 % of the rows of each past task, "naive:full" tunes every weight. Joint sees all rows at once: what is lost to
learning in order shows against it. Figures: clm_app/judging/matrix.py, which names their sources.

A finished cell is one line of a file per arm and order, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._tasks import DEFAULT_STRATEGY, Learnable, default_method, learnable, order, together
from clm_app.data.streams import TaskSource, stream_from
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadSettings
from clm_app.judging.matrix import Matrix
from clm_app.provenance import code_version
from clm_app.registry.versions import STARTER
from clm_app.strategies._base import Situation
from clm_app.strategies._combined import choose, made, part_of
from store.objects import file_digest

JOINT, NAIVE = "joint", "naive"
QUICK = {"tasks": 2, "rows_per_label": 15, "epochs": 3.0, "least_steps": 1}
SHARE_KNOBS = ("rows_share", "rows_per_task")  # how a strategy is told how much of a past task it may keep
PALETTE = ("#0f766e", "#c2410c", "#1d4ed8", "#a16207", "#7e22ce", "#be123c", "#4d7c0f", "#0e7490", "#475569", "#9d174d")


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
    """One finished training and its measurements. scores: {task: exact match on TEST, 0..1} of tasks seen and the next."""

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


class Stream:
    """One arm over one order of the tasks, in a folder of its own."""

    def __init__(self, arm: Arm, seed: int, tasks: list[Learnable], training: TrainingSettings, root: Path) -> None:
        self.arm, self.seed, self.training = arm, seed, training.model_copy(update={"seed": seed})
        start = seed * max(1, len(tasks) // 3) % len(tasks)  # each seed begins a third of the stream further on
        self.tasks = tasks[start:] + tasks[:start]
        self.folder = root / self._key() / f"{arm.text.replace(':', '-')}-{seed}"
        self.lines = self.folder / "cells.jsonl"
        self.cells = self._read()

    def _key(self) -> str:
        """Return twelve digits over everything that decides a cell but the code, which each line names itself."""
        knobs = [
            self.training.model_dump(exclude={"seed"}), file_digest(STARTER / "model.safetensors"),
            [(t.name, file_digest(t.file("train")), file_digest(t.file("test"))) for t in self.tasks],
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
            self.cell(0, "all", NAIVE, order(
                self._place(0), rows, self.training, method=self.arm.method, after=[t.exam("test") for t in self.tasks]
            ))  # fmt: skip
            return
        for position in range(len(self.cells), len(self.tasks)):
            self.step(position)

    def step(self, position: int) -> None:
        """Learn one task from the weights of the one before."""
        task, before, past = self.tasks[position], self._place(position - 1), self.tasks[:position]
        kind = json.loads((before / "kind.json").read_text()) if position else "base"
        rows = len(task.file("train").read_text(encoding="utf-8").splitlines())
        wanted = self.arm.settings(self.arm.strategy, rows)
        situation = Situation(kind, 0, position, rows, self.arm.method)
        strategy, settings, _ = choose(self.arm.strategy, wanted, situation)
        kept = {str(t.number): self._place(i) / "kept.jsonl" for i, t in enumerate(past)}
        kept = {number: file for number, file in kept.items() if file.exists()}
        seen = [*past, task, *self.tasks[position + 1 : position + 2]]  # the next one too, for forward transfer
        way = made(strategy, settings, self.seed)
        asked = order(
            self._place(position), task.file("train"), self.training, strategy=strategy, method=self.arm.method,
            weights=before / "weights" if position else None, weights_kind=kind if position else "", kept=kept,
            after=[task.exam("validation"), *(t.exam("test") for t in seen)],
        ).model_copy(update={
            "strategy_settings": settings, "task": task.name,
            "kept_tasks": {str(t.number): t.name for t in past if str(t.number) in kept},
            "state": before / "state" if (before / "state").is_dir() and any((before / "state").iterdir()) else None,
            "held_out": {str(t.number): t.file("validation") for t in past} if way.needs_held_out_rows else {},
        })  # fmt: skip
        self.cell(position, task.name, strategy, asked)
        for spent in ("weights", "state"):
            shutil.rmtree(before / spent, ignore_errors=True)

    def cell(self, position: int, task: str, strategy: str, asked) -> None:
        """Train and measure once, and add the line."""
        from clm_app.engine.loop import Engine
        from clm_app.events import Trained

        shutil.rmtree(asked.folder / "checkpoints", ignore_errors=True)  # half a cell would have half of its time
        at_trained: list[tuple[float, float]] = []
        clock = lambda: (time.process_time(), time.monotonic())  # noqa: E731
        say = lambda event: at_trained.append(clock()) if isinstance(event, Trained) else None  # noqa: E731
        cpu, began = clock()
        trained, measured = Engine(asked, say).run()
        names = {t.number: t.name for t in self.tasks}
        cell = Cell(
            position, task, strategy, {names[m.snapshot_id]: m.exact_match for m in measured if m.split == "test"},
            round(at_trained[0][1] - began, 2), round(at_trained[0][0] - cpu, 2),
            _bytes(asked.folder / "kept.jsonl") + _bytes(asked.folder / "state"), _bytes(asked.folder / "weights"),
            trained.figures, code_version(),
        )  # fmt: skip
        shutil.rmtree(asked.folder / "checkpoints", ignore_errors=True)
        (asked.folder / "kind.json").write_text(json.dumps(trained.weights_kind))
        with open(self.lines, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell._asdict()) + "\n")
        self.cells.append(cell)
        print(
            f"{self.arm.text}, order {self.seed}, {position + 1:2d} {task:<20} trained {cell.seconds:5.0f} s, "
            f"this task {cell.scores.get(task, mean(cell.scores.values())):.3f}, "
            f"all seen {mean(v for n, v in cell.scores.items() if n in self._seen(position)):.3f}", flush=True,
        )  # fmt: skip

    def _seen(self, position: int) -> list[str]:
        return [t.name for t in (self.tasks if self.arm.strategy == JOINT else self.tasks[: position + 1])]

    def _place(self, position: int) -> Path:
        return self.folder / str(position)

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def matrix(self) -> Matrix:
        """Return the retention matrix, its rows and columns in the order learned."""
        names = [t.name for t in self.tasks]
        values = [[cell.scores.get(name) for name in names] for cell in self.cells]
        return Matrix(tasks=names, versions=names, values=values)

    def summary(self) -> dict[str, float]:
        """Return the figures of this stream; accuracy and transfer as shares, times in seconds, sizes in bytes."""
        times = {"seconds": sum(c.seconds for c in self.cells), "cpu_seconds": sum(c.cpu_seconds for c in self.cells)}
        if self.arm.strategy == JOINT:
            return {"accuracy": mean(self.cells[0].scores.values())} | times
        found = self.matrix()
        return {
            "accuracy": found.average_accuracy, "learned": found.just_learned, "bwt": found.backward_transfer,
            "forgetting": found.forgetting or 0.0, "kept_kb": sum(c.kept_bytes for c in self.cells) / 1000,
        } | times  # fmt: skip


def mean(values) -> float:
    """Return the mean of any iterable."""
    found = list(values)
    return sum(found) / len(found)


def _bytes(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def curve(made: Matrix) -> list[float]:
    """Return the mean accuracy over the tasks seen so far, after each task."""
    return [mean(row[: i + 1]) for i, row in enumerate(made.values)]


NAMES = {
    "accuracy": "average accuracy", "learned": "just learned", "bwt": "backward transfer", "forgetting": "forgetting",
    "seconds": "training s", "cpu_seconds": "CPU s", "kept_kb": "rows and state kept, kB",
}  # fmt: skip


def show(
    streams: dict[tuple[str, int], Stream], arms: list[Arm], seeds: list[int], judged: bool
) -> list[report.Figure]:
    """Print the table and the main arms' matrices; return the figures."""
    by_arm = {arm.text: [streams[arm.text, seed].summary() for seed in seeds] for arm in arms}
    first = streams[arms[0].text, seeds[0]]
    report.table(
        f"{len(first.tasks)} tasks of CLINC150, exact match on TEST, {len(seeds)} orders, mean ± 95 % of the mean",
        ["", *NAMES.values()],
        [[arm, *(_text(key, [one[key] for one in found]) if key in found[0] else "" for key in NAMES)]
         for arm, found in by_arm.items()],
    )  # fmt: skip
    figures = bars(by_arm, arms, judged) if {NAIVE, JOINT} <= {arm.strategy for arm in arms} else []
    for arm, found in by_arm.items():
        for key, name in NAMES.items():
            if key in found[0]:
                value, margin = report.interval([one[key] for one in found])
                figures.append(report.figure(f"{arm}: {name}", value))
                if margin is not None:
                    figures.append(report.figure(f"{arm}: {name}, half of its 95 % interval", margin))
    report.verdicts(figures)
    return figures


def bars(by_arm: dict[str, list[dict]], arms: list[Arm], judged: bool) -> list[report.Figure]:
    """Return what the default is held to, over the orders; naive of its own method, and the best joint of any."""
    ours = next((arm for arm in arms if arm.strategy == DEFAULT_STRATEGY), None)
    if ours is None:
        return []
    of = lambda strategy: next(  # noqa: E731
        by_arm[a.text] for a in sorted(arms, key=lambda a: a.method != ours.method) if a.strategy == strategy
    )
    gap = lambda a, b, key: mean(x[key] - y[key] for x, y in zip(a, b, strict=True))  # noqa: E731
    own, naive = by_arm[ours.text], of(NAIVE)
    joint = max(
        (by_arm[a.text] for a in arms if a.strategy == JOINT), key=lambda found: mean(o["accuracy"] for o in found)
    )
    times = mean(x["cpu_seconds"] / y["cpu_seconds"] for x, y in zip(own, naive, strict=True))
    return [
        report.figure("naive: backward transfer", mean(one["bwt"] for one in naive), at_most=-0.20, judged=judged),
        report.figure(f"{ours.text}: forgetting", mean(o["forgetting"] for o in own), at_most=0.02, judged=judged),
        report.figure(
            f"best joint accuracy minus {ours.text}", gap(joint, own, "accuracy"), at_most=0.02, judged=judged
        ),
        report.figure(f"{ours.text}: CPU time of training over naive", times, at_most=1.35, judged=judged),
        report.figure(f"naive just learned minus {ours.text}", gap(naive, own, "learned"), at_most=0.01, judged=judged),
    ]


def _text(key: str, values: list[float]) -> str:
    return report.plus_minus(values, 0 if key in ("seconds", "cpu_seconds", "kept_kb") else 3)


def plot(streams: dict[tuple[str, int], Stream], arms: list[Arm], seeds: list[int], file: Path) -> None:
    """Draw accuracy over the tasks seen, for every arm, and joint as a line."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.8), layout="constrained", facecolor="white")
    count, ends = len(streams[arms[0].text, seeds[0]].tasks), []
    places = range(1, count + 1)
    for arm, colour in zip([arm for arm in arms if arm.strategy != JOINT], PALETTE * 3, strict=False):
        curves = [curve(streams[arm.text, seed].matrix()) for seed in seeds]
        middle = [mean(one[i] for one in curves) for i in range(count)]
        axis.plot(
            places,
            middle,
            color=colour,
            linewidth=2.2 if arm.strategy == DEFAULT_STRATEGY else 1.4,
            marker="o",
            markersize=3,
        )
        ends.append((middle[-1], arm.text, colour))
    low = -1.0
    for height, name, colour in sorted(ends):
        low = max(height, low + 0.045)  # names do not lie on each other
        axis.annotate(name, (count, height), (count + 0.25, low), color=colour, va="center", fontsize=9)
    for arm in (arm for arm in arms if arm.strategy == JOINT):
        height = mean(streams[arm.text, seed].summary()["accuracy"] for seed in seeds)
        axis.axhline(height, color="#64748b", linewidth=1.1, linestyle=(0, (5, 4)), zorder=0)
        axis.annotate(
            f"{arm.text}: all at once", (count * 1.3, height), (0, -4), textcoords="offset points", color="#64748b",
            fontsize=9, ha="right", va="top",
        )  # fmt: skip
    axis.set(xlabel="tasks learned", ylim=(0, 1.05), xlim=(0.7, count * 1.3), xticks=places)
    axis.set_title(f"Exact match on TEST over the tasks seen, mean of {len(seeds)} orders", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)


def side_by_side(todo: list[Stream], workers: int, command: list[str]) -> None:
    """Do several streams at a time, each in a process of its own with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CLM_THREADS": str(threads)}
    waiting, running = list(todo), []
    while waiting or running:
        while waiting and len(running) < workers:
            one = waiting.pop(0)
            arguments = [*command, "--arms", one.arm.text, "--seeds", str(one.seed), "--only"]
            running.append(
                subprocess.Popen([sys.executable, "-m", "benchmarks", "retention", *arguments], env=environment)
            )
        time.sleep(0.5)
        for child in [c for c in running if c.poll() is not None]:
            running.remove(child)
            if child.returncode:
                raise SystemExit(f"A stream ended with status {child.returncode}; its own words stand above.")


def sources_of(options) -> list[TaskSource]:
    """Return the stream that was asked for, its files made where they have to be."""
    return stream_from(report.clinc150(options.data), options.tasks, report.WORK / "rows")


def main() -> None:
    """Read the command line, do what is missing, show all."""
    parser = report.arguments(__doc__)
    parser.add_argument("--data", type=Path, default=report.CLINC150, help="folder of CLINC150")
    parser.add_argument("--tasks", type=int, default=10, help="domains learned, from the front")
    parser.add_argument(
        "--arms", nargs="+", default=[NAIVE, "replay@0.05", DEFAULT_STRATEGY, JOINT], help="strategy@share:method"
    )
    parser.add_argument(
        "--method", default="", help="way to tune of every arm that names none; empty: as for the default"
    )
    parser.add_argument("--rows-per-label", type=int, help="cut each task's training part to so many rows of a label")
    parser.add_argument("--workers", type=int, default=1, help="streams at a time")
    parser.add_argument("--only", action="store_true", help="do the streams and show nothing")
    parser.add_argument("--work", type=Path, default=report.WORK / "retention", help="folder of what is done")
    parser.add_argument("--fresh", action="store_true", help="do again what is done")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.svg or .png)")
    options = parser.parse_args()
    knobs = {}
    if options.quick:
        options.tasks, options.seeds, options.rows_per_label = (
            QUICK["tasks"],
            options.seeds[:1],
            QUICK["rows_per_label"],
        )
        knobs = {"epochs": QUICK["epochs"], "least_steps": QUICK["least_steps"]}
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    method = options.method or default_method()
    arms = [Arm.read(text, method) for text in options.arms]
    tasks = learnable(sources_of(options), report.WORK / "rows", options.rows_per_label)
    streams = {
        (arm.text, seed): Stream(arm, seed, tasks, TrainingSettings(**knobs), options.work)
        for seed in options.seeds for arm in arms
    }  # fmt: skip
    todo = [stream for stream in streams.values() if not stream.is_done]
    report.console.print(f"{report.machine()}; {len(todo)} of {len(streams)} streams are to do")
    if options.workers > 1 and len(todo) > 1:
        mine = [
            "--data",
            str(options.data),
            "--tasks",
            str(options.tasks),
            "--work",
            str(options.work),
            "--method",
            method,
        ]
        mine += ["--rows-per-label", str(options.rows_per_label)] * bool(options.rows_per_label) + [
            "--quick"
        ] * options.quick
        side_by_side(todo, options.workers, mine)
        streams = {
            key: Stream(s.arm, s.seed, tasks, TrainingSettings(**knobs), options.work) for key, s in streams.items()
        }
    else:
        for stream in todo:
            stream.go()
    if options.only:
        return
    figures = show(streams, arms, options.seeds, judged=not options.quick)
    if options.plot:
        plot(streams, arms, options.seeds, options.plot)
    raw = {
        arm.text: {seed: {
            "matrix": None if arm.strategy == JOINT else streams[arm.text, seed].matrix().model_dump(),
            "scores": streams[arm.text, seed].cells[-1].scores, "summary": streams[arm.text, seed].summary(),
            "strategies": sorted({cell.strategy for cell in streams[arm.text, seed].cells}),
        } for seed in options.seeds} for arm in arms
    }  # fmt: skip
    report.write(options.json, figures, report.chosen(options) | {
        "training": TrainingSettings(**knobs).model_dump(),
        "rows": {t.name: len(t.file("train").read_text(encoding="utf-8").splitlines()) for t in tasks},
    }, raw)  # fmt: skip


if __name__ == "__main__":
    report.run(main)
