"""The answer to "which update broke this task": the sentence, and every version of the line that was looked at."""

from __future__ import annotations

from clm_app.judging.bisect import Answer
from ui.parts.words import card, chip, percent, safe, table


def broken(answer: Answer) -> str:
    """Return the answer as HTML."""
    rows = [
        [
            f"<b>{safe(look.version)}</b>", percent(look.value), f"{look.lost:,}", f"{look.gained:,}",
            "p < 0.001" if look.p < 0.001 else f"p = {look.p:.3f}",
            chip("broken", "refused") if look.is_broken else chip("knows it", "accepted"),
            "before" if look.was_known else "now",
        ]
        for look in answer.looks
    ]  # fmt: skip
    heads = ["Version", answer.task, "Lost", "Gained", "More than chance", "", "Measured"]
    caption = f"Exact match on the same {answer.looks[0].items:,} test rows; lost and gained since {answer.good}"
    said = f'<p class="clm-about">{safe(answer.sentence)}</p>'
    gate = f'<p class="clm-why">The gate had said of it: {safe(answer.decision)}</p>' if answer.decision else ""
    note = f"{answer.measured} of {answer.versions} versions measured for it"
    return card(f"What broke {answer.task}", said + gate + table(heads, [*rows], caption, is_safe=True), note)
