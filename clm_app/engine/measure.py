"""Measure what a model knows of a task: exact answers and the likelihood of the right one, from one forward pass.

Greedy decoding gives exactly the right answer if and only if, at every prefix of the right answer, the likeliest next
token is the right one. So one pass over prompt + answer gives both figures, and no text has to be generated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from clm_app.data.rows import Row, load
from clm_app.engine.batches import IGNORED, Encoded, answer_logits, tensors
from clm_app.engine.order import Exam
from clm_app.engine.routed import Routed
from clm_app.events import Measured

ROWS = 64  # rows in one forward pass
NOISE_ROWS = 24  # in one forward pass of the second measurement: other padding, other sums


@torch.no_grad()
def outcomes(
    model: torch.nn.Module, rows: list[Row], encoded: Encoded, device: torch.device, size: int = ROWS
) -> list[dict]:
    """Return one dict per row, in order: item (key), exact (bool), loss (summed nats), tokens (answer tokens).

    A model with one adapter per task answers each row through the adapter that its router names, added as `route`.
    """
    if isinstance(model, Routed):
        return _through_routes(model, rows, encoded, device, size)
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, encoded(rows[i]))))
    found: list[dict] = [{}] * len(rows)
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        logits, targets = answer_logits(model, tensors([rows[i] for i in chosen], encoded, device))
        counts = targets != IGNORED
        right = ((logits.argmax(-1) == targets) | ~counts).all(1)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets).sum(1)  # fmt: skip
        for i, exact, nats, tokens in zip(chosen, right.tolist(), loss.tolist(), counts.sum(1).tolist(), strict=True):
            found[i] = {"item": rows[i].key, "exact": exact, "loss": round(nats, 6), "tokens": tokens}
    return found


def _through_routes(model: Routed, rows: list[Row], encoded: Encoded, device: torch.device, size: int) -> list[dict]:
    found: list[dict] = [{}] * len(rows)
    for task, places in model.groups([row.prompt for row in rows]).items():
        with model.using(task) as answering:
            answered = outcomes(answering, [rows[i] for i in places], encoded, device, size)
            for i, line in zip(places, answered, strict=True):
                found[i] = line | {"route": task}
    return found


def sit(model, exam: Exam, encoded: Encoded, device: torch.device, file: Path, say: Callable) -> Measured:
    """Measure one exam, write its outcomes to `file`, and say the figures."""
    return written(exam, outcomes(model, load(exam.file), encoded, device), file, say)


def written(exam: Exam, found: list[dict], file: Path, say: Callable) -> Measured:
    """Write the outcomes of an exam to `file`, whose folder says when it was sat, and say the figures."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    event = Measured(
        snapshot_id=exam.snapshot_id, split=exam.split, items=len(found), when=file.parent.name,
        exact_match=sum(line["exact"] for line in found) / len(found),
        answer_loss=sum(line["loss"] for line in found) / sum(line["tokens"] for line in found),
        outcomes=str(file),
    )  # fmt: skip
    say(event)
    return event


def noise(model, exam: Exam, encoded: Encoded, device: torch.device, before: Path) -> dict[str, float]:
    """Measure an exam again, in batches of other rows, and return how far the same weights differ from themselves.

    before: outcomes of the first time. Returns items, flips, and loss: the mean absolute difference in nats per answer token.
    """
    rows = load(exam.file)
    first = {line["item"]: line for line in map(json.loads, before.read_text(encoding="utf-8").splitlines())}
    again = outcomes(model, rows[::-1], encoded, device, NOISE_ROWS)
    differences = [abs(line["loss"] - first[line["item"]]["loss"]) / max(line["tokens"], 1) for line in again]
    flips = sum(line["exact"] != first[line["item"]]["exact"] for line in again)
    return {"items": len(again), "flips": flips, "loss": sum(differences) / len(differences)}
