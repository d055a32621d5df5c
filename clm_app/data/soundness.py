"""Are a task's rows fit to learn from: prompts without another template around them, every class taught, answers that follow.

The first two are refused before a run; the last is a guess from words, and is only asked where a run has learned nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from clm_app.data.rows import Row
from clm_app.errors import BadData

# What chat templates write around what a person says: ChatML, Llama, Mistral, Gemma, Phi, Alpaca, Vicuna.
MARKS = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>|^<s>|^###\s*(?:Instruction|Human|User)\s*:"
    r"|^(?:User|Human)\s*:.*\n\s*(?:Assistant|Bot)\s*:\s*$",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
MOST_WRAPPED = 0.5  # share of prompts from which on it is no quotation of a template but one
ROWS_OF_A_CLASS = 5  # mean training rows of a label from which on labels are classes, and not answers that occur once
LEAST_TESTED = 2  # test rows of a class that nothing teaches; a single one may be a slip
FOLDS = 5
BY_CHANCE = 1e-4  # p-value above which answers do not follow from their prompts; real classes lie below 1e-100


class Following(NamedTuple):
    """How well the words of a prompt tell its label, on rows that were not counted. Shares 0..1."""

    rows: int
    right: float
    by_chance: float  # what guesses of the same frequencies would get
    p: float

    @property
    def is_nothing(self) -> bool:
        """Say whether the words tell no more than chance."""
        return self.p > BY_CHANCE


def refuse_wrapped(rows: Collection[Row], where: str) -> None:
    """Refuse prompts that stand in a chat template already: the model's own would be put around them a second time.

    where: begins the sentence, such as the file's name.

    Raises:
        BadData: with a mark that gives them away, and how many have one.
    """
    marks = [found.group().split("\n")[0].strip() for row in rows if (found := MARKS.search(row.prompt))]
    if len(marks) > MOST_WRAPPED * len(rows):
        mark, _ = Counter(marks).most_common(1)[0]
        raise BadData(
            f"{where}: {len(marks):,} of {len(rows):,} prompts stand in a chat template already ({mark[:30]!r}), so that the "
            "template would be doubled: the model's own is put around every prompt. Give prompts as a person types them."
        )


def refuse_untaught_classes(taught: Iterable[Row], tested: Iterable[Row], known: Collection[str], where: str) -> None:
    """Refuse rows whose test part asks for classes that no training row has.

    known: labels that earlier rows of the same task have taught.

    Raises:
        BadData: with the class that is asked for most.
    """
    labels, asked = Counter(row.label for row in taught), Counter(row.label for row in tested)
    if not labels or labels.total() < ROWS_OF_A_CLASS * len(labels):
        return
    missing = {label: count for label, count in asked.items() if label not in labels and label not in known}
    missing = {label: count for label, count in missing.items() if count >= LEAST_TESTED}
    if missing:
        worst = max(missing, key=missing.__getitem__)
        others = f", and {len(missing) - 1} more classes likewise" if len(missing) > 1 else ""
        raise BadData(
            f"{where}: the class {worst[:60]!r} is missing from the training rows, and {missing[worst]} test rows ask for "
            f"it{others}. Add rows of it, or take it out of the test part."
        )


def following(rows: list[Row]) -> Following | None:
    """Return how well words tell the labels; None where labels are no classes, or there is one alone.

    Naive Bayes over words with add-one smoothing, each fifth of the rows guessed from the other four.
    """
    labels = Counter(row.label for row in rows)
    if len(labels) < 2 or len(rows) < ROWS_OF_A_CLASS * len(labels):
        return None
    guesses: list[tuple[str, str]] = []
    for fold in range(FOLDS):
        guess = _guessing([row for i, row in enumerate(rows) if i % FOLDS != fold])
        guesses += [(guess(row.prompt), row.label) for row in rows[fold::FOLDS]]
    said = Counter(guess for guess, _ in guesses)
    by_chance = sum(said[label] * count for label, count in labels.items()) / len(rows) ** 2
    right = sum(guess == label for guess, label in guesses)
    from scipy.stats import binom

    return Following(len(rows), right / len(rows), by_chance, float(binom.sf(right - 1, len(rows), by_chance)))


def _guessing(rows: list[Row]):
    """Return a function that names the likeliest label of a prompt."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.label].update(_words(row.prompt))
    seen, prior = len({word for words in counts.values() for word in words}), Counter(row.label for row in rows)
    totals = {label: words.total() + seen for label, words in counts.items()}

    def guess(prompt: str) -> str:
        words = _words(prompt)
        return max(counts, key=lambda label: math.log(prior[label]) + sum(
            math.log((counts[label][word] + 1) / totals[label]) for word in words
        ))  # fmt: skip

    return guess


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
