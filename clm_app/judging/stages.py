"""Export parity, stage by stage: the first stage at which the served side differs from the trained one names the cause.

1 the rendered text, 2 token ids, 3 vocabulary and end tokens, 4 which task's adapter answers, 5 the first token's
distribution, 6 the likelihood of right answers and the greedy replies, 7 task scores. Nothing is loaded here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clm_app.judging.paired import holm, mcnemar, non_inferiority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from clm_app.judging.parity import Bounds, Golden, ParitySettings

LIKELY = 0.01  # probability from which on a token's log-probability is compared
TIE = 0.01  # nats: tokens so close to the likeliest one count as likeliest, for no rounding is as exact as a tie
SHOWN = 3  # prompts that the evidence shows
CUT = 400  # characters of a text that the evidence shows


class Finding(NamedTuple):
    """The first difference. The sentence says what it does and what to do next."""

    cause: str
    sentence: str
    evidence: dict


class Facts(NamedTuple):
    """What one side's tokenizer and configuration say."""

    template: str
    has_template: bool  # False: the folder has none, and the plain one stands in
    vocabulary: dict[str, int]
    controls: frozenset[int]
    bos: int | None
    eos: int | None
    ends: frozenset[int]  # ids that end a reply


@dataclass
class Seen:
    """What one side makes of one golden prompt."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    refusal: str = ""  # why the side does not take the conversation; empty: it does
    route: str | None = None  # task whose adapter answers; None: the side has no router
    steps: NDArray | None = None  # (answer tokens, or 1, vocabulary) log-probabilities, the right answer given
    reply: list[int] = field(default_factory=list)  # greedy, its end token included
    reply_text: str = ""


# --- 1 to 4: what goes in --------------------------------------------------------------------------------------------


def in_tokens(
    goldens: Sequence[Golden], trained: Sequence[Seen], served: Sequence[Seen], of_trained: Facts, of_served: Facts
) -> Finding | None:
    """Return the first difference in what the two sides read, or None."""
    pairs = [
        (golden, one, other)
        for golden, one, other in zip(goldens, trained, served, strict=True)
        if not (one.refusal and other.refusal)  # a template that takes no system message says so on both sides
    ]
    for stage in (_refusals, _texts, _ids):
        if found := stage(pairs, of_trained, of_served):
            return found
    return _vocabularies(of_trained, of_served) or _routes(pairs)


def _refusals(pairs: list, of_trained: Facts, of_served: Facts) -> Finding | None:
    for golden, one, other in pairs:
        if one.refusal != other.refusal:
            side, why = ("served", other.refusal) if other.refusal else ("trained", one.refusal)
            return Finding("refused", f"The {side} side refuses a conversation that the other one takes: {why} "
                           "Give both the same chat template and the same context length, then export again.",
                           {"prompt": golden.name, "trained": one.refusal, "served": other.refusal})  # fmt: skip
    return None


def _texts(pairs: list, of_trained: Facts, of_served: Facts) -> Finding | None:
    different = [pair for pair in pairs if pair[1].text != pair[2].text]
    if not different:
        return None
    evidence = {"prompts": [_shown(golden.name, one.text, other.text) for golden, one, other in different[:SHOWN]]}
    if of_trained.has_template and not of_served.has_template:
        return Finding("template_missing", "The chat template is missing: the served folder has none, so that a "
                       "conversation is written plainly and not as in training. Copy chat_template.jinja from the base "
                       "and export again.", evidence)  # fmt: skip
    if of_trained.template != of_served.template:
        return Finding("template_changed", "The chat template was changed: the served one writes "
                       f"{len(different)} of {len(pairs)} golden prompts otherwise than training did. Put the base's "
                       "chat_template.jinja back and export again.", evidence)  # fmt: skip
    return Finding("rendered_otherwise", "The same chat template writes another text when it is served: what a person "
                   "types, or the special tokens' texts, is treated otherwise. Render as clm_app/data/template.py does.",
                   evidence)  # fmt: skip


def _ids(pairs: list, of_trained: Facts, of_served: Facts) -> Finding | None:
    different = [pair for pair in pairs if pair[1].ids != pair[2].ids]
    if not different:
        return None
    names = {number: token for token, number in of_trained.vocabulary.items()}
    golden, one, other = different[0]
    evidence = {
        "different": f"{len(different)} of {len(pairs)} prompts",
        "prompts": [_shown(g.name, a.ids, b.ids) for g, a, b in different[:SHOWN]],
        "tokens": {"trained": _around(one.ids, other.ids, names)[0], "served": _around(one.ids, other.ids, names)[1]},
    }
    cause, sentence = _cause_of_ids(one.ids, other.ids, of_trained, of_served)
    return Finding(cause, sentence, evidence)


def _cause_of_ids(one: list[int], other: list[int], of_trained: Facts, of_served: Facts) -> tuple[str, str]:
    bos, eos = of_trained.bos, of_trained.eos
    starts = [_leading(ids, bos) for ids in (one, other)]
    if bos is not None and one[starts[0] :] == other[starts[1] :]:
        if starts[1] > starts[0]:
            twice = starts[0] > 0
            what = "BOS twice: the template and the tokenizer both add it" if twice else (
                "BOS added: the served tokenizer adds it, and training had none"
            )  # fmt: skip
            return ("bos_twice" if twice else "bos_added"), (
                f"{what}, so that every prompt begins otherwise than in training. Turn off add_bos_token, or encode with "
                "add_special_tokens=False, and export again."
            )
        return "bos_missing", (
            "BOS missing: training began every prompt with the start token and the served side leaves it out. Turn on "
            "add_bos_token, or put bos_token into the template, and export again."
        )
    if of_trained.vocabulary != of_served.vocabulary:
        return _other_tokenizer(of_trained, of_served)
    if eos is not None and [i for i in one if i != eos] == [i for i in other if i != eos]:
        if other.count(eos) > one.count(eos):
            return "eos_added", (
                "EOS added: the served tokenizer puts an end token into the prompt, so that the model takes its answer for "
                "given. Turn off add_eos_token and export again."
            )
        return "eos_missing", (
            "EOS missing: training ended each turn with the end token and the served prompt leaves it out. Put eos_token "
            "back into the template and export again."
        )
    more = sum(i in of_trained.controls for i in other) - sum(i in of_trained.controls for i in one)
    if more > 0:
        return "control_typed", (
            "Text that a person types becomes control tokens when it is served: a conversation can forge turns. Break "
            "control tokens in contents apart, as clm_app/data/template.py does."
        )
    if len(other) < len(one) and (one[-len(other) :] == other or one[: len(other)] == other):
        return "prompt_cut", (
            f"The served prompt is cut to {len(other)} of {len(one)} tokens. Give the served side the model's whole context."
        )
    return "cut_otherwise", (
        "The same vocabulary cuts the same text into other tokens: normalisation, splitting or merges differ. Serve with "
        "the base's own tokenizer.json."
    )


def _vocabularies(of_trained: Facts, of_served: Facts) -> Finding | None:
    evidence = {
        "tokens": {"trained": len(of_trained.vocabulary), "served": len(of_served.vocabulary)},
        "ends": {"trained": sorted(of_trained.ends), "served": sorted(of_served.ends)},
        "controls": {"trained": len(of_trained.controls), "served": len(of_served.controls)},
    }
    if of_trained.vocabulary != of_served.vocabulary:
        return Finding(*_other_tokenizer(of_trained, of_served), evidence)
    if of_trained.controls != of_served.controls:
        lost = sorted(of_trained.controls ^ of_served.controls)
        return Finding("controls_changed", f"{len(lost)} token ids are control tokens on one side and plain text on the "
                       f"other, such as {lost[0]}. Serve with the base's own tokenizer.json.", evidence)  # fmt: skip
    if missing := of_trained.ends - of_served.ends:
        return Finding("eos_missing", f"EOS missing: the trained answers end with token {min(missing)}, and the served side "
                       "does not stop there, so that replies run on. Set eos_token_id in generation_config.json and export "
                       "again.", evidence)  # fmt: skip
    if more := of_served.ends - of_trained.ends:
        return Finding("eos_added", f"The served side stops at token {min(more)} too, which ends no trained answer, so that "
                       "replies break off. Correct eos_token_id in generation_config.json.", evidence)  # fmt: skip
    return None


def _other_tokenizer(of_trained: Facts, of_served: Facts) -> tuple[str, str]:
    moved = of_trained.vocabulary.items() ^ of_served.vocabulary.items()
    return "other_tokenizer", (
        f"Another tokenizer is served: {len({token for token, _ in moved})} tokens have other ids or are on one side alone, "
        "so that ids mean other words than in training. Copy the base's tokenizer files and export again."
    )


def _routes(pairs: list) -> Finding | None:
    routed = [pair for pair in pairs if pair[1].route is not None]
    different = [pair for pair in routed if pair[1].route != pair[2].route]
    if not different:
        return None
    evidence = {"prompts": [_shown(g.name, one.route, other.route) for g, one, other in different[:SHOWN]]}
    golden, one, other = different[0]
    if all(pair[2].route is None for pair in routed):
        return Finding("no_router", "The router is missing: one set of weights answers every task when it is served, and "
                       "training measured an adapter for each. Serve with a backend that knows routes.json.", evidence)  # fmt: skip
    return Finding("routed_otherwise", f"Another adapter answers: {len(different)} of {len(routed)} golden prompts go to "
                   f"another task when served, {golden.name} to {other.route or 'the base'} and not to "
                   f"{one.route or 'the base'}. Put the version's own routes.json and routes.npz back.", evidence)  # fmt: skip


# --- 5 to 7: what comes out ------------------------------------------------------------------------------------------


def apart(trained: Sequence[NDArray], served: Sequence[NDArray]) -> dict[str, float]:
    """Return how far distributions of the first token are apart; names as in Bounds. Each: (vocabulary,) log-probabilities."""
    differences, divergences, top1, top5 = [], [], [], []
    for one, other in zip(trained, served, strict=True):
        likely = np.maximum(one, other) >= np.log(LIKELY)
        differences.append(float(np.abs(one - other)[likely].max(initial=0.0)))
        divergences.append(float((np.exp(one) * (one - other)).sum()))
        top1.append(is_likeliest(one, int(other.argmax())))
        best = [set(np.argpartition(-side, 5)[:5].tolist()) for side in (one, other)]
        top5.append(len(best[0] & best[1]) / 5)
    figures = {"log_probability": max(differences), "divergence": max(0.0, float(np.mean(divergences)))}
    return figures | {"top1": float(np.mean(top1)), "top5": float(np.mean(top5))}


def is_likeliest(log_probabilities: NDArray, token: int) -> bool:
    """Say whether a token is the likeliest one, or as good as tied with it."""
    return bool(log_probabilities[token] >= log_probabilities.max() - TIE)


def beyond(figures: dict[str, float], bounds: Bounds, prompts: int, alpha: float) -> dict[str, dict]:
    """Return {figure: {is, bound}} of those that are out of their bounds.

    A share of `prompts` is out where so few would agree with a chance below alpha if the bound were the true share: one
    of ten prompts says little.
    """
    told, out = bounds.model_dump(), {}
    for name in figures.keys() & told.keys():
        value, bound = figures[name], told[name]
        if name in ("top1", "replies"):
            is_out = value < bound and at_most(round(value * prompts), prompts, bound) < alpha
        else:
            is_out = value < bound if name == "top5" else not value <= bound  # no number is out of any bound
        if is_out:
            out[name] = {"is": round(value, 6), "bound": bound}
    return out


def at_most(count: int, of: int, share: float) -> float:
    """Return the chance that at most `count` of so many agree where each does with probability `share`."""
    from scipy.stats import binom

    return float(binom.cdf(count, of, share))


class Score(NamedTuple):
    """One task's scored rows on both sides."""

    task: str
    rows: int
    trained: float  # share exactly right, 0..1
    served: float
    lost: int
    gained: int

    @classmethod
    def of(cls, task: str, trained: Sequence[bool], served: Sequence[bool]) -> Score:
        """Count what one task's rows say, in the same order on both sides."""
        pairs = Counter(zip(trained, served, strict=True))
        rows = len(trained)
        return cls(task, rows, sum(trained) / rows, sum(served) / rows, pairs[True, False], pairs[False, True])


