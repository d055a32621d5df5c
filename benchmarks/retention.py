"""Does the stream stay known? Tasks learned one by one, with every way against forgetting, and all at once (joint).

Each task is trained from the weights after the one before, by the product's own engine with its defaults, and the TEST
part of every task seen is measured after each. An arm is a strategy, written `strategy@share:method`: "replay@0.05"
keeps 5 % of the rows of each past task, "naive:full" tunes every weight. Joint sees all rows at once: what is lost to
learning in order shows against it. Figures: clm_app/judging/matrix.py, which names their sources.

A finished cell is one line of a file per arm and order, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._learning import JOINT, NAIVE, Arm, Stream, mean
from benchmarks._stories import stories
from benchmarks._streams import STREAMS, Kind
from benchmarks._tasks import DEFAULT_STRATEGY, default_method
from clm_app.engine.settings import TrainingSettings
from clm_app.judging import bootstrap
from clm_app.judging.matrix import Matrix
from clm_app.registry.versions import STARTER

QUICK = {"tasks": 2, "rows_per_label": 10, "epochs": 3.0, "least_steps": 1}
MODELS = {"starter": {}, "stories260K": {"learning_rate": 2e-3}}  # LOG.md, "Which strategy": the rate that suits it
PALETTE = ("#0f766e", "#c2410c", "#1d4ed8", "#a16207", "#7e22ce", "#be123c", "#4d7c0f", "#0e7490", "#475569", "#9d174d")
INTERVALS = {  # figures that are drawn again from their items, as clm_app/judging/bootstrap.py names them
    "accuracy": "average_accuracy", "bwt": "backward_transfer", "forgetting": "forgetting", "fwt": "forward_transfer",
    "intransigence": "intransigence",
}  # fmt: skip

NAMES = {
    "accuracy": "average accuracy", "learned": "just learned", "bwt": "backward transfer", "forgetting": "forgetting",
    "fwt": "forward transfer", "intransigence": "intransigence", "first_kept": "first task kept",
    "first_round": "after the first round",
    "worst_round": "worst round", "f1": "token F1", "f1_learned": "token F1 just learned", "f1_lost": "token F1 lost",
    "loss": "nats per token", "loss_risen": "nats per token risen", "cpu_seconds": "CPU s",
    "general_text": "general text, bits per byte", "general_ability": "general ability",
    "kept_kb": "rows and state kept, kB", "weights_mb": "weights, MB",
}  # fmt: skip
WHOLE = ("cpu_seconds", "kept_kb")  # shown without decimals


Streams = dict[tuple[str, int], Stream]
Found = dict[str, dict[int, dict[str, float]]]  # {arm: {order: {figure: value}}}


def show(
    streams: Streams, arms: list[Arm], kind: Kind, seeds: dict[str, list[int]], judged: bool
) -> list[report.Figure]:
    """Print the table; return the figures. seeds: {arm: orders that it was run over}."""
    by_arm = {arm.text: {seed: streams[arm.text, seed].summary() for seed in seeds[arm.text]} for arm in arms}
    for arm, found in by_arm.items():
        for seed, one in found.items():
            one |= drawn(streams, arms, arm, seed)
    names = {key: name for key, name in NAMES.items() if any(key in one[min(one)] for one in by_arm.values())}
    report.table(
        f"{kind.title}; exact match on TEST; mean ± 95 % of the mean over orders, or over items where there is one order",
        ["", "orders", *names.values()],
        [[arm, len(found), *(_text(key, found) for key in names)] for arm, found in by_arm.items()],
    )  # fmt: skip
    figures = bars(streams, by_arm, arms, kind, judged)
    for arm, found in by_arm.items():
        for key, name in names.items():
            if key in found[min(found)]:
                value, margin = spread(key, found)
                figures.append(report.figure(f"{arm}: {name}", value))
                if margin is not None:
                    figures.append(report.figure(f"{arm}: {name}, half of its 95 % interval", margin))
    report.verdicts(figures)
    return figures


def drawn(streams: Streams, arms: list[Arm], arm: str, seed: int) -> dict[str, float]:
    """Return intransigence against the best arm that learns all at once, and half of each figure's interval over items."""
    stream = streams[arm, seed]
    if stream.arm.strategy == JOINT or stream.kind.measured_every > 1:
        return {}
    at_once = [streams[a.text, seed] for a in arms if a.strategy == JOINT and streams[a.text, seed].is_done]
    joint = max(at_once, key=lambda one: one.summary()["accuracy"], default=None)
    above = joint.right_at_once() if joint else [None] * len(stream.names)
    cells = [[stream.untaught[name] for name in stream.names], above, *stream.outcomes()]
    found = bootstrap.intervals([cells])
    halves = {f"{key} ±": (found[name][1] - found[name][0]) / 2 for key, name in INTERVALS.items() if name in found}
    figures = bootstrap.figures(bootstrap.shares(cells))
    return halves | ({"intransigence": float(figures["intransigence"])} if joint else {})


