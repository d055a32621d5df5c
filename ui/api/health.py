"""Whether the app answers, and what it serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

import clm_app
from clm_app.errors import ClmError
from clm_app.registry import versions
from ui.api._base import Api


class Health(Api):
    """GET /api/health."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router = APIRouter(tags=["health"])

        @router.get("/api/health")
        def health() -> dict[str, Any]:
            """page: whether the page is ready; live: name of the live version, null where no model is there yet."""
            try:
                live, problem = versions.live(self.house.workspace).name, self.house.page_problem
            except ClmError as err:
                live, problem = None, str(err)
            return {
                "status": "ok" if not problem else "degraded",
                "problem": problem,
                "page": self.house.page_is_ready,
                "version": clm_app.__version__,
                "live": live,
                "home": str(self.house.workspace.home),
            }

        return router
