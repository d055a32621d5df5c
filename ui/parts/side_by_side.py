"""Two versions side by side: their scores and flips, what they cost and take, their benchmarks, and what they reply."""

from __future__ import annotations

from typing import Any

from clm_app.judging.standing import Standing
from ui.parts.standing import MARKS, in_unit, on_disk
from ui.parts.with_without import SHOWN, with_without
from ui.parts.word_diff import as_html
from ui.parts.words import between, card, chip, count, points, safe, span, table


def side_by_side(found: dict[str, Any]) -> str:
    """Return the whole comparison as HTML. found: as `comparing.side_by_side` gives it."""
    return with_without(found) + _costs(found) + _benchmarks(found)


def _costs(found: dict[str, Any]) -> str:
    old, new = (Standing.model_validate(told) for told in found["versions"])
    facts = [
        ("Learned", *(safe(v.learned or "nothing yet") for v in (old, new))),
        ("On disk", *(on_disk(v) for v in (old, new))),
        ("Parameters", *(f"{v.parameters:,}" for v in (old, new))),
        ("Trained for", *(span(v.training_s) for v in (old, new))),
        ("Speed of training", *(f"{v.tokens_per_s:,.0f} tokens/s" if v.tokens_per_s else "–" for v in (old, new))),
        ("The gate", *(safe(v.sentence or "not judged") for v in (old, new))),
    ]
    drawn = table(
        ["", found["before"], found["after"]], [list(fact) for fact in facts], "Size, speed and cost", is_safe=True
    )
    return card("Size, speed and cost", drawn, "energy is not measured")


def _benchmarks(found: dict[str, Any]) -> str:
    if not found["benchmarks"]:
        return ""
    rows = [
        [safe(one["benchmark"]), safe(one["on"]), *(_value(one, side) for side in ("before", "after")), _change(one),
         f"{one['items']:,}"] for one in found["benchmarks"]
    ]  # fmt: skip
    heads = ["Benchmark", "On", found["before"], found["after"], "Change", "Items"]
    caption = "Benchmarks that both sat. In brackets the 95 % interval; of the change, the items drawn in pairs"
    return card("Benchmarks", table(heads, rows, caption, is_safe=True) + _flips(found["benchmark_flips"]))


def _value(one: dict[str, Any], side: str) -> str:
    ends = " to ".join(in_unit(one[f"{side}_{end}"], one["unit"]) for end in ("low", "high"))
    return f"{safe(in_unit(one[side], one['unit']))} <small>({safe(ends)})</small>"


def _change(one: dict[str, Any]) -> str:
    if one["change"] is None:
        return '<span class="clm-quiet">not said item by item</span>'
    if one["unit"].startswith("share"):
        said = points(one["change"]) + between((one["low"], one["high"]), digits=1)
    else:
        said = f"{one['change']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})".replace("-", "−")
    return f"{chip(one['says'], MARKS.get(one['says'], 'none'))} {said}"


def _flips(flips: list[dict[str, Any]]) -> str:
    if not flips:
        return ""
    rows = [
        [chip(f["kind"], "refused" if f["kind"] == "lost" else "accepted"), safe(f["benchmark"]), safe(f["prompt"])]
        for f in flips[:SHOWN]
    ]
    among = f", the first {SHOWN}" if len(flips) > SHOWN else ""
    drawn = table(
        ["", "Benchmark", "Prompt"], rows, f"{count(len(flips), 'item')} scored otherwise{among}", is_safe=True
    )
    return f'<div class="clm-tall clm-wide">{drawn}</div>'


def replies(found: dict[str, Any]) -> str:
    """Return what both said, with the words that differ. found: as `comparing.outputs` or `comparing.prompts` gives it."""
    left, right = (found.get(name) or found.get(other) for name, other in (("before", "left"), ("after", "right")))
    if not found["replies"]:
        return '<p class="clm-quiet">No row flipped, so there are no replies to compare.</p>'
    said = "".join(_reply(one, left, right) for one in found["replies"])
    note = f"{count(len(found['replies']), 'prompt')}, greedy"
    return card(f"What {left} and {right} reply", f'<div class="clm-replies">{said}</div>', note)


def _reply(one: dict[str, Any], left: str, right: str) -> str:
    """Return one prompt with both replies, and the second once more with its differences marked."""
    kind = chip(one["kind"], "refused" if one["kind"] == "lost" else "accepted") if "kind" in one else ""
    task = f"<small>{safe(one['task'])}</small>" if "task" in one else ""
    wanted = f'<p class="clm-quiet">Right: {safe(one["response"])}</p>' if one.get("response") else ""
    before, after = one.get("before", one.get("left")), one.get("after", one.get("right"))
    return (
        f"<article><header>{kind} {task}<b>{safe(one['prompt'])}</b></header>{wanted}"
        f'<div class="clm-two"><div><small>{safe(left)}</small><p class="clm-diff">{safe(before) or "<i>nothing</i>"}</p></div>'
        f"<div><small>{safe(right)}</small>"
        f'<p class="clm-diff">{safe(after) or "<i>nothing</i>"}</p></div></div>'
        f"<small>From one to the other</small>{as_html(one['parts'])}</article>"
    )
