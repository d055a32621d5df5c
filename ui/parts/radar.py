"""Up to three versions over the tasks they share, each task a spoke from 0 to 100 %, as SVG."""

from __future__ import annotations

import math

from clm_app.judging.standing import Standing, Standings
from ui.parts.trends import dash, hue, legend, mark
from ui.parts.words import card, percent, safe

WIDTH, HEIGHT, RADIUS = 560, 380, 145
LONGEST = 20  # letters of a task's name
LEAST_SPOKES, MOST_VERSIONS = 3, 3


def radar(found: Standings, names: list[str]) -> str:
    """Return the plot as HTML, or a sentence where it would say nothing. names: the versions to draw, at most three."""
    known = {row.version: row for row in found.rows}
    rows = [known[name] for name in dict.fromkeys(names) if name in known][:MOST_VERSIONS]
    tasks = [task for task in found.tasks if rows and all(task in row.scores for row in rows)]
    if len(tasks) < LEAST_SPOKES:
        return '<p class="clm-quiet">A radar plot needs three tasks that all chosen versions were measured on.</p>'
    said = "; ".join(
        f"{row.version}: " + ", ".join(f"{task} {percent(row.scores[task].value)}" for task in tasks) for row in rows
    )
    shapes = "".join(_shape(i, row, tasks) for i, row in enumerate(rows))
    plot = (
        f'<div class="clm-scroll"><svg class="clm-plot clm-radar" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{safe(said)}">{_web(tasks)}{shapes}</svg></div>'
    )
    return card("Task by task", plot + legend([row.version for row in rows]), "exact match; the rim is 100 %")


def _web(tasks: list[str]) -> str:
    rings = "".join(
        f'<polygon class="clm-rule" points="{_outline([share] * len(tasks))}"/>' for share in (0.25, 0.5, 0.75, 1)
    )
    spokes = "".join(_spoke(i, len(tasks), task) for i, task in enumerate(tasks))
    return rings + spokes


def _spoke(place: int, of: int, task: str) -> str:
    (x, y), (tx, ty) = _at(place, of, 1), _at(place, of, 1.12)
    anchor = "middle" if abs(tx - WIDTH / 2) < 12 else "start" if tx > WIDTH / 2 else "end"
    short = task if len(task) <= LONGEST else f"{task[: LONGEST - 1]}…"
    return (
        f'<line class="clm-rule" x1="{WIDTH / 2}" y1="{HEIGHT / 2}" x2="{x:.1f}" y2="{y:.1f}"/>'
        f'<text class="clm-tick" x="{tx:.1f}" y="{ty + 4:.1f}" text-anchor="{anchor}">'
        f"<title>{safe(task)}</title>{safe(short)}</text>"
    )


def _shape(number: int, row: Standing, tasks: list[str]) -> str:
    values = [row.scores[task].value for task in tasks]
    dots = "".join(
        f"<g><title>{safe(row.version)}, {safe(task)}: {percent(value)}</title>{mark(number, *_at(i, len(tasks), value))}</g>"
        for i, (task, value) in enumerate(zip(tasks, values, strict=True))
    )
    return f'<g class="clm-hue" style="{hue(number)}"><polygon points="{_outline(values)}"{dash(number)}/>{dots}</g>'


def _outline(values: list[float]) -> str:
    return " ".join("{:.1f},{:.1f}".format(*_at(i, len(values), value)) for i, value in enumerate(values))


def _at(place: int, of: int, share: float) -> tuple[float, float]:
    """Return where a share lies on a spoke; the first one points up, the others follow clockwise."""
    angle = 2 * math.pi * place / of
    return WIDTH / 2 + RADIUS * share * math.sin(angle), HEIGHT / 2 - RADIUS * share * math.cos(angle)
