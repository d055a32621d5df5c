"""Export parity of a version: what was read of it, and reading it now."""

from __future__ import annotations

import threading
from typing import Any

from fastapi import APIRouter

from clm_app.errors import ChildFailed
from clm_app.judging import parity
from clm_app.registry import versions
from ui.api._base import Api


class Parity(Api):
    """GET and POST /api/versions/{name}/parity."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router, workspace = APIRouter(tags=["versions"]), self.house.workspace
        one_at_a_time = threading.Lock()  # each loads a model twice over

        @router.get("/api/versions/{name}/parity")
        def readings(name: str) -> list[dict[str, Any]]:
            """Return every reading of a version, newest first; the name "live" is the live one."""
            version = versions.by_name(workspace, name)
            return [reading.model_dump(mode="json") for reading in parity.readings(workspace, version)]

        @router.post("/api/versions/{name}/parity", status_code=201)
        def check(name: str) -> dict[str, Any]:
            """Compare the version as it is served with what was trained, now, and return the reading."""
            version = versions.by_name(workspace, name)
            if self.house.router is None:
                raise ChildFailed("Nothing can be served here, so there is nothing to compare. Open the app itself.")
            with one_at_a_time:
                found = parity.check(workspace, self.house.router.spawn, version, again=True)
            return found.model_dump(mode="json")

        return router
