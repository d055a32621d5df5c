"""The gate: promote a candidate that learned the new task and hurt no old one, by paired tests on the same items."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class GateSettings(BaseModel):
    """How strict the gate is."""

    model_config = ConfigDict(extra="forbid")

    margin_points: float = Field(
        5.0, ge=0, le=100, description="largest loss on an old task that is let through, in points"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="error rate of the tests, one-sided, Holm over the old tasks")
    least_items: int = Field(20, ge=1, le=1_000_000, description="fewest test items of a task to judge it by")


class Pair(BaseModel):
    """One task's test items, answered by the live version and by the candidate: whether each answer was exactly right."""

    task: str
    before: list[bool]
    after: list[bool]

    @property
    def lost(self) -> int:
        """Items that were right and are wrong now (negative flips)."""
        return sum(b and not a for b, a in zip(self.before, self.after, strict=True))

    @property
    def gained(self) -> int:
        """Items that were wrong and are right now."""
        return sum(a and not b for b, a in zip(self.before, self.after, strict=True))

    @property
    def change(self) -> float:
        """Change of accuracy in points (100 x share)."""
        return 100 * (self.gained - self.lost) / len(self.before)


class Verdict(BaseModel):
    """What the gate says, in a sentence and in figures."""

    verdict: str
    sentence: str
    evidence: dict


def judge(new: Pair, old: list[Pair], settings: GateSettings) -> Verdict:
    """Compare candidate and live version on the same items and say promote, hold or inconclusive.

    Test: exact one-sided McNemar on the discordant items (Dietterich 1998), Holm (1979) over the old tasks. A task is
    hurt where its loss is larger than the margin and not chance; the new task is learned where its gain is not chance.
    """
    learned_p = mcnemar(new.gained, new.lost)
    losses = [mcnemar(pair.lost, pair.gained) for pair in old]
    adjusted = holm(losses)
    hurt = [(pair, p) for pair, p in zip(old, adjusted, strict=True)
            if p < settings.alpha and -pair.change > settings.margin_points]  # fmt: skip
    evidence = {
        "new": _line(new, learned_p), "old": [_line(pair, p) for pair, p in zip(old, adjusted, strict=True)],
        "settings": settings.model_dump(), "test": "exact one-sided McNemar, Holm over the old tasks",
    }  # fmt: skip
    short = [pair for pair in [new, *old] if len(pair.before) < settings.least_items]
    if hurt:
        worst, worst_p = min(hurt, key=lambda found: found[0].change)
        names = f" and {len(hurt) - 1} other task{'s' * (len(hurt) > 2)}" if len(hurt) > 1 else ""
        return Verdict(verdict="hold", evidence=evidence, sentence=(
            f"Refused: it forgets {worst.task}{names}: {_share(worst.before)} before, {_share(worst.after)} now, a loss of "
            f"{-worst.change:.0f} points that is not chance ({_p(worst_p)})."
        ))  # fmt: skip
    if short:
        return Verdict(verdict="inconclusive", evidence=evidence, sentence=(
            f"Undecided: {short[0].task} has {len(short[0].before)} test items and {settings.least_items} are needed; add rows."
        ))  # fmt: skip
    if learned_p >= settings.alpha:
        return Verdict(verdict="hold", evidence=evidence, sentence=(
            f"Refused: it did not learn {new.task}: {_share(new.before)} right before, {_share(new.after)} now "
            f"({_p(learned_p)})."
        ))  # fmt: skip
    kept = _kept(list(zip(old, adjusted, strict=True)), settings.margin_points) if old else "is the first task"
    return Verdict(verdict="promote", evidence=evidence, sentence=(
        f"Promoted: it learned {new.task} ({_share(new.before)} → {_share(new.after)} right) and {kept}."
    ))  # fmt: skip


def mcnemar(for_it: int, against: int) -> float:
    """Return the one-sided p-value that `for_it` flips outnumber `against` by chance; 1.0 where nothing flipped."""
    if not for_it + against:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(for_it, for_it + against, 0.5, alternative="greater").pvalue)


def holm(values: list[float]) -> list[float]:
    """Return p-values adjusted for their number, in the order given (Holm 1979)."""
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = worst
    return adjusted


def exact_outcomes(file: Path) -> dict[str, bool]:
    """Return {item: was it exactly right} from an outcomes file."""
    return {line["item"]: line["exact"] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def pair(task: str, before: Path, after: Path) -> Pair:
    """Return the two versions' outcomes on the same items, matched by item."""
    old, new = exact_outcomes(before), exact_outcomes(after)
    items = sorted(old.keys() & new.keys())
    return Pair(task=task, before=[old[i] for i in items], after=[new[i] for i in items])


def _line(pair: Pair, p: float) -> dict:
    n = len(pair.before)
    return {"task": pair.task, "items": n, "before": sum(pair.before) / n, "after": sum(pair.after) / n,
            "lost": pair.lost, "gained": pair.gained, "change_points": pair.change, "p": p}  # fmt: skip


def _kept(old: list[tuple[Pair, float]], margin_points: float) -> str:
    """Return what is true of the old tasks of a candidate that hurt none: within the margin, or no more than chance."""
    count = f"the {len(old)} earlier task{'s' * (len(old) > 1)}"
    worst, p = min(old, key=lambda found: found[0].change)
    if -worst.change <= margin_points:
        return f"keeps {count} within {margin_points:g} points"
    return f"lost no more than chance on {count} (most on {worst.task}: {-worst.change:.0f} points, {_p(p)})"


def _share(outcomes: list[bool]) -> str:
    return f"{100 * sum(outcomes) / len(outcomes):.0f} %"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
