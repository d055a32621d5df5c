"""Two versions side by side on the same test rows: what each task gained or lost, and which rows flipped."""

from __future__ import annotations

from typing import Any

from ui.parts.words import card, chip, count, percent, points, safe, table

SHOWN = 60  # flipped rows; the API has all


def with_without(found: dict[str, Any]) -> str:
    """Return the comparison as HTML. found: as `questions.compare` gives it."""
    before, after = found["before"], found["after"]
    rows = [
        [safe(t["task"]), percent(t["before"]), percent(t["after"]), _change(t["change_points"]),
         f"{t['lost']:,}", f"{t['gained']:,}", f"{t['items']:,}"]
        for t in found["tasks"]
    ]  # fmt: skip
    heads = ["Task", before, after, "Change", "Lost", "Gained", "Test rows"]
    scores = table(
        heads, rows, "Exact match on the same test rows; lost and gained are rows that flipped", is_safe=True
    )
    lost = sum(t["lost"] for t in found["tasks"])
    note = f"{count(lost, 'row')} lost, {sum(t['gained'] for t in found['tasks']):,} gained"
    return card(f"From {before} to {after}", scores + _flips(found["flips"]), note)


def _change(change_points: float) -> str:
    kind = "clm-lost" if change_points <= -10 else ""
    return f'<span class="{kind}">{points(change_points / 100)}</span>'


def _flips(flips: list[dict[str, Any]]) -> str:
    if not flips:
        return '<p class="clm-quiet">No row flipped.</p>'
    rows = [
        [chip(f["kind"], "refused" if f["kind"] == "lost" else "accepted"), safe(f["task"]), safe(f["prompt"]),
         safe(f["response"]), f"{f['loss_before']:.1f} → {f['loss_after']:.1f}", safe(f["route"] or "–")]
        for f in flips[:SHOWN]
    ]  # fmt: skip
    heads = ["", "Task", "Prompt", "Right answer", "Loss, nats", "Adapter"]
    if not any(f["route"] for f in flips):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    among = f", the first {SHOWN}" if len(flips) > SHOWN else ""
    drawn = table(heads, rows, f"{count(len(flips), 'flipped row')}, worst first{among}", is_safe=True)
    return f'<div class="clm-tall clm-wide">{drawn}</div>'