def spread(key: str, found: dict[int, dict[str, float]]) -> tuple[float, float | None]:
    """Return a figure's mean and half the width of its 95 % interval: Student's t over orders; of one order, over items."""
    value, margin = report.interval([one[key] for one in found.values()])
    return value, found[min(found)].get(f"{key} ±") if margin is None else margin


def _text(key: str, found: dict[int, dict[str, float]]) -> str:
    if key not in found[min(found)]:
        return ""
    value, margin = spread(key, found)
    digits = 0 if key in WHOLE else 3
    return f"{round(value, digits) + 0.0:.{digits}f}" + ("" if margin is None else f" ± {margin:.{digits}f}")


def bars(streams: Streams, by_arm: Found, arms: list[Arm], kind: Kind, judged: bool) -> list[report.Figure]:
    """Return what the default is held to; over the orders that both sides of a comparison were run over."""
    ours = next((arm for arm in arms if arm.strategy == DEFAULT_STRATEGY), None)
    if ours is None:
        return []
    own, found = by_arm[ours.text], []
    gap = lambda a, b, key: mean(a[s][key] - b[s][key] for s in a.keys() & b.keys())  # noqa: E731
    of = lambda strategy: [  # noqa: E731
        by_arm[a.text] for a in sorted(arms, key=lambda a: a.method != ours.method) if a.strategy == strategy
    ]
    say = lambda *args, **bounds: found.append(report.figure(*args, **bounds, judged=judged))  # noqa: E731
    if kind.measured_every > 1:
        say(f"{ours.text}: last round minus first", mean(o["accuracy"] - o["first_round"] for o in own.values()),
            at_least=-0.01)  # fmt: skip
        return found
    if "first_kept" in own[min(own)] and streams[ours.text, min(own)].names[0] == "facts":
        say(f"{ours.text}: facts kept", mean(one["first_kept"] for one in own.values()), at_least=0.95)
    if kind.is_text:
        for key in ("f1", "loss"):
            rivals = {arm: one for arm, one in by_arm.items() if arm != ours.text and key in one[min(one)]}
            for arm, one in rivals.items():
                found.append(report.figure(f"{NAMES[key]}: {ours.text} minus {arm}", gap(own, one, key)))
        return found
    say(f"{ours.text}: forgetting", mean(o["forgetting"] for o in own.values()), at_most=0.02)
    for naive in of(NAIVE)[:1]:
        say("naive: backward transfer", mean(one["bwt"] for one in naive.values()), at_most=-0.20)
        say(f"naive just learned minus {ours.text}", gap(naive, own, "learned"), at_most=0.01)
        times = mean(own[s]["cpu_seconds"] / naive[s]["cpu_seconds"] for s in own.keys() & naive.keys())
        say(f"{ours.text}: CPU time of training over naive", times, at_most=1.35)
    if joints := of(JOINT):
        best = max(joints, key=lambda one: mean(o["accuracy"] for o in one.values()))
        say(f"best joint accuracy minus {ours.text}", gap(best, own, "accuracy"), at_most=0.02)
    rest = [a for a in arms if a.strategy not in (JOINT, DEFAULT_STRATEGY)]
    if rest:
        second = max(rest, key=lambda a: mean(one["accuracy"] for one in by_arm[a.text].values()))
        ahead = lead(streams, ours.text, second.text, sorted(own.keys() & by_arm[second.text].keys()))
        say(f"{ours.text} minus the next best, {second.text}, lower end of its 95 % interval", ahead, at_least=0.0)
    return found


def lead(streams: Streams, ours: str, other: str, seeds: list[int]) -> float:
    """Return the lower end of how far one arm is ahead in average accuracy, in shares, on the same items: the worst order."""
    pairs = [(streams[other, seed].outcomes()[-1], streams[ours, seed].outcomes()[-1]) for seed in seeds]
    return min(bootstrap.changes(*pair)[-1][0] for pair in pairs)


def curve(made: Matrix) -> list[float]:
    """Return the mean accuracy over the tasks seen so far, after each measurement."""
    return [
        mean(value for value in row[: max(i + 1, sum(v is not None for v in row) - 1)] if value is not None)
        for i, row in enumerate(made.values)
    ]


