"""Two versions side by side on the same test rows: what each task gained or lost, and which rows flipped."""

from __future__ import annotations

from typing import Any

from ui.parts.words import between, card, chip, count, percent, points, safe, table

SHOWN = 60  # flipped rows; the API has all
COUNTS = ("lost", "gained", "items")
CAPTION = (
    "Exact match on the same test rows; lost and gained are rows that flipped. In brackets: where the change would lie in "
    "95 of 100 cases, had other test rows been drawn; grey where that holds 0"
)


def with_without(found: dict[str, Any]) -> str:
    """Return the comparison as HTML. found: as `questions.compare` gives it."""
    before, after = found["before"], found["after"]
    rows = [[*_scores(t, t["task"]), *(f"{t[name]:,}" for name in COUNTS)] for t in found["tasks"]]
    lost, gained, items = (sum(t[name] for t in found["tasks"]) for name in COUNTS)
    if len(rows) > 1:
        rows.append([f"<b>{cell}</b>" for cell in (*_scores(found["mean"], "mean of the tasks"), lost, gained, items)])
    heads = ["Task", before, after, "Change", "Lost", "Gained", "Test rows"]
    scores = table(heads, rows, CAPTION, is_safe=True)
    note = f"{count(lost, 'row')} lost, {gained:,} gained"
    return card(f"From {before} to {after}", scores + _flips(found["flips"]), note)


def _scores(one: dict[str, Any], name: str) -> list[str]:
    return [safe(name), _share(one, "before"), _share(one, "after"), _change(one)]


def _share(one: dict[str, Any], side: str) -> str:
    """Return a share, with its interval where that is known."""
    ends = between((one[f"{side}_low"], one[f"{side}_high"]), digits=0) if f"{side}_low" in one else ""
    return f"{percent(one[side])}<small>{ends}</small>" if ends else percent(one[side])


def _change(one: dict[str, Any]) -> str:
    """Return the change with its interval; grey where the interval holds 0, so that chance may have made it."""
    low, high = one["low_points"], one["high_points"]
    kind = "clm-quiet" if low <= 0 <= high else "clm-lost" if one["change_points"] <= -10 else ""
    ends = between((low / 100, high / 100), digits=1)
    return f'<span class="{kind}">{points(one["change_points"] / 100)}{ends}</span>'


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
