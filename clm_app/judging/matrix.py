"""The retention matrix: what every version knows of every task, and the two figures that sum it up."""

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
