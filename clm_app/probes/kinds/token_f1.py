"""Token F1: how many words of the right answer stand in the reply, and how many of the reply in the answer?

Source: Rajpurkar et al. 2016, SQuAD (arXiv:1606.05250), section 6.1: harmonic mean of precision and recall over words, the
best over the right answers of an item, the mean over items. As there, articles do not count; marks count inside a word.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from clm_app.judging.wording import token_f1, words
from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, need_answer, per_class
from clm_app.probes.kinds._replies import normalised


class TokenF1Settings(KindSettings):
    """Which words count."""

    leave_out: str | None = Field(
        "a an the", description="words that do not count, in lower case with a space between; empty: every word counts"
    )


class TokenF1(Kind):
    """Overlap of words between reply and right answer."""

    title = "Token F1"
    purpose = "Short answers whose wording is free, such as a place or a span of text, where exact match asks too much."
    unit = "share of words"
    asks = "text"
    Settings = TokenF1Settings

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item without an answer."""
        super().check(item)
        need_answer(item)

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score (F1 to the nearest right answer), exact (the same words), class and text."""
        said = self._counted(heard.text)
        rights = [self._counted(answer) for answer in item.answers]
        score = max(1.0 if said == right else token_f1(said, right) for right in rights)
        return {"item": item.key, "score": score, "exact": said in rights, "class": item.label, "text": heard.text}

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return exact (share of replies with the same words) and per_class."""
        return {"exact": sum(one["exact"] for one in outcomes) / len(outcomes)} | per_class(outcomes)

    def _counted(self, text: str) -> str:
        """Return the words that count; all of them where the text has no other."""
        left_out = (self.settings.leave_out or "").split()
        return " ".join(word for word in words(text) if word not in left_out) or normalised(text)
