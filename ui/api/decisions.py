"""Decisions of the gate: what was decided and why, whether it can be derived again, and what people say of it."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from clm_app.errors import NotThere
from clm_app.judging.decisions import derived
from store.tables import Decision
from ui import actions
from ui.api._base import Api


class Word(BaseModel):
    """What a person says of a verdict."""

    model_config = ConfigDict(extra="forbid")

    says: Literal["approve", "reject", "override"] = Field(description="of the version's last decision")
    by: str = Field(min_length=1, max_length=100, description="name of who says so; kept in the audit trail")
    reason: str = Field("", max_length=500, description="needed to reject and to override")


class Decisions(Api):
    """GET /api/decisions/{id}, GET …/derived, POST /api/versions/{name}/say."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router, workspace = APIRouter(tags=["decisions"]), self.house.workspace

        @router.get("/api/decisions/{decision_id}")
        def decision(decision_id: int) -> dict[str, Any]:
            """Return one decision with its evidence."""
            with workspace.read() as session:
                found = session.get(Decision, decision_id)
            if found is None:
                raise NotThere(f"There is no decision {decision_id}. GET /api/jobs/<id> lists those of a job.")
            return found.model_dump(mode="json")

        @router.get("/api/decisions/{decision_id}/derived")
        def again(decision_id: int) -> dict[str, Any]:
            """Judge again from the outcomes that the decision is bound to, and say whether it comes out the same."""
            found = derived(workspace, decision_id)
            return {"same": found.is_same, "verdict": found.verdict.verdict, "sentence": found.verdict.sentence}

        @router.post("/api/versions/{name}/say")
        def say(name: str, word: Word) -> dict[str, Any]:
            """Approve, reject or override; the last word needed puts the version live."""
            said = actions.say(self.house, name, word.says, word.by, word.reason)
            return {"version": said.version.name, "state": said.version.state, "missing": said.missing}

        return router
