"""A public suite as a job: a child runs the version through the lm-evaluation-harness, and each task's figures are kept.

A child that is killed is started again with the tasks that are left; so is the job after a restart of the app.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version as installed
from pathlib import Path

from clm_app.engine.suite_child import SuiteOrder
from clm_app.errors import ChildFailed
from clm_app.events import AnyEvent, Failed, Measuring, Scored
from clm_app.judging.harness import HarnessSettings
from clm_app.registry import versions
from clm_app.wishes import SuiteWish
from clm_app.workspace import Workspace
from jobs.queue import Cancelled, Queue
from store.db import record
from store.tables import Job, Version

ATTEMPTS = 3  # children that are tried while none of them finishes a task
BEAT_S = 0.5


class Suite:
    """One suite job."""

    def __init__(
        self, workspace: Workspace, queue: Queue, job: Job, spawn: Callable, _on_deploy: Callable[[], None]
    ) -> None:
        self.workspace, self.queue, self.job, self.spawn = workspace, queue, job, spawn
        self.wish = SuiteWish(**job.wish)
        self.folder = workspace.home / "suites" / f"{job.id}"
        self.stage, self.share, self.failed = f"loading {self.wish.version}", 0.0, None

    def go(self) -> dict:
        """Do the whole job and return {version, harness (its version), scores: {task of the wish: see events.Scored}}.

        Raises:
            Cancelled: a person asked for it.
            ClmError: a task cannot be run, or the child failed; the tasks before it are kept for the next try.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        version, fruitless = versions.by_name(self.workspace, self.wish.version), 0
        while left := [task for task in self.wish.tasks if task not in self.scores()]:
            ended_with = self.run(version, left)
            fruitless = fruitless + 1 if left[0] not in self.scores() else 0
            if fruitless == ATTEMPTS:
                raise ChildFailed(
                    f"The suite on {version.name} was ended from outside {ATTEMPTS} times, last with: {ended_with}. Memory "
                    "may be short: try fewer batch_rows."
                )
        return self.register(version)

    def run(self, version: Version, tasks: list[str]) -> str:
        """Let a child run the tasks that are left; return its last line."""
        base, adapter = versions.weights(self.workspace, version)
        settings = self.wish.model_dump(include=set(HarnessSettings.model_fields)) | {"tasks": tasks}
        order = SuiteOrder(
            version=version.name, base=base, adapter=adapter, threads=self.workspace.settings.threads,
            settings=HarnessSettings(**settings),
        )  # fmt: skip
        file = self.folder / "order.json"
        file.write_text(order.model_dump_json(indent=1), encoding="utf-8")
        child = self.spawn(
            ["python", "-m", "clm_app.engine.suite_child", str(file)], name=f"suite-{self.job.id}",
            on_event=self.hear, on_text=None, environment={"TQDM_DISABLE": "1"},
        )  # fmt: skip
        try:
            while child.wait(BEAT_S) is None:
                self.beat()
        finally:
            child.stop()
        if self.failed:
            raise ChildFailed(self.failed.sentence)
        return child.last[-1] if child.last else "no word"

    def hear(self, event: AnyEvent) -> None:
        """Take what the child says; figures go to disk at once."""
        if isinstance(event, Failed):
            self.failed = event
        elif isinstance(event, Scored):
            file = self.file_of(event.task)
            draft = file.with_suffix(".draft")
            draft.write_text(event.model_dump_json(exclude={"kind", "task"}), encoding="utf-8")
            draft.replace(file)
        elif isinstance(event, Measuring):
            place = self.wish.tasks.index(event.task)
            self.share = (place + event.done / max(event.of, 1)) / len(self.wish.tasks)
            self.stage = f"{event.task}: asking {self.wish.version}, task {place + 1} of {len(self.wish.tasks)}"

    def scores(self) -> dict[str, dict]:
        """Return what is kept of each task that was run."""
        files = {task: self.file_of(task) for task in self.wish.tasks}
        return {task: json.loads(file.read_text(encoding="utf-8")) for task, file in files.items() if file.exists()}

    def file_of(self, task: str) -> Path:
        """Return where a task's figures are kept; named by its place, since a name may hold any sign."""
        return self.folder / f"{self.wish.tasks.index(task)}.json"

    def register(self, version: Version) -> dict:
        """Write the figures down as an audit event and return the job's result."""
        result = {"version": version.name, "harness": installed("lm_eval"), "scores": self.scores()}
        with self.workspace.write() as session:
            self.queue.held(session, self.job)
            record(session, self.job.asked_by, "suite.run", f"version:{version.id}", job=self.job.id, **result)
        return result

    def beat(self) -> None:
        """Renew the lease and say where the job stands."""
        row = self.queue.beat(self.job, status="running", stage=self.stage, done_share=min(0.99, self.share))
        if row.is_cancel_asked:
            raise Cancelled
