"""The gate by simulation: ten old tasks whose items are drawn from what real update chains answered, and a truth that is known.

A world is four cells of real items: right before and after, lost, gained, wrong both times; each item brings the likelihood
of its answer before and after along. What is lost is made as large as the truth asks; the likelihoods in a cell stay real.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from benchmarks._gate_chains import AGAIN, FIRST
from clm_app.judging.gate import GateSettings, Pair, judge
from clm_app.judging.paired import items_needed, mcnemar

TASKS = 10
SIZES = (30, 84, 150, 450, 1000, 2000)
TRUTHS = {"equal": 0.0, "2 worse": 0.02, "5 worse": 0.05, "20 worse": 0.2}  # of one of the ten old tasks, as a share
BARRED = ("equal", "5 worse")  # truths that a bar is about
TOO_FEW = 20  # items of each task: fewer than least_items
UNMOVED = 1e-4  # nats: the same weights differ from themselves by less
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
        by = min(by, self.shares[0])  # no more than is right
        shares = self.shares + by * np.array([-1.0, 1.0, 0.0, 0.0])
        return World(self.name, shares, [self.losses[0], lost, *self.losses[2:]])

    def draw(self, rng: Generator, task: str, n: int) -> Pair:
        """Return n items of a task as the gate gets them."""
        cells = np.sort(rng.choice(4, n, p=self.shares))
        right = np.array(ANSWERS, float)[cells]  # (n, 2)
        counts = np.bincount(cells, minlength=4)
        losses = np.concatenate([
            drawn[rng.integers(0, len(drawn), count)] for drawn, count in zip(self.losses, counts, strict=True) if count
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


def worlds(chains: Path, orders: list[int]) -> tuple[dict[str, World], NDArray]:
    """Return the worlds that real chains show, and the likelihoods of items that flipped by chance.

    retrained: the same rows learned with another seed. adapters: what a router confuses. unmoved: the same to the last bit.
    """
    again, routed = [], []
    for number in orders:
        (file,) = (chains / f"{AGAIN}-{number}" / "after").glob("*-test.jsonl")
        again.append(outcomes(chains / f"{FIRST}-full-{number}" / "after" / file.name, file))
        before = chains / f"{FIRST}-routed-{number}"
        for position in (chains / f"auto-full-{number}" / "1", chains / f"auto-full-{number}" / "2"):
            for file in (before / "after").glob("*-test.jsonl") if (position / "after").exists() else ():
                routed.append(outcomes(file, position / "after" / file.name))
            before = position
    both = np.concatenate(routed)
    still = both[np.abs(both[:, 3] - both[:, 2]) < UNMOVED]
    found = [equal("retrained", np.concatenate(again)), equal("adapters", both), equal("unmoved", still)]
    return {world.name: world for world in found}, lost(np.concatenate(again))


class Trial(NamedTuple):
    """One candidate before the gate and before two simpler rules."""

    gate: str  # its verdict
    accuracy: str  # of the gate with loss_margin 0
    mean: str  # mean accuracy over the old tasks must not fall
    mcnemar: str  # no old task may have fallen by a plain one-sided McNemar test at 5 %


RULES = {
    "gate": "the gate", "accuracy": "the gate, loss_margin 0", "mean": "mean accuracy must not fall",
    "mcnemar": "McNemar at 5 % a task",
}  # fmt: skip


def trial(rng: Generator, world: World, hurt: World, n: int, new: Pair) -> Trial:
    """Draw ten old tasks, one of them hurt, and ask everybody."""
    old = [(hurt if number == 0 else world).draw(rng, f"task {number}", n) for number in range(TASKS)]
    is_kept = all(mcnemar(pair.lost, pair.gained) >= 0.05 for pair in old)
    change = sum(pair.gained - pair.lost for pair in old)
    return Trial(
        judge(new, old, GateSettings()).verdict, judge(new, old, GateSettings(loss_margin=0.0)).verdict,
        "promote" if change >= 0 else "hold", "promote" if is_kept else "hold",
    )  # fmt: skip


class Cell(NamedTuple):
    """What became of so many candidates of one truth. counts: {rule: {verdict: how many}}."""

    world: str
    truth: str
    n: int
    trials: int
    counts: dict[str, dict[str, int]]

    def share(self, rule: str, *verdicts: str) -> float:
        """Return the share of candidates that a rule gave one of these verdicts."""
        return sum(self.counts[rule].get(verdict, 0) for verdict in verdicts) / self.trials


class Simulation:
    """Every cell that is asked for; what is done stands in a file."""

    def __init__(self, root: Path, chains: Path, orders: list[int]) -> None:
        self.worlds, self.lost = worlds(chains, orders)
        self.lines = root / "simulation.jsonl"
        root.mkdir(parents=True, exist_ok=True)
        self.found = (
            [Cell(**json.loads(line)) for line in self.lines.read_text().splitlines()] if self.lines.exists() else []
        )
        self.new = Pair(task="new", before=[0.0] * 450, after=[1.0] * 405 + [0.0] * 45)

    def needed(self, name: str) -> int:
        """Return how many items of each task the product says it takes where both versions are equal."""
        return max(GateSettings().least_items, items_needed(
            GateSettings().margin_points / 100, self.worlds[name].flipping, GateSettings().alpha / TASKS
        ))  # fmt: skip

    def go(self, trials: int, few_trials: int) -> list[Cell]:
        """Do what is missing; few_trials: of what no bar is about."""
        found = []
        for name in self.worlds:
            for truth in TRUTHS:
                is_barred = truth in BARRED
                for n in (TOO_FEW, *SIZES, self.needed(name)) if is_barred else SIZES:
                    found.append(self.cell(name, truth, n, trials if is_barred else few_trials))
        return found

    def cell(self, name: str, truth: str, n: int, trials: int) -> Cell:
        """Return one cell, drawn from a seed of its own."""
        for one in self.found:
            if (one.world, one.truth, one.n, one.trials) == (name, truth, n, trials):
                return one
        rng, world = (
            np.random.default_rng([n, list(TRUTHS).index(truth), list(self.worlds).index(name)]),
            self.worlds[name],
        )
        hurt = world.worse(TRUTHS[truth], self.lost) if TRUTHS[truth] else world
        done = [trial(rng, world, hurt, n, self.new) for _ in range(trials)]
        one = Cell(name, truth, n, trials, {rule: dict(Counter(getattr(t, rule) for t in done)) for rule in RULES})
        with open(self.lines, "a", encoding="utf-8") as out:
            out.write(json.dumps(one._asdict()) + "\n")
        self.found.append(one)
        return one
