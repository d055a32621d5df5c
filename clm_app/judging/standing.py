"""Who stands where: the live version (the champion) beside every other one (the challengers), on the items both answered.

A version is called better or worse than the champion only where the 95 % interval of the mean change lies on one side of
zero, over the same test rows drawn in pairs (clm_app/judging/bootstrap.py); each of these comparisons is made by itself.
The interval of a single score: Wilson 1927 (JASA 22, 209), which has a width at 0 % and 100 % too.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel
from sqlmodel import Session, select

from clm_app.errors import BadModel
from clm_app.judging.benchmarks import title
from clm_app.judging.bootstrap import Interval, changes, over_items
from clm_app.judging.gate import exact_outcomes
from clm_app.registry import versions
from clm_app.workspace import Workspace
from store.tables import Benchmark, BenchmarkReading, Decision, Deployment, Measurement, Run, Task, Version

if TYPE_CHECKING:
    from numpy.typing import NDArray

BETTER, WORSE, ALIKE = "better", "worse", "not to be told from it"


class Score(BaseModel):
    """A share of right answers (0..1) with its 95 % interval over other test rows."""

    value: float
    low: float
    high: float
    items: int
    is_shared: bool = True  # on the very test rows that the champion was measured on


class Change(BaseModel):
    """A mean change over tasks, in points, with its 95 % interval; the same rows drawn for both versions."""

    points: float
    low: float
    high: float
    tasks: int
    items: int

    @property
    def says(self) -> str:
        """The word for it: better or worse only where the interval lies on one side of zero."""
        return BETTER if self.low > 0 else WORSE if self.high < 0 else ALIKE


class Reading(BaseModel):
    """The newest reading of one benchmark on a version; value, low and high in `unit`."""

    benchmark: str  # name@version
    kind: str
    on: str
    backend: str
    value: float
    low: float
    high: float
    unit: str
    lower_is_better: bool
    items: int


class Size(NamedTuple):
    """Bytes on disk: of all that is loaded to answer, and of what this version added to its parent's files."""

    whole: int
    added: int


class Standing(BaseModel):
    """One version: what it knows, what it kept, what it costs, what was decided, and how it compares with the champion.

    scores: {task: exact match on its test rows}. mean: over the tasks shared with the champion; None where there is none.
    kept: mean change of the tasks it had learned before its last one, since each was just learned (backward transfer).
    against: mean change from the champion to it; None for the champion and where nothing is shared. live: (from, until)
    of each time it was live; until is None where it is live now. size_bytes: None where files are gone.
    """

    version: str
    parent: str | None
    track: str
    state: str
    is_champion: bool
    made: datetime
    learned: str | None  # the task of its own run
    scores: dict[str, Score]
    mean: Score | None
    kept: Change | None
    against: Change | None
    readings: list[Reading]
    size_bytes: int | None
    added_bytes: int | None
    parameters: int
    training_s: float | None
    tokens_per_s: float | None
    verdict: str | None
    sentence: str | None
    live: list[tuple[datetime, datetime | None]]


class Standings(BaseModel):
    """The table: best first, by how many of the champion's tasks a version was measured on, then by its mean on them."""

    champion: str
    tasks: list[str]
    rows: list[Standing]

    def line(self) -> list[Standing]:
        """Return the champion's ancestors and itself, oldest first: the line of updates that led to it."""
        known = {row.version: row for row in self.rows}
        found: list[Standing] = []
        step = known.get(self.champion)
        while step is not None:
            found.append(step)
            step = known.get(step.parent or "")
        return found[::-1]


def standings(workspace: Workspace) -> Standings:
    """Return every version's standing beside the live one.

    Raises:
        BadModel: there is no model to start from yet.
    """
    champion = versions.live(workspace)
    with workspace.read() as session:
        everything = session.exec(select(Version).order_by(Version.id)).all()
        known = _Record(session, everything)
    names = {v.id: v.name for v in everything}
    tasks = sorted({m.task_id for measured in known.measured.values() for m in measured.values()})
    rows = [_standing(workspace, known, v, champion, names, tasks) for v in everything]
    rows.sort(key=lambda row: (-_shared(row), -(row.mean.value if row.mean else -1), row.made))
    return Standings(champion=champion.name, tasks=[known.tasks[t] for t in tasks], rows=rows)


