"""The retention matrix: what every version knows of every task, and the figures that sum it up."""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from sqlmodel import Session, select

from clm_app.judging import bootstrap
from clm_app.judging.gate import exact_outcomes
from clm_app.workspace import Workspace
from store.objects import Objects
from store.series.measured import since_trained
from store.tables import Measurement, Run, Task, Version

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Made = list[tuple[Run, Version, str]]  # a stream's runs in order, each with its version and the name of its task

NEWEST_STREAMS = 20  # of other jobs, that a stream is put beside


class Matrix(BaseModel):
    """values[i][j]: exact match (0..1, TEST) of task j by the version made after task i; None where not measured.

    before: b, exact match of each task by the base, before anything was learned. joint: a*, exact match of each task by
    a model trained on all tasks up to it at once. intervals: (low, high) of a figure over other test items, 95 %.
    seeds: of all jobs that learned this stream in the same way; over_seeds: (mean, low, high) of a figure over these and
    their items, where there is more than one.
    """

    tasks: list[str]
    versions: list[str]
    values: list[list[float | None]]
    before: list[float | None] = []
    joint: list[float | None] = []
    intervals: dict[str, tuple[float, float]] = {}
    seeds: list[int] = []
    over_seeds: dict[str, tuple[float, float, float]] = {}

    @property
    def last(self) -> list[float | None]:
        """What the newest version knows of each task."""
        return self.values[-1]

    @property
    def average_accuracy(self) -> float:
        """Mean of the last row over the tasks it saw (Lopez-Paz and Ranzato 2017, arXiv:1706.08840, ACC)."""
        seen = [value for value in self.last if value is not None]
        return sum(seen) / len(seen)

    @property
    def backward_transfer(self) -> float:
        """Mean change since each earlier task was just learned (same source, BWT); below 0 is forgetting, 0 for one task."""
        rows = range(len(self.values) - 1)
        changes = [self.last[i] - self.values[i][i] for i in rows if None not in (self.last[i], self.values[i][i])]
        return sum(changes) / len(changes) if changes else 0.0

    @property
    def just_learned(self) -> float:
        """Mean of the diagonal: how well each task was learned when it was new. A model that refuses to learn shows here."""
        diagonal = [row[i] for i, row in enumerate(self.values) if row[i] is not None]
        return sum(diagonal) / len(diagonal) if diagonal else 0.0

    @property
    def forgetting(self) -> float | None:
        """Mean drop from each earlier task's best moment: 1/(T-1) sum over j < T of (max over i < T of R[i][j]) - R[T][j].

        Unlike backward transfer it counts a task that rose after it was learned and fell again. In shares, -1..1; above 0
        is forgetting. None for one task, and where a version that had learned a task was not measured on it.
        Source: Chaudhry et al. 2018, arXiv:1801.10112, section 3 (F_k).
        """
        return _mean([self._drop(j) for j in range(len(self.values) - 1)])

    def _drop(self, j: int) -> float | None:
        since = [row[j] for row in self.values[j:]]
        if None in since:
            return None
        return max(row[j] for row in self.values[:-1] if row[j] is not None) - since[-1]

    def forward_transfer(self, before: list[float | None]) -> float | None:
        """Mean head start of a task before it is learned: 1/(T-1) sum over j > 1 of R[j-1][j] - b[j].

        before: b, exact match of each task (0..1) before anything was learned. In shares; above 0 where earlier tasks
        helped. None for one task, and where a value in it was not measured.
        Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, equation 4 (FWT).
        """
        return _mean([_difference(self.values[j - 1][j], before[j]) for j in range(1, len(self.values))])

    def intransigence(self, joint: list[float | None]) -> float | None:
        """Mean of what was not learned for the sake of the old: 1/T sum over j of a*[j] - R[j][j].

        joint: a*, exact match of each task (0..1) by a model trained on all tasks up to it at once. In shares; below 0
        where the stream learned the task better. None where a value in it was not measured.
        Source: Chaudhry et al. 2018, arXiv:1801.10112, section 3 (I_k), here its mean over the tasks.
        """
        return _mean([_difference(joint[j], row[j]) for j, row in enumerate(self.values)])

    @property
    def figures(self) -> dict[str, float | None]:
        """Every figure by name, in the order they are shown; None where one cannot be said."""
        return {
            "average_accuracy": self.average_accuracy, "backward_transfer": self.backward_transfer,
            "forgetting": self.forgetting,
            "forward_transfer": self.forward_transfer(self.before) if self.before else None,
            "intransigence": self.intransigence(self.joint) if self.joint else None,
        }  # fmt: skip


