"""Does the stream stay known? CLINC150's domains learned one by one: naive, replay (the product's default), and joint.

Each task is trained from the weights after the one before, by the product's own engine, and every task's TEST part is
measured after each. Joint sees all rows at once, each as often as in a stream: what is lost to learning in order shows
against it. Figures: Lopez-Paz and Ranzato 2017 (arXiv:1706.08840); forgetting: Chaudhry et al. 2018 (arXiv:1801.10112).

A finished cell is one line of the work file, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._tasks import DEFAULT_STRATEGY, Learnable, default_method, learnable, order, together
from clm_app.catalog import pick
from clm_app.data.streams import stream_from
from clm_app.engine.loop import Engine
from clm_app.engine.settings import TrainingSettings
from clm_app.events import Trained
from clm_app.judging.matrix import Matrix
from clm_app.provenance import code_version
from clm_app.registry.versions import STARTER
from store.objects import file_digest

JOINT = "joint"
QUICK = {"tasks": 2, "rows_per_label": 15, "epochs": 3.0, "least_steps": 1}


class Cell(NamedTuple):
    """One finished training and its measurements. scores: {task name: exact match on TEST, 0..1}, unseen tasks too."""

    key: str
    arm: str
    seed: int
    position: int
    task: str
    scores: dict[str, float]
    figures: dict
    cpu_seconds: float
    code: str


class Bench:
    """The plan of a run: which tasks, in which arms, over which seeds; and the cells that are done."""

    def __init__(self, options, tasks: list[Learnable], training: TrainingSettings) -> None:
        self.options, self.tasks, self.training = options, tasks, training
        self.arms = ["naive", options.strategy]
        self.key = self._key()
        self.folder = options.work.with_suffix("") / self.key
        self.done = self._read()

    def _key(self) -> str:
        """Return twelve digits over everything that decides a cell but the code, which each line names itself."""
        knobs = {
            "training": self.training.model_dump(exclude={"seed"}), "method": self.options.method,
            "settings": [
                pick(f"clm_app.{shelf}", name).Settings().model_dump()
                for shelf, name in (("methods", self.options.method), ("strategies", self.options.strategy))
            ],
            "strategy": self.options.strategy, "model": file_digest(STARTER / "model.safetensors"),
            "tasks": [(t.name, file_digest(t.file("train")), file_digest(t.file("test"))) for t in self.tasks],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:12]

    def _read(self) -> dict[tuple[str, int, int], Cell]:
        if not self.options.work.exists():
            return {}
        whole, _, cut_off = self.options.work.read_text(encoding="utf-8").rpartition("\n")
        if cut_off:  # the power failed within a line
            self.options.work.write_text(whole + "\n" if whole else "", encoding="utf-8")
        cells = [Cell(**json.loads(line)) for line in whole.splitlines()]
        return {(c.arm, c.seed, c.position): c for c in cells if c.key == self.key}

    def ordered(self, seed: int) -> list[Learnable]:
        """Return the tasks in the order of this seed: each seed begins a third of the stream further on."""
        start = seed * max(1, len(self.tasks) // 3) % len(self.tasks)
        return self.tasks[start:] + self.tasks[:start]

    def go(self) -> None:
        """Do every cell that is not done, one seed after the other."""
        for seed in self.options.seeds:
            for arm in self.arms:
                self.stream(arm, seed)
            self.joint(seed)

    def stream(self, arm: str, seed: int) -> None:
        """Learn the tasks one after the other from where the work file ends."""
        tasks, place = self.ordered(seed), self.folder / f"{arm}-{seed}"
        kind = pick("clm_app.methods", self.options.method).weights_kind
        first = next((i for i in range(len(tasks)) if (arm, seed, i) not in self.done), len(tasks))
        if 0 < first < len(tasks) and not (place / str(first - 1) / "weights").exists():
            first = 0  # the lines were kept and the weights were not: they cannot be gone on from
        for position in range(first, len(tasks)):
            task, folder, before = tasks[position], place / str(position), place / str(position - 1)
            kept = {str(t.number): place / str(i) / "kept.jsonl" for i, t in enumerate(tasks[:position])}
            self.cell(arm, seed, position, task.name, order(
                folder, task.file("train"), self.training.model_copy(update={"seed": seed}), strategy=arm,
                method=self.options.method, weights=before / "weights" if position else None,
                weights_kind=kind if position else "", after=[t.exam("test") for t in self.tasks],
                kept={number: file for number, file in kept.items() if file.exists()},
            ))  # fmt: skip
            shutil.rmtree(before / "weights", ignore_errors=True)

    def joint(self, seed: int) -> None:
        """Learn all tasks in one training of as many passes."""
        if (JOINT, seed, 0) not in self.done:
            place = self.folder / f"{JOINT}-{seed}"
            self.cell(JOINT, seed, 0, "all", order(
                place, together(self.ordered(seed), place / "rows.jsonl"), method=self.options.method,
                training=self.training.model_copy(update={"seed": seed}), after=[t.exam("test") for t in self.tasks],
            ))  # fmt: skip

    def cell(self, arm: str, seed: int, position: int, task: str, wanted) -> None:
        """Train and measure once, and add the line."""
        shutil.rmtree(wanted.folder / "checkpoints", ignore_errors=True)  # half a cell would have half of its CPU time
        cpu, began = time.process_time(), time.monotonic()
        at_trained: list[float] = []
        say = lambda event: at_trained.append(time.process_time()) if isinstance(event, Trained) else None  # noqa: E731
        trained, measured = Engine(wanted, say).run()
        names = {t.number: t.name for t in self.tasks}
        cell = Cell(
            self.key, arm, seed, position, task, {names[m.snapshot_id]: m.exact_match for m in measured}, trained.figures,
            round(at_trained[0] - cpu, 2), code_version(),
        )  # fmt: skip
        shutil.rmtree(wanted.folder / "checkpoints", ignore_errors=True)
        self.options.work.parent.mkdir(parents=True, exist_ok=True)
        with open(self.options.work, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell._asdict()) + "\n")
        self.done[arm, seed, position] = cell
        report.console.print(
            f"{arm:>7}, seed {seed}, {position + 1:2d} {task:<20} trained {trained.figures['seconds']:5.0f} s, "
            f"all {time.monotonic() - began:5.0f} s, this task {cell.scores.get(task, mean(cell.scores.values())):.3f}"
        )

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def matrix(self, arm: str, seed: int) -> Matrix:
        """Return the retention matrix of one stream, its rows and columns in the order learned."""
        names = [t.name for t in self.ordered(seed)]
        rows = [self.done[arm, seed, i].scores for i in range(len(names))]
        return Matrix(tasks=names, versions=names, values=[[row[name] for name in names] for row in rows])

    def summary(self, arm: str, seed: int) -> dict[str, float]:
        """Return the figures of one stream or of joint."""
        if arm == JOINT:
            cells, figures = [self.done[JOINT, seed, 0]], {"accuracy": mean(self.done[JOINT, seed, 0].scores.values())}
        else:
            cells, made = [self.done[arm, seed, i] for i in range(len(self.tasks))], self.matrix(arm, seed)
            figures = {
                "accuracy": made.average_accuracy, "bwt": made.backward_transfer, "learned": made.just_learned,
                "forgetting": forgetting(made),
            }  # fmt: skip
        return figures | {
            "seconds": sum(c.figures["seconds"] for c in cells), "cpu_seconds": sum(c.cpu_seconds for c in cells),
        }  # fmt: skip


def mean(values) -> float:
    """Return the mean of any iterable."""
    found = list(values)
    return sum(found) / len(found)


def forgetting(made: Matrix) -> float:
    """Return the mean, over all tasks but the last, of what each lost since its best moment; below 0 is gain."""
    count = len(made.tasks)
    lost = [max(made.values[i][j] for i in range(j, count - 1)) - made.last[j] for j in range(count - 1)]
    return mean(lost) if lost else 0.0


def curve(made: Matrix) -> list[float]:
    """Return the mean accuracy over the tasks seen so far, after each task."""
    return [mean(row[: i + 1]) for i, row in enumerate(made.values)]


def show(bench: Bench) -> list[report.Figure]:
    """Print the tables and return the figures."""
    seeds, ours = bench.options.seeds, bench.options.strategy
    by_arm = {arm: [bench.summary(arm, seed) for seed in seeds] for arm in (*bench.arms, JOINT)}
    names = {
        "accuracy": "average accuracy", "bwt": "backward transfer", "learned": "just learned", "forgetting": "forgetting",
        "seconds": "training s", "cpu_seconds": "CPU s",
    }  # fmt: skip
    rows = []
    for arm, found in by_arm.items():
        for seed, one in zip(seeds, found, strict=True):
            rows.append([f"{arm}, seed {seed}", *(_cell(key, [one[key]]) if key in one else "" for key in names)])
        if len(seeds) > 1:
            rows.append([f"[bold]{arm}, mean ± 95 %[/]", *(
                _cell(key, [one[key] for one in found]) if key in found[0] else "" for key in names
            )])  # fmt: skip
    report.table(
        f"{len(bench.tasks)} tasks of CLINC150, exact match on TEST, {bench.options.method}",
        ["", *names.values()],
        rows,
    )
    for arm in bench.arms:
        show_matrix(f"{arm}: mean over the seeds, tasks in the order learned", mean_matrix(bench, arm))
    over = lambda arm, key: [one[key] for one in by_arm[arm]]  # noqa: E731
    gap = lambda a, b, key: mean(x - y for x, y in zip(over(a, key), over(b, key), strict=True))  # noqa: E731
    times = lambda key: mean(x / y for x, y in zip(over(ours, key), over("naive", key), strict=True))  # noqa: E731
    judged = not bench.options.quick
    figures = [
        report.figure("naive backward transfer", mean(over("naive", "bwt")), at_most=-0.20, judged=judged),
        report.figure(f"{ours} forgetting", mean(over(ours, "forgetting")), at_most=0.05, judged=judged),
        report.figure(f"{ours} accuracy minus naive", gap(ours, "naive", "accuracy"), at_least=0.30, judged=judged),
        report.figure(f"joint accuracy minus {ours}", gap(JOINT, ours, "accuracy"), at_most=0.05, judged=judged),
        report.figure(f"{ours} training time, times naive", times("seconds")),
        report.figure(f"{ours} CPU time, times naive", times("cpu_seconds")),
    ]
    for arm, found in by_arm.items():
        for key in names:
            if key in found[0]:
                value, margin = report.interval([one[key] for one in found])
                figures.append(report.figure(f"{arm} {names[key]}, mean", value))
                if margin is not None:
                    figures.append(report.figure(f"{arm} {names[key]}, half of its 95 % interval", margin))
    report.verdicts(figures)
    codes = {cell.code for cell in bench.done.values() if cell.seed in seeds}
    if len(codes) > 1:
        report.console.print(f"[yellow]The cells come from {len(codes)} states of the code; --fresh does all again.[/]")
    return figures


def _cell(key: str, values: list[float]) -> str:
    return report.plus_minus(values, 0 if "seconds" in key else 3)


def mean_matrix(bench: Bench, arm: str) -> list[list[float]]:
    """Return the mean over the seeds, by place in the order learned: the tasks differ from seed to seed."""
    found, count = [bench.matrix(arm, seed).values for seed in bench.options.seeds], len(bench.tasks)
    return [[mean(values[i][j] for values in found) for j in range(count)] for i in range(count)]


def show_matrix(title: str, values: list[list[float]]) -> None:
    """Print a matrix; what was not yet learned stands in brackets."""
    report.table(title, ["after", *(str(j + 1) for j in range(len(values)))], [
        [i + 1, *(f"{value:.2f}" if j <= i else f"({value:.2f})" for j, value in enumerate(row))]
        for i, row in enumerate(values)
    ])  # fmt: skip


def plot(bench: Bench, file: Path) -> None:
    """Draw accuracy over the tasks seen, and the mean matrices beside it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    colours = {"naive": "#c2410c", bench.options.strategy: "#0f766e"}
    seeds, count = bench.options.seeds, len(bench.tasks)
    figure, (left, *right) = pyplot.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=[1.35, 1, 1], layout="constrained", facecolor="white"
    )
    places = range(1, count + 1)
    for arm in bench.arms:
        curves = [curve(bench.matrix(arm, seed)) for seed in seeds]
        middle = [mean(c[i] for c in curves) for i in range(count)]
        for one in curves:
            left.plot(places, one, color=colours[arm], alpha=0.25, linewidth=1)
        left.plot(places, middle, color=colours[arm], linewidth=2.2, marker="o", markersize=4)
        left.annotate(arm, (count, middle[-1]), (6, 0), textcoords="offset points", color=colours[arm], va="center")
    joint = mean(bench.summary(JOINT, seed)["accuracy"] for seed in seeds)
    left.axhline(joint, color="#64748b", linewidth=1.2, linestyle=(0, (5, 4)), zorder=0)
    left.annotate("joint: all tasks at once", (1, joint), (0, 5), textcoords="offset points", color="#64748b")
    left.set(xlabel="tasks learned", ylim=(0, 1.06), xlim=(0.7, count + 0.12 * count), xticks=places)
    left.set_title("Accuracy over the tasks seen", loc="left", fontsize=11)
    left.spines[["top", "right"]].set_visible(False)
    left.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    among = f" (mean of {len(seeds)} orders)" if len(seeds) > 1 else ""
    for axis, arm in zip(right, bench.arms, strict=True):
        values = mean_matrix(bench, arm)
        seen = [[v if j <= i else float("nan") for j, v in enumerate(row)] for i, row in enumerate(values)]
        axis.imshow(seen, vmin=0, vmax=1, cmap="YlGnBu")
        for i, row in enumerate(values):
            for j, value in enumerate(row[: i + 1]):
                ink = "white" if value > 0.6 else "#1f2d38"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axis.set(
            xticks=range(count), xticklabels=places, yticks=range(count), yticklabels=places, xlabel="task measured"
        )
        axis.set_title(f"{arm}: exact match on TEST, %{among}", loc="left", fontsize=11)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    right[0].set_ylabel("after learning task")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)
    pyplot.close(figure)


