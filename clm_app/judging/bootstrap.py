"""How sure a figure of retention is: an interval from drawing its test items, and its seeds, again and again.

Source: percentile bootstrap, Efron and Tibshirani 1993, chapter 13; over seeds the two levels of Davison and Hinkley
1997, section 3.8: seeds are drawn first, and items within each drawn seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    # cells[i][j]: a number, mostly 0 or 1, for each test item of task j by the version made after task i; None where
    # not measured. A column's items stand in the same order in every row: an item is drawn for all versions at once.
    Cells = list[list[NDArray | None]]
    Figure = Callable[[NDArray], NDArray]

Interval = tuple[float, float]
RESAMPLES, LEVEL = 2000, 0.95


def average_accuracy(values: NDArray) -> NDArray:
    """Return `Matrix.average_accuracy` of each matrix. values: (..., versions, tasks), NaN where not measured."""
    return _mean_of_measured(values[..., -1, :])


def backward_transfer(values: NDArray) -> NDArray:
    """Return `Matrix.backward_transfer` of each matrix. values: (..., versions, tasks), NaN where not measured."""
    import numpy

    earlier = values.shape[-2] - 1
    changes = (values[..., -1, :] - _diagonal(values))[..., :earlier]
    return _mean_of_measured(changes) if earlier else numpy.zeros(values.shape[:-2])


def forgetting(values: NDArray, best: NDArray | None = None) -> NDArray:
    """Return `Matrix.forgetting` of each matrix, NaN where that is None. values: (..., versions, tasks).

    best: (tasks - 1,), the version that was best at each earlier task; None takes each matrix's own.
    """
    import numpy

    earlier = values.shape[-2] - 1
    if not earlier:
        return numpy.full(values.shape[:-2], numpy.nan)
    best = best_moments(values) if best is None else numpy.broadcast_to(best, (*values.shape[:-2], earlier))
    highest = numpy.take_along_axis(values[..., :earlier], best[..., None, :], axis=-2)[..., 0, :]
    is_seen = numpy.tril(numpy.ones(values.shape[-2:], bool))[:, :earlier]
    is_whole = ~(numpy.isnan(values[..., :earlier]) & is_seen).any(axis=(-2, -1))
    return numpy.where(is_whole, (highest - values[..., -1, :earlier]).mean(axis=-1), numpy.nan)


def best_moments(values: NDArray) -> NDArray:
    """Return (..., tasks - 1): which version, the last one apart, was best at each earlier task; the first of equals."""
    import numpy

    earlier = values[..., :-1, : values.shape[-2] - 1]
    if not earlier.shape[-1]:
        return numpy.zeros((*values.shape[:-2], 0), int)
    return numpy.where(numpy.isnan(earlier), -1.0, earlier).argmax(axis=-2)


def forward_transfer(values: NDArray, before: NDArray) -> NDArray:
    """Return `Matrix.forward_transfer` of each matrix, NaN where that is None. before: (..., tasks)."""
    import numpy

    if values.shape[-2] < 2:
        return numpy.full(values.shape[:-2], numpy.nan)
    ahead = numpy.diagonal(values, offset=1, axis1=-2, axis2=-1)  # R[j-1][j]
    return (ahead - before[..., 1 : ahead.shape[-1] + 1]).mean(axis=-1)


def intransigence(values: NDArray, joint: NDArray) -> NDArray:
    """Return `Matrix.intransigence` of each matrix, NaN where that is None. joint: (..., tasks)."""
    return (joint[..., : values.shape[-2]] - _diagonal(values)).mean(axis=-1)


def figures(cells: NDArray, best: NDArray | None = None) -> dict[str, NDArray]:
    """Return the figures of `Matrix`, by name, of each of many matrices; NaN where one cannot be said.

    cells: (..., 2 + versions, tasks), NaN where not measured. Row 0: the base, before anything was learned; row 1: at
    each task a model that learned all tasks so far at once; then the versions. best: see `forgetting`.
    """
    before, joint, values = cells[..., 0, :], cells[..., 1, :], cells[..., 2:, :]
    return {
        "average_accuracy": average_accuracy(values), "backward_transfer": backward_transfer(values),
        "forgetting": forgetting(values, best), "forward_transfer": forward_transfer(values, before),
        "intransigence": intransigence(values, joint),
    }  # fmt: skip


def over_items(
    cells: Cells, figure: Figure = average_accuracy, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Return (low, high) of one figure over other test items of the same tasks.

    Says nothing of other seeds. An interval of no width where every answer is right: so do not read 100 % as certain.

    Raises:
        ValueError: two versions were measured on another number of items of one task, or nothing was measured.
    """
    import numpy

    found = figure(draw(cells, resamples, numpy.random.default_rng(seed)))
    if numpy.isnan(found).any():
        raise ValueError("A figure cannot be said where something that it needs was not measured.")
    return _ends(found, level)