def size(workspace: Workspace, version: Version, parent: Version | None) -> Size | None:
    """Return how much room a version takes; None where some of its files are gone."""
    try:
        base, adapter = versions.weights(workspace, version)
        mine = workspace.objects.path(version.object) if version.object else base
        theirs = workspace.objects.path(parent.object) if parent and parent.object else None
    except (KeyError, BadModel):
        return None
    own = _files(mine)
    shared = _files(theirs).keys() if theirs else set()
    whole = own if adapter is None else own | _files(base)
    return Size(sum(whole.values()), sum(length for inode, length in own.items() if inode not in shared))


def wilson(share: float, items: int) -> Interval:
    """Return the 95 % interval of a share of so many items."""
    return _wilson(round(share * items), items)


# --- what the record holds -----------------------------------------------------------------------------------------------


class _Record:
    """All rows that the table is made from, read at once, by the id of their version."""

    def __init__(self, session: Session, everything: Iterable[Version]) -> None:
        self.tasks = dict(session.exec(select(Task.id, Task.name)).all())
        self.versions = {v.id: v for v in everything}
        self.runs = {run.id: run for run in session.exec(select(Run))}
        self.decisions = {d.version_id: d for d in session.exec(select(Decision).order_by(Decision.id))}
        self.measured: dict[int, dict[int, Measurement]] = {}  # {version: {snapshot: the newest of its test rows}}
        for m in session.exec(
            select(Measurement).where(Measurement.metric == "exact_match", Measurement.split == "test")
            .order_by(Measurement.id)
        ):  # fmt: skip
            self.measured.setdefault(m.version_id, {})[m.snapshot_id] = m
        self.readings: dict[int, dict[tuple, Reading]] = {}
        for found, benchmark in session.exec(
            select(BenchmarkReading, Benchmark).join(Benchmark, Benchmark.id == BenchmarkReading.benchmark_id)
            .where(BenchmarkReading.split == "test", BenchmarkReading.version_id.is_not(None)).order_by(BenchmarkReading.id)
        ):  # fmt: skip
            self.readings.setdefault(found.version_id, {})[benchmark.id, found.on, found.backend] = reading(
                found, benchmark
            )
        self.live = _live(session)
        self.learned = self._learned()

    def _learned(self) -> dict[int, dict[int, tuple[int, int]]]:
        """Return {version: {task it has learned: (snapshot, version that learned it last)}}; parents have smaller ids."""
        found: dict[int, dict[int, tuple[int, int]]] = {}
        for version in self.versions.values():
            mine = dict(found.get(version.parent_id, {}))
            if run := self.runs.get(version.run_id):
                mine[run.task_id] = run.snapshot_id, version.id
            found[version.id] = mine
        return found


def reading(found: BenchmarkReading, benchmark: Benchmark) -> Reading:
    """Return a reading with the name of its benchmark."""
    own = found.model_dump(include=set(Reading.model_fields) & set(BenchmarkReading.model_fields))
    return Reading(benchmark=title(benchmark), kind=benchmark.kind, **own)


def _live(session: Session) -> dict[int, list[tuple[datetime, datetime | None]]]:
    """Return {version: when it was live}, from the moves of the alias."""
    moves = session.exec(select(Deployment).where(Deployment.alias == "live").order_by(Deployment.id)).all()
    found: dict[int, list[tuple[datetime, datetime | None]]] = {}
    for move, after in zip(moves, [*moves[1:], None], strict=True):
        found.setdefault(move.version_id, []).append((move.created_at, after.created_at if after else None))
    return found


# --- one version ---------------------------------------------------------------------------------------------------------


