"""The rows that a version keeps of past tasks, each with the sentence why it was kept."""

from __future__ import annotations

from typing import Any

from ui.parts.words import card, chip, count, safe, table

HEADS = ["Prompt", "Answer", "Why it is here", "Row"]
SHOWN = 50  # rows of one task; the API has all


def kept_rows(name: str, groups: list[dict[str, Any]]) -> str:
    """Return the rows of each task as HTML. groups: as `questions.kept_rows` gives them."""
    heading = f"Rows kept by {name}"
    if not groups:
        return card(heading, '<p class="clm-quiet">It keeps no row of any task.</p>')
    whole = sum(len(group["rows"]) for group in groups)
    return card(heading, "".join(map(_group, groups)), f"{count(whole, 'row')} of {count(len(groups), 'task')}")


def _group(group: dict[str, Any]) -> str:
    shown, rows = group["rows"][:SHOWN], len(group["rows"])
    budget = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in group["budget"].items())
    facts = [count(rows, "row"), f"kept by {group['strategy']}", budget, _withdrawn(group["withdrawn"])]
    cells = [[safe(row["prompt"]), safe(row["response"]), safe(row["why"]), _key(row)] for row in shown]
    more = f'<p class="clm-quiet">The first {SHOWN} of {rows:,}.</p>' if rows > SHOWN else ""
    said = "; ".join(fact for fact in facts if fact)
    return (
        f'<details data-task="{safe(group["task"])}">'
        f"<summary>{safe(group['task'])} <small>{safe(said)}</small></summary>"
        f'<div class="clm-tall clm-wide">{table(HEADS, cells, is_safe=True)}</div>{more}</details>'
    )


def _withdrawn(number: int) -> str:
    return f"{number:,} withdrawn: never rehearsed again" if number else ""


def _key(row: dict[str, Any]) -> str:
    if row["withdrawn"]:
        return f"<code>{safe(row['key'])}</code> {chip('withdrawn', 'refused')}"
    return (
        f'<button type="button" class="clm-link" data-row="{safe(row["key"])}" title="choose this row to withdraw it">'
        f"<code>{safe(row['key'])}</code></button>"
    )
