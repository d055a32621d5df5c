"""Calibration: where the model is 80 % sure, is it right in 80 of 100 cases?

P(choice) = its likelihood over the sum of all choices' (softmax of log P). Brier score = sum over choices of (P - 1 if right
else 0)², 0 to 2 (Brier 1950, Monthly Weather Review 78, 1; equation 2); it is what an item counts. Expected calibration
error = sum over bins of items in it / all × |share right - mean confidence|, confidence = P of the likeliest choice (Guo et
al. 2017, arXiv:1706.04599, equation 3), here over bins of equally many items (Nguyen and O'Connor 2015, arXiv:1508.05154):
bins of equal width would leave most items of a sure model in one. It stands too high where bins hold few items.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import Field

from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, need_choices


class CalibrationSettings(KindSettings):
    """How sure is counted."""

    bins: int = Field(10, ge=1, le=100, description="groups of equally many items in the reliability table")
    likelihood: Literal["total", "per_token"] = Field(
        "total", description="of a choice: as it stands, or without advantage for short ones"
    )


class Calibration(Kind):
    """Brier score, expected calibration error, reliability table."""

    title = "Calibration"
    purpose = "Choices with one right answer, where it matters whether the model knows when it does not know."
    unit = "Brier score"
    lower_is_better = True
    asks = "choices"
    Settings = CalibrationSettings

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item without two different choices, or whose right answer is not among them."""
        super().check(item)
        need_choices(item)

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score (Brier), confidence (0..1), right and text (the likeliest choice, the first of equals)."""
        lengths = heard.choice_tokens if self.settings.likelihood == "per_token" else [1] * len(heard.choices)
        shares = _softmax([-nats / length for nats, length in zip(heard.choices, lengths, strict=True)])
        is_right = [choice in item.answers for choice in item.choices]
        # Where several are right, any of them is: the truth is then one class made of them all.
        rights = sum(share for share, right in zip(shares, is_right, strict=True) if right)
        wrongs = sum(share**2 for share, right in zip(shares, is_right, strict=True) if not right)
        place = max(range(len(shares)), key=shares.__getitem__)
        return {
            "item": item.key, "score": round((rights - 1) ** 2 + wrongs, 9), "confidence": round(shares[place], 9),
            "right": is_right[place], "text": item.choices[place],
        }  # fmt: skip

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return ece, accuracy, confidence (means), and reliability: [{items, from, to, confidence, accuracy}]."""
        ordered = sorted(outcomes, key=lambda one: one["confidence"])
        table = [
            _bin(ordered[first:end]) for first, end in pairwise(self._ends([one["confidence"] for one in ordered]))
        ]
        gap = sum(row["items"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(ordered)
        return {"ece": gap, **{name: _bin(ordered)[name] for name in ("accuracy", "confidence")}, "reliability": table}

    def _ends(self, confidences: list[float]) -> list[int]:
        """Return where bins begin and end; items that are equally sure share one, so that no order of theirs decides."""
        count, bins = len(confidences), min(self.settings.bins, len(confidences))
        ends = (bisect_right(confidences, confidences[i * count // bins - 1]) for i in range(1, bins + 1))
        return sorted({0, *ends})


def _bin(members: Sequence[dict]) -> dict:
    """Return the row of the reliability table for items in order of confidence."""
    return {
        "items": len(members), "from": members[0]["confidence"], "to": members[-1]["confidence"],
        "confidence": sum(one["confidence"] for one in members) / len(members),
        "accuracy": sum(one["right"] for one in members) / len(members),
    }  # fmt: skip


def _softmax(logs: list[float]) -> list[float]:
    highest = max(logs)
    raised = [math.exp(log - highest) for log in logs]
    return [one / sum(raised) for one in raised]
