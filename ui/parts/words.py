"""How numbers, times and sentences are said on the page; everything that comes from outside is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ui.questions import aware


def safe(value: Any) -> str:
    """Return the value as text that HTML shows as it is."""
    return html.escape(str(value), quote=True)


def percent(share: float | None) -> str:
    """0.874 -> "87 %", never broken over two lines; None -> an en dash, which means: not measured."""
    return "–" if share is None else f"{share * 100:.0f}\N{NO-BREAK SPACE}%"


def points(share: float) -> str:
    """-0.032 -> "−3.2 points": a difference of two shares."""
    return f"{'−' if share < 0 else '+' if share > 0 else '±'}{abs(share) * 100:.1f}\N{NO-BREAK SPACE}points"


def between(interval: Sequence[float] | None, digits: int) -> str:
    """(-0.012, 0.031) -> " (−1.2 to 3.1)", in points or per cent as the figure before it; None -> nothing."""
    if interval is None:
        return ""
    low, high = (f"{round(100 * end, digits) + 0.0:.{digits}f}".replace("-", "−") for end in interval)
    return f" ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"


def count(number: int, noun: str) -> str:
    """(1240, "row") -> "1,240 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(seconds: float | None) -> str:
    """Return a length of time in one unit, as a person would say it."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def moment(when: datetime | str | None) -> str:
    """Return a time on this machine's clock, with the date where it is not today."""
    if when is None:
        return "–"
    when = aware(datetime.fromisoformat(when) if isinstance(when, str) else when).astimezone()
    today = datetime.now().astimezone().date()
    return f"{when:%H:%M}" if when.date() == today else f"{when:%d %b %Y, %H:%M}"


def ago(when: datetime | str) -> str:
    """Return how long ago a time was: "12 min ago"."""
    when = aware(datetime.fromisoformat(when) if isinstance(when, str) else when)
    passed = (datetime.now(UTC) - when).total_seconds()
    return "just now" if passed < 90 else f"{span(passed) if passed < 172_800 else f'{passed / 86_400:.0f} days'} ago"


def notice(sentence: str, kind: str = "good") -> str:
    """Return a sentence in a box: good, problem or note. A screen reader speaks a problem at once."""
    role = "alert" if kind == "problem" else "status"
    return f'<div class="clm-notice clm-{kind}" role="{role}">{safe(sentence)}</div>' if sentence else ""


def figures(pairs: list[tuple[str, str, str]]) -> str:
    """Return (name, value, small print) as a row of figures."""
    cells = "".join(
        f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd>{f'<small>{safe(more)}</small>' if more else ''}</div>"
        for name, value, more in pairs
    )
    return f'<dl class="clm-figures">{cells}</dl>'


def table(headers: list[str], rows: list[list[str]], caption: str = "", *, is_safe: bool = False) -> str:
    """Return an HTML table. is_safe: the cells are HTML already; otherwise they are escaped."""
    said = str if is_safe else safe
    head = "".join(f'<th scope="col">{safe(h)}</th>' for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{said(c)}</td>" for c in row) + "</tr>" for row in rows)
    title = f"<caption>{safe(caption)}</caption>" if caption else ""
    return (
        f'<div class="clm-scroll" tabindex="0" role="region" aria-label="{safe(caption or "table")}">'
        f'<table class="clm-table">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def card(title: str, body: str, note: str = "") -> str:
    """Return a titled box; body is HTML."""
    small = f'<span class="clm-card-note">{safe(note)}</span>' if note else ""
    return f'<section class="clm-card"><header><h3>{safe(title)}</h3>{small}</header>{body}</section>'


def chip(text: str, kind: str) -> str:
    """Return a short coloured word, such as a state."""
    return f'<span class="clm-chip clm-chip-{safe(kind)}">{safe(text)}</span>'
