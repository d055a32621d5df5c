"""The table of all versions: what each knows of every task, what it kept and cost, and how it compares with the live one."""

from __future__ import annotations

from clm_app.judging.standing import BETTER, WORSE, Change, Reading, Score, Standing, Standings
from ui.parts.words import between, card, chip, moment, percent, points, safe, span, table

MB = 1_000_000
CAPTION = (
    "Exact match on test rows; in brackets the 95 % interval, had other rows been drawn. The mean and the change are over the "
    "tasks that both the version and the live one were measured on, the rows drawn in pairs; each version is compared by itself"
)
MARKS = {BETTER: "accepted", WORSE: "refused"}


def standing_table(found: Standings) -> str:
    """Return the table as HTML. found: as `standings` gives it."""
    names = list(dict.fromkeys(r.benchmark for row in found.rows for r in row.readings))
    heads = ["Version", "State", "Beside the live one", "Mean", "Kept", *found.tasks, *names, "On disk", "Trained for",
             "The gate", "Live"]  # fmt: skip
    drawn = table(heads, [_row(row, found.tasks, names) for row in found.rows], CAPTION, is_safe=True)
    return card("Every version", f'<div class="clm-standing">{drawn}</div>', f"champion: {found.champion}")


def _row(row: Standing, tasks: list[str], benchmarks: list[str]) -> list[str]:
    read = {r.benchmark: r for r in row.readings}
    return [
        f"<b>{safe(row.version)}</b>{f'<br><small>{safe(row.learned)}</small>' if row.learned else ''}",
        chip("champion", "live") if row.is_champion else chip(row.state, row.state),
        "–" if row.against is None else beside(row.against),
        _score(row.mean), "–" if row.kept is None else points(row.kept.points / 100),
        *(_score(row.scores.get(task)) for task in tasks), *(_reading(read.get(name)) for name in benchmarks),
        on_disk(row), span(row.training_s), f'<span title="{safe(row.sentence or "")}">{safe(row.verdict or "–")}</span>',
        _live(row),
    ]  # fmt: skip


def beside(change: Change) -> str:
    """Return how a version compares with the champion: the word, the change and its interval."""
    ends = between((change.low / 100, change.high / 100), digits=1)
    return f"{chip(change.says, MARKS.get(change.says, 'none'))}<br>{points(change.points / 100)}<small>{ends}</small>"


def _score(score: Score | None) -> str:
    if score is None:
        return '<span class="clm-quiet" aria-label="not measured">–</span>'
    other = "" if score.is_shared else '<small title="on other test rows than the live version">*</small>'
    return f"{percent(score.value)}{other}<small>{between((score.low, score.high), digits=0)}</small>"


def _reading(reading: Reading | None) -> str:
    return (
        "–"
        if reading is None
        else f'<span title="{safe(reading.unit)}">{safe(in_unit(reading.value, reading.unit))}</span>'
    )


def in_unit(value: float, unit: str) -> str:
    """Return a benchmark's value as a person says it: per cent of a share, else two digits and the unit."""
    return percent(value) if unit.startswith("share") else f"{value:.2f} {unit}"


def on_disk(row: Standing) -> str:
    """Return what a version takes on disk: what it added, and all that is loaded to answer."""
    if row.size_bytes is None:
        return "–"
    return f"{row.added_bytes / MB:,.1f}\N{NO-BREAK SPACE}MB<br><small>{row.size_bytes / MB:,.1f} MB in all</small>"


def _live(row: Standing) -> str:
    if not row.live:
        return "never"
    start, end = row.live[-1]
    earlier = len(row.live) - 1
    times = "once" if earlier == 1 else f"{earlier} times"
    before = f"<br><small>live {times} before</small>" if earlier else ""
    return f"{'since ' if end is None else ''}{moment(start)}{'' if end is None else f' to {moment(end)}'}{before}"
