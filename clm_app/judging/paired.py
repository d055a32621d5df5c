"""Two versions on the same items: how much can have been lost, and can more than a margin be excluded?

Shares are of the items, 0..1. A flip is an item that one version answers rightly and the other wrongly: `lost` ones were
right and are wrong now, `gained` ones the other way round. Only flips carry information about a change, but the number of
items bounds what an unseen flip could weigh.

Sources: score test and interval of a paired difference, Tango 1998 (Statistics in Medicine 17, 891); exact test of no
change, McNemar 1947; several tests, Holm 1979; sample size, Lu and Bean 1995 (Statistics in Medicine 14, 1831), with
the variance of both hypotheses. How well the levels hold: LOG.md, "The gate".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

HALVINGS = 60  # of an interval of length 2: beyond what a float can tell apart


class Bounds(NamedTuple):
    """A mean of paired differences with its lower and its upper one-sided bound."""

    mean: float
    lower: float
    upper: float


def score(lost: int, gained: int, n: int, loss: float) -> float:
    """Return Tango's statistic for "the true loss is `loss`"; standard normal where that is so, small where it is less.

    loss: share of lost minus share of gained items, -1..1.
    """
    a, b, c = 2 * n, -lost - gained + (2 * n - lost + gained) * loss, -gained * loss * (1 - loss)
    rare = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # likeliest share of gained items under that loss
    variance = n * (2 * rare + loss * (1 - loss))
    above = lost - gained - n * loss
    if variance <= 0:
        return math.copysign(math.inf, above) if above else 0.0
    return above / math.sqrt(variance)


def non_inferiority(lost: int, gained: int, n: int, margin: float) -> float:
    """Return the p-value of "the new version loses `margin` or more": small means that so large a loss is excluded.

    With a margin of 0 there is nothing to exclude but a loss of these very items: 0.0 where none was lost, else 1.0.
    """
    if not n:
        return 1.0
    if not margin:
        return 1.0 if lost else 0.0
    return _normal(score(lost, gained, n, margin))


def lower_bound(lost: int, gained: int, n: int, alpha: float = 0.05) -> float:
    """Return the lower one-sided 1 - alpha bound of (new - old), a share -1..1, by inverting the score test."""
    if not n:
        return -1.0
    low, high = (lost - gained) / n, 1.0  # the loss lies between what was seen and everything
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _normal(score(lost, gained, n, middle)) > alpha else (low, middle)
    return -high


def upper_bound(lost: int, gained: int, n: int, alpha: float = 0.05) -> float:
    """Return the upper one-sided 1 - alpha bound of (new - old), a share -1..1."""
    return -lower_bound(gained, lost, n, alpha)


def mcnemar(for_it: int, against: int) -> float:
    """Return the one-sided p-value that `for_it` flips outnumber `against` by chance; 1.0 where nothing flipped. Exact."""
    if not for_it + against:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(for_it, for_it + against, 0.5, alternative="greater").pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the order given (Holm 1979)."""
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = worst
    return adjusted


def mean_bound(differences: Sequence[float], alpha: float = 0.05) -> Bounds:
    """Return the mean of paired differences with its one-sided 1 - alpha bounds, by Student's t.

    Infinite bounds for fewer than two differences. No width where all are the same: the caller says how many items it
    wants at least.
    """
    import numpy
    from scipy.stats import t

    values = numpy.asarray(differences, float)
    if len(values) < 2:
        return Bounds(float(values.mean()) if len(values) else 0.0, -math.inf, math.inf)
    mean = float(values.mean())
    half = float(t.ppf(1 - alpha, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Bounds(mean, mean - half, mean + half)


def mean_p(differences: Sequence[float], bound: float = 0.0) -> float:
    """Return the p-value of "the mean of these paired differences is `bound` or more": small means it is below."""
    import numpy
    from scipy.stats import t

    values = numpy.asarray(differences, float)
    if len(values) < 2:
        return 1.0
    deviation = float(values.std(ddof=1))
    if not deviation:
        return 0.0 if values[0] < bound else 1.0
    return float(t.cdf((values.mean() - bound) / (deviation / math.sqrt(len(values))), len(values) - 1))


def items_needed(margin: float, discordant_share: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return how many items exclude a loss of `margin` with this power where the versions are truly alike.

    discordant_share: of items that flip either way. The variance under a loss of the margin is the score test's own, so that
    where not one flips it is as many items as that test takes.
    """
    if not margin:
        return 1
    z, more = _quantile(1 - alpha), _quantile(power)
    b, c = 2 * margin - discordant_share, -discordant_share / 2 * margin * (1 - margin)
    rare = (math.sqrt(b * b - 8 * c) - b) / 4  # as in `score`, at equal shares of lost and gained items
    spread = z * math.sqrt(2 * rare + margin * (1 - margin)) + more * math.sqrt(discordant_share)
    return math.ceil((spread / margin) ** 2)


def margin_seen(lost: int, gained: int, n: int, alpha: float = 0.05) -> float:
    """Return the smallest margin that these very outcomes exclude, a share 0..1."""
    return max(0.0, -lower_bound(lost, gained, n, alpha))


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)