class Measuring(BaseModel):
    """A row of the matrix that is being filled: the version is trained, and its child measures it.

    values: exact match (0..1, TEST) of the stream's tasks up to the one just learned; None where not measured yet. now:
    the place of the task that is measured at this moment, or None.
    """

    track: str
    tasks: list[str]
    values: list[float | None]
    now: int | None


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(values: list[float | None]) -> float | None:
    """Return the mean, or None where there is no value or one is missing."""
    return None if not values or None in values else sum(values) / len(values)


def retention(workspace: Workspace, job_id: int, track: str = "main") -> Matrix | None:
    """Return the matrix of one track of a job, or None until its first version is measured."""
    with workspace.read() as session:
        made = _made(session, job_id, track)
        found = _measured(session, [v.id for _, v, _ in made])
    if not made or not found:
        return None
    values = [[found.get((v.id, column.snapshot_id), (None,))[0] for column, *_ in made] for _, v, _ in made]
    return Matrix(tasks=[name for *_, name in made], versions=[v.name for _, v, _ in made], values=values)


def judged(workspace: Workspace, job_id: int, track: str = "main") -> Matrix | None:
    """Return the matrix with everything it is compared with, and the intervals of its figures.

    Intervals are left out where the outcomes behind the measurements are gone. Nothing is drawn twice: what is stored
    never changes, so an interval is kept by the digests it was drawn from.
    """
    with workspace.read() as session:
        made = _made(session, job_id, track)
        if not made:
            return None
        streams = {made[0][0].seed: made} | _other_seeds(session, made)
        grids = [_grid(session, one, _joint(session, one)) for one in streams.values()]
    before, joint, *values = ([cell[0] if cell else None for cell in row] for row in grids[0])
    if not any(value is not None for row in values for value in row):
        return None
    digests = tuple(tuple(tuple(cell and cell[1] for cell in row) for row in grid) for grid in grids)
    root = workspace.objects.root
    return Matrix(
        tasks=[name for *_, name in made], versions=[v.name for _, v, _ in made], values=values, before=before,
        joint=joint, intervals=_intervals(root, digests[:1]), seeds=sorted(streams),
        over_seeds=_over_seeds(root, digests) if len(streams) > 1 else {},
    )  # fmt: skip


def being_measured(workspace: Workspace, job_id: int) -> Measuring | None:
    """Return the row of the version that a job's child measures now, from what the child has said; None without one."""
    with workspace.read() as session:
        run = session.exec(select(Run).where(Run.job_id == job_id, Run.status == "running")).first()
        if run is None or session.exec(select(Version.id).where(Version.run_id == run.id)).first():
            return None
        columns = session.exec(
            select(Run.snapshot_id, Task.name).join(Task, Task.id == Run.task_id).order_by(Run.position)
            .where(Run.job_id == job_id, Run.track == run.track, Run.position <= run.position)
        ).all()  # fmt: skip
    said = since_trained(workspace.home / run.folder / "events.jsonl")
    if said is None:
        return None
    tests = [event for event in said if event.get("split") == "test"]
    shares = {e["snapshot_id"]: e["exact_match"] for e in tests if e["kind"] == "measured" and e["when"] == "after"}
    names = [name for _, name in columns]
    current = tests[-1]["task"] if tests and tests[-1]["kind"] == "measuring" else None
    return Measuring(
        track=run.track, tasks=names, values=[shares.get(snapshot_id) for snapshot_id, _ in columns],
        now=names.index(current) if current in names else None,
    )  # fmt: skip


def tracks(workspace: Workspace, job_id: int) -> list[str]:
    """Return the names of a job's tracks, main first."""
    with workspace.read() as session:
        names = set(session.exec(select(Run.track).where(Run.job_id == job_id)))
    return sorted(names, key=lambda name: (name != "main", name))


# --- what was measured, and by whom -------------------------------------------------------------------------------------


def _made(session: Session, job_id: int, track: str) -> Made:
    return list(session.exec(
        select(Run, Version, Task.name).join(Version, Version.run_id == Run.id).join(Task, Task.id == Run.task_id)
        .where(Run.job_id == job_id, Run.track == track).order_by(Run.position)
    ))  # fmt: skip


def _measured(session: Session, version_ids: list[int]) -> dict[tuple[int, int], tuple[float, str]]:
    """Return {(version id, snapshot id): (exact match on its test items, digest of the outcomes)}, newest measurement."""
    found = session.exec(
        select(Measurement.version_id, Measurement.snapshot_id, Measurement.value, Measurement.object)
        .where(Measurement.version_id.in_(version_ids), Measurement.metric == "exact_match", Measurement.split == "test")
        .order_by(Measurement.id)
    )  # fmt: skip
    return {(version, taken): (value, digest) for version, taken, value, digest in found}


