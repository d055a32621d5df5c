"""Versions and their lineage, what is live and was live, the machine, and the audit trail."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from clm_app import hardware
from clm_app.registry import versions
from ui import actions, questions
from ui.api._base import Api


class DeployWish(BaseModel):
    """Why a person makes a version live."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(min_length=1, max_length=500, description="kept in the deployment history and the audit trail")


class Versions(Api):
    """GET /api/versions, …/{name}, …/{name}/kept, /api/compare, /api/deployments, /api/hardware, /api/audit; POST …/deploy."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router, workspace = APIRouter(tags=["versions"]), self.house.workspace

        @router.get("/api/versions")
        def everything() -> list[dict[str, Any]]:
            """Return every version, newest first."""
            live = versions.live(workspace).id
            return [v.model_dump(mode="json") | {"live": v.id == live} for v in versions.everything(workspace)]

        @router.get("/api/versions/{name}")
        def card(name: str) -> dict[str, Any]:
            """Return the lineage card of one version; the name "live" is the live one."""
            version = versions.by_name(workspace, name)
            return versions.card(workspace, version) | {"probes": questions.readings(workspace, version)}

        @router.get("/api/versions/{name}/kept")
        def kept(name: str) -> list[dict[str, Any]]:
            """Return the rows that a version keeps of each task, every one with the sentence why."""
            return questions.kept_rows(workspace, versions.by_name(workspace, name))

        @router.get("/api/compare")
        def compare(before: str, after: str) -> dict[str, Any]:
            """Return two versions' scores on the same test rows, and every row that flipped, worst first."""
            return questions.compare(workspace, before, after)

        @router.post("/api/versions/{name}/deploy")
        def deploy(name: str, wish: DeployWish) -> dict[str, Any]:
            """Make the version live, once it is loaded and answers."""
            return actions.make_live(self.house, name, wish.reason).model_dump(mode="json")

        @router.get("/api/deployments")
        def deployments() -> list[dict[str, Any]]:
            """Return every move of the live alias, newest first."""
            return questions.deployments(workspace)

        @router.get("/api/hardware")
        def machine() -> dict[str, Any]:
            """Return the machine's load now."""
            return hardware.reading(workspace.home)

        @router.get("/api/audit")
        def audit(limit: int = 100) -> list[dict[str, Any]]:
            """Return the newest audit events, newest first."""
            return [e.model_dump(mode="json") for e in questions.audit(workspace, min(max(limit, 1), 10_000))]

        return router
