"""Classification: which class does the model give an item, and which classes does it confuse?

Accuracy = share of items with the right class. Per class: precision, recall and F1, their harmonic mean (van Rijsbergen
1979, chapter 7). Macro F1 = mean of F1 over the classes that are right for at least one item, so that a rare class counts
as much as a common one (Opitz and Burst 2019, arXiv:1911.03347, equation 2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, likeliest, need_answer, need_choices
from clm_app.probes.kinds._replies import normalised

OTHER = "(other)"  # a reply that names no class


class ClassificationSettings(KindSettings):
    """How the class is found."""

    by: Literal["reply", "likelihood", "likelihood_per_token"] = Field(
        "reply",
        description="reply: what the model writes; likelihood: the likeliest of the item's choices; per token: the same, "
        "without advantage for short choices",
    )


class Classification(Kind):
    """Accuracy, macro F1, figures per class, confusion."""

    title = "Classification"
    purpose = "Each item belongs to one of several classes, such as the intent of a message or the mood of a review."
    unit = "share right"
    asks = "text"
    Settings = ClassificationSettings

    def __init__(self, settings: ClassificationSettings) -> None:
        super().__init__(settings)
        self.asks = "text" if settings.by == "reply" else "choices"

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item without a class or, by likelihood, without choices among which the right one is."""
        super().check(item)
        need_answer(item)
        if self.asks == "choices":
            need_choices(item)

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score, class (the right one), names (what the class is called in a reply) and text."""
        if self.asks == "choices":
            per_token = self.settings.by == "likelihood_per_token"
            place = likeliest(heard.choices, heard.choice_tokens if per_token else None)
            said = OTHER if place is None else item.choices[place]
        else:
            said = heard.text
        names = [normalised(answer) for answer in item.answers]
        score = float(normalised(said) in names)
        return {"item": item.key, "score": score, "class": item.group, "names": names, "text": said}

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return macro_f1, per_class {class: {items, precision, recall, f1}} and confusion {right: {said: items}}."""
        classes = {name: outcome["class"] for outcome in outcomes for name in outcome["names"]}
        confusion: dict[str, Counter[str]] = {}
        for outcome in outcomes:
            said = outcome["class"] if outcome["score"] else classes.get(normalised(outcome["text"]), OTHER)
            confusion.setdefault(outcome["class"], Counter())[said] += 1
        each = {name: _class(name, confusion) for name in sorted(confusion)}
        return {
            "macro_f1": sum(one["f1"] for one in each.values()) / len(each),
            "per_class": each,
            "confusion": {right: dict(said.most_common()) for right, said in sorted(confusion.items())},
        }


def _class(name: str, confusion: dict[str, Counter[str]]) -> dict:
    """Return one class's figures; precision is 0 where the class was never said, as F1 then is."""
    right, items = confusion[name][name], confusion[name].total()
    said = sum(row[name] for row in confusion.values())
    return {"items": items, "precision": right / said if said else 0.0, "recall": right / items,
            "f1": 2 * right / (said + items)}  # fmt: skip
