"""Which items of a benchmark stand in training rows already, as they are or nearly: what was read before is no test.

A row's text is compared letter by letter, five at a time (Jaccard), and an item of five words or more is looked for inside
longer rows, five words at a time (containment); 0.8 of the shingles make a near duplicate. Two texts that name other
numbers are two questions. Source: shingles, their resemblance and containment: Broder 1997, "On the resemblance and
containment of documents".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from sqlmodel import Session, select

from clm_app.data.rows import load
from clm_app.probes.kinds._base import BenchmarkItem
from clm_app.situations import stored
from clm_app.workspace import Workspace
from store.tables import Snapshot, Task, Version

ALIKE = 0.8  # share of shingles from which two texts are near duplicates
WIDE = 5  # letters, or words, in a shingle
# Marks go, but those that make a number another one stay: 12 + 35 is not 12 - 35, and 1.5 is not 15.
_MARK = re.compile(r"(?![-+*/%=<>^]\s*\d|[.,:]\d)[^\w\s]")
_NUMBER = re.compile(r"\d+")


class Leak(BaseModel):
    """One item and the training row of one task that is closest to it."""

    model_config = ConfigDict(extra="forbid")

    item: str = Field(description="key of the item")
    task: str
    snapshot_id: int
    row: str = Field(description="key of the training row")
    trained: str = Field(description="the row's prompt, its first 200 characters")
    how: Literal["exact", "near", "inside"] = Field(
        description="equal but for case, spaces and marks; nearly the same text; or most of the item inside a longer row"
    )
    closeness: float = Field(description="share of shingles in common, 0.8..1")


class LeakReport(BaseModel):
    """What the check found, and how far it has looked; younger snapshots and versions are still to be looked at."""

    model_config = ConfigDict(extra="forbid")

    rows: int = Field(0, description="different training prompts that were compared")
    newest_snapshot: int = 0
    newest_version: int = 0
    leaks: list[Leak] = []

    @property
    def keys(self) -> set[str]:
        """Keys of the items that leak."""
        return {leak.item for leak in self.leaks}


def leaks(workspace: Workspace, items: Sequence[BenchmarkItem], known: LeakReport | None = None) -> LeakReport:
    """Compare every item's prompt with the training rows of every snapshot, and with the rows that versions keep.

    known: an earlier report on the same items; only what is younger is looked at, and what it found stays.

    Raises:
        BadData: rows that were trained on are gone, so that nobody can say.
    """
    known = known or LeakReport()
    with workspace.read() as session:
        sources, snapshot, version = _younger(workspace, session, known)
    trained: dict[str, dict[str, tuple[int, str, str]]] = defaultdict(dict)  # {text: {task: its first row}}
    for task, snapshot_id, file in sources:
        for row in load(file):
            trained[plain(row.prompt)].setdefault(task, (snapshot_id, row.key, row.prompt[:200]))
    by_text: dict[str, list[str]] = defaultdict(list)
    for item in items:
        by_text[plain(item.prompt)].append(item.key)
    closest = {(leak.item, leak.task): leak for leak in known.leaks}
    for found in _found(by_text, trained):
        before = closest.get((found.item, found.task))
        if before is None or found.closeness > before.closeness:
            closest[found.item, found.task] = found
    return LeakReport(
        rows=known.rows + len(trained), newest_snapshot=snapshot, newest_version=version, leaks=list(closest.values())
    )


def is_outdated(workspace: Workspace, report: LeakReport) -> bool:
    """Say whether there are rows that the report's check has not seen."""
    with workspace.read() as session:
        return _newest(session) != (report.newest_snapshot, report.newest_version)


def plain(text: str) -> str:
    """Return the text without what makes no other question of it: case, spaces, marks; never empty for a text of marks."""
    folded = text.casefold()
    return " ".join(_MARK.sub(" ", folded).split()) or " ".join(folded.split())


class Alike(NamedTuple):
    """Place of a text in the index, and how it is alike."""

    place: int
    how: str
    closeness: float


