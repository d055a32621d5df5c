"""The contract of a kind of benchmark: what an item needs, what a model is asked of it, what its answer is worth.

A value is the sum of the items' numerators over the sum of their denominators (`Kind.parts`), with an interval from
drawing the items anew (clm_app/judging/bootstrap.py). So any two versions that sat the same items can be compared item by
item, whatever the kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clm_app.errors import BadData
from clm_app.judging.bootstrap import over_items
from clm_app.probes._base import Value

SHELF = "clm_app.probes.kinds"
PROMPT = "{prompt}"

Asks = Literal["answer", "text", "choices", "texts"]


class BenchmarkItem(BaseModel):
    """One line of a benchmark's validation.jsonl or test.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    prompt: str = Field(min_length=1, description="what the person writes; for perplexity the text itself")
    expected: str | list[str] = Field("", description="the right answer; several: any of them is right")
    rubric: dict = Field({}, description="the kind's own: schema, must_not_say, tolerance and the like")
    choices: list[str] = Field([], description="answers to choose among by likelihood")
    label: str = Field(
        "", description="class of the item, for figures per class; empty: in classification the right answer"
    )

    @property
    def key(self) -> str:
        """Twelve hex digits that name the item by prompt, expected, rubric and choices."""
        told = json.dumps([self.prompt, self.expected, self.rubric, self.choices], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, in order; empty where none is given."""
        given = [self.expected] if isinstance(self.expected, str) else self.expected
        return tuple(answer for answer in given if answer.strip())

    @property
    def group(self) -> str:
        """Class that the item counts for in figures per class; empty where there is neither label nor answer."""
        return self.label or next(iter(self.answers), "")


class Heard(NamedTuple):
    """What a model said of one item; a kind reads what it asked for, the rest keeps its default."""

    text: str = ""  # greedy reply (asks "text")
    exact: bool | None = None  # greedy decoding would give exactly the first right answer (asks "answer")
    nats: float = 0.0  # -log P of that answer and its end token, or of the whole text (asks "texts"), summed
    tokens: int = 0  # that `nats` is summed over
    choices: tuple[float, ...] = ()  # -log P of each choice, summed nats (asks "choices")
    choice_tokens: tuple[int, ...] = ()
    seconds: float = 0.0  # of this reply where replies are made one by one, else its share of the batch
    first_s: float = 0.0  # until the first token; 0: not known
    completion_tokens: int = 0


class KindSettings(BaseModel):
    """How a kind asks and judges."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field(PROMPT, description="the person's message; {prompt} stands for the item's prompt")

    @field_validator("template")
    @classmethod
    def _asks_the_item(cls, template: str) -> str:
        if PROMPT not in template:
            raise ValueError(f"a template without {PROMPT} would ask every item the same; write {PROMPT} in it")
        return template


class Rubric(BaseModel):
    """What an item's rubric may say; a kind that reads none knows no key."""

    model_config = ConfigDict(extra="forbid")


class Kind:
    """One kind of benchmark. A subclass says what it asks, and what an item's outcome is."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""
    purpose: ClassVar[str] = ""  # when to choose it, for a person
    unit: ClassVar[str] = ""  # begins with "share" where a score is 0..1
    lower_is_better: ClassVar[bool] = False
    margin_points: ClassVar[float | None] = None  # largest loss the gate lets through; None: the gate's own
    Settings: ClassVar[type[KindSettings]] = KindSettings
    Rubric: ClassVar[type[Rubric]] = Rubric
    asks: Asks  # of the class, or of one made with the knobs that decide it

    def __init__(self, settings: KindSettings) -> None:
        self.settings = settings

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item that this kind cannot judge. A subclass adds what it needs and calls this first.

        Raises:
            BadData: the item lacks something; says the rule and the next step.
        """
        self.rubric(item)

    def rubric(self, item: BenchmarkItem) -> BaseModel:
        """Return the item's rubric in this kind's own form.

        Raises:
            BadData: a key that this kind does not know, or a value that it cannot take.
        """
        try:
            return self.Rubric.model_validate(item.rubric)
        except ValidationError as err:
            first = err.errors()[0]
            place = ".".join(map(str, first["loc"])) or "rubric"
            known = ", ".join(field.alias or key for key, field in self.Rubric.model_fields.items()) or "none"
            raise BadData(
                f"The rubric of {shown(item)} cannot be used: {place}: {first['msg']}. Keys of this kind: {known}. "
                "Correct it or leave it out."
            ) from err

    def asked(self, item: BenchmarkItem) -> str:
        """Return the person's message."""
        return self.settings.template.replace(PROMPT, item.prompt)  # str.format would open attributes to a template

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return what is kept of an item, as one JSON line: `item` (its key), `score`, and what figures need."""
        raise NotImplementedError

    def parts(self, outcome: dict) -> tuple[float, float]:
        """Return (numerator, denominator) that an outcome adds to the value."""
        return outcome["score"], 1.0

    def value(self, outcomes: Sequence[dict]) -> Value:
        """Return the value over all items, with its 95 % interval over other items of the same sort.

        Raises:
            BadData: there are no outcomes.
        """
        import numpy

        if not outcomes:
            raise BadData("A benchmark without items has no value. Give it at least one item.")
        parts = numpy.array([self.parts(outcome) for outcome in outcomes], float)  # (items, 2)
        numerator, denominator = parts.sum(axis=0)
        ends = over_items([[parts[:, 0]], [parts[:, 1]]], lambda drawn: drawn[..., 0, 0] / drawn[..., 1, 0])
        return Value(float(numerator / denominator), *ends)

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return further figures of the same outcomes, by name; JSON-able, one inside another where that is clearer."""
        return {}


def need_answer(item: BenchmarkItem) -> None:
    """Refuse an item without a right answer.

    Raises:
        BadData: `expected` is empty.
    """
    if not item.answers:
        raise BadData(f"{shown(item)} has no expected answer, which this kind compares with. Fill in `expected`.")


def need_choices(item: BenchmarkItem) -> None:
    """Refuse an item that does not leave a choice between a right and a wrong answer.

    Raises:
        BadData: there are fewer than two choices, two are the same or one is empty, or not all answers are among them.
    """
    need_answer(item)
    if len(item.choices) < 2 or len(set(item.choices)) < len(item.choices) or not all(item.choices):
        raise BadData(
            f"{shown(item)} has {len(item.choices)} choices, and at least two different ones are needed, none of them empty. "
            "Fill in `choices`."
        )
    if missing := [answer for answer in item.answers if answer not in item.choices]:
        raise BadData(
            f"{shown(item)} expects {missing[0]!r}, which is not among its choices. "
            "Write `expected` as it stands in `choices`: the text itself, no letter or number."
        )
    if len(item.answers) == len(item.choices):
        raise BadData(f"Every choice of {shown(item)} is right. Add a wrong one to `choices`.")


def likeliest(nats: Sequence[float], lengths: Sequence[int] | None = None) -> int | None:
    """Return the place of the likeliest choice; None where two are equally likely, which decides nothing.

    nats: -log P of each choice, summed; lengths: of each choice, to divide by; None divides by nothing.
    """
    scores = list(nats) if lengths is None else [one / length for one, length in zip(nats, lengths, strict=True)]
    best = min(scores)
    return scores.index(best) if scores.count(best) == 1 else None


def per_class(outcomes: Sequence[dict]) -> dict[str, dict]:
    """Return {"per_class": {class: {items, score}}}, the mean score of each `class`; {} where no outcome names one."""
    classes: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome["class"]:
            classes.setdefault(outcome["class"], []).append(outcome["score"])
    found = {name: {"items": len(each), "score": sum(each) / len(each)} for name, each in sorted(classes.items())}
    return {"per_class": found} if found else {}


def shown(item: BenchmarkItem) -> str:
    """Return how an item is named in a sentence: its prompt, cut short."""
    return repr(item.prompt if len(item.prompt) <= 60 else item.prompt[:59] + "…")


CONTRACT = Kind
