"""How well, and how soon, does the starter learn one new domain? Validation accuracy and seconds on a CLINC150 domain.

The product's own engine and defaults tune the shipped starter with LoRA (`--method` takes others); the starter has
seen no row of CLINC150. Seconds are wall time of the training alone, so the load of the machine is printed with them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._tasks import Learnable, learnable, order
from clm_app.data.streams import stream_from
from clm_app.engine.loop import Engine
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadSettings
from clm_app.events import Trained

QUICK = {"rows_per_label": 20, "epochs": 3.0, "least_steps": 1}
LEAST_ACCURACY, MOST_SECONDS = 0.93, 90.0


def tune(task: Learnable, method: str, training: TrainingSettings) -> dict:
    """Tune the starter on one task; return accuracy on validation and test, wall and CPU seconds, and what it took."""
    with tempfile.TemporaryDirectory() as folder:
        cpu, at_trained = time.process_time(), []
        say = lambda event: at_trained.append(time.process_time()) if isinstance(event, Trained) else None  # noqa: E731
        wanted = order(
            Path(folder), task.file("train"), training, method=method,
            after=(task.exam("validation"), task.exam("test")),
        )  # fmt: skip
        trained, (validation, test) = Engine(wanted, say).run()
    return {
        "task": task.name, "seed": training.seed, "validation": validation.exact_match, "test": test.exact_match,
        "seconds": trained.figures["seconds"], "cpu_seconds": round(at_trained[0] - cpu, 1),
        "steps": trained.figures["steps"], "tokens_per_s": trained.figures["tokens_per_s"],
        "trained_parameters": trained.figures["trained_parameters"],
    }  # fmt: skip


def main() -> None:
    """Read the command line, tune, show."""
    parser = report.arguments(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument("--data", type=Path, default=report.CLINC150, help="folder of CLINC150")
    parser.add_argument("--domain", default="banking", help="the domain to learn")
    parser.add_argument("--all", action="store_true", help="every domain, each from the starter")
    parser.add_argument("--method", default="lora", help="way to tune")
    parser.add_argument(
        "--epochs", type=float, default=6.0, help='passes (LOG.md, "Training defaults": lora wants six)'
    )
    options = parser.parse_args()
    cache = report.WORK / "rows"
    sources = stream_from(report.clinc150(options.data), None, cache)
    names = [source.name for source in sources]
    if not options.all:
        sources = [source for source in sources if source.name == options.domain.replace("_", " ")]
    if not sources:
        raise BadSettings(f"{options.domain!r} is not among the domains: {', '.join(names)}. Choose one of these.")
    report.console.print(report.machine())
    knobs = {"epochs": options.epochs}
    if options.quick:
        knobs = {"epochs": QUICK["epochs"], "least_steps": QUICK["least_steps"]}
    found = []
    for task in learnable(sources, cache, QUICK["rows_per_label"] if options.quick else None):
        for seed in options.seeds:
            found.append(tune(task, options.method, TrainingSettings(**knobs, seed=seed)))
            one = found[-1]
            report.console.print(
                f"{one['task']}, seed {seed}: validation {one['validation']:.3f} after {one['seconds']:.0f} s"
            )
    keys = ["validation", "test", "seconds", "cpu_seconds", "steps", "tokens_per_s", "trained_parameters"]
    report.table(
        f"The starter tuned with {options.method}", ["domain", *(key.replace("_", " ") for key in keys)],
        [[f"{one['task']}, seed {one['seed']}", *(one[key] for key in keys)] for one in found], report.machine(),
    )  # fmt: skip
    judged, figures = not options.quick, []
    for one in found:
        name = f"{one['task']}, seed {one['seed']}"
        figures.append(report.figure(f"{name}: validation", one["validation"], at_least=LEAST_ACCURACY, judged=judged))
        figures.append(report.figure(f"{name}: seconds", one["seconds"], at_most=MOST_SECONDS, judged=judged))
        figures.append(report.figure(f"{name}: test", one["test"]))
    report.verdicts(figures)
    settings = report.chosen(options) | {"training": TrainingSettings(**knobs).model_dump()}
    report.write(options.json, figures, settings, found)


if __name__ == "__main__":
    report.run(main)
