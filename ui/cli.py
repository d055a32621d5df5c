"""What the terminal shows, as rich renderables; who fetches the values and prints them is not decided here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from clm_app.judging.matrix import Matrix
from store.tables import Version
from ui.parts.heat_map import said
from ui.parts.words import moment, percent

VERDICT_STYLE = {"promote": "green", "hold": "red", "repair": "yellow", "inconclusive": "yellow"}
STATE_STYLE = {
    "accepted": "green", "refused": "red", "candidate": "yellow", "waiting": "yellow", "undecided": "yellow", "base": "cyan",
}  # fmt: skip


def matrix_table(matrix: Matrix, title: str = "What was kept") -> Table:
    """Return the retention matrix: a row per version, a column per task, exact match in percent of the test rows."""
    figures = "\n".join(f"{name.replace('_', ' ')} {value}{interval}" for name, value, interval in said(matrix))
    table = Table(title=title, caption=f"{figures}\nrow: version after learning task i; column: task j", min_width=46)
    table.add_column("after")
    for task in matrix.tasks:
        table.add_column(Text(task), justify="right", overflow="fold")
    for i, (version, values) in enumerate(zip(matrix.versions, matrix.values, strict=True)):
        table.add_row(Text(version), *(_cell(value, own=i == j) for j, value in enumerate(values)))
    return table


def _cell(value: float | None, *, own: bool) -> Text:
    if value is None:
        return Text("–", style="dim")
    style = "green" if value >= 0.8 else "yellow" if value >= 0.5 else "red"
    return Text(percent(value), style=f"bold {style}" if own else style)


def versions_table(versions: Iterable[Version], live: str) -> Table:
    """Return the versions, newest first as given. live: the name of the live one."""
    versions = list(versions)
    names = {version.id: version.name for version in versions}
    table = Table(title="Versions")
    for heading in ("version", "state", "parent", "track", "strategy", "method", "made"):
        table.add_column(heading)
    for v in versions:
        state = (
            Text("live", style="bold green") if v.name == live else Text(v.state, style=STATE_STYLE.get(v.state, ""))
        )
        parent = names.get(v.parent_id, "–")
        table.add_row(
            Text(v.name), state, Text(parent), v.track, v.strategy or "–", v.method or "–", moment(v.created_at)
        )
    return table


def decision_lines(decisions: Iterable[dict[str, Any]]) -> list[Text]:
    """Return one line per decision: version, verdict and its sentence. decisions: as `ui.questions.decisions` gives."""
    return [
        Text.assemble(
            (d["version"], "bold"), "  ", (d["verdict"], VERDICT_STYLE.get(d["verdict"], "")), f"  {d['sentence']}"
        )
        for d in decisions
    ]
