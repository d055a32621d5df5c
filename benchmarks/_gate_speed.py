"""What a benchmark of a thousand items costs beside the forward passes that it needs at least, over the same batches in turns."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._streams import domains

# isort: split
import torch

from clm_app.engine import measure
from clm_app.engine.batches import answer_logits, tensors
from clm_app.engine.examiner import ExaminationSettings, Paper, Sitting
from clm_app.engine.examining import Trained, batches, sit
from clm_app.probes.kinds._base import BenchmarkItem
from clm_app.registry.versions import STARTER

ITEMS = 1000


class Turn(NamedTuple):
    """CPU seconds of one turn: the whole examination, the same batches made and passed, and the passes alone."""

    examined: float
    batched: float
    passed: float


def turns(data: Path, root: Path, items: int, count: int) -> list[Turn]:
    """Let the starter sit so many items `count` times, each time beside a bare loop over the same batches."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    paper = Paper(key="speed", name="speed", kind="exact_match", settings={}, split="test", file=root / "items.jsonl")
    chosen = written(data, paper.file, items)
    candidate = Trained(Sitting(
        folder=root, version="v0", base=STARTER, adapter=None, on="trained", backend="engine", converted=root / "copy",
        threads=1, run=ExaminationSettings(), papers=[paper],
    ))  # fmt: skip
    torch.set_num_threads(1)
    made = ready(candidate, chosen)
    found = []
    for turn in range(count + 1):
        first = bare(candidate, made) if turn % 2 else None  # who follows whom changes with each turn
        began = time.process_time()
        sit(paper, candidate, root, lambda event: None)
        examined = time.process_time() - began
        (root / "speed.jsonl").unlink()
        batched, passed = first or bare(candidate, made)
        if turn:  # the first turn warms both up
            found.append(Turn(examined, batched, passed))
    return found


def written(data: Path, file: Path, count: int) -> list[BenchmarkItem]:
    """Write so many test rows of all domains as items of exact match and return them."""
    rows = [row for task in domains(data, None, 50, report.WORK / "rows") for row in measure.load(task.file("test"))]
    step = max(1, len(rows) // count)
    items = [BenchmarkItem(prompt=row.prompt, expected=row.response) for row in rows[::step][:count]]
    file.write_text("".join(item.model_dump_json() + "\n" for item in items), encoding="utf-8")
    return items


def ready(candidate: Trained, items: list[BenchmarkItem]) -> list[list[tuple[list[int], list[int]]]]:
    """Return the batches of token ids that the examination passes through the model."""
    pairs = list(zip(
        candidate._prompts([item.prompt for item in items]), candidate._replied([i.answers[0] for i in items]), strict=True
    ))  # fmt: skip
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    places = batches(lengths, candidate.prompt.context, candidate.run.batch_tokens, measure.ROWS)
    return [[pairs[i] for i in batch] for batch in places]


@torch.no_grad()
def bare(candidate: Trained, made: list) -> tuple[float, float]:
    """Return (CPU seconds with the tensors' making, CPU seconds of the passes alone) over ready token ids."""

    class Ids:
        tokenizer = candidate.tokenizer

        def __call__(self, ids):
            return ids

    began = time.process_time()
    passed = 0.0
    for batch in made:
        inputs = tensors(batch, Ids(), candidate.device)
        at = time.process_time()
        answer_logits(candidate.model, inputs)
        passed += time.process_time() - at
    return time.process_time() - began, passed


def ratio(found: list[Turn], beside: str) -> float:
    """Return the median over turns of the examination's time over the bare loop's."""
    return statistics.median(turn.examined / getattr(turn, beside) for turn in found)
