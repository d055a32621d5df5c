"""The search for the update that broke a task, as a job: each missing measurement is made by a child and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clm_app.engine.order import Exam
from clm_app.engine.settings import TrainingSettings
from clm_app.engine.sitting import Sitting
from clm_app.errors import ChildFailed
from clm_app.events import Measured
from clm_app.judging import bisect
from clm_app.registry import versions
from clm_app.workspace import Workspace
from jobs.cycle import BEAT_S, Cancelled, Listener
from jobs.queue import Queue
from store.db import record
from store.tables import Job, Measurement, Run, Snapshot, Version


class Bisection:
    """One bisect job. Cut off anywhere, it is simply run again: what was measured is in the record and costs nothing."""

    def __init__(
        self, workspace: Workspace, queue: Queue, job: Job, spawn: Callable, _on_deploy: Callable[[], None]
    ) -> None:
        self.workspace, self.queue, self.job, self.spawn = workspace, queue, job, spawn
        self.wish = bisect.BisectWish(**job.wish)
        self.made, self.most = 0, bisect.line_of(workspace, self.wish).most

    def go(self) -> dict:
        """Do the whole job and return the answer.

        Raises:
            Cancelled: a person asked for it; what was measured stays.
            ClmError: a version cannot be measured; what was measured stays.
        """
        self.beat("looking at what is measured already")
        answer = bisect.find(self.workspace, self.wish, self.measure)
        with self.workspace.write() as session:
            self.queue.held(session, self.job)
            record(session, "clock", "task.bisected", f"job:{self.job.id}", task=answer.task, sentence=answer.sentence)
        return answer.model_dump(mode="json")

    def measure(self, version: Version, taken: Snapshot) -> Measurement:
        """Let a child measure a version on the test rows of a snapshot, and register what it found.

        Raises:
            ChildFailed: it said why it cannot, or was ended from outside.
        """
        order, heard = self.order(version, taken), []
        listener = Listener(order.folder / "events.jsonl")

        def hear(event) -> None:
            listener(event)
            if isinstance(event, Measured):
                heard.append(event)

        child = self.spawn(
            ["python", "-m", "clm_app.engine.sitting", str(order.folder / "order.json")],
            name=f"bisect-{self.job.id}-{version.name}", on_event=hear, on_text=listener.text,
        )  # fmt: skip
        try:
            while child.wait(BEAT_S) is None:
                self.beat(f"measuring {version.name} on {order.exam.task}")
        finally:
            child.stop()
        if listener.failed:
            raise ChildFailed(listener.failed.sentence)
        if not heard:
            raise ChildFailed(
                f"The measuring of {version.name} was ended from outside, last with: "
                f"{child.last[-1] if child.last else 'no word'}. Ask for the search again: it goes on from what is measured."
            )
        self.made += 1
        return self.register(version, taken, heard[-1])

    def order(self, version: Version, taken: Snapshot) -> Sitting:
        """Write the child's order."""
        base, adapter = versions.weights(self.workspace, version)
        folder = self.workspace.home / "bisect" / f"{self.job.id}" / version.name
        folder.mkdir(parents=True, exist_ok=True)
        with self.workspace.read() as session:
            run = session.get(Run, version.run_id) if version.run_id else None
        knobs = TrainingSettings(**(run.settings.get("training", {}) if run else {}))
        exam = Exam(
            snapshot_id=taken.id, task=self.wish.task, split="test",
            file=self.workspace.objects.path(taken.object) / "test.jsonl",
        )  # fmt: skip
        order = Sitting(
            folder=folder, base=base, adapter=adapter, exam=exam, max_tokens=knobs.max_tokens,
            threads=self.workspace.settings.threads,
        )  # fmt: skip
        (folder / "order.json").write_text(order.model_dump_json(indent=1), encoding="utf-8")
        return order

    def register(self, version: Version, taken: Snapshot, measured: Measured) -> Measurement:
        """Write both figures of a measurement, as the update cycle does, and return the exact match."""
        digest = self.workspace.objects.put(Path(measured.outcomes))
        rows = [
            Measurement(
                version_id=version.id, task_id=taken.task_id, snapshot_id=taken.id, split="test", metric=metric,
                value=value, items=measured.items, object=digest,
            )
            for metric, value in (("exact_match", measured.exact_match), ("answer_loss", measured.answer_loss))
        ]  # fmt: skip
        with self.workspace.write() as session:
            self.queue.held(session, self.job)
            session.add_all(rows)
            session.flush()
            record(session, "clock", "version.measured", f"version:{version.id}", name=version.name, snapshot=taken.id,
                   exact_match=measured.exact_match, job=self.job.id)  # fmt: skip
        return rows[0]

    def beat(self, stage: str) -> None:
        """Renew the lease and say where the job stands."""
        row = self.queue.beat(self.job, status="running", stage=stage, done_share=min(0.95, self.made / self.most))
        if row.is_cancel_asked:
            raise Cancelled
