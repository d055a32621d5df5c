"""Exact match: is the reply the right answer, to the letter or word for word?

Source of the form: Rajpurkar et al. 2016, SQuAD (arXiv:1606.05250), section 6.1: share of replies that equal one of the
right answers. To the letter needs no reply: greedy decoding gives the answer if and only if every token of it is the
likeliest one after those before it (clm_app/engine/measure.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from clm_app.errors import BadData
from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, need_answer, per_class, shown
from clm_app.probes.kinds._replies import normalised


class ExactMatchSettings(KindSettings):
    """How alike the reply and the right answer must be."""

    compare: Literal["letters", "words"] = Field(
        "letters",
        description="letters: every letter and the end of the reply, from one forward pass; words: the reply is written "
        "out, and capitals and marks around words do not count",
    )


class ExactMatch(Kind):
    """Share of items that are answered exactly."""

    title = "Exact match"
    purpose = "One right answer in fixed words: intents, codes, names, short facts."
    unit = "share right"
    asks = "answer"
    Settings = ExactMatchSettings

    def __init__(self, settings: ExactMatchSettings) -> None:
        super().__init__(settings)
        self.asks = "answer" if settings.compare == "letters" else "text"

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item without an answer, or with several where one forward pass can look at one alone."""
        super().check(item)
        need_answer(item)
        if self.asks == "answer" and len(item.answers) > 1:
            raise BadData(
                f"{shown(item)} has {len(item.answers)} right answers, and by letters one is compared. "
                "Set compare to words, or keep one answer."
            )

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score, exact; by letters loss (summed nats) and tokens of the answer, by words the text."""
        if self.asks == "answer":
            told = {"loss": round(heard.nats, 6), "tokens": heard.tokens}
            return {
                "item": item.key,
                "score": float(heard.exact),
                "exact": bool(heard.exact),
                "class": item.label,
            } | told
        right = normalised(heard.text) in map(normalised, item.answers)
        exact = heard.text in item.answers
        return {"item": item.key, "score": float(right), "exact": exact, "class": item.label, "text": heard.text}

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return exact (share, to the letter), per_class, and by letters answer_loss (nats per token)."""
        found = {"exact": sum(one["exact"] for one in outcomes) / len(outcomes)} | per_class(outcomes)
        if self.asks == "answer" and (tokens := sum(one["tokens"] for one in outcomes)):
            found["answer_loss"] = sum(one["loss"] for one in outcomes) / tokens
        return found
