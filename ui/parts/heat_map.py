"""The retention matrix as a table: the number is in each cell, the colour only repeats it."""

from __future__ import annotations

from collections.abc import Sequence

from clm_app.judging.matrix import Matrix, Measuring
from ui.parts.words import between, count, percent, points, safe

CAPTION = "row: version after learning task i; column: task j; exact match on the test rows, in %"
MEANINGS = {  # each figure in one sentence, with what is good
    "average_accuracy": "the newest version's share of right answers, mean over the tasks learned so far. High is good.",
    "backward_transfer": "how far each earlier task has moved since it was just learned, on average. 0 or above is good.",
    "forgetting": "how far each earlier task is now below the best it ever was, on average. 0 or below is good.",
    "forward_transfer": "how much more of each later task was right just before it was learned than with the base model, "
    "on average. Above 0 is good.",
    "intransigence": "how much better each new task was known by a model that learned all tasks so far at once (joint), on "
    "average. 0 or below is good.",
}


def heat_map(matrix: Matrix | None, title: str, tasks: list[str], measuring: Measuring | None = None) -> str:
    """Return one track's matrix with its figures.

    tasks: the whole stream; those not learned yet get an empty column, so that two tracks stand in line. measuring: the
    row that is being filled, drawn last; the figures are those of the rows above it, which are whole.
    """
    known = measuring.tasks if measuring else matrix.tasks
    tasks = tasks if tasks[: len(known)] == known else known
    heads = "".join(f'<th scope="col">{safe(name)}</th>' for name in tasks)
    rows = "".join(_row(matrix, i, len(tasks)) for i in range(len(matrix.versions))) if matrix else ""
    if measuring:
        rows += _row_in_the_making(measuring, len(tasks))
    change = "".join(_change(matrix, j) for j in range(len(matrix.tasks))) if matrix else ""
    foot = f'<tfoot><tr><th scope="row">since learned</th>{change}</tr></tfoot>' if matrix else ""
    return (
        f'<figure class="clm-heat"><figcaption><b>{safe(title)}</b>{_figures(matrix) if matrix else ""}</figcaption>'
        f'<div class="clm-scroll" tabindex="0" role="region" aria-label="{safe(title)}: retention matrix">'
        f'<table style="min-width:{92 + 66 * len(tasks)}px">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody>{foot}</table></div>"
        f"<small>{CAPTION}{_over_seeds(matrix) if matrix else ''}</small></figure>"
    )


def legend(matrices: list[Matrix]) -> str:
    """Return what each figure says that one of these matrices shows, and what stands in brackets."""
    shown = {name for matrix in matrices for name, *_ in said(matrix)}
    lines = [f"<dt>{_name(name)}</dt><dd>{meaning}</dd>" for name, meaning in MEANINGS.items() if name in shown]
    if any(matrix.intervals for matrix in matrices):
        lines.append(
            "<dt>in brackets</dt><dd>where the figure would lie in 95 of 100 cases, had other test rows of the same tasks "
            "been drawn.</dd>"
        )
    return f'<dl class="clm-meanings">{"".join(lines)}</dl>' if lines else ""


def said(matrix: Matrix) -> list[tuple[str, str, str]]:
    """Return (figure, its value, its interval) in words of every figure that can be said of the matrix.

    Of one task nothing can be lost or gained yet: that is left out.
    """
    return [
        (name, *_worded(name, value, matrix.intervals.get(name))) for name, value in matrix.figures.items()
        if value is not None and (name != "backward_transfer" or len(matrix.versions) > 1)
    ]  # fmt: skip


def _figures(matrix: Matrix) -> str:
    return "".join(
        f'<span title="{safe(MEANINGS[name])}">{_name(name)} <strong>{safe(value)}</strong>{interval}</span>'
        for name, value, interval in said(matrix)
    )


def _worded(name: str, value: float, interval: Sequence[float] | None) -> tuple[str, str]:
    if name == "average_accuracy":
        return percent(value), between(interval, digits=0)
    is_loss = name in ("forgetting", "intransigence")  # where a plus before the figure would read as praise
    return points(value).removeprefix("+") if is_loss else points(value), between(interval, digits=1)


def _name(figure: str) -> str:
    return figure.replace("_", " ")


def _over_seeds(matrix: Matrix) -> str:
    """Return the figures over all jobs that learned this stream in the same way with another seed."""
    if not matrix.over_seeds:
        return ""
    figures = [
        f"{_name(name)} {''.join(_worded(name, mean, ends))}" for name, (mean, *ends) in matrix.over_seeds.items()
    ]
    return f"<br>Mean over {count(len(matrix.seeds), 'seed')}, interval over seeds and test rows: {', '.join(figures)}"


def _row(matrix: Matrix, i: int, columns: int) -> str:
    cells = "".join(_cell(matrix, i, j, value) for j, value in enumerate(matrix.values[i]))
    return f'<tr><th scope="row">{safe(matrix.versions[i])}</th>{cells}{_empty(columns - len(matrix.values[i]))}</tr>'


def _cell(matrix: Matrix, i: int, j: int, value: float | None) -> str:
    if value is None:
        return '<td class="clm-heat-none"><span aria-label="not measured">–</span></td>'
    hint = f"{matrix.versions[i]} answers {percent(value)} of the test rows of {matrix.tasks[j]}"
    if i < j:
        hint += ", which it has not learned"
    return _share(value, hint, "own" if i == j else "ahead" if i < j else "")


def _row_in_the_making(measuring: Measuring, columns: int) -> str:
    cells = "".join(_cell_in_the_making(measuring, j, value) for j, value in enumerate(measuring.values))
    empty = _empty(columns - len(measuring.values))
    return f'<tr class="clm-measuring"><th scope="row">measuring</th>{cells}{empty}</tr>'


def _cell_in_the_making(measuring: Measuring, j: int, value: float | None) -> str:
    task = measuring.tasks[j]
    if value is not None:
        return _share(value, f"The new version answers {percent(value)} of the test rows of {task}", "clm-heat-soon")
    if j == measuring.now:
        return f'<td class="clm-heat-now clm-heat-soon"><span aria-label="{safe(task)} is being measured">…</span></td>'
    return '<td class="clm-heat-none clm-heat-soon"><span aria-label="not measured yet"></span></td>'


def _share(value: float, hint: str, place: str) -> str:
    kind = " ".join(name for name in ("strong" if value >= 0.6 else "", place) if name)
    return f'<td class="{kind}" style="--share:{value:.3f}" title="{safe(hint)}">{value * 100:.0f}</td>'


def _empty(cells: int) -> str:
    return '<td class="clm-heat-none"></td>' * cells


def _change(matrix: Matrix, j: int) -> str:
    last = matrix.last[j]
    learned = matrix.values[j][j] if j < len(matrix.values) else None
    if last is None or learned is None or j == len(matrix.values) - 1:
        return "<td>–</td>"
    lost = (last - learned) * 100
    kind = "clm-lost" if lost <= -10 else ""
    return f'<td class="{kind}">{"−" if lost < -0.5 else "+" if lost >= 0.5 else "±"}{abs(lost):.0f}</td>'