def _standing(
    workspace: Workspace, known: _Record, version: Version, champion: Version, names: dict[int, str], tasks: list[int]
) -> Standing:
    measured, theirs = known.measured.get(version.id, {}), known.measured.get(champion.id, {})
    shared = _newest(m for snapshot, m in measured.items() if snapshot in theirs)
    scores = {
        known.tasks[task]: _score(m, task in shared)
        for task, m in sorted((_newest(measured.values()) | shared).items())
    }
    run, decision = known.runs.get(version.run_id), known.decisions.get(version.id)
    room = size(workspace, version, known.versions.get(version.parent_id))
    own = list(shared.values())
    return Standing(
        version=version.name, parent=names.get(version.parent_id), track=version.track, state=version.state,
        is_champion=version.id == champion.id, made=version.created_at,
        learned=known.tasks[run.task_id] if run else None,
        scores={known.tasks[t]: scores[known.tasks[t]] for t in tasks if known.tasks[t] in scores},
        mean=_mean(workspace, own), kept=_kept(workspace, known, version),
        against=None if version.id == champion.id else _change(workspace, [(theirs[m.snapshot_id], m) for m in own]),
        readings=list(known.readings.get(version.id, {}).values()),
        size_bytes=room.whole if room else None, added_bytes=room.added if room else None,
        parameters=version.parameters, training_s=run.figures.get("seconds") if run else None,
        tokens_per_s=run.figures.get("tokens_per_s") if run else None,
        verdict=decision.verdict if decision else None, sentence=decision.sentence if decision else None,
        live=known.live.get(version.id, []),
    )  # fmt: skip


def _newest(found: Iterable[Measurement]) -> dict[int, Measurement]:
    """Return {task: the measurement on its newest snapshot}."""
    return {m.task_id: m for m in sorted(found, key=lambda m: m.snapshot_id)}


def _score(m: Measurement, is_shared: bool) -> Score:
    low, high = wilson(m.value, m.items)
    return Score(value=m.value, low=low, high=high, items=m.items, is_shared=is_shared)


def _mean(workspace: Workspace, measured: list[Measurement]) -> Score | None:
    if not measured:
        return None
    value, items = fmean(m.value for m in measured), sum(m.items for m in measured)
    if len(measured) == 1:
        return _score(measured[0], True)
    if (files := _places(workspace, measured)) is None:
        return Score(value=value, low=value, high=value, items=items)
    low, high = _interval(files)
    return Score(value=value, low=low, high=high, items=items)


def _kept(workspace: Workspace, known: _Record, version: Version) -> Change | None:
    """Return how the tasks learned before its own last one have moved since each was just learned."""
    mine, pairs = known.measured.get(version.id, {}), []
    for snapshot, learner in known.learned[version.id].values():
        then = known.measured.get(learner, {}).get(snapshot)
        if learner != version.id and then and snapshot in mine:
            pairs.append((then, mine[snapshot]))
    return _change(workspace, pairs)


def _change(workspace: Workspace, pairs: list[tuple[Measurement, Measurement]]) -> Change | None:
    """Return the mean change over tasks; None without a pair, and where the outcomes behind one are gone."""
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    places = _places(workspace, before), _places(workspace, after)
    if not pairs or None in places:
        return None
    value = fmean(new.value - old.value for old, new in pairs)
    low, high = _paired(*places)
    items = sum(m.items for m in after)
    return Change(points=100 * value, low=100 * low, high=100 * high, tasks=len(pairs), items=items)


def _shared(row: Standing) -> int:
    return sum(score.is_shared for score in row.scores.values())


# --- objects never change, so nothing is drawn twice -----------------------------------------------------------------------


def _places(workspace: Workspace, measured: list[Measurement]) -> tuple[Path, ...] | None:
    """Return the files of outcomes, or None where one is gone."""
    try:
        return tuple(workspace.objects.path(m.object) for m in measured)
    except KeyError:
        return None


@lru_cache(maxsize=4096)
def answers(file: Path) -> NDArray:
    """Return 0 or 1 for each item of an outcomes file, in the order of the items' keys."""
    import numpy

    found = exact_outcomes(file)
    return numpy.array([bool(found[item]) for item in sorted(found)])


@lru_cache(maxsize=4096)
def _interval(files: tuple[Path, ...]) -> Interval:
    return over_items([[answers(file) for file in files]])


@lru_cache(maxsize=4096)
def _paired(before: tuple[Path, ...], after: tuple[Path, ...]) -> Interval:
    return changes([answers(file) for file in before], [answers(file) for file in after])[-1]


@lru_cache(maxsize=65536)
def _wilson(right: int, items: int) -> Interval:
    from scipy.stats import binomtest

    found = binomtest(right, items).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


@lru_cache(maxsize=1024)
def _files(place: Path) -> dict[tuple[int, int], int]:
    """Return {(device, inode): bytes} of every file in a place; a file that two versions share is one."""
    files = place.rglob("*") if place.is_dir() else [place]
    found = [file.stat() for file in files if file.is_file()]
    return {(status.st_dev, status.st_ino): status.st_size for status in found}