def _grid(session: Session, made: Made, joint: list[int | None]) -> list[list[tuple[float, str] | None]]:
    """Return (value, digest) of the outcomes of every cell; rows as those of `bootstrap.Cells`."""
    parents = dict(session.exec(select(Version.id, Version.parent_id)).all())
    root = made[0][1].id
    while parents[root] is not None:
        root = parents[root]
    found = _measured(session, [root, *(v for v in joint if v), *(v.id for _, v, _ in made)])
    rows = [[root] * len(made), joint, *([v.id] * len(made) for _, v, _ in made)]
    return [[found.get((v, run.snapshot_id)) for v, (run, *_) in zip(row, made, strict=True)] for row in rows]


def _beside(session: Session, made: Made, track: str, strategies: list[str]) -> list[Made]:
    """Return what other jobs made from the same version of the same snapshots in the same order, newest job first.

    Each as far as it went along, with the strategy named for each place.
    """
    first = made[0][0]
    ids = session.exec(
        select(Run.job_id).order_by(Run.job_id.desc()).limit(NEWEST_STREAMS).where(
            Run.job_id != first.job_id, Run.track == track, Run.position == 0, Run.strategy == strategies[0],
            Run.snapshot_id == first.snapshot_id, Run.parent_version_id == first.parent_version_id,
        )
    ).all()  # fmt: skip
    wanted = [(run.position, run.snapshot_id, name) for (run, *_), name in zip(made, strategies, strict=True)]
    return [
        [one for one, _ in takewhile(
            lambda pair: (pair[0][0].position, pair[0][0].snapshot_id, pair[0][0].strategy) == pair[1],
            zip(_made(session, job_id, track), wanted, strict=False),
        )] for job_id in ids
    ]  # fmt: skip


def _joint(session: Session, made: Made) -> list[int | None]:
    """Return for each task the version that learned it at once with all tasks before it, None where there is none."""
    found: list[int | None] = [None] * len(made)
    for stream in _beside(session, made, "main", ["joint"] * len(made)):
        for place, (_, version, _) in enumerate(stream):
            found[place] = found[place] or version.id
            if version.state != "accepted":
                break  # the next one went on from another version, which had not learned this task
    return found


def _other_seeds(session: Session, made: Made) -> dict[int, Made]:
    """Return {seed: stream} of other jobs that learned the whole of this one in the same way, the newest of each seed."""
    found: dict[int, Made] = {}
    for stream in _beside(session, made, made[0][0].track, [run.strategy for run, *_ in made]):
        is_alike = len(stream) == len(made) and all(
            _recipe(a) == _recipe(b) for (a, *_), (b, *_) in zip(made, stream, strict=True)
        )
        if is_alike and stream[0][0].seed != made[0][0].seed:
            found.setdefault(stream[0][0].seed, stream)
    return found


def _recipe(run: Run) -> tuple[str, dict]:
    training = {knob: value for knob, value in run.settings.get("training", {}).items() if knob != "seed"}
    return run.method, {"strategy": run.settings.get("strategy"), "method": run.settings.get("method")} | training


# --- intervals; kept, since objects never change -------------------------------------------------------------------------

Grids = tuple[tuple[tuple[str | None, ...], ...], ...]  # of each stream the digests of its cells


@lru_cache(maxsize=64)
def _intervals(root: Path, grids: Grids) -> dict[str, tuple[float, float]]:
    streams = _cells(root, grids)
    return bootstrap.intervals(streams) if streams else {}


@lru_cache(maxsize=64)
def _over_seeds(root: Path, grids: Grids) -> dict[str, tuple[float, float, float]]:
    """Return {figure: (mean over the streams, low, high)}."""
    streams = _cells(root, grids)
    if not streams:
        return {}
    each = [bootstrap.figures(bootstrap.shares(cells)) for cells in streams]
    ends = bootstrap.intervals(streams)
    return {name: (float(sum(one[name] for one in each)) / len(each), *ends[name]) for name in ends}


def _cells(root: Path, grids: Grids) -> list[bootstrap.Cells]:
    """Return the outcomes of every cell, or [] where an object is gone."""
    objects = Objects(root)
    try:
        return [[[digest and _exact(objects.path(digest)) for digest in row] for row in grid] for grid in grids]
    except KeyError:
        return []


@lru_cache(maxsize=4096)
def _exact(file: Path) -> NDArray:
    """Return 0 or 1 for each item of an outcomes file, in the order of the items' keys."""
    import numpy

    found = exact_outcomes(file)
    return numpy.array([found[item] for item in sorted(found)])
