"""General ability: of two sentences that differ in one thing, does the model find the right one likelier?

Source of the form: Warstadt et al. 2020, BLiMP (arXiv:1912.00582): minimal pairs, judged by the likelihood of the whole
sentence, log P = sum of log P(token | tokens before); value = share of pairs with P(good) > P(bad). Guessing gives one
half. Nearly every contrast stands there both ways round ("the dog runs", "the dogs run"), so that a model that knows
nothing but which word is more common gets about one half too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clm_app.errors import BadData
from clm_app.probes._base import Item, Likelihood, Probe, key_of


class MinimalPair(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid")

    kind: str = Field("", description="what the pair tests, such as agreement")
    good: str = Field(min_length=1)
    bad: str = Field(min_length=1)


class GeneralAbility(Probe):
    """Eight kinds of sixteen pairs: grammar that a story for children needs, and what belongs together every day."""

    title = "General ability"
    unit = "share right"
    own_file = Path(__file__).with_name("general_ability.jsonl")
    form = 'Write one JSON object on each line: {"kind": "agreement", "good": "The dog runs.", "bad": "The dog run."}.'

    def read(self, text: str) -> list[Item]:
        """Return one item for each pair, the good sentence first.

        Raises:
            BadData: a line is no such object, or its two sentences are the same.
        """
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                pair = MinimalPair.model_validate_json(line)
            except ValidationError as err:
                raise BadData(f"Line {number} is no pair: {err.errors()[0]['msg']}. {self.form}") from err
            if pair.good == pair.bad:
                raise BadData(f"Line {number} has the same sentence twice: {pair.good!r}. {self.form}")
            found.append(Item(key_of(pair.good, pair.bad), (pair.good, pair.bad), pair.kind))
        return found

    def outcome(self, item: Item, found: Sequence[Likelihood]) -> dict:
        """Return item, kind, right, and the two sentences' -log P in nats."""
        good, bad = (round(one.nats, 6) for one in found)
        return {"item": item.key, "kind": item.kind, "right": good < bad, "good": good, "bad": bad}

    def parts(self, outcome: dict) -> tuple[float, float]:
        """Return (1 or 0, 1)."""
        return float(outcome["right"]), 1.0

    def figures(self, outcomes: Sequence[dict]) -> dict[str, float]:
        """Return the share right of each kind."""
        kinds: dict[str, list[bool]] = {}
        for outcome in outcomes:
            kinds.setdefault(outcome["kind"], []).append(outcome["right"])
        return {kind: sum(right) / len(right) for kind, right in kinds.items() if kind}
