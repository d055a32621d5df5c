"""A model as judge of two sides: their replies to the same prompts, what it says of each pair, kept as an audit event."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import Field, ValidationError
from sqlmodel import select

from clm_app.errors import BadData, BadInput, BadSettings, NotThere
from clm_app.judging import pairwise
from clm_app.judging.benchmarks import clean_items, find, kind_of, title
from clm_app.judging.pairwise import Judged, JudgeSettings, JudgingSettings, Pair
from clm_app.registry import versions
from clm_app.workspace import Workspace
from store.db import record
from store.tables import AuditEvent
from ui import questions
from ui.comparing import MOST_PROMPTS, PromptsWish, Side, named, of_version, refusal, replies_of
from ui.house import House

JUDGED = "replies.judged"  # the audit event that keeps what was said


class JudgedWish(PromptsWish):
    """Prompts that two sides answer, and a model that says which reply is the better one; nobody else is asked."""

    prompts: list[str] = Field([], max_length=MOST_PROMPTS, description="what is asked; or one of the next two")
    benchmark: str = Field(
        "", max_length=100, description="its validation items are asked, from the first; name or name@version"
    )
    flipped: bool = Field(False, description="ask the test rows that flipped between two versions, worst first")
    most: int = Field(
        20, ge=1, le=MOST_PROMPTS, description="most items of the benchmark, or flipped rows, that are asked"
    )
    judge: Side = Field(description="who judges: a version of ours, or an endpoint")
    judging: JudgingSettings = Field(default_factory=JudgingSettings, description="how the judge is asked")


def judged(house: House, wish: JudgedWish) -> dict[str, Any]:
    """Let a judge say of each prompt whose reply is better, keep what it said as an audit event, and return it.

    {left, right, judge: who; asked: what; sentence; notes: what weakens it; figures: see pairwise.Comparison, a win is the
    right side's; pairs: {item, prompt, expected, left, right (replies), says, new_first, old_first (the judge's words)}}.

    Raises:
        BadInput: an address is not on this machine and not said to be outside, or refuses; there is nothing to ask.
        NotThere: no such version or benchmark, or the judge does not answer. ChildFailed: a side does not answer.
    """
    left, right, judge = (named(house, side) for side in (wish.left, wish.right, wish.judge))
    by = _judge(house, wish)
    about, items = _asked(house.workspace, wish)
    asked = [item.prompt for item in items]
    old, new = (replies_of(house, side, asked, wish.max_tokens, wish.limit_s) for side in (wish.left, wish.right))
    pairs = [item._replace(new=b.text, old=a.text) for item, a, b in zip(items, old, new, strict=True)]
    said = list(by(pairs))
    figures = pairwise.compare(said)
    found = {
        "left": left, "right": right, "judge": judge, "asked": about, "rubric": wish.judging.rubric,
        "sentence": _judgement(left, right, judge, figures), "notes": _notes(wish, left, right, judge),
        "figures": figures.model_dump(),
    }  # fmt: skip
    told = [_plain(pair, one) for pair, one in zip(pairs, said, strict=True)]
    _keep(house, wish, found, told)
    return found | {"pairs": told}


def before(workspace: Workspace, limit: int = 20) -> list[dict[str, Any]]:
    """Return what judges said, newest first: {id, at, by}, and as `judged` but for the pairs, whose object is named."""
    wanted = select(AuditEvent).where(AuditEvent.action == JUDGED).order_by(AuditEvent.id.desc()).limit(limit)
    with workspace.read() as session:
        return [{"id": e.id, "at": e.at.isoformat(), "by": e.actor} | e.detail for e in session.exec(wanted)]


def once(workspace: Workspace, event_id: int) -> dict[str, Any]:
    """Return one of them with its pairs; none where their file is gone.

    Raises:
        NotThere: nothing was judged under this number.
    """
    with workspace.read() as session:
        kept = session.get(AuditEvent, event_id)
    if kept is None or kept.action != JUDGED:
        raise NotThere(f"Nothing was judged under number {event_id}. GET /api/compare/judged lists what was.")
    try:
        pairs = json.loads(workspace.objects.path(kept.detail["object"]).read_bytes())
    except KeyError:
        pairs = []
    return {"id": kept.id, "at": kept.at.isoformat(), "by": kept.actor} | kept.detail | {"pairs": pairs}


def _judge(house: House, wish: JudgedWish) -> Callable[[Sequence[Pair]], Iterable[Judged]]:
    """Return what judges pairs, after looking whether it may be asked."""
    side, how = wish.judge, wish.judging
    if side.version:
        ask = lambda message: of_version(house, side.version, message, how.max_tokens, how.timeout_s).text  # noqa: E731
        return lambda pairs: pairwise.judged_by(ask, pairs, how)
    address = side.endpoint()
    try:
        settings = JudgeSettings(
            **how.model_dump(), base_url=address.base_url, model=address.model, key=address.api_key
        )
    except ValidationError as err:
        raise refusal(err) from err
    return lambda pairs: pairwise.judge(pairs, settings)


def _asked(workspace: Workspace, wish: JudgedWish) -> tuple[str, list[Pair]]:
    """Return (what is asked, in words; a pair without replies for each prompt)."""
    if sum((bool(wish.prompts), bool(wish.benchmark), wish.flipped)) != 1:
        raise BadSettings(
            "A judge is given prompts, a benchmark, or the rows that flipped. Give exactly one of the three."
        )
    if wish.prompts:
        return "prompts", [Pair(f"prompt {n}", prompt, "", "") for n, prompt in enumerate(wish.prompts, 1)]
    if wish.flipped:
        if not (wish.left.version and wish.right.version):
            raise BadSettings("Rows flip between two versions of ours. Give prompts or a benchmark for an endpoint.")
        flips = questions.compare(workspace, wish.left.version, wish.right.version)["flips"][: wish.most]
        if not flips:
            raise BadInput(
                f"No row flipped between {wish.left.name} and {wish.right.name}. Give prompts or a benchmark."
            )
        return "flipped rows", [Pair(flip["item"], flip["prompt"], "", "", flip["response"]) for flip in flips]
    row = find(workspace, wish.benchmark)
    kind, items = kind_of(row), clean_items(workspace, row, "validation").items[: wish.most]
    if not items:
        raise BadData(
            f"{title(row)} has no validation items that no training row has, and its test items are touched once. "
            "Choose another benchmark, or give prompts."
        )
    return title(row), [Pair(item.key, kind.asked(item), "", "", " or ".join(item.answers)) for item in items]


def _plain(pair: Pair, said: Judged) -> dict[str, Any]:
    return {"prompt": pair.prompt, "expected": pair.expected, "left": pair.old, "right": pair.new} | said.model_dump()


def _judgement(left: str, right: str, judge: str, found: pairwise.Comparison) -> str:
    """Return the figures as one sentence."""
    ties = f", {found.ties} tie{'s' * (found.ties != 1)}" + (
        f", {found.unreadable} not readable" if found.unreadable else ""
    )
    wins = f"{judge} finds {right} better on {found.wins} of {found.pairs} prompts and {left} on {found.losses}{ties}"
    chance = "more than chance would give" if found.p < 0.05 else "no more than chance may give"
    return f"{wins}: {chance} (p = {found.p:.2g})."


def _notes(wish: JudgedWish, left: str, right: str, judge: str) -> list[str]:
    """Return what weakens the verdict, in sentences."""
    notes = []
    if judge in (left, right):  # self-enhancement bias: Zheng et al. 2023, section 3.3
        notes.append("The judge is one of the two, and models favour their own words. Ask another one.")
    if wish.flipped:
        notes.append("The rows were chosen since they flipped; the shares say nothing of other rows.")
    return notes


def _keep(house: House, wish: JudgedWish, found: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
    workspace = house.workspace
    ours = next((side for side in (wish.right, wish.left) if side.version), None)
    subject = f"version:{versions.by_name(workspace, ours.version).id}" if ours else "endpoint:"
    told = workspace.objects.put_bytes(json.dumps(pairs, ensure_ascii=False).encode())
    with workspace.write() as session:
        record(session, house.actor, JUDGED, subject, **found, object=told)
