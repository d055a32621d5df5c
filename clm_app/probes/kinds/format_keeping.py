"""Format keeping: does the reply have the form that was agreed on, whatever it says?

Source of the form: Zhou et al. 2023, IFEval (arXiv:2311.07911): rules that a program can check, and an item counts only where
all of its rules hold (their prompt-level strict accuracy). The rules here know no language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict, Field

from clm_app.errors import BadData
from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, per_class, shown
from clm_app.probes.kinds._replies import compiled, finds


class FormatRules(BaseModel):
    """Rules of form; those of an item's rubric go before the benchmark's."""

    model_config = ConfigDict(extra="forbid")

    pattern: str | None = Field(
        None, description="regular expression of the whole reply; (?i) in front: capitals do not count"
    )
    starts_with: str | None = Field(None, description="first letters of the reply, capitals included")
    ends_with: str | None = Field(None, description="last letters of the reply, capitals included")
    least_words: int = Field(0, ge=0, description="fewest words, parted by spaces; 0: no such rule")
    most_words: int = Field(0, ge=0, description="most words, parted by spaces; 0: no such rule")
    most_characters: int = Field(
        0, ge=0, description="most characters, also where no spaces part words; 0: no such rule"
    )
    most_lines: int = Field(0, ge=0, description="most lines; 0: no such rule")


class FormatSettings(KindSettings, FormatRules):
    """What form every reply must have."""


class FormatKeeping(Kind):
    """Share of replies that keep every rule of form."""

    title = "Format"
    purpose = "Replies of an agreed form: a prefix, a number of words, one line, a pattern such as a ticket number."
    unit = "share kept"
    margin_points = 0.0
    asks = "text"
    Settings, Rubric = FormatSettings, FormatRules

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item without a rule, a pattern that is none, or rules that no reply can keep."""
        super().check(item)
        rules = self._rules(item)
        if rules == FormatRules():
            raise BadData(
                f"{shown(item)} has no rule of form, so every reply would pass. Set one of {', '.join(FormatRules.model_fields)}, "
                "for all items in the settings or in the item's rubric."
            )
        if rules.most_words and rules.least_words > rules.most_words:
            raise BadData(
                f"{shown(item)} asks for at least {rules.least_words} and at most {rules.most_words} words. Correct one of them."
            )
        if rules.pattern:
            compiled(rules.pattern, capitals=True)

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score, broken (names of rules), class and text."""
        broken = list(_broken(self._rules(item), heard.text.strip()))
        return {"item": item.key, "score": float(not broken), "broken": broken, "class": item.label, "text": heard.text}

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return broken {rule: replies that broke it} and per_class."""
        return {"broken": dict(Counter(rule for one in outcomes for rule in one["broken"]))} | per_class(outcomes)

    def _rules(self, item: BenchmarkItem) -> FormatRules:
        shared = self.settings.model_dump(include=set(FormatRules.model_fields))
        return FormatRules(**shared | self.rubric(item).model_dump(exclude_unset=True))


def _broken(rules: FormatRules, text: str) -> Iterator[str]:
    """Yield the name of every rule that a reply breaks."""
    count = len(text.split())
    if rules.pattern and not finds(compiled(rules.pattern, capitals=True), text, whole=True):
        yield "pattern"
    if not text.startswith(rules.starts_with or ""):
        yield "starts_with"
    if not text.endswith(rules.ends_with or ""):
        yield "ends_with"
    if count < rules.least_words:
        yield "least_words"
    for name, found in (("most_words", count), ("most_characters", len(text)), ("most_lines", len(text.splitlines()))):
        if (most := getattr(rules, name)) and found > most:
            yield name