def intervals(
    streams: list[Cells], resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, Interval]:
    """Return {figure: (low, high)} of all `figures`; one that needs what was not measured is left out.

    streams: cells with the rows that `figures` names. One stream: over other test items. Several, one for each seed: of
    the figure's mean, over other seeds and other items; with fewer than about ten it is too narrow, as the spread
    between seeds is drawn from those alone. Forgetting is counted from the moment that was best as measured: the best of
    each draw is best by chance too, and the interval would stand too high.
    """
    import numpy

    rng = numpy.random.default_rng(seed)
    drawn = rng.integers(0, len(streams), (resamples, len(streams)))
    found: dict[str, NDArray] = {}
    for number, cells in enumerate(streams):
        chosen, best = drawn == number, best_moments(shares(cells)[2:])
        for name, values in figures(draw(cells, int(chosen.sum()), rng), best).items():
            found.setdefault(name, numpy.empty(drawn.shape))[chosen] = values
    means = {name: values.mean(axis=1) for name, values in found.items()}
    return {name: _ends(values, level) for name, values in means.items() if not numpy.isnan(values).any()}


def changes(
    before: list[NDArray], after: list[NDArray], resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> list[Interval]:
    """Return (low, high) of what a version gained or lost on each task, and last of the mean over the tasks, in shares.

    before, after: for each task 0 or 1 for each test item, in the same order: the items are drawn in pairs.
    """
    import numpy

    drawn = draw([before, after], resamples, numpy.random.default_rng(seed))
    found = drawn[:, 1] - drawn[:, 0]
    return [_ends(values, level) for values in (*found.T, found.mean(axis=1))]


def shares(cells: Cells) -> NDArray:
    """Return the share of right answers in each cell (rows, tasks), NaN where not measured."""
    import numpy

    return numpy.array([[numpy.nan if cell is None else cell.mean() for cell in row] for row in cells])


def draw(cells: Cells, resamples: int, rng: numpy.random.Generator) -> NDArray:
    """Return `resamples` matrices (resamples, rows, tasks), each from as many items as there are, drawn anew.

    Items that all rows answer alike are one kind; how often each kind is drawn is multinomial. That is the same as
    drawing items one by one, and a hundred times faster.
    """
    import numpy

    values = numpy.full((resamples, len(cells), len(cells[0])), numpy.nan)
    for task in range(len(cells[0])):
        measured = [row for row in range(len(cells)) if cells[row][task] is not None]
        if not measured:
            continue
        answers = numpy.stack([cells[row][task] for row in measured])  # (rows, items)
        kinds, counts = numpy.unique(answers, axis=1, return_counts=True)
        times = rng.multinomial(answers.shape[1], counts / answers.shape[1], resamples)
        values[:, measured, task] = times @ kinds.T.astype(float) / answers.shape[1]
    return values


def _diagonal(values: NDArray) -> NDArray:
    import numpy

    return numpy.diagonal(values, axis1=-2, axis2=-1)


def _mean_of_measured(values: NDArray) -> NDArray:
    """Return the mean over the last axis without what is NaN; NaN where nothing is left."""
    import numpy

    counts = (~numpy.isnan(values)).sum(axis=-1)
    return numpy.where(counts, numpy.nansum(values, axis=-1) / numpy.maximum(counts, 1), numpy.nan)


def _ends(found: NDArray, level: float) -> Interval:
    import numpy

    low, high = numpy.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
