"""Versions as a graph from parent to child, drawn as SVG; shape and colour say the state, and each node is a button."""

from __future__ import annotations

from store.tables import Version
from ui.parts.words import safe

STEP_X, STEP_Y, LEFT, TOP, R = 96, 84, 46, 34, 15
# (kind, what the legend calls it)
LEGEND = (
    ("live", "live"),
    ("accepted", "accepted"),
    ("candidate", "waiting for the gate"),
    ("waiting", "waiting for approval"),
    ("undecided", "undecided"),
    ("refused", "refused"),
    ("naive", "comparison without protection"),
    ("base", "base model"),
)


def lineage(everything: list[Version], live_id: int, chosen: str) -> str:
    """Return the graph of all versions; `chosen` is the name of the one whose card is open."""
    places = _places(everything)
    by_id = {v.id: v for v in everything}
    lines = "".join(
        _line(places[v.parent_id], places[v.id], v.track != "main") for v in everything if v.parent_id in places
    )
    nodes = "".join(
        _node(v, *places[v.id], _kind(v, live_id), v.name == chosen) for v in sorted(by_id.values(), key=lambda v: v.id)
    )
    width = LEFT * 2 + STEP_X * max(x for x, _ in places.values())
    height = TOP * 2 + STEP_Y * max(y for _, y in places.values()) + 12
    return (
        f'<div class="clm-lineage clm-scroll"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="group" aria-label="{len(everything)} versions, parents to the left">{lines}{nodes}</svg></div>'
        f"{_legend({_kind(v, live_id) for v in everything})}"
    )


def _places(everything: list[Version]) -> dict[int, tuple[int, int]]:
    """Return {version id: (generation, lane)}: a first child goes on in its parent's lane, others open a new one."""
    children: dict[int | None, list[Version]] = {}
    known = {v.id for v in everything}
    for version in everything:
        children.setdefault(version.parent_id if version.parent_id in known else None, []).append(version)
    for siblings in children.values():
        siblings.sort(key=lambda v: (v.track != "main", v.state == "refused", v.id))
    places: dict[int, tuple[int, int]] = {}
    lanes = -1
    waiting = [(root, 0, None) for root in reversed(children.get(None, []))]
    while waiting:
        version, generation, lane = waiting.pop()
        if lane is None:
            lanes += 1
            lane = lanes
        places[version.id] = (generation, lane)
        below = children.get(version.id, [])
        goes_on = below and below[0].track == version.track
        waiting += [(c, generation + 1, None) for c in reversed(below[1:] if goes_on else below)]
        waiting += [(below[0], generation + 1, lane)] if goes_on else []
    return places


def _kind(version: Version, live_id: int) -> str:
    if version.id == live_id:
        return "live"
    return "naive" if version.track != "main" else version.state


def _at(place: tuple[int, int]) -> tuple[int, int]:
    return LEFT + place[0] * STEP_X, TOP + place[1] * STEP_Y


def _line(parent: tuple[int, int], child: tuple[int, int], is_comparison: bool) -> str:
    (x0, y0), (x1, y1) = _at(parent), _at(child)
    bend = x0 + STEP_X / 2
    kind = ' class="clm-dashed"' if is_comparison else ""
    return f'<path{kind} d="M{x0} {y0} C{bend} {y0} {bend} {y1} {x1} {y1}"/>'


def _shape(kind: str, x: int, y: int) -> str:
    if kind == "refused":
        return (
            f'<rect class="clm-shape" x="{x - R + 2}" y="{y - R + 2}" width="{2 * R - 4}" height="{2 * R - 4}" rx="3"/>'
            f'<path class="clm-mark" d="M{x - 5} {y - 5}l10 10m0 -10l-10 10"/>'
        )
    if kind == "naive":
        return f'<path class="clm-shape" d="M{x} {y - R}L{x + R} {y}L{x} {y + R}L{x - R} {y}Z"/>'
    if kind == "base":
        return f'<rect class="clm-shape" x="{x - R}" y="{y - R + 3}" width="{2 * R}" height="{2 * R - 6}" rx="4"/>'
    ring = f'<circle class="clm-ring" cx="{x}" cy="{y}" r="{R + 4}"/>' if kind == "live" else ""
    return f'{ring}<circle class="clm-shape" cx="{x}" cy="{y}" r="{R - 1}"/>'


def _node(version: Version, generation: int, lane: int, kind: str, is_chosen: bool) -> str:
    x, y = _at((generation, lane))
    said = dict(LEGEND).get(kind, kind)
    halo = f'<circle class="clm-halo" cx="{x}" cy="{y}" r="{R + 9}"/>' if is_chosen else ""
    return (
        f'<g class="clm-node clm-{safe(kind)}" role="button" tabindex="0" aria-pressed="{str(is_chosen).lower()}" '
        f'data-version="{safe(version.name)}" aria-label="{safe(version.name)}, {safe(said)}">'
        f"<title>{safe(version.name)}: {safe(said)}</title>{halo}{_shape(kind, x, y)}"
        f'<text x="{x}" y="{y + R + 24}">{safe(version.name)}</text></g>'
    )


def _legend(present: set[str]) -> str:
    entries = "".join(
        f'<li><svg width="40" height="40" viewBox="0 0 40 40" aria-hidden="true"><g class="clm-node clm-{kind}">'
        f"{_shape(kind, 20, 20)}</g></svg>{said}</li>"
        for kind, said in LEGEND
        if kind in present
    )
    return f'<ul class="clm-legend" aria-label="What the shapes mean">{entries}</ul>'
