"""The gate: promote a candidate that learned the new task and lost nothing that matters; say so only where it was shown.

Three questions, all on the same items before and after. Learned: is the gain on the new task more than chance and noise?
Kept: is a loss of more than the margin excluded on every old task and every benchmark? Floor: is general text read as
well, is general ability there, are few answers lost over all? Harm that is plain refuses; where neither harm nor its
absence can be shown the verdict is inconclusive, with the number of items that it takes. No silence passes.

Statistics: clm_app/judging/paired.py. Non-inferiority with a margin, one-sided, Holm over tasks; where items are too few
for it, the likelihood of the right answers, which every item moves a little, may show that a task was kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from clm_app.judging import paired
from clm_app.judging.paired import holm, mcnemar

UNSEEN = 0.03  # a share beyond the margin: so large a loss has to be excluded by right and wrong at least, see _by_likelihood
GUESSED = 0.001  # chance of so many right guesses; at alpha one shuffled file of twenty would pass, and who has learned is far off
BESIDE_WORDS = 0.5  # of what counting words gets is the least that counts as learned
SURELY = 5  # times less often than alpha it may be missed (LOG.md, "The gate")
CLIPPED = 5.0  # nats per answer token: beyond, one item would decide for all of them
MOST_FLIPS_PERCENT = (
    3.0  # negative flips that an update of equal quality makes: 2 to 3 % (Yan et al. 2021, arXiv:2011.09161)
)
OWN = ("margin_points", "lower_is_better", "is_share")  # what a pair brings along to be judged by
FLIPS_SHOWN = 200  # in the evidence; all of them are in the outcomes it is bound to


class GateSettings(BaseModel):
    """How strict the gate is, and who has the last word."""

    model_config = ConfigDict(extra="forbid")

    margin_points: float = Field(
        2.0,
        ge=0,
        le=100,
        description="largest loss on an old task that is let through, in points; more must be excluded",
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="error rate of the tests, one-sided, Holm over the old tasks")
    least_items: int = Field(30, ge=1, le=1_000_000, description="fewest test items of a task to judge it by")
    loss_margin: float = Field(
        0.02, ge=0, le=100, description="where items are too few for the margin: largest mean rise of a task's loss that is "
        "let through, in nats per answer token; 0 leaves this way out",
    )  # fmt: skip
    most_flips_percent: float | None = Field(
        None, ge=0, le=100, description="most right answers of old tasks, all together, that may be wrong now, in per cent of "
        "their items; empty: 3, or the margin where that is larger",
    )  # fmt: skip
    most_text_rise: float | None = Field(
        None, ge=0, le=100, description="largest rise of general text, in bits per byte; empty: shown and not judged"
    )
    most_ability_loss: float | None = Field(
        None, ge=0, le=100, description="largest loss of general ability, in points; empty: shown and not judged"
    )
    policy: Literal["alone", "approval", "four eyes"] = Field(
        "alone",
        description="alone: what passes is promoted at once; approval: it waits for a named person; four eyes: for "
        "two, neither of whom asked for the training",
    )  # fmt: skip

    @property
    def flips_let_through(self) -> float:
        """Most negative flips over all old tasks, in per cent of their items."""
        usual = max(MOST_FLIPS_PERCENT, self.margin_points)
        return usual if self.most_flips_percent is None else self.most_flips_percent


class Pair(BaseModel):
    """One task's or benchmark's items, answered by the live version and by the candidate.

    before, after: right or not, or a score (0..1 where it is a share). loss_before, loss_after: nats per answer token of
    the right answer; empty where not known. bound_to: digests of what this was read from.
    """

    task: str
    before: list[float]
    after: list[float]
    items: list[str] = []
    loss_before: list[float] = []
    loss_after: list[float] = []
    margin_points: float | None = Field(None, description="its own margin; None: the gate's")
    lower_is_better: bool = False
    is_share: bool = True
    bound_to: dict[str, str] = {}
    left_out: list[str] = Field([], description="items that are in training rows too, and so say nothing")

    @property
    def lost(self) -> int:
        """Items that were right and are wrong now (negative flips), or whose score fell."""
        return sum(change < 0 for change in self.changes)

    @property
    def gained(self) -> int:
        """Items that were wrong and are right now, or whose score rose."""
        return sum(change > 0 for change in self.changes)

    @property
    def changes(self) -> list[float]:
        """What each item gained, in its own unit; below 0 is a loss."""
        sign = -1 if self.lower_is_better else 1
        return [sign * (a - b) for b, a in zip(self.before, self.after, strict=True)]

    @property
    def change(self) -> float:
        """Mean change in points (100 x share); of a figure that is no share, in per cent of what it was."""
        return 100 * sum(self.changes) / len(self.before) / self.scale if self.before else 0.0

    @property
    def scale(self) -> float:
        """What 100 points are, in the unit of the scores."""
        return 1.0 if self.is_share else max(abs(_mean(self.before)), 1e-12)

    @property
    def is_graded(self) -> bool:
        """Say whether there is more than right and wrong."""
        return any(value not in (0, 1) for value in (*self.before, *self.after))

    @property
    def rises(self) -> list[float]:
        """How much the loss of each right answer has risen, in nats per answer token, clipped at CLIPPED."""
        return [
            max(-CLIPPED, min(CLIPPED, a - b)) for b, a in zip(self.loss_before, self.loss_after, strict=True)
        ]  # fmt: skip


class Noise(BaseModel):
    """The noise floor: the same weights measured twice, in other batches."""

    items: int
    flips: int
    loss: float = Field(0.0, description="mean absolute difference, nats per answer token")

    @property
    def share(self) -> float:
        """Flips per item."""
        return self.flips / self.items if self.items else 0.0


class Guessing(BaseModel):
    """What a task of classes gives to who has learned nothing of it, and what counting words gets. Shares right, 0..1."""

    chance: float = Field(description="by one and the same answer, or by guesses as frequent as the classes")
    words: float = Field(description="by counting the words of the training rows, on rows that were not counted")


class Floor(BaseModel):
    """One general probe, before and after: its change with a 95 % interval over items."""

    probe: str
    title: str
    unit: str
    before: float
    after: float
    change: float
    low: float
    high: float
    lower_is_better: bool
    bound_to: dict[str, str] = {}


class Verdict(BaseModel):
    """What the gate says, in a sentence and in figures. verdict: promote, hold, repair or inconclusive."""

    verdict: str
    sentence: str
    evidence: dict


class Finding(BaseModel):
    """What the tests say of one old task or benchmark. status: kept, hurt or unclear; by: accuracy or likelihood."""

    pair: Pair
    margin: float
    p_kept: float
    p_hurt: float
    status: str
    by: str = "accuracy"
    lower_points: float
    rise: float | None = None
    rise_upper: float | None = None
    needed: int

    def line(self) -> dict:
        """Return it as the evidence keeps it."""
        return _line(self.pair, self.p_hurt) | {
            "status": self.status, "by": self.by, "margin_points": 100 * self.margin, "p_kept": self.p_kept,
            "lower_points": self.lower_points, "rise": self.rise, "rise_upper": self.rise_upper,
            "items_needed": self.needed,
        }  # fmt: skip


def judge(
    new: Pair,
    old: list[Pair],
    settings: GateSettings,
    *,
    floors: list[Floor] = [],  # noqa: B006 never changed
    noise: Noise | None = None,
    looks: int = 1,
    guessing: Guessing | None = None,
) -> Verdict:
    """Compare candidate and live version on the same items and say promote, hold, repair or inconclusive.

    old: every old task, and every benchmark that the candidate is held to. floors: general probes. looks: how many
    candidates of this training are judged on the same TEST items; alpha is shared among them (Bonferroni). guessing: of a
    new task of classes; who does not beat chance, or is not half as good as counting words, has learned nothing.
    """
    alpha = settings.alpha / max(looks, 1)
    learned_p, gain = _gain(new, noise)
    learned_p = max(learned_p, _guessed(new, guessing))
    is_learned = learned_p < alpha
    findings = _findings(old, settings, alpha)
    hurt = sorted((f for f in findings if f.status == "hurt"), key=lambda f: f.pair.change)
    unclear = [f for f in findings if f.status == "unclear"]
    fallen = [said for floor in floors if (said := _fallen(floor, settings))]
    flips = _negative_flips(old, settings, alpha)
    evidence = {
        "new": _line(new, learned_p) | {"gain_lower_points": 100 * gain, "learned": is_learned},
        "old": [f.line() for f in findings], "general": [floor.model_dump() for floor in floors],
        "negative_flips": flips, "noise": noise.model_dump() if noise else None,
        "guessing": guessing.model_dump() if guessing else None, "looks": looks, "alpha": alpha,
        "settings": settings.model_dump(), "flips": _flips([new, *old]),
        "test": "Tango's score test of non-inferiority, exact one-sided McNemar for gain and harm, Holm over the old tasks",
    }  # fmt: skip
    verdict, sentence = _said(new, is_learned, learned_p, findings, hurt, unclear, fallen, flips, settings, guessing)
    return Verdict(verdict=verdict, sentence=sentence, evidence=evidence)


# --- the three questions ----------------------------------------------------------------------------------------------


def _gain(new: Pair, noise: Noise | None) -> tuple[float, float]:
    """Return (p-value of "it gained no more than noise", lower bound of the gain as a share)."""
    n = len(new.before)
    if new.is_graded:
        bound = paired.mean_bound(new.changes)
        return paired.mean_p([-change for change in new.changes], 0.0) if n else 1.0, bound.lower / new.scale
    floor = noise.share if noise else 0.0
    lower = paired.lower_bound(new.lost, new.gained, n)
    p = mcnemar(new.gained, new.lost)
    if floor and n:  # not only more than chance: more than the same weights differ from themselves
        p = max(p, paired.non_inferiority(new.lost, new.gained, n, -floor))
    return p, lower


def _guessed(new: Pair, guessing: Guessing | None) -> float:
    """Return 1.0 where this many are right by guessing, or counting words gets more than twice as many; else 0.0."""
    if guessing is None or new.is_graded or not new.after:
        return 0.0
    right, n = round(sum(new.after)), len(new.after)
    if right < BESIDE_WORDS * guessing.words * n:
        return 1.0
    from scipy.stats import binom

    return float(binom.sf(right - 1, n, guessing.chance) > GUESSED)


def _findings(old: list[Pair], settings: GateSettings, alpha: float) -> list[Finding]:
    """Return what is found of each old task, Holm over all of them, first by accuracy and then by likelihood."""
    margins = [(settings.margin_points if p.margin_points is None else p.margin_points) / 100 for p in old]
    kept = holm([_p_kept(pair, margin) for pair, margin in zip(old, margins, strict=True)])
    harmed = holm([_p_hurt(pair) for pair in old])
    found = []
    for pair, margin, p_kept, p_hurt in zip(old, margins, kept, harmed, strict=True):
        n = len(pair.before)
        is_hurt = pair.lost > 0 if not margin and not pair.is_graded else p_hurt < alpha and -pair.change > 100 * margin
        is_kept = p_kept < alpha and n >= settings.least_items
        found.append(Finding(
            pair=pair, margin=margin, p_kept=p_kept, p_hurt=p_hurt, lower_points=_lower_points(pair, alpha),
            status="hurt" if is_hurt and n else "kept" if is_kept else "unclear",
            needed=max(settings.least_items, paired.items_needed(
                margin, (pair.lost + pair.gained + 1) / (n + 2), alpha / max(len(old), 1)
            )),
        ))  # fmt: skip
    return _by_likelihood(found, settings, alpha)


def _by_likelihood(found: list[Finding], settings: GateSettings, alpha: float) -> list[Finding]:
    """Look at what accuracy leaves open through the loss of the right answers, which every item moves a little.

    It says "kept" only where items are many enough for a loss to show at all: an update that leaves most answers as they were
    to the last bit, as a router does, and spoils one in twenty, moves no likelihood on items that miss these. And only where
    right and wrong cannot: a loss of the margin itself may move likelihoods by less than loss_margin.
    """
    able = [
        f for f in found
        if f.status == "unclear" and settings.loss_margin and f.margin and len(f.pair.rises) >= settings.least_items
    ]  # fmt: skip
    kept = holm([paired.mean_p(f.pair.rises, settings.loss_margin) for f in able])
    hurt = holm([paired.mean_p([-rise for rise in f.pair.rises], -settings.loss_margin) for f in able])
    for finding, p_kept, p_hurt in zip(able, kept, hurt, strict=True):
        bound = paired.mean_bound(finding.pair.rises, alpha)
        finding.rise, finding.rise_upper = bound.mean, bound.upper
        is_within = -finding.pair.change <= 100 * finding.margin
        is_seen = _p_kept(finding.pair, finding.margin + UNSEEN) < alpha / SURELY
        is_few = len(finding.pair.before) < finding.needed
        if p_kept < alpha and is_within and is_seen and is_few:
            finding.status, finding.by = "kept", "likelihood"
        elif p_hurt < alpha and not is_within:
            finding.status, finding.by, finding.p_hurt = "hurt", "likelihood", p_hurt
    return found


def _p_kept(pair: Pair, margin: float) -> float:
    if not pair.is_graded:
        return paired.non_inferiority(pair.lost, pair.gained, len(pair.before), margin)
    unseen = paired.non_inferiority(0, 0, len(pair.before), margin)  # a change that no drawn item shows
    return max(unseen, paired.mean_p([-change / pair.scale for change in pair.changes], margin or 1e-9))


def _p_hurt(pair: Pair) -> float:
    return mcnemar(pair.lost, pair.gained) if not pair.is_graded else paired.mean_p(pair.changes, 0.0)


def _lower_points(pair: Pair, alpha: float) -> float:
    if not pair.before:
        return -100.0
    if pair.is_graded:
        lower = paired.mean_bound(pair.changes, alpha).lower / pair.scale
        return 100 * lower if math.isfinite(lower) else -100.0
    return 100 * paired.lower_bound(pair.lost, pair.gained, len(pair.before), alpha)


def _fallen(floor: Floor, settings: GateSettings) -> str:
    """Return a sentence where a general probe fell by more than is let through and that is not chance, else nothing."""
    is_share = floor.unit.startswith("share")
    most = settings.most_ability_loss if is_share else settings.most_text_rise
    if most is None:
        return ""
    worse, certain = (floor.change, floor.low) if floor.lower_is_better else (-floor.change, -floor.high)
    allowed = most / 100 if is_share else most
    if worse <= allowed or certain <= 0:
        return ""
    said = f"rose from {floor.before:.2f} to {floor.after:.2f} {floor.unit}, by more than {most:g}"
    if is_share:
        said = f"fell from {100 * floor.before:.0f} % to {100 * floor.after:.0f} %, by more than {most:g} points"
    return f"{floor.title.lower()} {said}"


def _negative_flips(old: list[Pair], settings: GateSettings, alpha: float) -> dict:
    """Return {lost, items, percent, p, too_many} over old tasks with enough items; p: of so many by chance at the rate let
    through."""
    pairs = [pair for pair in old if not pair.is_graded and len(pair.before) >= settings.least_items]
    lost, items = sum(p.lost for p in pairs), sum(len(p.before) for p in pairs)
    most, p = settings.flips_let_through, 1.0
    if lost and most < 100:
        from scipy.stats import binom

        p = float(binom.sf(lost - 1, items, most / 100))
    percent = 100 * lost / items if items else 0.0
    return {"lost": lost, "items": items, "percent": percent, "p": p, "too_many": percent > most and p < alpha}


# --- the sentence -----------------------------------------------------------------------------------------------------


def _said(new, is_learned, learned_p, findings, hurt, unclear, fallen, flips, settings, guessing) -> tuple[str, str]:
    """Return (verdict, sentence). Plain harm comes first, then what was not learned, then what cannot be told."""
    gain = f"{_share(new.before)} → {_share(new.after)} right" if not new.is_graded else f"{new.change:+.1f} points"
    if hurt:
        harm = f"it forgets {_names(hurt)}: {_harm(hurt[0])}"
        if is_learned:
            return "repair", f"Needs repair: it learned {new.task} ({gain}), but {harm}."
        return "hold", f"Refused: {harm}."
    if fallen:
        return "hold", f"Refused: {'; '.join(fallen)}."
    if flips["too_many"]:
        return "hold", (
            f"Refused: {flips['lost']:,} of {flips['items']:,} items of old tasks were right and are wrong now "
            f"({flips['percent']:.1f} %), more than the {settings.flips_let_through:g} % let through."
        )
    if not is_learned and len(new.before) < settings.least_items:
        return "inconclusive", (
            f"Undecided: {new.task} has {_count(len(new.before), 'test item')} and at least {settings.least_items} are needed; "
            "add rows."
        )
    if not is_learned:
        beside = _p(learned_p)
        if guessing:
            beside = f"guesses get {100 * guessing.chance:.0f} %, and counting words {100 * guessing.words:.0f} %"
        return "hold", (
            f"Refused: it did not learn {new.task}: {_share(new.before)} right before, {_share(new.after)} now ({beside})."
        )
    if unclear:
        return "inconclusive", _undecided(
            max(unclear, key=lambda f: f.needed - len(f.pair.before)), len(unclear), settings
        )
    kept = _kept(findings) if findings else "is the first task"
    return "promote", f"Promoted: it learned {new.task} ({gain}) and {kept}."


def _undecided(worst: Finding, how_many: int, settings: GateSettings) -> str:
    pair, n, margin = worst.pair, len(worst.pair.before), 100 * worst.margin
    others = f" and {how_many - 1} more" if how_many > 1 else ""
    if not n and pair.left_out:
        return (
            f"Undecided: all {len(pair.left_out):,} test items of {pair.task}{others} stand in training rows, so nothing is left "
            "to judge by. Make a benchmark of other items."
        )
    if not n:
        return (
            f"Undecided: the live version was never measured on {pair.task}{others}, so there is nothing to compare with. "
            "Measure it."
        )
    if n < settings.least_items:
        return (
            f"Undecided: {pair.task}{others} has {_count(n, 'test item')} and at least {settings.least_items} are needed, for a "
            f"margin of {margin:g} points about {worst.needed:,}; add rows."
        )
    seen = -worst.lower_points
    return (
        f"Undecided: on {pair.task}{others} {n:,} test items show {pair.change:+.1f} points and cannot exclude a loss of "
        f"{margin:g} points (only one of {seen:.1f}); about {max(worst.needed, n + 1):,} items are needed, or a wider margin."
    )


def _kept(findings: list[Finding]) -> str:
    """Return what was shown of the old tasks of a candidate that is promoted."""
    count = f"the {len(findings)} earlier tasks" if len(findings) > 1 else "the earlier task"
    margins = {round(100 * f.margin, 6) for f in findings}
    each = " on each" if len(findings) > 1 else ""
    said = f"keeps {count}: a loss of more than {max(margins):g} points is excluded{each}"
    by_likelihood = [f.pair.task for f in findings if f.by == "likelihood"]
    if by_likelihood:
        few = by_likelihood[0] if len(by_likelihood) == 1 else f"{len(by_likelihood)} of them"
        said += f", on {few} by the likelihood of the right answers, as items are few"
    return said


def _harm(finding: Finding) -> str:
    pair = finding.pair
    if pair.is_graded:
        return f"{pair.change:+.1f} points, which is not chance ({_p(finding.p_hurt)})"
    if not finding.margin:
        return f"{_count(pair.lost, 'item')} of {len(pair.before):,} that were right are wrong now, and none may be"
    what = "by the likelihood of its answers " if finding.by == "likelihood" else ""
    return (
        f"{_share(pair.before)} before, {_share(pair.after)} now, a loss of {-pair.change:.0f} points that {what}is not chance "
        f"({_p(finding.p_hurt)})"
    )


def _names(hurt: list[Finding]) -> str:
    more = len(hurt) - 1
    return hurt[0].pair.task + (f" and {more} other task{'s' * (more > 1)}" if more else "")


def _line(pair: Pair, p: float) -> dict:
    return {"task": pair.task, "items": len(pair.before), "before": _mean(pair.before), "after": _mean(pair.after),
            "lost": pair.lost, "gained": pair.gained, "change_points": pair.change, "p": p, "bound_to": pair.bound_to,
            "own": {name: getattr(pair, name) for name in OWN}, "left_out": pair.left_out}  # fmt: skip


def _flips(pairs: list[Pair]) -> dict:
    """Return {shown: the worst flips first, counted: how many there are}; a flip names its task and item."""
    found = []
    for pair in pairs:
        losses = (
            zip(pair.loss_before, pair.loss_after, strict=True) if pair.loss_before else [(0.0, 0.0)] * len(pair.items)
        )
        for item, change, (before, after) in zip(pair.items, pair.changes, losses, strict=True) if pair.items else ():
            if change:
                kind = "lost" if change < 0 else "gained"
                found.append(
                    {"task": pair.task, "item": item, "kind": kind, "loss_before": before, "loss_after": after}
                )
    found.sort(key=lambda flip: (flip["kind"] == "gained", flip["loss_before"] - flip["loss_after"]))
    return {"shown": found[:FLIPS_SHOWN], "counted": len(found)}


# --- outcomes from files ----------------------------------------------------------------------------------------------


def exact_outcomes(file: Path) -> dict[str, bool]:
    """Return {item: was it exactly right} from an outcomes file."""
    return {line["item"]: line["exact"] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def pair(
    task: str,
    before: Path | None,
    after: Path,
    margin_points: float | None = None,
    bound_to: dict[str, str] | None = None,
    left_out: Iterable[str] = (),
    **own: bool,
) -> Pair:
    """Return the two versions' outcomes on the same items, matched by item; of a missing `before` a pair without items.

    left_out: items that are not judged. own: `lower_is_better` and `is_share` of a benchmark.
    """
    old, new = _outcomes(before) if before else {}, _outcomes(after)
    shared = sorted(old.keys() & new.keys())
    known = set(left_out)
    items = [item for item in shared if item not in known]
    told = {"before": [old[i][0] for i in items], "after": [new[i][0] for i in items]}
    if items and all(old[i][1] is not None and new[i][1] is not None for i in items):
        told |= {"loss_before": [old[i][1] for i in items], "loss_after": [new[i][1] for i in items]}
    told["left_out"] = [item for item in shared if item in known]
    return Pair(task=task, items=items, margin_points=margin_points, bound_to=bound_to or {}, **told, **own)


def _outcomes(file: Path) -> dict[str, tuple[float, float | None]]:
    """Return {item: (score, nats per answer token or None)} of an outcomes file of a task or of a benchmark."""
    found = {}
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        if "exact" not in line and "score" not in line:
            continue  # an item that the model could not be asked, such as one longer than its context
        loss = line["loss"] / max(line.get("tokens", 1), 1) if "loss" in line else None
        found[line["item"]] = float(line["score"] if "score" in line else line["exact"]), loss
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _share(outcomes: list[float]) -> str:
    return f"{100 * _mean(outcomes):.0f} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