def plot(streams: Streams, arms: list[Arm], seeds: dict[str, list[int]], title: str, file: Path) -> None:
    """Draw accuracy over the tasks seen, for every arm, and joint as a line."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.8), layout="constrained", facecolor="white")
    count, ends = len(next(iter(streams.values())).measured), []
    places = range(1, count + 1)
    for arm, colour in zip([arm for arm in arms if arm.strategy != JOINT], PALETTE * 3, strict=False):
        curves = [curve(streams[arm.text, seed].matrix()) for seed in seeds[arm.text]]
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
        height = mean(streams[arm.text, seed].summary()["accuracy"] for seed in seeds[arm.text])
        axis.axhline(height, color="#64748b", linewidth=1.1, linestyle=(0, (5, 4)), zorder=0)
        axis.annotate(
            f"{arm.text}: all at once", (count * 1.5, height), (0, -4), textcoords="offset points", color="#64748b",
            fontsize=9, ha="right", va="top",
        )  # fmt: skip
    axis.set(xlabel="tasks learned", ylim=(0, 1.05), xlim=(0.7, count * 1.5), xticks=places)
    axis.set_title(f"{title}: exact match on TEST over the tasks seen", loc="left", fontsize=11)
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


def main() -> None:
    """Read the command line, do what is missing, show all."""
    parser = report.arguments(__doc__)
    parser.add_argument("--stream", choices=STREAMS, default="clinc150", help="which tasks are learned")
    parser.add_argument(
        "--data", type=Path, default=report.DATA, help="folder of data sets, CLINC150 as clinc150 in it"
    )
    parser.add_argument("--model", choices=MODELS, default="starter", help="stories260K: the fast set")
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
    parser.add_argument(
        "--done", action="store_true", help="do nothing more: show every order that is done of each arm"
    )
    parser.add_argument("--work", type=Path, default=report.WORK / "retention", help="folder of what is done")
    parser.add_argument("--fresh", action="store_true", help="do again what is done")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.svg or .png)")
    options = parser.parse_args()
    knobs, kind = dict(MODELS[options.model]), STREAMS[options.stream]
    model = STARTER if options.model == "starter" else stories(options.data / options.model, report.WORK)
    if options.quick:
        options.tasks, options.seeds = QUICK["tasks"], options.seeds[:1]
        options.rows_per_label = QUICK["rows_per_label"]
        knobs |= {"epochs": QUICK["epochs"], "least_steps": QUICK["least_steps"]}
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    method = options.method or default_method()
    arms = [Arm.read(text, method) for text in options.arms]
    tasks = kind.make(options.data, options.tasks, options.rows_per_label, report.WORK / "rows")
    asked = {(arm.text, seed): (arm, seed) for seed in options.seeds for arm in arms}
    found = lambda: {  # noqa: E731
        key: Stream(*one, kind, tasks, TrainingSettings(**knobs), model, options.work) for key, one in asked.items()
    }
    streams = found()
    todo = [] if options.done else [stream for stream in streams.values() if not stream.is_done]
    report.console.print(f"{report.machine()}; {len(todo)} of {len(streams)} streams are to do")
    if options.workers > 1 and len(todo) > 1:
        mine = [
            "--stream", options.stream, "--data", str(options.data), "--tasks", str(options.tasks),
            "--work", str(options.work), "--method", method, "--model", options.model,
        ]  # fmt: skip
        mine += ["--rows-per-label", str(options.rows_per_label)] * bool(options.rows_per_label)
        side_by_side(todo, options.workers, [*mine, *["--quick"] * options.quick])
        streams = found()
    else:
        for stream in todo:
            stream.go()
    if options.only:
        return
    seeds = {arm.text: [s for s in options.seeds if streams[arm.text, s].is_done] for arm in arms}
    arms = [arm for arm in arms if seeds[arm.text]]
    figures = show(streams, arms, kind, seeds, judged=not options.quick)
    if options.plot:
        plot(streams, arms, seeds, kind.title, options.plot)
    raw = {arm.text: {seed: raw_of(streams[arm.text, seed]) for seed in seeds[arm.text]} for arm in arms}
    report.write(options.json, figures, report.chosen(options) | {
        "training": TrainingSettings(**knobs).model_dump(),
        "rows": {t.name: len(t.file("train").read_text(encoding="utf-8").splitlines()) for t in tasks},
    }, raw)  # fmt: skip


def raw_of(stream: Stream) -> dict:
    """Return what a stream measured, for the report."""
    return {
        "matrix": None if stream.arm.strategy == JOINT else stream.matrix().model_dump(),
        "scores": stream.cells[-1].scores, "summary": stream.summary(),
        "strategies": sorted({cell.strategy for cell in stream.cells}), "code": sorted({c.code for c in stream.cells}),
    }  # fmt: skip


if __name__ == "__main__":
    report.run(main)
