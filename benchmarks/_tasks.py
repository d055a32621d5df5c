"""The stream that is learned: tasks read and split as the product does, and orders for its engine.

Nothing here decides how training goes: strategy, method and knobs are the product's defaults unless a flag says so.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from clm_app.data.ingest import split
from clm_app.data.reading import read_rows
from clm_app.data.rows import Row, dump, load
from clm_app.data.streams import TaskSource
from clm_app.engine.order import Exam, Order
from clm_app.engine.settings import TrainingSettings
from clm_app.registry.versions import STARTER, count_parameters
from clm_app.settings import Settings
from clm_app.wishes import LearnWish

DEFAULT_STRATEGY: str = LearnWish.model_fields["strategy"].default


def default_method() -> str:
    """Return the method that the product takes for the starter when nobody chooses one."""
    return LearnWish(stream=[TaskSource(name="any")]).method_for(count_parameters(STARTER))


class Learnable(NamedTuple):
    """One task: its number in the stream (the exam's snapshot id), its name, and the folder with its three files.

    least_steps: as the training's knob, where this task needs more than the others.
    """

    number: int
    name: str
    folder: Path
    least_steps: int | None = None

    def file(self, part: str) -> Path:
        """Return the file of train, validation or test."""
        return self.folder / f"{part}.jsonl"

    def exam(self, part: str) -> Exam:
        """Return the exam of one part."""
        return Exam(snapshot_id=self.number, task=self.name, split=part, file=self.file(part))


def learnable(sources: list[TaskSource], cache: Path, rows_per_label: int | None = None) -> list[Learnable]:
    """Return the tasks with their split files in `cache`; rows_per_label cuts the training part, for a quick run."""
    settings, found = Settings(), []
    for number, source in enumerate(sources, 1):
        parts = split(read_rows(Path(source.path), settings).rows, seed=0)
        folder = cache / f"{Path(source.path).stem}-{rows_per_label or 'all'}"
        parts["train"] = few(parts["train"], rows_per_label)
        found.append(written(number, source.name, folder, parts))
    return found


def written(number: int, name: str, folder: Path, parts: dict[str, list[Row]]) -> Learnable:
    """Write the three parts of a task and return it."""
    task = Learnable(number, name, folder)
    for part, rows in parts.items():
        dump(rows, task.file(part))
    return task


def few(rows: list[Row], per_label: int | None) -> list[Row]:
    """Return at most so many rows of each label, chosen by a fixed seed; None keeps all."""
    if per_label is None:
        return rows
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    rng = random.Random(0)
    return [
        row for label in sorted(by_label) for row in rng.sample(by_label[label], min(per_label, len(by_label[label])))
    ]


def together(tasks: list[Learnable], file: Path) -> Path:
    """Write the training rows of all tasks into one file and return it."""
    dump([row for task in tasks for row in load(task.file("train"))], file)
    return file


def order(
    folder: Path, rows: Path, training: TrainingSettings, *, method: str, strategy: str = "naive",
    weights: Path | None = None, weights_kind: str = "", kept: dict[str, Path] | None = None, after: tuple = (),
    model: Path = STARTER,
) -> Order:  # fmt: skip
    """Return the order of one run over a model, or over weights that an earlier run wrote."""
    return Order(
        folder=folder, base=weights if weights_kind == "full" else model,
        adapter=weights if weights_kind in ("adapter", "routed") else None, root=model,
        rows=rows, kept=kept or {}, strategy=strategy,
        strategy_settings={}, method=method, method_settings={}, training=training, before=[], after=list(after),
        threads=Settings().threads,
    )  # fmt: skip
