"""Multiple choice: does the model find the right one of several answers likeliest?

Source of the form: Brown et al. 2020 (arXiv:2005.14165), section 2.4; accuracy and the one normalised by length as `acc` and
`acc_norm` of the lm-evaluation-harness (Biderman et al. 2024, arXiv:2405.14782, appendix A.1): the choice with the highest
log P(choice | prompt), as it stands, per byte of UTF-8, or per token. A tie is wrong: a model that knows nothing gets no gift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, likeliest, need_choices, per_class

WAYS = ("total", "per_byte", "per_token")


class MultipleChoiceSettings(KindSettings):
    """Which likelihood decides."""

    likelihood: Literal["total", "per_byte", "per_token"] = Field(
        "total", description="of a choice: as it stands, or without advantage for short ones, per byte or per token"
    )


class MultipleChoice(Kind):
    """Accuracy among given choices, by likelihood."""

    title = "Multiple choice"
    purpose = (
        "Several given answers, one of them right: exams, common sense. Needs no reply, so small models can be judged."
    )
    unit = "share right"
    asks = "choices"
    Settings = MultipleChoiceSettings

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item without two different choices, or whose right answer is not among them."""
        super().check(item)
        need_choices(item)

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score, text (the choice), right {way: bool} and lead (nats; by how much the right one is likelier)."""
        lengths = {"total": None, "per_byte": [len(c.encode()) for c in item.choices], "per_token": heard.choice_tokens}
        chosen = {way: likeliest(heard.choices, lengths[way]) for way in WAYS}
        right = {way: place is not None and item.choices[place] in item.answers for way, place in chosen.items()}
        place = chosen[self.settings.likelihood]
        split = {is_right: [n for n, c in zip(heard.choices, item.choices, strict=True) if (c in item.answers) == is_right]
                 for is_right in (True, False)}  # fmt: skip
        return {
            "item": item.key, "score": float(right[self.settings.likelihood]), "class": item.label,
            "text": "" if place is None else item.choices[place], "right": right,
            "lead": round(min(split[False], default=0.0) - min(split[True]), 6),
        }  # fmt: skip

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return accuracy by each way to normalise, lead (nats, mean) and per_class."""
        count = len(outcomes)
        found = {way: sum(one["right"][way] for one in outcomes) / count for way in WAYS}
        return found | {"lead": sum(one["lead"] for one in outcomes) / count} | per_class(outcomes)
