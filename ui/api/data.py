"""Tasks and their rows: give a file, get a frozen snapshot, look into it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from clm_app.data import ingest, withdrawal
from clm_app.errors import NotThere
from store.tables import Snapshot, Task
from ui.api._base import Api


class WithdrawWish(BaseModel):
    """Which row a person takes back, and why."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(min_length=1, max_length=64, description="the twelve hex digits that name the row's content")
    reason: str = Field(min_length=1, max_length=500, description="kept in the audit trail")


class Data(Api):
    """GET and POST /api/tasks, GET /api/tasks/{name}/rows, POST /api/rows/withdraw."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router, workspace = APIRouter(tags=["data"]), self.house.workspace

        @router.get("/api/tasks")
        def tasks() -> list[dict[str, Any]]:
            """Return every task with its newest snapshot."""
            return [_plain(task, taken) for task, taken in ingest.tasks(workspace)]

        @router.post("/api/tasks", status_code=201)
        def add(name: Annotated[str, Form()], file: Annotated[UploadFile, File()]) -> dict[str, Any]:
            """Check a file of rows and freeze it as a new task; the whole file is refused or taken."""
            with tempfile.TemporaryDirectory(dir=workspace.uploads) as folder:
                path = Path(folder) / (Path(file.filename or "rows.jsonl").name or "rows.jsonl")
                self.receive(file, path)
                taken = ingest.snapshot(workspace, name, path, self.house.actor)
            return next(_plain(t, s) for t, s in ingest.tasks(workspace) if s.id == taken.id)

        @router.get("/api/tasks/{name}/rows")
        def rows(
            name: str,
            split: Literal["train", "validation", "test"] = "train",
            limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        ) -> list[dict[str, Any]]:
            """Return the first rows of one part of the task's newest snapshot."""
            for task, taken in ingest.tasks(workspace):
                if task.key == name.strip().lower():
                    return [row.model_dump() for row in ingest.rows_of(workspace, taken, split)[:limit]]
            raise NotThere(f"There is no task {name!r}. GET /api/tasks lists them.")

        @router.post("/api/rows/withdraw", status_code=201)
        def withdraw(wish: WithdrawWish) -> dict[str, Any]:
            """Take a row back: no run that is ordered from now on rehearses it."""
            return withdrawal.withdraw(workspace, wish.key, wish.reason, self.house.actor).model_dump(mode="json")

        return router


def _plain(task: Task, taken: Snapshot) -> dict[str, Any]:
    return {"name": task.name, "id": task.id, "snapshot": taken.model_dump(mode="json")}
