"""What went wrong with an update, in words a manager understands: the cause behind a refusal, where one can be named.

Nothing here decides: the gate has spoken. A cause is named from what the record knows of the run, its rows and its answers,
and only where it explains what was seen; an update that was promoted has none, but for benchmark items that it was trained on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from clm_app.data.rows import Row
from clm_app.data.soundness import Following, following
from clm_app.judging.gate import Guessing, Pair, Verdict

TOO_FAST = 5  # times the method's own learning rate; from there on the rate is suspected
UNMOVED = 1e-4  # nats per answer token: the same weights differ from themselves by 1e-6 in batches of other rows
HARDLY = 0.9  # of the loss of the first step; a run that learns ends below half of it
MOST_CUT = 0.5  # share of rows that lost a part of their tokens
LOOKED_AT = 2000  # rows, at most, that are asked whether answers follow from prompts


class Cause(NamedTuple):
    """A name that a program may ask for, and the sentence for a person."""

    cause: str
    sentence: str


class Case(NamedTuple):
    """What the record knows of an update that was judged.

    rows: training rows of the new task. figures: of the run, as the engine wrote them. training: its knobs.
    """

    verdict: Verdict
    new: Pair
    rows: list[Row]
    figures: dict
    training: dict

    @property
    def is_learned(self) -> bool:
        """Say whether the gate found more than chance on the new task."""
        return self.verdict.evidence["new"]["learned"]


def causes(case: Case) -> list[Cause]:
    """Return what explains the verdict, the likeliest first; empty where nothing does, or nothing needs to be explained."""
    leaks = list(_contaminated(case.verdict.evidence))
    if case.verdict.verdict == "promote":
        return leaks
    return [Cause(name, said) for name, look in LOOKS.items() if (said := look(case))][:1] + leaks


def told(verdict: Verdict, found: list[Cause]) -> Verdict:
    """Return the verdict with its causes in the evidence; its sentence stays the one that the gate said."""
    return verdict.model_copy(update={"evidence": verdict.evidence | {"causes": [cause._asdict() for cause in found]}})


def guessing(rows: list[Row]) -> Guessing | None:
    """Return what guesses and counting words get on a new task of classes; None where its labels are no classes."""
    found = _following(rows)
    if found is None:
        return None
    most = Counter(row.label for row in rows).most_common(1)[0][1] / len(rows)
    return Guessing(chance=max(most, found.by_chance), words=found.right)


def _following(rows: list[Row]) -> Following | None:
    return following(random.Random(0).sample(rows, min(LOOKED_AT, len(rows))))


# --- looks, in the order in which they are taken: what is certain before what is likely ---------------------------------


def _nothing_changed(case: Case) -> str:
    rises = case.new.rises
    if case.is_learned or not rises or max(map(abs, rises)) > UNMOVED:
        return ""
    return (
        f"The cause: the update changed nothing; all {len(rises):,} answers are as likely as before. Look whether any weight "
        "was trained."
    )


def _rows_cut(case: Case) -> str:
    cut, rows = case.figures.get("cut_rows", 0), len(case.rows)
    if case.is_learned or not rows or cut < MOST_CUT * rows:
        return ""
    return (
        f"The cause: {cut:,} of {rows:,} rows are longer than {case.training.get('max_tokens')} tokens and were cut. Raise "
        "max_tokens."
    )


def _learning_rate(case: Case) -> str:
    rate, usual = case.figures.get("learning_rate"), case.figures.get("usual_rate")
    if not rate or not usual or rate < TOO_FAST * usual:
        return ""
    first, last = case.figures.get("first_loss") or 0.0, case.figures.get("loss", 0.0)
    return (
        f"The cause: the learning rate {rate:.2g} is {rate / usual:.0f} times the usual {usual:.2g} and far too high; the loss "
        f"went from {first:.2f} to {last:.2f}. Leave learning_rate empty."
    )


def _shuffled_labels(case: Case) -> str:
    if case.is_learned:
        return ""
    found = _following(case.rows)
    if found is None or not found.is_nothing:
        return ""
    return (
        f"The cause: the answers do not follow from the prompts, as if they were shuffled; words tell {100 * found.right:.0f} % "
        f"of the answers, and chance {100 * found.by_chance:.0f} %. Look whether the file's columns fit each other."
    )


def _loss_never_fell(case: Case) -> str:
    first, last = case.figures.get("first_loss"), case.figures.get("loss")
    if case.is_learned or not first or last is None or last < HARDLY * first:
        return ""
    return (
        f"The cause: the training learned nothing; its loss was {first:.2f} at the first step and {last:.2f} at the end. Give it "
        "more steps, or another learning rate."
    )


LOOKS: dict[str, Callable[[Case], str]] = {
    "nothing_changed": _nothing_changed, "rows_cut": _rows_cut, "learning_rate": _learning_rate,
    "shuffled_labels": _shuffled_labels, "loss_never_fell": _loss_never_fell,
}  # fmt: skip


def _contaminated(evidence: dict) -> Iterator[Cause]:
    for line in evidence["old"]:
        if count := len(line["left_out"]):
            yield Cause("contaminated_benchmark", (
                f"{count:,} of {count + line['items']:,} items of {line['task']} stand in training rows and were left out: what "
                "was read before is no test."
            ))  # fmt: skip
