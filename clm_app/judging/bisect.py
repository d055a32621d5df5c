"""Which update broke a task: halve the line of versions between one that knew it and one that does not, until one is left.

Of n updates at most log2(n), rounded up, have to be measured, and the two ends; what was measured before costs nothing,
and what is measured now is kept. A version counts as broken where it lost more than `drop_points` against the good one on the same
test rows and that is more than chance (exact McNemar test). As `git bisect` does, it takes what lies between two broken
versions as broken; where the record says otherwise, the answer says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from sqlmodel import Session, select

from clm_app.data.ingest import find as find_task
from clm_app.data.ingest import tasks
from clm_app.errors import BadInput, NotThere
from clm_app.judging.gate import exact_outcomes
from clm_app.judging.paired import mcnemar
from clm_app.registry import versions
from clm_app.registry.versions import measurement
from clm_app.situations import refuse_damage, stored
from clm_app.workspace import Workspace
from store.db import record
from store.tables import Decision, Job, Measurement, Run, Snapshot, Task, Version

Measure = Callable[[Version, Snapshot], Measurement]


class BisectWish(BaseModel):
    """Find the update that broke a task."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(min_length=1, max_length=80, description="task whose score got worse")
    good: str = Field(
        "", max_length=80, description="version that still knew it; empty: the one of the line that was best at it"
    )
    bad: str = Field("live", min_length=1, max_length=80, description="version that has lost it")
    drop_points: float = Field(
        5.0,
        gt=0,
        le=100,
        description="loss against the good version from which on a version counts as broken, in points",
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="error rate of the test that the loss is more than chance")


class Line(NamedTuple):
    """What is searched: the versions from the good one to the bad one, oldest first, and the rows they are asked."""

    task: Task
    taken: Snapshot
    chain: list[Version]

    @property
    def most(self) -> int:
        """Most versions that have to be measured: the two ends, and one for each halving."""
        return 2 + math.ceil(math.log2(len(self.chain) - 1))


class Look(BaseModel):
    """What was seen of one version: its share of right answers (0..1), and its flips against the good version."""

    version: str
    value: float
    items: int
    lost: int
    gained: int
    p: float
    is_broken: bool
    was_known: bool  # measured before this search


class Answer(BaseModel):
    """The update that broke the task, what it was made from, and how it was found.

    first_broken: None where the bad version is not broken by the wish's own rule. looks: in the order of the line.
    measured: made for this search; known: taken from the record; most: of `measured`, what halving can take.
    """

    task: str
    good: str
    bad: str
    last_good: str | None = None
    first_broken: str | None = None
    run_id: int | None = None
    learned: str | None = None
    strategy: str | None = None
    verdict: str | None = None
    decision: str | None = None
    versions: int
    measured: int
    known: int
    most: int
    is_steady: bool  # once broken, broken ever since, as far as was looked
    looks: list[Look]
    sentence: str


def ask(workspace: Workspace, wish: BisectWish, by: str) -> Job:
    """Check that the search can begin, write it down as a job, and return it.

    The versions are written down by name: "live" and the best one may be others by the time the clock comes to it.

    Raises:
        NotThere: there is no such task or version.
        BadInput: the two versions are not of one line, or nothing is there to search.
        BadModel, BadData: weights or rows that may have to be measured are gone.
    """
    line = line_of(workspace, wish)
    stored(workspace, line.taken.object, f"The rows of {line.task.name}")
    for version in line.chain:
        if _known(workspace, version, line.taken) is None:
            refuse_damage(workspace, version)
    wish = wish.model_copy(update={"task": line.task.name, "good": line.chain[0].name, "bad": line.chain[-1].name})
    with workspace.write() as session:
        job = Job(kind="bisect", wish=wish.model_dump(mode="json"), asked_by=by, stage="waiting for the clock")
        session.add(job)
        session.flush()
        record(session, by, "job.asked", f"job:{job.id}", kind="bisect", task=line.task.name,
               good=wish.good, bad=wish.bad)  # fmt: skip
    return job


