"""The gate by simulation: ten old tasks whose items are drawn from what real update chains answered, and a truth that is known.

A world is four cells of real items: right before and after, lost, gained, wrong both times; each item brings the likelihood
of its answer before and after along. What is lost is made as large as the truth asks; the likelihoods in a cell stay real.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from clm_app.judging.gate import GateSettings, Pair, Verdict, judge
from clm_app.judging.paired import mcnemar

TASKS = 10
SIZES = (30, 84, 150, 450, 1000, 2000)
TRUTHS = {"equal": 0.0, "2 worse": 0.02, "5 worse": 0.05, "20 worse": 0.2}  # of one of the ten old tasks, as a share
VERDICTS = ("promote", "hold", "repair", "inconclusive")
ANSWERS = ((1, 1), (1, 0), (0, 1), (0, 0))  # right before, right after: kept, lost, gained, wrong


class Drawn(Pair):
    """A pair whose sums are made once: thousands of candidates stand before the gate, each twice."""

    changes = cached_property(lambda self: Pair.changes.fget(self))
    lost = cached_property(lambda self: Pair.lost.fget(self))
    gained = cached_property(lambda self: Pair.gained.fget(self))
    change = cached_property(lambda self: Pair.change.fget(self))
    rises = cached_property(lambda self: Pair.rises.fget(self))
    is_graded = cached_property(lambda self: Pair.is_graded.fget(self))


class World(NamedTuple):
    """Shares of the four cells, and for each the real (loss before, loss after) in nats per answer token."""

    name: str
    shares: NDArray  # (4,)
    losses: list[NDArray]  # four of (items, 2)

    @property
    def flipping(self) -> float:
        """Share of items that flip either way where nothing has changed in truth."""
        return float(self.shares[1] + self.shares[2])

    def worse(self, by: float, lost: NDArray) -> World:
        """Return the world in which so large a share more is lost; lost: (items, 2) likelihoods of items that were."""
        return World(
            self.name, self.shares + by * np.array([-1.0, 1.0, 0.0, 0.0]), [self.losses[0], lost, *self.losses[2:]]
        )

    def draw(self, rng: Generator, task: str, n: int) -> Pair:
        """Return n items of a task as the gate gets them."""
        cells = np.sort(rng.choice(4, n, p=self.shares))
        right = np.array(ANSWERS, float)[cells]
        counts = np.bincount(cells, minlength=4)
        losses = np.concatenate([
            drawn[rng.integers(0, len(drawn), count)] for drawn, count in zip(self.losses, counts, strict=True)
        ])  # fmt: skip
        return Drawn(task=task, before=right[:, 0].tolist(), after=right[:, 1].tolist(),
                    loss_before=losses[:, 0].tolist(), loss_after=losses[:, 1].tolist())  # fmt: skip


def outcomes(before: Path, after: Path) -> NDArray:
    """Return (items, 4): right before, right after, nats per token before and after, of two outcome files."""
    one, other = (
        {line["item"]: line for line in map(json.loads, file.read_text().splitlines())} for file in (before, after)
    )
    return np.array([
        (one[i]["exact"], other[i]["exact"], one[i]["loss"] / one[i]["tokens"], other[i]["loss"] / other[i]["tokens"])
        for i in one.keys() & other.keys()
    ])  # fmt: skip


def equal(name: str, found: NDArray) -> World:
    """Return the world in which two versions answer as these two did and neither is better: each is the new one once."""
    both = np.concatenate([found, found[:, [1, 0, 3, 2]]])
    is_in = [(both[:, 0] == before) & (both[:, 1] == after) for before, after in ANSWERS]
    return World(name, np.array([mask.mean() for mask in is_in]), [both[mask][:, 2:] for mask in is_in])


def lost(found: NDArray) -> NDArray:
    """Return (items, 2) likelihoods of the items that were right and are wrong now."""
    return found[(found[:, 0] == 1) & (found[:, 1] == 0)][:, 2:]


class Trial(NamedTuple):
    """One candidate before the gate and before two simpler rules. Each True where it was promoted, but the gate's verdict."""

    gate: str
    accuracy: str  # the gate with loss_margin 0
    mean: bool  # mean accuracy over the old tasks must not fall
    mcnemar: bool  # no old task may have fallen by a plain one-sided McNemar test at 5 %


def trial(rng: Generator, world: World, hurt: World, n: int, new: Pair) -> Trial:
    """Draw ten old tasks, one of them hurt, and ask everybody."""
    old = [(hurt if number == 0 else world).draw(rng, f"task {number}", n) for number in range(TASKS)]
    change = sum(pair.gained - pair.lost for pair in old)
    return Trial(
        asked(new, old).verdict, asked(new, old, loss_margin=0.0).verdict, change >= 0,
        all(mcnemar(pair.lost, pair.gained) >= 0.05 for pair in old),
    )  # fmt: skip


def asked(new: Pair, old: list[Pair], **knobs) -> Verdict:
    """Return the gate's verdict with its defaults but for these knobs."""
    return judge(new, old, GateSettings(**knobs))
