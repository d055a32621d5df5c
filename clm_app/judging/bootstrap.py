"""How sure a figure of the matrix is: an interval from drawing its test items, and its seeds, again and again.

Source: percentile bootstrap, Efron and Tibshirani 1993, chapter 13; over seeds the two levels of Davison and Hinkley
1997, section 3.8: seeds are drawn first, and items within each drawn seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    # cells[i][j]: 0 or 1 for each test item of task j by the version made after task i; None where not measured.
    # A column's items stand in the same order in every row: an item is drawn for all versions at once.
    Cells = list[list[NDArray | None]]
    Figure = Callable[[NDArray], NDArray]


def average_accuracy(values: NDArray) -> NDArray:
    """Return `Matrix.average_accuracy` of each matrix. values: (..., versions, tasks), NaN where not measured."""
    import numpy

    return numpy.nanmean(values[..., -1, :], axis=-1)


def backward_transfer(values: NDArray) -> NDArray:
    """Return `Matrix.backward_transfer` of each matrix. values: (..., versions, tasks), NaN where not measured."""
    import numpy

    earlier = values.shape[-2] - 1
    changes = (values[..., -1, :] - numpy.diagonal(values, axis1=-2, axis2=-1))[..., :earlier]
    return numpy.nanmean(changes, axis=-1) if earlier else numpy.zeros(values.shape[:-2])


def forgetting(values: NDArray) -> NDArray:
    """Return `Matrix.forgetting` of each matrix, NaN where that is None. values: (..., versions, tasks)."""
    import numpy

    earlier = values.shape[-2] - 1
    if not earlier:
        return numpy.full(values.shape[:-2], numpy.nan)
    drops = numpy.fmax.reduce(values[..., :-1, :earlier], axis=-2) - values[..., -1, :earlier]
    is_seen = numpy.tril(numpy.ones(values.shape[-2:], bool))[:, :earlier]
    is_whole = ~(numpy.isnan(values[..., :earlier]) & is_seen).any(axis=(-2, -1))
    return numpy.where(is_whole, drops.mean(axis=-1), numpy.nan)


def over_items(
    cells: Cells, figure: Figure = average_accuracy, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return (low, high) of a figure over other test items of the same tasks.

    Says nothing of other seeds. An interval of no width where every answer is right: so do not read 100 % as certain.

    Raises:
        ValueError: two versions were measured on another number of items of one task, or nothing was measured.
    """
    import numpy

    rng = numpy.random.default_rng(seed)
    return _ends(figure(draw(cells, resamples, rng)), level)


def over_seeds(
    streams: list[Cells], figure: Figure = average_accuracy, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return (low, high) of a figure's mean over seeds, for other seeds and other items. streams: one for each seed.

    With fewer than about ten seeds the interval is too narrow: the spread between seeds is drawn from those alone.
    """
    import numpy

    rng = numpy.random.default_rng(seed)
    drawn = rng.integers(0, len(streams), (resamples, len(streams)))
    found = numpy.empty(drawn.shape)
    for number, cells in enumerate(streams):
        chosen = drawn == number
        if times := int(chosen.sum()):
            found[chosen] = figure(draw(cells, times, rng))
    return _ends(found.mean(axis=1), level)


def draw(cells: Cells, resamples: int, rng: numpy.random.Generator) -> NDArray:
    """Return `resamples` matrices (resamples, versions, tasks), each from as many items as there are, drawn anew."""
    import numpy

    values = numpy.full((resamples, len(cells), len(cells[0])), numpy.nan)
    for task in range(len(cells[0])):
        measured = [row for row in range(len(cells)) if cells[row][task] is not None]
        if not measured:
            continue
        answers = numpy.stack([cells[row][task] for row in measured]).astype(numpy.float32)  # (versions, items)
        items = answers.shape[1]
        places = rng.integers(0, items, (resamples, items)) + numpy.arange(resamples)[:, None] * items
        times = numpy.bincount(places.ravel(), minlength=resamples * items).reshape(resamples, items)
        values[:, measured, task] = times.astype(numpy.float32) @ answers.T / items
    return values


def _ends(found: NDArray, level: float) -> tuple[float, float]:
    import numpy

    if numpy.isnan(found).any():
        raise ValueError("A figure cannot be said where something that it needs was not measured.")
    low, high = numpy.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
