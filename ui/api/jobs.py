"""Jobs: ask for one, look at it, follow it, cancel it. The clock finds what is asked for; no route trains."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from clm_app import wishes
from store.tables.work import ENDED
from ui import questions
from ui.api._base import Api

LOOK_EVERY_S = 0.5


class Jobs(Api):
    """POST /api/learn, GET /api/jobs, and what hangs below one job."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router, workspace = APIRouter(tags=["jobs"]), self.house.workspace

        @router.post("/api/learn", status_code=201)
        def learn(wish: wishes.LearnWish) -> dict[str, Any]:
            """Write the wish down as a job and return it."""
            return wishes.ask(workspace, wish, self.house.actor).model_dump(mode="json")

        @router.get("/api/jobs")
        def jobs(limit: int = 50) -> list[dict[str, Any]]:
            """Return the newest jobs, newest first."""
            return [j.model_dump(mode="json") for j in questions.jobs(workspace, min(max(limit, 1), 1000))]

        @router.get("/api/jobs/{job_id}")
        def job(job_id: int) -> dict[str, Any]:
            """Return one job with its runs, their latest progress, decisions and retention matrices."""
            return questions.job_story(workspace, job_id)

        @router.post("/api/jobs/{job_id}/cancel")
        def cancel(job_id: int) -> dict[str, Any]:
            """Ask the job to stop; its checkpoint is kept."""
            return wishes.cancel(workspace, job_id, self.house.actor).model_dump(mode="json")

        @router.get("/api/jobs/{job_id}/events")
        async def events(job_id: int) -> StreamingResponse:
            """Stream the job's story as server-sent events: one whenever it changed, a last one named "end"."""
            await asyncio.to_thread(questions.job, workspace, job_id)  # a wrong number is refused before the stream
            return StreamingResponse(self._changes(job_id), media_type="text/event-stream")

        return router

    async def _changes(self, job_id: int) -> AsyncIterator[str]:
        last, quiet_s = "", 0.0
        while not self.house.is_stopping:
            story = await asyncio.to_thread(questions.job_story, self.house.workspace, job_id)
            text = json.dumps(story, sort_keys=True)
            if story["status"] in ENDED:
                yield f"event: end\ndata: {text}\n\n"
                return
            quiet_s = 0.0 if text != last else quiet_s + LOOK_EVERY_S
            if text != last:
                yield f"event: job\ndata: {text}\n\n"
            elif quiet_s >= 15:
                yield ": still here\n\n"
                quiet_s = 0.0
            last = text
            await asyncio.sleep(LOOK_EVERY_S)
