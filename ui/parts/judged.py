"""What a judge says of two sides: the sentence, the figures, and each pair with both replies and the judge's own words."""

from __future__ import annotations

from typing import Any

from ui.parts.words import card, chip, count, figures, moment, notice, percent, safe, table

SAYS = {
    "win": ("right", "accepted"),
    "loss": ("left", "refused"),
    "tie": ("tie", "none"),
    "unreadable": ("unreadable", "none"),
}


def judged(found: dict[str, Any]) -> str:
    """Return one judgement as HTML. found: as `judging.judged` or `judging.once` gives it."""
    told = found["figures"]
    low, high = (percent(told[end]) for end in ("low", "high"))
    drawn = figures([
        (f"Better: {found['right']}", str(told["wins"]), f"of {count(told['pairs'], 'pair')}"),
        (f"Better: {found['left']}", str(told["losses"]), "in both orders"),
        ("Ties", str(told["ties"]), "the orders disagree, or neither is better"),
        ("Not readable", str(told["unreadable"]), "in no other figure"),
        (f"Wins of {found['right']}", percent(told["win_share"]), f"95 %: {low} to {high}; ties left out"),
        ("Place decided", percent(told["position_bias"]), f"first {told['favoured']['A']}, second {told['favoured']['B']}"),
    ])  # fmt: skip
    notes = "".join(notice(note, "note") for note in found["notes"])
    said = "".join(_pair(pair, found["left"], found["right"]) for pair in found["pairs"])
    body = f'<p class="clm-about">{safe(found["sentence"])}</p>{notes}{drawn}<div class="clm-replies">{said}</div>'
    return card(f"What {found['judge']} says", body, f"{found['asked']}; rubric: {found['rubric']}")


def judged_before(found: list[dict[str, Any]]) -> str:
    """Return earlier judgements as a table, or nothing. found: as `judging.before` gives it."""
    if not found:
        return ""
    rows = [[moment(one["at"]), safe(one["asked"]), safe(one["sentence"])] for one in found]
    return card("What judges said", table(["When", "Asked", "Said"], rows, is_safe=True), "kept in the audit trail")


def _pair(pair: dict[str, Any], left: str, right: str) -> str:
    word, kind = SAYS[pair["says"]]
    wanted = f'<p class="clm-quiet">Right: {safe(pair["expected"])}</p>' if pair["expected"] else ""
    sides = "".join(
        f'<div><small>{safe(name)}</small><p class="clm-diff">{safe(text) or "<i>nothing</i>"}</p></div>'
        for name, text in ((left, pair["left"]), (right, pair["right"]))
    )
    words = "".join(
        f'<div><small>{safe(name)} stood first</small><p class="clm-diff">{safe(text) or "<i>not asked: the same words</i>"}</p>'
        "</div>"
        for name, text in ((right, pair["new_first"]), (left, pair["old_first"]))
    )
    return (
        f"<article><header>{chip(word, kind)}<b>{safe(pair['prompt'])}</b></header>{wanted}"
        f'<div class="clm-two">{sides}</div><small>The judge\'s words</small><div class="clm-two">{words}</div></article>'
    )