def main() -> None:
    """Read the command line, do what is missing, show all."""
    parser = report.arguments(__doc__)
    parser.add_argument("--data", type=Path, default=report.CLINC150, help="folder of CLINC150")
    parser.add_argument("--tasks", type=int, default=10, help="domains learned, from the front")
    parser.add_argument("--method", default=default_method(), help="way to tune")
    parser.add_argument("--strategy", default=DEFAULT_STRATEGY, help="way against forgetting, beside naive")
    parser.add_argument("--epochs", type=float, help="passes over each task's rows; empty takes the product's default")
    parser.add_argument("--work", type=Path, default=report.WORK / "retention.jsonl", help="JSON lines, one per cell")
    parser.add_argument("--fresh", action="store_true", help="do again what the work file has already")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw curves and matrices (.svg or .png)")
    options = parser.parse_args()
    if options.quick:
        options.tasks, options.seeds = QUICK["tasks"], options.seeds[:1]
    if options.fresh:
        options.work.unlink(missing_ok=True)
        shutil.rmtree(options.work.with_suffix(""), ignore_errors=True)
    cache = report.WORK / "rows"
    sources = stream_from(report.clinc150(options.data), options.tasks, cache)
    tasks = learnable(sources, cache, QUICK["rows_per_label"] if options.quick else None)
    knobs = {"epochs": QUICK["epochs"], "least_steps": QUICK["least_steps"]} if options.quick else {}
    if options.epochs:
        knobs["epochs"] = options.epochs
    bench = Bench(options, tasks, TrainingSettings(**knobs))
    report.console.print(f"{report.machine()}; {len(bench.done)} cells are done already")
    bench.go()
    figures = show(bench)
    if options.plot:
        plot(bench, options.plot)
    seeds = options.seeds
    raw = {
        "matrices": {arm: {seed: bench.matrix(arm, seed).model_dump() for seed in seeds} for arm in bench.arms},
        "joint": {seed: bench.done[JOINT, seed, 0].scores for seed in seeds},
    }  # fmt: skip
    report.write(options.json, figures, report.chosen(options) | {
        "training": bench.training.model_dump(), "rows": {t.name: len(t.file("train").read_text().splitlines()) for t in tasks},
    }, raw)  # fmt: skip


if __name__ == "__main__":
    report.run(main)
