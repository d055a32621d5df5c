"""The retention matrix as a table: the number is in each cell, the colour only repeats it."""

from __future__ import annotations

from clm_app.judging.matrix import Matrix
from ui.parts.words import percent, points, safe

CAPTION = "row: version after learning task i; column: task j; exact match on the test rows"


def heat_map(matrix: Matrix, title: str, tasks: list[str]) -> str:
    """Return one track's matrix with its average accuracy, backward transfer and forgetting.

    tasks: the whole stream; those not learned yet get an empty column, so that two tracks stand in line.
    """
    tasks = tasks if tasks[: len(matrix.tasks)] == matrix.tasks else matrix.tasks
    empty = '<td class="clm-heat-none"></td>' * (len(tasks) - len(matrix.tasks))
    heads = "".join(f'<th scope="col">{safe(name)}</th>' for name in tasks)
    rows = "".join(_row(matrix, i, empty) for i in range(len(matrix.versions)))
    change = "".join(_change(matrix, j) for j in range(len(matrix.tasks)))
    lost = matrix.forgetting
    drop = f"<span>forgetting <strong>{points(lost).removeprefix('+')}</strong></span>" if lost is not None else ""
    return (
        f'<figure class="clm-heat"><figcaption><b>{safe(title)}</b>'
        f"<span>average accuracy <strong>{percent(matrix.average_accuracy)}</strong></span>"
        f"<span>backward transfer <strong>{points(matrix.backward_transfer)}</strong></span>{drop}</figcaption>"
        f'<div class="clm-scroll" tabindex="0" role="region" aria-label="{safe(title)}: retention matrix">'
        f'<table style="min-width:{92 + 58 * len(tasks)}px">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody>"
        f'<tfoot><tr><th scope="row">since learned</th>{change}</tr></tfoot></table></div>'
        f"<small>{CAPTION}</small></figure>"
    )


def _row(matrix: Matrix, i: int, empty: str) -> str:
    cells = "".join(_cell(matrix, i, j, value) for j, value in enumerate(matrix.values[i]))
    return f'<tr><th scope="row">{safe(matrix.versions[i])}</th>{cells}{empty}</tr>'


def _cell(matrix: Matrix, i: int, j: int, value: float | None) -> str:
    if value is None:
        return '<td class="clm-heat-none"><span aria-label="not measured">–</span></td>'
    kind = " ".join(name for name, holds in (("strong", value >= 0.6), ("own", i == j)) if holds)
    hint = f"{matrix.versions[i]} answers {percent(value)} of the test rows of {matrix.tasks[j]}"
    return f'<td class="{kind}" style="--share:{value:.3f}" title="{safe(hint)}">{value * 100:.0f}</td>'


def _change(matrix: Matrix, j: int) -> str:
    last = matrix.last[j]
    learned = matrix.values[j][j] if j < len(matrix.values) else None
    if last is None or learned is None or j == len(matrix.values) - 1:
        return "<td>–</td>"
    lost = (last - learned) * 100
    kind = "clm-lost" if lost <= -10 else ""
    return f'<td class="{kind}">{"−" if lost < -0.5 else "+" if lost >= 0.5 else "±"}{abs(lost):.0f}</td>'