class Index:
    """Some texts, asked for each of many others which of them it is alike. All texts are `plain` ones, and different."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.places = {text: place for place, text in enumerate(texts)}
        self.numbers = [_numbers(text) for text in texts]
        self.letters, self.words = _Shingles(map(letters, texts)), _Shingles(map(words, texts))

    def alike(self, text: str) -> Iterator[Alike]:
        """Yield every text of the index that this one is or nearly is, or that stands in it; each once."""
        exact, numbers = self.places.get(text), _numbers(text)
        if exact is not None:
            yield Alike(exact, "exact", 1.0)
        seen, shingles = {exact}, letters(text)
        for place, shared in self.letters.sharing(shingles, of_both=True):
            if place not in seen and self.numbers[place] == numbers:
                seen.add(place)
                yield Alike(place, "near", shared / (len(shingles) + self.letters.sizes[place] - shared))
        for place, shared in self.words.sharing(words(text), of_both=False):
            if place not in seen and set(self.numbers[place]) <= set(numbers):
                yield Alike(place, "inside", shared / self.words.sizes[place])


class _Shingles:
    """Sets of shingles, and for each shingle which of them have it."""

    def __init__(self, sets: Iterable[set[str]]) -> None:
        import numpy

        having: dict[str, list[int]] = defaultdict(list)
        sizes = []
        for place, one in enumerate(sets):
            sizes.append(len(one) or numpy.inf)  # an empty set shares nothing with any
            for shingle in one:
                having[shingle].append(place)
        self.sizes = numpy.array(sizes, float)
        self.having = {shingle: numpy.array(places) for shingle, places in having.items()}

    def sharing(self, shingles: set[str], of_both: bool) -> Iterator[tuple[int, int]]:
        """Yield (place, shingles in common) of every set that has 0.8 in common: of its own, or of both together."""
        import numpy

        found = [places for shingle in shingles if (places := self.having.get(shingle)) is not None]
        if not found:
            return
        shared = numpy.bincount(numpy.concatenate(found), minlength=len(self.sizes))
        whole = self.sizes + (len(shingles) - shared if of_both else 0)
        for place in numpy.nonzero(shared >= ALIKE * whole)[0].tolist():
            yield place, int(shared[place])


def _numbers(text: str) -> list[str]:
    return sorted(_NUMBER.findall(text))


def letters(text: str) -> set[str]:
    """Return the shingles of five letters, spaces counted; a shorter text is one shingle."""
    framed = f" {text} "
    return {framed[i : i + WIDE] for i in range(max(1, len(framed) - WIDE + 1))}


def words(text: str) -> set[str]:
    """Return the shingles of five words; none in a shorter text."""
    found = text.split()
    return {" ".join(found[i : i + WIDE]) for i in range(len(found) - WIDE + 1)}


def _found(by_text: dict[str, list[str]], trained: dict[str, dict[str, tuple[int, str, str]]]) -> Iterator[Leak]:
    texts = list(by_text)
    index = Index(texts)
    for text, by_task in trained.items():
        for place, how, closeness in index.alike(text):
            for task, (snapshot_id, row, prompt) in by_task.items():
                for item in by_text[texts[place]]:
                    yield Leak(item=item, task=task, snapshot_id=snapshot_id, row=row, trained=prompt, how=how,
                               closeness=round(closeness, 3))  # fmt: skip


def _newest(session: Session) -> tuple[int, int]:
    newest = (
        session.exec(select(table.id).order_by(table.id.desc()).limit(1)).first() for table in (Snapshot, Version)
    )
    return tuple(found or 0 for found in newest)


def _younger(workspace: Workspace, session: Session, known: LeakReport) -> tuple[list[tuple[str, int, Path]], int, int]:
    """Return (task, snapshot id, file of rows) of all that was trained on since, and how far that is."""
    names = dict(session.exec(select(Snapshot.id, Task.name).join(Task, Task.id == Snapshot.task_id)).all())
    found = [
        (names[taken.id], taken.id, stored(workspace, taken.object, f"The rows of {names[taken.id]}") / "train.jsonl")
        for taken in session.exec(select(Snapshot).where(Snapshot.id > known.newest_snapshot).order_by(Snapshot.id))
    ]
    kept: dict[str, int] = {}
    for version in session.exec(select(Version).where(Version.id > known.newest_version).order_by(Version.id)):
        kept |= {digest: int(place) for place, digest in version.memory.items() if place.isdigit()}
    found += [
        (names[snapshot_id], snapshot_id, stored(workspace, digest, f"The kept rows of {names[snapshot_id]}"))
        for digest, snapshot_id in kept.items()
    ]
    return found, *_newest(session)
