"""The retention matrix: what every version knows of every task, and the figures that sum it up."""

from __future__ import annotations

from pydantic import BaseModel
from sqlmodel import select

from clm_app.workspace import Workspace
from store.tables import Measurement, Run, Task, Version


class Matrix(BaseModel):
    """values[i][j]: exact match (0..1, TEST) of task j by the version made after task i; None where not measured."""

    tasks: list[str]
    versions: list[str]
    values: list[list[float | None]]

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
    def normalised_retention(self) -> float | None:
        """Mean share of each earlier task that is still there: 1/(T-1) sum over j < T of R[T][j] / R[j][j].

        1 where nothing was lost, whatever the level that was reached. None for one task, and where a value in it was
        not measured or a task was not learned at all (R[j][j] = 0). Kemker et al. 2018 (arXiv:1708.02072) divide in the
        same way, by a jointly trained model's accuracy.
        """
        return _mean([
            self.last[j] / row[j] if row[j] and self.last[j] is not None else None
            for j, row in enumerate(self.values[:-1])
        ])  # fmt: skip


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(values: list[float | None]) -> float | None:
    """Return the mean, or None where there is no value or one is missing."""
    return None if not values or None in values else sum(values) / len(values)


def retention(workspace: Workspace, job_id: int, track: str = "main") -> Matrix | None:
    """Return the matrix of one track of a job, or None until its first version is measured."""
    with workspace.read() as session:
        made = session.exec(
            select(Run, Version, Task.name).join(Version, Version.run_id == Run.id).join(Task, Task.id == Run.task_id)
            .where(Run.job_id == job_id, Run.track == track).order_by(Run.position)
        ).all()  # fmt: skip
        figures = session.exec(
            select(Measurement).where(
                Measurement.version_id.in_([v.id for _, v, _ in made]),
                Measurement.metric == "exact_match", Measurement.split == "test",
            )
        ).all()  # fmt: skip
    if not made or not figures:
        return None
    by_pair = {(f.version_id, f.task_id): f.value for f in figures}
    values = [[by_pair.get((v.id, column.task_id)) for column, _, _ in made] for _, v, _ in made]
    return Matrix(tasks=[name for *_, name in made], versions=[v.name for _, v, _ in made], values=values)


def tracks(workspace: Workspace, job_id: int) -> list[str]:
    """Return the names of a job's tracks, main first."""
    with workspace.read() as session:
        names = set(session.exec(select(Run.track).where(Run.job_id == job_id)))
    return sorted(names, key=lambda name: (name != "main", name))
