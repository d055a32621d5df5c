"""How each task fared from version to version: a line for each task over the updates that led to the live version, as SVG."""

from __future__ import annotations

from clm_app.judging.standing import Score, Standing, Standings
from ui.parts.words import card, percent, safe

STEP, LEFT, TOP, HEIGHT, BELOW = 74, 44, 14, 210, 44
COLOURS = 8  # --clm-hue-1 … in page.css; after these the dashes change
DASHES = ("", "7 4", "2 4", "10 3 2 3")


def trends(found: Standings) -> str:
    """Return the plot as HTML, or a sentence where no line can be drawn yet. found: as `standings` gives it."""
    line = found.line()
    drawn = {task: points for task in found.tasks if (points := _points(line, task))}
    if not drawn or len(line) < 2:
        return '<p class="clm-quiet">The live version has learned nothing yet, so there is no line to draw.</p>'
    width = LEFT + STEP * (len(line) - 1) + 30
    said = "; ".join(
        f"{task}: {percent(points[0][1].value)} when learned, {percent(points[-1][1].value)} in {line[points[-1][0]].version}"
        for task, points in drawn.items()
    )
    lines = "".join(_line(i, task, points, line) for i, (task, points) in enumerate(drawn.items()))
    plot = (
        f'<div class="clm-scroll" tabindex="0" role="region" aria-label="Accuracy over the versions">'
        f'<svg class="clm-plot" viewBox="0 0 {width} {TOP + HEIGHT + BELOW}" width="{width}" height="{TOP + HEIGHT + BELOW}" '
        f'role="img" aria-label="{safe(said)}">{_grid(line, width)}{lines}</svg></div>'
    )
    return card("Each task over the updates", plot + legend(list(drawn)), "exact match on the test rows, since learned")


def _points(line: list[Standing], task: str) -> list[tuple[int, Score]]:
    """Return (place in the line, score) of a task since it was first learned."""
    first = next((i for i, row in enumerate(line) if row.learned == task), None)
    if first is None:
        return []
    return [(i, score) for i, row in enumerate(line) if i >= first and (score := row.scores.get(task))]


def _grid(line: list[Standing], width: int) -> str:
    rules = "".join(
        f'<line class="clm-rule" x1="{LEFT}" x2="{width - 16}" y1="{_y(share)}" y2="{_y(share)}"/>'
        f'<text class="clm-tick" x="{LEFT - 8}" y="{_y(share) + 4}" text-anchor="end">{share * 100:.0f} %</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    names = "".join(
        f'<text class="clm-tick" x="{_x(i)}" y="{TOP + HEIGHT + 20}" text-anchor="middle">{safe(row.version)}</text>'
        for i, row in enumerate(line)
    )
    return rules + names


def _line(number: int, task: str, points: list[tuple[int, Score]], line: list[Standing]) -> str:
    """Return one task's line; where a version was not measured it is broken."""
    path, last = "", None
    for place, score in points:
        path += f"{'L' if last == place - 1 else 'M'}{_x(place)} {_y(score.value):.1f}"
        last = place
    dots = "".join(
        f"<g><title>{safe(line[place].version)}, {safe(task)}: {percent(score.value)} "
        f"({percent(score.low)} to {percent(score.high)})</title>{mark(number, _x(place), _y(score.value))}</g>"
        for place, score in points
    )
    return f'<g class="clm-hue" style="{hue(number)}"><path d="{path}"{dash(number)}/>{dots}</g>'


def _x(place: int) -> int:
    return LEFT + 14 + STEP * place


def _y(share: float) -> float:
    return TOP + HEIGHT * (1 - share)


# --- what the plots share --------------------------------------------------------------------------------------------------


def hue(number: int) -> str:
    """Return the style that gives a line its colour, which light and dark pages choose for themselves."""
    return f"--hue:var(--clm-hue-{number % COLOURS + 1})"


def dash(number: int) -> str:
    """Return the attribute that tells a line from those of the same colour, and from others without colour."""
    kind = DASHES[number // COLOURS % len(DASHES)]
    return f' stroke-dasharray="{kind}"' if kind else ""


def mark(number: int, x: float, y: float) -> str:
    """Return a point whose shape, too, says which line it is on."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>',
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
        f'<path class="clm-dot-shape" d="M{x:.1f} {y - 5.4:.1f}l5 9.4h-10Z"/>',
        f'<path class="clm-dot-shape" d="M{x:.1f} {y - 5.6:.1f}l5.6 5.6l-5.6 5.6l-5.6 -5.6Z"/>',
    )
    return shapes[number % len(shapes)]


def legend(names: list[str]) -> str:
    """Return the names beside a piece of their line."""
    entries = "".join(
        f'<li><svg width="36" height="16" viewBox="0 0 36 16" aria-hidden="true"><g class="clm-hue" style="{hue(i)}">'
        f'<path d="M2 8H34"{dash(i)}/>{mark(i, 18, 8)}</g></svg>{safe(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="clm-legend clm-legend-lines" aria-label="What the lines mean">{entries}</ul>'