class Scores(NamedTuple):
    """What the scored rows say of the served artefact."""

    hurt: list[Score]  # lost more than the margin, and not by chance
    is_kept: bool  # over all rows a loss of the margin is excluded
    rows: int
    lost: int
    gained: int
    lines: list[dict]


def scored(scores: Sequence[Score], settings: ParitySettings) -> Scores:
    """Judge each task and all of them together; several tests are corrected for their number (Holm 1979)."""
    margin = settings.margin_points / 100
    rows, lost, gained = (sum(getattr(one, name) for one in scores) for name in ("rows", "lost", "gained"))
    whole = [Score("all tasks", rows, 0, 0, lost, gained)] if len(scores) > 1 else []
    tested = [*scores, *whole]
    chances = holm([mcnemar(one.lost, one.gained) for one in tested])
    hurt = [
        one for one, chance in zip(tested, chances, strict=True)
        if chance < settings.alpha and (one.lost - one.gained) / one.rows > margin
    ]  # fmt: skip
    is_kept = non_inferiority(lost, gained, rows, margin) < settings.alpha if rows else False
    return Scores(hurt, is_kept, rows, lost, gained, [one._asdict() for one in scores])


# --- evidence --------------------------------------------------------------------------------------------------------


def _leading(ids: list[int], token: int | None) -> int:
    return next((i for i, found in enumerate(ids) if found != token), len(ids))


def first_place(one: Sequence, other: Sequence) -> int:
    """Return the first place at which two sequences differ; the shorter one's length where it only ends."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _shown(name: str, one, other) -> dict:
    """Return a prompt's name with both sides, cut around the first difference where they are long."""
    if one is None or other is None or isinstance(one, str) and max(len(one), len(other)) <= CUT:
        return {"prompt": name, "trained": one, "served": other}
    at = first_place(one, other)
    start, end = max(0, at - 8), at + (CUT if isinstance(one, str) else 24)
    return {"prompt": name, "first_difference_at": at, "trained": one[start:end], "served": other[start:end]}


def _around(one: list[int], other: list[int], names: dict[int, str]) -> list[list[str]]:
    at = first_place(one, other)
    return [[names.get(i, f"[{i}]") for i in ids[max(0, at - 2) : at + 6]] for ids in (one, other)]
