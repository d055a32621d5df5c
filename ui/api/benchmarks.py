"""Benchmarks: make one from a file, from items or from a task, look into it, and let versions sit it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, UploadFile

from clm_app import wishes
from clm_app.errors import BadData, BadSettings
from clm_app.judging import benchmarks
from clm_app.registry import versions
from store.tables import Benchmark
from ui.api._base import Api


class Benchmarks(Api):
    """GET and POST /api/benchmarks, GET …/{name}, …/{name}/items and …/{name}/readings, POST /api/examine, /api/suites."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router, workspace = APIRouter(tags=["benchmarks"]), self.house.workspace

        @router.get("/api/benchmarks")
        def everything() -> list[dict[str, Any]]:
            """Return every version of every benchmark, newest first."""
            return [_plain(row) for row in benchmarks.everything(workspace)]

        @router.post("/api/benchmarks", status_code=201)
        def add(
            kind: Annotated[str, Form()],
            name: Annotated[str, Form()] = "",
            settings: Annotated[str, Form(description="the kind's knobs, a JSON object")] = "{}",
            file: Annotated[UploadFile | None, File()] = None,
            items: Annotated[str, Form(description="instead of a file: a JSON list of items")] = "",
            task: Annotated[str, Form(description="instead of a file: a task, whose held-out rows are taken")] = "",
        ) -> dict[str, Any]:
            """Freeze items as a version of the benchmark `name`; the whole of them is refused or taken."""
            knobs = _json(settings, dict, "settings")
            if sum((file is not None, bool(items), bool(task))) != 1:
                raise BadData(
                    "A benchmark is made from a file, from items or from a task. Give exactly one of the three."
                )
            if task:
                row = benchmarks.from_task(workspace, task, kind, knobs, self.house.actor, name)
            elif items:
                told = _json(items, list, "items")
                row = benchmarks.from_items(workspace, name, told, kind, knobs, self.house.actor)
            else:
                row = self._from_upload(file, name, kind, knobs)
            return _plain(row)

        @router.get("/api/benchmarks/{name}")
        def one(name: str) -> dict[str, Any]:
            """Return a benchmark, "name" or "name@version", with its versions and what leaks of it."""
            row = benchmarks.find(workspace, name)
            leaking = benchmarks.checked(workspace, row)
            every = [r.version for r in benchmarks.everything(workspace, row.name)]
            return _plain(row) | {"versions": every, "leaking_items": len(leaking.keys)}

        @router.get("/api/benchmarks/{name}/items")
        def items_of(
            name: str,
            split: Literal["validation", "test"] = "validation",
            limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        ) -> list[dict[str, Any]]:
            """Return the first items of one split, each with its key and whether it leaks into training rows."""
            row = benchmarks.find(workspace, name)
            leaking = benchmarks.leakage_of(row).keys
            found = benchmarks.items_of(workspace, row, split)[:limit]
            return [item.model_dump() | {"key": item.key, "leaks": item.key in leaking} for item in found]

        @router.get("/api/benchmarks/{name}/readings")
        def readings(name: str) -> list[dict[str, Any]]:
            """Return what this version of the benchmark said of versions and endpoints, newest first."""
            names = {version.id: version.name for version in versions.everything(workspace)}
            found = benchmarks.readings(workspace, benchmarks.find(workspace, name))
            return [r.model_dump(mode="json") | {"version": names.get(r.version_id)} for r in found]

        @router.post("/api/examine", status_code=201)
        def examine(wish: wishes.ExamineWish) -> dict[str, Any]:
            """Write the wish down as a job and return it."""
            return wishes.ask_examination(workspace, wish, self.house.actor).model_dump(mode="json")

        @router.post("/api/suites", status_code=201)
        def suite(wish: wishes.SuiteWish) -> dict[str, Any]:
            """Ask for tasks of the lm-evaluation-harness as a job; the figures are its result."""
            return wishes.ask_suite(workspace, wish, self.house.actor).model_dump(mode="json")

        return router

    def _from_upload(self, file: UploadFile, name: str, kind: str, settings: dict) -> Benchmark:
        with tempfile.TemporaryDirectory(dir=self.house.workspace.uploads) as folder:
            path = Path(folder) / (Path(file.filename or "").name or "items.jsonl")
            self.receive(file, path)
            return benchmarks.from_file(self.house.workspace, name or path.stem, path, kind, settings, self.house.actor)


def _plain(row: Benchmark) -> dict[str, Any]:
    return row.model_dump(mode="json") | {"title": benchmarks.title(row)}


def _json(text: str, kind: type, field: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError as err:
        raise BadSettings(f"{field} is not JSON: {err}. Correct it and try again.") from err
    if not isinstance(found, kind) or (kind is list and not all(isinstance(one, dict) for one in found)):
        word = "a JSON object" if kind is dict else "a JSON list of objects"
        raise BadSettings(f"{field} is {str(found)[:40]!r}; it must be {word}. Correct it and try again.")
    return found
