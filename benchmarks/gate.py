"""Does the gate hold what it promises: no worse model promoted, no equal one held back, bad updates named, hurt ones repaired?

simulation: thousands of candidates whose truth is known, drawn from what real update chains answered, before the gate and
before two simpler rules. bad: ten kinds of bad updates through the public way. repair: real update chains of the starter,
each candidate that hurt an old task repaired by the ladder. speed: a benchmark's run beside its bare forward passes.

What is done is kept as lines of files, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import shutil
import statistics
from collections import Counter
from pathlib import Path

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._gate_chains import ARMS, ROWS_PER_LABEL, Candidate, Chains

# isort: split
import torch

from benchmarks import _gate_bad as bad
from benchmarks import _gate_simulation as simulation
from benchmarks import _gate_speed as speed
from clm_app.engine.settings import TrainingSettings

PARTS = ("repair", "simulation", "bad", "speed")
ORDERS = [0, 1, 2]
TRIALS, FEW_TRIALS, TURNS = 1000, 300, 20
QUICK = {  # under a minute on one core: works or not
    "orders": [0], "rows_per_label": 4, "trials": 3, "kinds": ("one class dropped", "template broken", "truncated file"),
    "items": 100, "turns": 1, "knobs": {"epochs": 1, "least_steps": 8, "batch_rows": 16},
    "arms": {"naive:full": 2, "auto:full": 2},
}  # fmt: skip


# --- repair: real chains ------------------------------------------------------------------------------------------------


def repair(found: list[Candidate], judged: bool) -> list[report.Figure]:
    """Print what became of every candidate that hurt an old task; return the figures."""
    failures = [one for one in found if one.is_failure]
    report.table(
        "Candidates that learned and hurt an old task; exact match on TEST, before → trained → repaired",
        ["", "order", "new task", "old tasks", "rung", "CPU s of the climb / of training"],
        [[one.arm, one.order, _path(one, one.task), "; ".join(f"{name} {_path(one, name)}" for name in one.past),
          one.repair["rung"] or "none", f"{one.climb_cpu:.1f} / {one.train_cpu:.1f}"] for one in failures],
        f"{len(found)} candidates; the gate said " + ", ".join(
            f"{verdict} {count}" for verdict, count in Counter(one.verdict for one in found).items()
        ),
    )  # fmt: skip
    rungs = Counter((step["rung"], step["outcome"]) for one in failures for step in one.repair["tried"])
    report.table("By rung", ["rung", "outcome", "how often"], [[*key, count] for key, count in sorted(rungs.items())])
    if not failures:
        return [report.figure("repair: candidates that hurt an old task", 0)]
    recoverable = [one for one in failures if one.is_recoverable]
    passed = sum(one.is_repaired for one in recoverable) / max(len(recoverable), 1)
    cpu = sum(one.climb_cpu for one in failures) / sum(one.train_cpu for one in failures)
    counted = statistics.fmean(
        sum(step.get("cost_share", 0) + step.get("test", {}).get("cost_share", 0) for step in one.repair["tried"])
        for one in failures
    )
    return [
        report.figure("repair: candidates that hurt an old task", len(failures)),
        report.figure("repair: of them recoverable by VALIDATION rows", len(recoverable)),
        report.figure("repair: recoverable ones that pass after repair", passed, at_least=0.6, judged=judged),
        report.figure("repair: all that pass after repair", sum(one.is_repaired for one in failures) / len(failures)),
        report.figure("repair: CPU time of the climb over that of the training", cpu, at_most=0.15, judged=judged),
        report.figure("repair: the same, the worst candidate", max(one.climb_cpu / one.train_cpu for one in failures)),
        report.figure("repair: the same, by the operations that the ladder counts", counted),
    ]


def _path(one: Candidate, task: str) -> str:
    last = f" → {100 * one.repaired[task]:.0f}" if task in one.repaired else ""
    return f"{100 * one.before[task]:.0f} → {100 * one.after[task]:.0f}{last}"


# --- simulation -----------------------------------------------------------------------------------------------------


def simulated(made: simulation.Simulation, cells: list[simulation.Cell], judged: bool) -> list[report.Figure]:
    """Print what every rule did with every truth; return the figures."""
    for name, world in made.worlds.items():
        rows = []
        for one in (cell for cell in cells if cell.world == name):
            rows.append([
                one.truth, one.n, one.trials,
                *(f"{100 * one.share(rule, v):.1f}" for rule in ("gate", "accuracy") for v in simulation.VERDICTS),
                *(f"{100 * one.share(rule, 'promote'):.1f}" for rule in ("mean", "mcnemar")),
            ])  # fmt: skip
        report.table(
            f"{name}: {100 * world.flipping:.1f} % of items flip between equal versions, {made.needed(name):,} items needed; in %",
            ["one of ten is", "n", "trials", *(f"{who}{verdict}" for who in ("", "0: ") for verdict in simulation.VERDICTS),
             "mean: promote", "McNemar: promote"], rows, "0: the gate with loss_margin 0",
        )  # fmt: skip
    of = lambda truth, *n: [c for c in cells if c.truth == truth and (not n or c.n in n)]  # noqa: E731
    worse = [cell for cell in of("5 worse") if cell.n > simulation.TOO_FEW]
    enough = [c for c in of("equal") if c.n >= made.needed(c.world) and c.world != "unmoved"]
    figures = [
        report.figure("simulation: 5 points worse on one of ten, promoted, the worst cell",
                      max(cell.share("gate", "promote") for cell in worse), at_most=0.01, judged=judged),
        report.figure("simulation: equal, enough items, held back, the worst cell",
                      max(1 - cell.share("gate", "promote") for cell in enough), at_most=0.2, judged=judged),
        report.figure("simulation: too few items, inconclusive, the worst cell",
                      min(c.share("gate", "inconclusive") for c in of("equal", simulation.TOO_FEW)), at_least=1.0, judged=judged),
        report.figure("simulation: 5 points worse, too few items, promoted",
                      max(c.share("gate", "promote") for c in of("5 worse", simulation.TOO_FEW))),
    ]  # fmt: skip
    for rule in simulation.RULES:
        figures.append(report.figure(f"simulation: 5 points worse, promoted by {simulation.RULES[rule]}, mean over cells",
                                     statistics.fmean(cell.share(rule, "promote") for cell in worse)))  # fmt: skip
    return figures


# --- bad updates ------------------------------------------------------------------------------------------------------


def named(found: list[bad.Tried], judged: bool) -> list[report.Figure]:
    """Print what became of every kind of bad update; return the figures."""
    kinds = list(dict.fromkeys(one.kind for one in found))
    report.table(
        "Bad updates through the public way", ["", "caught", "named", "how", "said of the first"],
        [[kind, f"{sum(o.is_caught for o in of)} of {len(of)}", f"{sum(o.is_named for o in of)} of {len(of)}",
          ", ".join(sorted({o.how for o in of})), (of[0].sentence[:70] + "…")]
         for kind in kinds if (of := [one for one in found if one.kind == kind])],
    )  # fmt: skip
    wrong = [one for one in found if one.kind != bad.GOOD]
    fine = [one for one in found if one.kind == bad.GOOD]
    for one in wrong:
        if not (one.is_caught and one.is_named):
            report.console.print(
                f"missed: {one.kind}, {one.seed} ({one.detail}): {one.how}, {one.sentence}", markup=False
            )
    both = sum(one.is_caught and one.is_named for one in wrong)
    return [
        report.figure("bad: updates tried", len(wrong)),
        report.figure("bad: caught and named", both, at_least=len(wrong) - 1, judged=judged),
        report.figure("bad: caught", sum(one.is_caught for one in wrong)),
        report.figure("bad: good updates", len(fine)),
        report.figure("bad: good updates promoted and without a cause", sum(o.how == "promote" and not o.causes for o in fine),
                      at_least=len(fine), judged=judged),
    ]  # fmt: skip


# --- speed --------------------------------------------------------------------------------------------------------------


def timed(found: list[speed.Turn], items: int, judged: bool) -> list[report.Figure]:
    """Print the CPU time of every turn; return the figures."""
    report.table(f"{items} items of exact match, the starter, one thread: CPU seconds", ["turn", "examined", "batched", "passed"],
                 [[str(number), *turn] for number, turn in enumerate(found, 1)],
                 "batched: a bare loop that makes the same batches' tensors and passes them; passed: the passes alone")  # fmt: skip
    return [
        report.figure(
            "speed: benchmark over the bare batched forward passes",
            speed.ratio(found, "batched"),
            at_most=1.1,
            judged=judged,
        ),
        report.figure("speed: benchmark over the passes alone", speed.ratio(found, "passed")),
    ]


def main() -> None:
    """Read the command line, do what is missing of the parts, show all."""
    parser = report.arguments(__doc__)
    parser.set_defaults(seeds=list(range(6)))
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is done; simulation draws from repair"
    )
    parser.add_argument(
        "--data", type=Path, default=report.DATA, help="folder of data sets: clinc150 and stories260K in it"
    )
    parser.add_argument("--work", type=Path, default=report.WORK / "gate", help="folder of what is done")
    parser.add_argument("--fresh", action="store_true", help="do again what is done")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick, judged = options.quick, not options.quick
    root = options.work.with_name(f"{options.work.name}-quick") if quick else options.work
    if options.fresh or quick:
        shutil.rmtree(root, ignore_errors=True)
    report.clinc150(options.data / "clinc150")
    report.console.print(report.machine())
    orders, per_label = (QUICK["orders"], QUICK["rows_per_label"]) if quick else (ORDERS, ROWS_PER_LABEL)
    figures: list[report.Figure] = []
    raw: dict[str, list] = {}
    if {"repair", "simulation"} & set(options.parts):
        knobs, arms = (QUICK["knobs"], QUICK["arms"]) if quick else ({}, ARMS)
        chains = Chains(root / "chains", options.data, orders, per_label, TrainingSettings(**knobs), arms)
        raw["repair"] = chains.go()
        figures += repair(raw["repair"], judged) if "repair" in options.parts else []
    if "simulation" in options.parts:
        for number in orders:
            chains.again(number)
        made = simulation.Simulation(root, root / "chains", orders)
        raw["simulation"] = made.go(QUICK["trials"], QUICK["trials"]) if quick else made.go(TRIALS, FEW_TRIALS)
        figures += simulated(made, raw["simulation"], judged)
    if "bad" in options.parts:
        seeds, kinds = (options.seeds[:1], QUICK["kinds"]) if quick else (options.seeds, (bad.GOOD, *bad.KINDS))
        raw["bad"] = bad.tried(root / "bad", options.data, seeds, ROWS_PER_LABEL, kinds, learned=judged)
        figures += named(raw["bad"], judged)
    if "speed" in options.parts:
        items, count = (QUICK["items"], QUICK["turns"]) if quick else (speed.ITEMS, TURNS)
        raw["speed"] = speed.turns(options.data, root / "speed", items, count)
        figures += timed(raw["speed"], items, judged)
    report.verdicts(figures)
    report.write(options.json, figures, report.chosen(options), {
        part: [one._asdict() for one in found] for part, found in raw.items()
    })  # fmt: skip


if __name__ == "__main__":
    report.run(main)
