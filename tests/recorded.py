"""A record written by hand as jobs write it: a line of versions, each with a run, a decision and what it answers."""

from __future__ import annotations

import json
from datetime import timedelta

from clm_app.data.rows import Row, dump
from clm_app.registry import versions
from clm_app.workspace import Workspace
from store.tables import Decision, Deployment, Job, Measurement, Run, Snapshot, Task, Version
from store.tables._columns import now


def right(count: int, of: int = 100) -> list[bool]:
    """Return answers of which the first `count` are right."""
    return [item < count for item in range(of)]


class Line:
    """Tasks of 100 test rows each, a base that was measured on nothing, and versions that are added one by one."""

    def __init__(self, workspace: Workspace, *tasks: str) -> None:
        self.workspace, self.base = workspace, versions.base_version(workspace)
        self.newest = self.base
        with workspace.write() as session:
            self.job = Job(kind="learn", wish={"stream": [{"name": name} for name in tasks], "strategy": "replay"})
            session.add(self.job)
            for place, name in enumerate(tasks, 1):
                session.add(Task(name=name, key=name.lower()))
                session.flush()
                taken = Snapshot(task_id=place, object=self._rows(name), train_rows=200, validation_rows=20, test_rows=100,
                                 source=f"/somewhere/private/{name}.jsonl")  # fmt: skip
                session.add(taken)

    @staticmethod
    def rows(task: str, part: str = "test") -> list[Row]:
        """Return the rows of a task."""
        return [Row(prompt=f"{part} question {i} of {task}?", response=f"answer {i % 4}") for i in range(100)]

    def _rows(self, task: str) -> str:
        folder = self.workspace.home / f"rows-{task}"
        for part in ("train", "validation", "test"):
            dump(self.rows(task, part), folder / f"{part}.jsonl")
        return self.workspace.objects.put(folder)

    def learn(self, task: int, answers: dict[int, list[bool]], *, track: str = "main", state: str = "accepted",
              parent: Version | None = None, weights: str | None = None, live: bool = True) -> Version:  # fmt: skip
        """Add a version that learned a task (1, 2, …). answers: {task: is each of its test rows right}."""
        parent = parent or self.newest
        with self.workspace.write() as session:
            place = len(versions.everything(self.workspace)) - 1
            run = Run(job_id=self.job.id, track=track, position=place, task_id=task, snapshot_id=task, status="done",
                      parent_version_id=parent.id, strategy="replay" if track == "main" else "naive", method="lora", seed=7,
                      folder=f"runs/{place}", code_version="0.1.0+abc", libraries={"torch": "2.13.0"},
                      hardware={"cores": 2, "gpus": []}, settings={"training": {"epochs": 2}, "strategy": {"rows_share": 0.2}},
                      figures={"seconds": 12.5, "tokens_per_s": 900, "steps": 40})  # fmt: skip
            session.add(run)
            session.flush()
            name = f"v{place + 1}" if track == "main" else f"naive-{place + 1}"
            version = Version(name=name, track=track, parent_id=parent.id, run_id=run.id, kind="full" if weights else "adapter",
                              base_path=parent.base_path, base_digest=parent.base_digest, state=state, method="lora",
                              object=weights or self.workspace.objects.put_bytes(name.encode()), strategy=run.strategy,
                              settings=run.settings, seed=7, parameters=1000, trained_parameters=10)  # fmt: skip
            session.add(version)
            session.flush()
            if track == "main":
                verdict = "promote" if state == "accepted" else "hold"
                decision = Decision(version_id=version.id, against_version_id=parent.id, verdict=verdict,
                                    sentence=f"{verdict.capitalize()}: said of {name}.")  # fmt: skip
                session.add(decision)
                session.flush()
                if state == "accepted" and live:
                    session.add(Deployment(version_id=version.id, previous_version_id=parent.id, decision_id=decision.id,
                                           created_at=now() + timedelta(seconds=place)))  # fmt: skip
        for taken, exact in answers.items():
            self.measure(version, taken, exact)
        if track == "main" and state == "accepted":
            self.newest = version
        return version

    def measure(self, version: Version, task: int, exact: list[bool]) -> None:
        """Write what a version answers on a task's test rows."""
        with self.workspace.read() as session:
            rows = self.rows(session.get_one(Task, task).name)
        lines = [
            json.dumps({"item": row.key, "exact": is_right, "loss": 0.1 if is_right else 3.0 + i / 100, "tokens": 2})
            for i, (row, is_right) in enumerate(zip(rows, exact, strict=True))
        ]
        digest = self.workspace.objects.put_bytes("\n".join(lines).encode())
        figures = {"exact_match": sum(exact) / len(exact), "answer_loss": 1.5}
        with self.workspace.write() as session:
            for metric, value in figures.items():
                session.add(
                    Measurement(
                        version_id=version.id, task_id=task, snapshot_id=task, split="test", metric=metric, value=value,
                        items=len(exact), object=digest,
                    )
                )  # fmt: skip