def line_of(workspace: Workspace, wish: BisectWish) -> Line:
    """Return what a wish asks to search.

    Raises:
        NotThere, BadInput: as `ask`.
    """
    task = find_task(workspace, wish.task)
    if task is None:
        raise NotThere(f"There is no task {wish.task!r}. GET /api/tasks lists them.")
    bad = versions.by_name(workspace, wish.bad)
    good = versions.by_name(workspace, wish.good) if wish.good else None
    with workspace.read() as session:
        chain = _ancestors(session, bad)
        learned = next((taken for taken, known in versions.lineage(session, bad) if known.id == task.id), None)
        taken = learned or next((taken for known, taken in tasks(workspace) if known.id == task.id), None)
        if taken is None:
            raise NotThere(f"{task.name} has no rows. Add its file on the Data tab first.")
        place = _place(chain, good) if good else _best(session, chain, task, taken)
    if place == len(chain) - 1:
        raise BadInput(f"There is no update between {chain[place].name} and {bad.name}. Name an older good version.")
    return Line(task, taken, chain[place:])


def _ancestors(session: Session, version: Version) -> list[Version]:
    """Return a version's line from the base to itself."""
    found = [version]
    while found[-1].parent_id is not None:
        found.append(session.get_one(Version, found[-1].parent_id))
    return found[::-1]


def _place(chain: list[Version], good: Version) -> int:
    names = [version.name for version in chain]
    if good.name not in names:
        raise BadInput(
            f"{chain[-1].name} does not stand on {good.name}, so no line of updates leads from one to the other. "
            f"Choose one of {', '.join(names[:-1][-12:]) or 'another line'}."
        )
    return names.index(good.name)


def _best(session: Session, chain: list[Version], task: Task, taken: Snapshot) -> int:
    """Return the place of the version that was best at the task, the newest of equals; unmeasured, where it was learned."""
    shares = {i: m.value for i, v in enumerate(chain[:-1]) if (m := measurement(session, v.id, taken.id))}
    if shares:
        return max(shares, key=lambda i: (shares[i], i))
    for i, version in reversed(list(enumerate(chain))):
        if version.run_id and session.get_one(Run, version.run_id).task_id == task.id:
            return i
    raise BadInput(
        f"No version before {chain[-1].name} was measured on {task.name} or learned it. Name the good version yourself."
    )


def _known(workspace: Workspace, version: Version, taken: Snapshot) -> Measurement | None:
    """Return what the record holds of a version, if its outcomes are still there to be paired."""
    with workspace.read() as session:
        found = measurement(session, version.id, taken.id)
    try:
        return found if found and workspace.objects.path(found.object) else None
    except KeyError:
        return None


# --- the search ----------------------------------------------------------------------------------------------------------


def first_broken(last: int, known: Mapping[int, bool], look: Callable[[int], bool]) -> int | None:
    """Return the first broken place after the last good one, or None where place `last` is not broken.

    Places are 0..last; place 0 is good. known: {place: is it broken}, of those that need no look. `look` says it of any
    other one; it is called at most 1 + ceil(log2(last)) times.
    """
    said = {0: False} | dict(known)
    if last not in said:
        said[last] = look(last)
    if not said[last]:
        return None
    good = max(place for place, is_broken in said.items() if not is_broken)
    broken = min(place for place, is_broken in said.items() if is_broken and place > good)
    while broken - good > 1:
        middle = (good + broken) // 2
        if look(middle):
            broken = middle
        else:
            good = middle
    return broken


def find(workspace: Workspace, wish: BisectWish, measure: Measure) -> Answer:
    """Return the update that broke the task. `measure` makes a measurement that is not there yet, and registers it.

    Raises:
        NotThere, BadInput: as `ask`. Whatever `measure` raises goes through; what it has registered stays.
    """
    line = line_of(workspace, wish)
    last, looks = len(line.chain) - 1, dict[int, Look]()
    found = {i: m for i, v in enumerate(line.chain) if (m := _known(workspace, v, line.taken))}
    good = found.get(0) or measure(line.chain[0], line.taken)

    def look(place: int) -> bool:
        mine = good if place == 0 else found.get(place) or measure(line.chain[place], line.taken)
        looks[place] = _look(workspace, wish, line.chain[place].name, good, mine, place in found)
        return looks[place].is_broken

    known = {place: look(place) for place in (0, *found)}
    broken = first_broken(last, known, look)
    return _answer(workspace, wish, line, looks, broken)


