"""The contract of a probe: which texts are read, what their likelihoods say of one item, how items become one value.

A value is the sum of the items' numerators over the sum of their denominators (`parts`), so every probe has its interval,
and its change from one version to the next, from drawing items anew (clm_app/judging/bootstrap.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clm_app.catalog import shelf
from clm_app.errors import BadData, BadSettings, plain
from clm_app.judging.bootstrap import over_items

SHELF = "clm_app.probes"
MOST_MB = 64  # of a person's own file; beyond, reading it would take longer than learning
LEAST_ITEMS = 5  # drawing fewer anew says nothing of other items


class ProbeSettings(BaseModel):
    """What is read, and how much of it."""

    model_config = ConfigDict(extra="forbid")

    file: Path | None = Field(None, description="your own file to measure with; empty: the one that comes along")
    most_items: int = Field(
        1000, ge=0, le=1_000_000, description="most items read, spread evenly over the file; 0 turns the probe off"
    )
    window_tokens: int = Field(
        256, ge=8, le=131_072, description="tokens read at once; a longer text is read in pieces, each on its own"
    )


class Item(NamedTuple):
    """What one outcome is about: the texts whose likelihoods are needed. The first one's words choose the adapter."""

    key: str
    texts: tuple[str, ...]
    kind: str = ""


class Likelihood(NamedTuple):
    """How likely a model finds a text: -log P in nats, summed over all its tokens."""

    nats: float
    tokens: int


class Value(NamedTuple):
    """A figure with its 95 % interval over items."""

    value: float
    low: float
    high: float


class Probe:
    """One measure. A subclass says which items it reads, what it takes from their likelihoods, and its unit."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""
    unit: ClassVar[str] = ""  # what begins with "share" is shown in per cent
    lower_is_better: ClassVar[bool] = False
    own_file: ClassVar[Path]  # that comes along
    form: ClassVar[str] = ""  # what a person's own file looks like, for a refusal
    Settings: ClassVar[type[ProbeSettings]] = ProbeSettings

    def __init__(self, settings: ProbeSettings) -> None:
        self.settings = settings

    def read(self, text: str) -> list[Item]:
        """Return every item in the text of a file.

        Raises:
            BadData: a line is not of this probe's form.
        """
        raise NotImplementedError

    def outcome(self, item: Item, found: Sequence[Likelihood]) -> dict:
        """Return what is kept of an item, given the likelihoods of its texts in order; written as a JSON line."""
        raise NotImplementedError

    def parts(self, outcome: dict) -> tuple[float, float]:
        """Return (numerator, denominator) that an outcome adds to the value."""
        raise NotImplementedError

    def figures(self, outcomes: Sequence[dict]) -> dict[str, float]:
        """Return further figures of the same outcomes, by name."""
        return {}

    @cached_property
    def items(self) -> list[Item]:
        """The items of this probe's file, at most `most_items` of them, each once.

        Raises:
            BadData: the file is missing, too large, not UTF-8, not of the probe's form, or has too few items.
        """
        file = self.settings.file.expanduser() if self.settings.file else self.own_file
        found = list({item.key: item for item in self.read(text_of(file))}.values())
        if len(found) < LEAST_ITEMS:
            raise BadData(f"{file.name} has {len(found)} items; at least {LEAST_ITEMS} are needed. {self.form}")
        count = min(self.settings.most_items, len(found))
        return [found[i * len(found) // count] for i in range(count)]

    @cached_property
    def ruler(self) -> str:
        """Twelve hex digits that name items and knobs: two readings compare only where these are the same."""
        told = [self.name, self.settings.window_tokens, [item.texts for item in self.items]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def value(self, outcomes: Sequence[dict]) -> Value:
        """Return the value over all items, with its interval over other items of the same sort."""
        return self._over_items([outcomes], lambda one: one)

    def change(self, before: Sequence[dict], after: Sequence[dict]) -> Value:
        """Return value after - value before with its interval, the same items drawn for both."""
        known = {outcome["item"]: outcome for outcome in before}
        return self._over_items([[known[o["item"]] for o in after], after], lambda one, other: other - one)

    def _over_items(self, columns: Sequence[Sequence[dict]], figure) -> Value:
        """Return a figure of the values of several columns of outcomes; all have the same items in the same order."""
        import numpy

        parts = numpy.array([[self.parts(outcome) for outcome in column] for column in columns])
        sums = parts.sum(axis=1)  # (columns, 2)
        cells = [[values] for column in parts for values in column.T]  # numerator and denominator of each, in turn
        ends = over_items(cells, lambda v: figure(*(v[..., i, 0] / v[..., i + 1, 0] for i in range(0, len(cells), 2))))
        return Value(float(figure(*(numerator / denominator for numerator, denominator in sums))), *ends)


def key_of(*texts: str) -> str:
    """Return twelve hex digits that name an item by its texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def text_of(file: Path) -> str:
    """Return the text of a file.

    Raises:
        BadData: it is missing, too large or not UTF-8.
    """
    try:
        if file.stat().st_size > MOST_MB * 1_000_000:
            raise BadData(f"{file} has more than {MOST_MB} MB, which a probe does not read. Give a shorter file.")
        return file.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise BadData(
            f"{file} cannot be read: {err.strerror}. Correct the probe's setting `file`, or leave it empty."
        ) from err
    except UnicodeDecodeError as err:
        raise BadData(f"{file} is not UTF-8 (byte {err.start}). Save it as UTF-8 and try again.") from err


def made(settings: dict[str, dict]) -> list[Probe]:
    """Return every probe of the shelf that is not turned off, its items read.

    settings: {probe: {knob: value}}; every other knob has its default.

    Raises:
        BadSettings: a probe or a knob is unknown, or a value is out of its bounds.
        BadData: a file cannot be used.
    """
    if unknown := settings.keys() - shelf(SHELF).keys():
        raise BadSettings(f"{min(unknown)!r} is not among the probes: {', '.join(shelf(SHELF))}. Choose one of these.")
    try:
        found = [cls(cls.Settings(**settings.get(name, {}))) for name, cls in shelf(SHELF).items()]
    except ValidationError as err:
        raise BadSettings(f"A probe cannot be set so: {plain(err)}") from err
    return [probe for probe in found if probe.settings.most_items and probe.items]


CONTRACT = Probe
