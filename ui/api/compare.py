"""Compare: two versions, two prompts' answers, all versions beside the live one; as values, as a report, as a table; and bisect."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from clm_app.judging import bisect
from clm_app.judging.standing import standings
from clm_app.registry import card, versions
from ui import comparing, judging
from ui.api._base import Api
from ui.parts.radar import radar
from ui.parts.report import report
from ui.parts.side_by_side import replies, side_by_side
from ui.parts.standing import standing_table
from ui.parts.trends import trends

Format = Literal["html", "csv"]


class Compare(Api):
    """GET /api/compare/…, /api/standings, their exports and …/{name}/card.md; POST /api/compare/prompts, …/judged, /api/bisect."""

    def routes(self) -> APIRouter:
        """Return the router."""
        router, workspace = APIRouter(tags=["compare"]), self.house.workspace

        @router.get("/api/compare/whole")
        def whole(before: str, after: str) -> dict[str, Any]:
            """Return scores, flips, sizes, speeds, costs and benchmarks of two versions."""
            return comparing.side_by_side(workspace, before, after)

        @router.get("/api/compare/outputs")
        def outputs(before: str, after: str, most: Annotated[int, Query(ge=1, le=50)] = 10) -> dict[str, Any]:
            """Return what both versions reply to the rows that flipped, worst first, with the words that differ."""
            return comparing.outputs(self.house, before, after, most)

        @router.post("/api/compare/prompts")
        def prompts(wish: comparing.PromptsWish) -> dict[str, Any]:
            """Return what two versions or endpoints reply to the same prompts, with the words that differ."""
            return comparing.prompts(self.house, wish)

        @router.post("/api/compare/judged")
        def judged(wish: judging.JudgedWish) -> dict[str, Any]:
            """Let a model judge what two versions or endpoints reply, each pair in both orders; what it said is kept."""
            return judging.judged(self.house, wish)

        @router.get("/api/compare/judged")
        def judged_before(limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> list[dict[str, Any]]:
            """Return what judges said before, newest first, without the pairs."""
            return judging.before(workspace, limit)

        @router.get("/api/compare/judged/{number}")
        def judged_once(number: int) -> dict[str, Any]:
            """Return one of them with its pairs."""
            return judging.once(workspace, number)

        @router.get("/api/compare/export")
        def export(
            before: str, after: str, format: Format = "html", outputs: Annotated[int, Query(ge=0, le=50)] = 0
        ) -> Response:
            """Return the comparison as one file; outputs: how many flipped rows are answered anew for it (html)."""
            found = comparing.side_by_side(workspace, before, after)
            name = f"{found['before']}-{found['after']}"
            if format == "csv":
                return _csv(comparing.compared_csv(found), name)
            said = replies(comparing.outputs(self.house, before, after, outputs)) if outputs else ""
            table = standings(workspace)
            body = side_by_side(found) + said + radar(table, [found["before"], found["after"]])
            return _html(report(f"From {found['before']} to {found['after']}", body), name)

        @router.get("/api/standings")
        def everything() -> dict[str, Any]:
            """Return every version's standing beside the live one, best first."""
            return standings(workspace).model_dump(mode="json")

        @router.get("/api/standings/export")
        def export_all(format: Format = "html") -> Response:
            """Return the table of all versions as one file."""
            table = standings(workspace)
            if format == "csv":
                return _csv(comparing.standings_csv(table), "versions")
            best = [row.version for row in table.rows if row.version != table.champion]
            body = standing_table(table) + trends(table) + radar(table, [table.champion, *best])
            return _html(report(f"Every version beside {table.champion}", body), "versions")

        @router.get("/api/versions/{name}/card.md")
        def model_card(name: str, prompts: bool = False) -> PlainTextResponse:
            """Return the model card of a version; prompts: write out the rows that it lost, and not only their keys."""
            said = card.model_card(workspace, versions.by_name(workspace, name), has_prompts=prompts)
            return PlainTextResponse(said, media_type="text/markdown; charset=utf-8")

        @router.post("/api/bisect", status_code=201)
        def broken(wish: bisect.BisectWish) -> dict[str, Any]:
            """Ask which update broke a task; the answer is the job's result."""
            return bisect.ask(workspace, wish, self.house.actor).model_dump(mode="json")

        return router


def _html(text: str, name: str) -> HTMLResponse:
    return HTMLResponse(text, headers=_file(name, "html"))


def _csv(text: str, name: str) -> Response:
    return Response(text, media_type="text/csv; charset=utf-8", headers=_file(name, "csv"))


def _file(name: str, ending: str) -> dict[str, str]:
    safe = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return {"content-disposition": f'attachment; filename="clm-{safe}.{ending}"'}