def _look(
    workspace: Workspace, wish: BisectWish, name: str, good: Measurement, mine: Measurement, was_known: bool
) -> Look:
    then, now = (exact_outcomes(workspace.objects.path(m.object)) for m in (good, mine))
    items = then.keys() & now.keys()
    if not items:
        raise BadInput(f"{name} and the good version were not asked the same rows. Name another good version.")
    lost, gained = (sum(one[i] and not other[i] for i in items) for one, other in ((then, now), (now, then)))
    p = mcnemar(lost, gained)
    return Look(
        version=name, value=sum(now[i] for i in items) / len(items), items=len(items), lost=lost, gained=gained, p=p,
        is_broken=100 * (lost - gained) >= wish.drop_points * len(items) and p < wish.alpha, was_known=was_known,
    )  # fmt: skip


# --- the answer ----------------------------------------------------------------------------------------------------------


def _answer(workspace: Workspace, wish: BisectWish, line: Line, looks: dict[int, Look], broken: int | None) -> Answer:
    ordered = [looks[place] for place in sorted(looks)]
    signs = [one.is_broken for one in ordered]
    told = {
        "task": line.task.name, "good": line.chain[0].name, "bad": line.chain[-1].name, "versions": len(line.chain),
        "measured": sum(not one.was_known for one in ordered), "known": sum(one.was_known for one in ordered),
        "most": line.most, "is_steady": signs == sorted(signs), "looks": ordered,
    }  # fmt: skip
    if broken is None:
        return Answer(**told, sentence=_not_broken(wish, line, looks[0], looks[len(line.chain) - 1]))
    version = line.chain[broken]
    with workspace.read() as session:
        run = session.get(Run, version.run_id) if version.run_id else None
        learned = session.get_one(Task, run.task_id).name if run else None
        decision = session.exec(
            select(Decision).where(Decision.version_id == version.id).order_by(Decision.id.desc())
        ).first()
    told |= {
        "last_good": line.chain[broken - 1].name, "first_broken": version.name, "run_id": run.id if run else None,
        "learned": learned, "strategy": version.strategy or None,
        "verdict": decision.verdict if decision else None, "decision": decision.sentence if decision else None,
    }  # fmt: skip
    return Answer(**told, sentence=_broken(told, looks, broken))


def _not_broken(wish: BisectWish, line: Line, good: Look, bad: Look) -> str:
    loss = 100 * (bad.lost - bad.gained) / bad.items
    why = f"less than {wish.drop_points:g} points" if loss < wish.drop_points else f"no more than chance ({_p(bad.p)})"
    return (
        f"{bad.version} has not lost {line.task.name}: {_share(good.value)} in {good.version}, {_share(bad.value)} now, on "
        f"{bad.items} test rows, {why}. Name another good version, or a smaller drop."
    )


def _broken(told: dict, looks: dict[int, Look], broken: int) -> str:
    before, now = looks[broken - 1], looks[broken]
    learned = f", which learned {told['learned']} with {told['strategy']}" if told["learned"] else ""
    said = (
        f"{now.version}{learned}, broke {told['task']}: {_share(before.value)} right in {before.version}, "
        f"{_share(now.value)} in {now.version} ({now.lost} of {now.items} rows lost and {now.gained} gained since "
        f"{told['good']}, {_p(now.p)}). {told['measured']} measured now, {told['known']} known before, of "
        f"{told['versions']} versions."
    ).replace(", broke", " broke", not learned)
    return said if told["is_steady"] else f"{said} {_unsteady(told['looks'])}"


def _unsteady(looks: list[Look]) -> str:
    """Say that the task was broken before and came back: the search found the break that still holds."""
    place = next(i for i, one in enumerate(looks[:-1]) if one.is_broken and not looks[i + 1].is_broken)
    return (
        f"It had been lost before: {looks[place].version} was worse, {looks[place + 1].version} better again. This is the break "
        "that holds since; versions that were not measured may hide others."
    )


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
