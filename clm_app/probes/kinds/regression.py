"""Regression: how near is the number in the reply to the right one?

Mean absolute error = mean of |said - right|; R² = 1 - sum of (said - right)² / sum of (right - mean of right)² (Draper and Smith
1998, section 1.3). Both are over the replies with a number in them; how many had none is told beside them, and each of those
counts as a miss in the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from clm_app.errors import BadData
from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, need_answer, shown
from clm_app.probes.kinds._replies import number_in


class RegressionSettings(KindSettings):
    """What counts as near, and which number is read."""

    tolerance: float = Field(0.0, ge=0, description="error that is let through, in the unit of the numbers")
    tolerance_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="error that is let through, as a share of the right number; the larger of both counts",
    )
    score: Literal["within", "nearness"] = Field(
        "within",
        description="of an item. within: 1 inside the tolerance, else 0; nearness: 1 / (1 + error / tolerance), so that "
        "half is left where the error is as large as the tolerance",
    )
    which: Literal["last", "first", "only"] = Field(
        "last", description="number of a reply that is read; only: a reply with several is unreadable"
    )
    decimal: Literal["point", "comma"] = Field("point", description="mark before the decimals, in reply and answer")


class RegressionRubric(BaseModel):
    """What an item may say for itself."""

    model_config = ConfigDict(extra="forbid")

    tolerance: float | None = Field(None, ge=0, description="in place of the benchmark's, both of them")


class Regression(Kind):
    """Share within a tolerance, mean absolute error, R²."""

    title = "Number"
    purpose = "The answer is a number and a near one is good: prices, durations, scores, sums."
    unit = "share near"
    asks = "text"
    Settings, Rubric = RegressionSettings, RegressionRubric

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item that does not expect one number."""
        super().check(item)
        need_answer(item)
        if len(item.answers) > 1 or self._number(item.answers[0], "only") is None:
            raise BadData(
                f"{shown(item)} expects {', '.join(map(repr, item.answers))}, and this kind needs one number. "
                f"Write it with a {self.settings.decimal} before the decimals."
            )

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score, expected and number (None: unreadable), and text."""
        right, number = self._number(item.answers[0], "only"), self._number(heard.text, self.settings.which)
        score = 0.0 if number is None else self._score(abs(number - right), self._tolerance(item, right))
        return {"item": item.key, "score": score, "expected": right, "number": number, "text": heard.text}

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return unreadable (replies without a number), mean_absolute_error and r2; None where nothing can be said."""
        read = [(one["number"], one["expected"]) for one in outcomes if one["number"] is not None]
        middle = sum(right for _, right in read) / len(read) if read else 0.0
        spread = sum((right - middle) ** 2 for _, right in read)
        left = sum((number - right) ** 2 for number, right in read)
        return {
            "unreadable": len(outcomes) - len(read),
            "mean_absolute_error": sum(abs(number - right) for number, right in read) / len(read) if read else None,
            "r2": 1 - left / spread if spread else None,
        }

    def _number(self, text: str, which: str) -> float | None:
        return number_in(text, self.settings.decimal, which)

    def _tolerance(self, item: BenchmarkItem, right: float) -> float:
        own = self.rubric(item).tolerance
        return max(self.settings.tolerance, self.settings.tolerance_share * abs(right)) if own is None else own

    def _score(self, error: float, tolerance: float) -> float:
        # 0.1 + 0.2 is not 0.3: an error at the very edge is inside.
        if self.settings.score == "within" or not tolerance:
            return float(error <= tolerance * (1 + 1e-9))
        return tolerance / (tolerance + error)
