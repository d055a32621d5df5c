"""What is asked of two versions side by side, and of all of them: scores, costs, flips, replies; nothing here writes."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlmodel import Session, select

from clm_app.catalog import shelf
from clm_app.errors import BadInput, ChildFailed
from clm_app.judging.benchmarks import kind_of, leakage_of, load
from clm_app.judging.benchmarks import made as kind_made
from clm_app.judging.bootstrap import over_items
from clm_app.judging.standing import ALIKE, BETTER, WORSE, Standings, reading, standings, wilson
from clm_app.probes._base import Value
from clm_app.probes.kinds._base import SHELF, Kind
from clm_app.registry import versions
from clm_app.serving.chat import ChatOptions
from clm_app.serving.endpoint import Endpoint, Reply
from clm_app.workspace import Workspace
from store.tables import Benchmark, BenchmarkReading
from ui import questions
from ui.house import House
from ui.parts.word_diff import as_text, word_diff

MOST_PROMPTS = 50  # asked in one request
LATENCY = "latency"  # the kind of benchmark that says how long a reply takes

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a formula begins in a spreadsheet: OWASP, "CSV injection"


class Side(BaseModel):
    """Who answers on one side: a version of ours, or an OpenAI-compatible address that a person named."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field("", max_length=80, description="name of a version, or live; empty where an address is given")
    base_url: str = Field("", description="address of an endpoint; empty where a version is given")
    model: str = Field("", description="name of the model at that address")
    api_key: str = Field("", description="its key, where it needs one; never kept", repr=False)
    outside: bool = Field(False, description="the address is not on this machine, and the prompts may leave it")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Side:
        if bool(self.version) == bool(self.base_url):
            raise ValueError("give either a version or a base_url with its model")
        return self

    def endpoint(self) -> Endpoint:
        """Return the address to ask.

        Raises:
            BadInput: it is no address, or not on this machine and not said to be outside.
        """
        try:
            return Endpoint(**self.model_dump(exclude={"version"}))
        except ValidationError as err:
            raise refusal(err) from err

    @property
    def name(self) -> str:
        """What the side is called in an answer."""
        return self.version or f"{self.model} at {self.base_url}"


def refusal(err: ValidationError) -> BadInput:
    """Return what pydantic says of an address as a sentence."""
    first = err.errors()[0]
    name = ".".join(map(str, first["loc"])) or "base_url"
    return BadInput(f"{name}: {first['msg'].removeprefix('Value error, ')}.")


class PromptsWish(BaseModel):
    """Prompts that two sides answer greedily."""

    model_config = ConfigDict(extra="forbid")

    left: Side = Field(description="who answers on the left")
    right: Side = Field(description="who answers on the right")
    prompts: list[str] = Field(min_length=1, max_length=MOST_PROMPTS, description="what is asked, each on its own")
    max_tokens: int = Field(256, ge=1, le=8192, description="longest reply, in tokens")
    limit_s: float = Field(60.0, gt=0, le=600, description="longest time for one reply, in seconds")


# --- scores, costs and flips -----------------------------------------------------------------------------------------------


def side_by_side(workspace: Workspace, before: str, after: str) -> dict[str, Any]:
    """Return all that is known of two versions: `questions.compare` and more.

    tasks: also before_low, before_high, after_low, after_high, the 95 % intervals of the two shares. versions: the
    standing of both (size, parameters, training time, speed, verdict). benchmarks: see `_benchmarks`. benchmark_flips:
    {benchmark, item, prompt, kind (lost or gained), before_text, after_text (None where no reply was kept)}.

    Raises:
        BadInput, NotThere: as `questions.compare`.
    """
    found = questions.compare(workspace, before, after)
    for task in found["tasks"]:
        for side in ("before", "after"):
            task[f"{side}_low"], task[f"{side}_high"] = wilson(task[side], task["items"])
    rows = {row.version: row.model_dump(mode="json") for row in standings(workspace).rows}
    told, flips = _benchmarks(workspace, found["before"], found["after"])
    return found | {
        "versions": [rows[found[side]] for side in ("before", "after")],
        "benchmarks": told, "benchmark_flips": flips,
    }  # fmt: skip


def _benchmarks(workspace: Workspace, before: str, after: str) -> tuple[list[dict], list[dict]]:
    """Return the benchmarks that both versions sat, and the items that flipped.

    Of each benchmark: benchmark, kind, on, backend, unit, lower_is_better, items, before, before_low, before_high, after,
    after_low, after_high; and change, low, high, the difference with its 95 % interval over the same items, with the word
    for it (says); these are None where a kind sums its items up in its own way, or the outcomes are gone.
    """
    names = [versions.by_name(workspace, name).id for name in (before, after)]
    with workspace.read() as session:
        one, other = (_newest_readings(session, version) for version in names)
        sat = {row.id: row for row in session.exec(select(Benchmark))}
    told, flips = [], []
    for place in sorted(one.keys() & other.keys()):
        then, now, benchmark = one[place], other[place], sat[place[0]]
        plain = [reading(found, benchmark).model_dump() for found in (then, now)]
        row = {
            name: plain[1][name] for name in ("benchmark", "kind", "on", "backend", "unit", "lower_is_better", "items")
        }
        for side, values in zip(("before", "after"), plain, strict=True):
            row |= {side: values["value"], f"{side}_low": values["low"], f"{side}_high": values["high"]}
        told.append(row | _change(workspace, benchmark, then, now))
        flips += _benchmark_flips(workspace, row["benchmark"], benchmark, then, now)
    return told, flips


def _newest_readings(session: Session, version_id: int) -> dict[tuple[int, str, str], BenchmarkReading]:
    found = select(BenchmarkReading).where(BenchmarkReading.version_id == version_id, BenchmarkReading.split == "test")
    return {(r.benchmark_id, r.on, r.backend): r for r in session.exec(found.order_by(BenchmarkReading.id))}


def _change(
    workspace: Workspace, benchmark: Benchmark, then: BenchmarkReading, now: BenchmarkReading
) -> dict[str, Any]:
    files = _outcome_files(workspace, then, now)
    kind = shelf(SHELF).get(benchmark.kind)
    change = None
    if files and kind is not None and kind.value is Kind.value:
        change = _paired(benchmark.kind, json.dumps(benchmark.settings), frozenset(leakage_of(benchmark).keys), *files)
    if change is None:
        return {"change": None, "low": None, "high": None, "says": None}
    return {"change": change.value, "low": change.low, "high": change.high, "says": _says(change, now.lower_is_better)}


def _says(change: Value, lower_is_better: bool) -> str:
    if change.low <= 0 <= change.high:
        return ALIKE
    return WORSE if (change.value > 0) == lower_is_better else BETTER


def _outcome_files(workspace: Workspace, *found: BenchmarkReading) -> tuple[Path, ...] | None:
    try:
        return tuple(workspace.objects.path(one.object) for one in found)
    except KeyError:
        return None


def _judging(leaking: frozenset[str], *files: Path) -> list[tuple[dict, dict]]:
    """Return both outcomes of each item that may judge: neither leaked into training rows nor too long for a model."""
    old, new = map(questions.outcomes, files)
    shared = sorted((old.keys() & new.keys()) - leaking)
    return [(old[item], new[item]) for item in shared if "too_long" not in old[item] and "too_long" not in new[item]]


@lru_cache(maxsize=256)
def _paired(kind: str, settings: str, leaking: frozenset[str], before: Path, after: Path) -> Value | None:
    """Return the change of a benchmark's value with its 95 % interval, the same items drawn for both; None of no items."""
    import numpy

    made = kind_made(kind, json.loads(settings))
    lines = _judging(leaking, before, after)
    if not lines:
        return None
    columns = numpy.array([[*made.parts(old), *made.parts(new)] for old, new in lines], float)  # (items, 4)

    def change(sums):
        """Return the value after less the value before. sums: (..., 4), numerator and denominator of each."""
        return sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]

    ends = over_items([[column] for column in columns.T], lambda drawn: change(drawn[..., 0]))
    return Value(float(change(columns.sum(axis=0))), *ends)


def _benchmark_flips(
    workspace: Workspace, name: str, benchmark: Benchmark, then: BenchmarkReading, now: BenchmarkReading
) -> list[dict[str, Any]]:
    """Return the items of a benchmark scored in shares whose score is another now, lost ones first."""
    files = _outcome_files(workspace, then, now) if now.unit.startswith("share") else None
    if not files or benchmark.kind not in shelf(SHELF):
        return []
    prompts = _prompts(workspace.objects.path(benchmark.object) / f"{now.split}.jsonl")
    has_replies = kind_of(benchmark).asks == "text"
    flips = []
    for old, new in _judging(frozenset(leakage_of(benchmark).keys), *files):
        if change := (old["score"] - new["score"] if now.lower_is_better else new["score"] - old["score"]):
            texts = {f"{side}_text": line.get("text") if has_replies else None
                     for side, line in (("before", old), ("after", new))}  # fmt: skip
            flips.append({
                "benchmark": name, "item": new["item"], "prompt": prompts.get(new["item"], ""),
                "kind": "gained" if change > 0 else "lost",
            } | texts)  # fmt: skip
    return sorted(flips, key=lambda flip: flip["kind"], reverse=True)


@lru_cache(maxsize=32)
def _prompts(file: Path) -> dict[str, str]:
    """Return {item: its prompt} of one part of a benchmark."""
    return {item.key: item.prompt for item in load(file)}


# --- replies -------------------------------------------------------------------------------------------------------------


def outputs(house: House, before: str, after: str, most: int = 10, limit_s: float = 60.0) -> dict[str, Any]:
    """Return what both versions reply to the rows that flipped, worst first, with the words that differ.

    before, after: names. replies: {task, prompt, response, kind, before, after (texts), parts ([same, gone or new; text]),
    diff (as plain text), kept (whether the replies were kept by a benchmark and not asked for now)}.

    Raises:
        ChildFailed: a version cannot be loaded or does not answer in time. Else as `questions.compare`.
    """
    found = side_by_side(house.workspace, before, after)
    kept = [flip for flip in found["benchmark_flips"] if None not in (flip["before_text"], flip["after_text"])]
    asked = found["flips"][:most]
    told = []
    if asked:
        prompts = [flip["prompt"] for flip in asked]
        sides = Side(version=found["before"]), Side(version=found["after"])
        old, new = (replies_of(house, side, prompts, None, limit_s) for side in sides)
        told = [
            {name: flip[name] for name in ("task", "prompt", "response", "kind")}
            | _told(a.text, b.text)
            | {"kept": False}
            for flip, a, b in zip(asked, old, new, strict=True)
        ]
    told += [
        {"task": flip["benchmark"], "prompt": flip["prompt"], "response": "", "kind": flip["kind"], "kept": True}
        | _told(flip["before_text"], flip["after_text"])
        for flip in kept[: max(0, most - len(told))]
    ]
    return {
        "before": found["before"],
        "after": found["after"],
        "flips": len(found["flips"]) + len(kept),
        "replies": told,
    }


def prompts(house: House, wish: PromptsWish) -> dict[str, Any]:
    """Return what both sides reply to each prompt: {left, right: who; replies: {prompt, left, right, parts, diff, …}}.

    left_s, right_s: seconds of each reply; left_tokens, right_tokens: None where an endpoint does not count them.

    Raises:
        BadInput: a side is no address, refuses, or is not on this machine and not said to be outside.
        NotThere: there is no such version. ChildFailed: a side does not answer, or not in time.
    """
    sides = wish.left, wish.right
    for side in sides:  # both are looked at before any is asked
        named(house, side)
    old, new = (replies_of(house, side, wish.prompts, wish.max_tokens, wish.limit_s) for side in sides)
    replies = [
        {"prompt": prompt, "left": a.text, "right": b.text, "left_s": a.seconds, "right_s": b.seconds,
         "left_tokens": a.tokens, "right_tokens": b.tokens}
        | {name: value for name, value in _told(a.text, b.text).items() if name in ("parts", "diff")}
        for prompt, a, b in zip(wish.prompts, old, new, strict=True)
    ]  # fmt: skip
    return {"left": wish.left.name, "right": wish.right.name, "replies": replies}


def named(house: House, side: Side) -> str:
    """Return what a side is called in the record, where "live" would be another version tomorrow.

    Raises:
        NotThere, BadInput: as `prompts`.
    """
    if side.version:
        return versions.by_name(house.workspace, side.version).name
    return f"{side.model} at {side.endpoint().base_url}"


def _told(before: str, after: str) -> dict[str, Any]:
    parts = word_diff(before, after)
    return {"before": before, "after": after, "parts": parts, "diff": as_text(parts)}


def replies_of(house: House, side: Side, asked: Iterable[str], max_tokens: int | None, limit_s: float) -> list[Reply]:
    """Return a side's replies, one after the other."""
    longest = max_tokens or house.workspace.settings.max_new_tokens
    ask: Callable[[str], Reply]
    if side.version:
        ask = lambda prompt: of_version(house, side.version, prompt, longest, limit_s)  # noqa: E731
    else:
        endpoint = side.endpoint()
        ask = lambda prompt: endpoint.ask(prompt, longest, limit_s)  # noqa: E731
    return [ask(prompt) for prompt in asked]


def of_version(house: House, version: str, prompt: str, max_tokens: int, limit_s: float) -> Reply:
    """Return a version's greedy reply to one prompt, through the house's own router.

    Raises:
        NotThere: no such version. BadInput: the prompt does not fit. ChildFailed: it is not loaded, or the time is over.
    """
    if house.router is None:
        raise ChildFailed("No model can be served yet. Try again in a moment.")
    began, text, tokens = time.monotonic(), "", 0
    pieces = house.router.chat(
        version, [{"role": "user", "content": prompt}], ChatOptions(max_tokens=max_tokens, temperature=0.0)
    )
    try:
        for piece in pieces:
            text, tokens = text + piece.text, max(tokens, piece.completion_tokens)
            if time.monotonic() - began > limit_s:
                raise ChildFailed(
                    f"{version} has not answered within {limit_s:g} s. Ask for fewer tokens, or allow more seconds."
                )
    finally:
        pieces.close()
    return Reply(text, time.monotonic() - began, tokens)


# --- tables for other programs -----------------------------------------------------------------------------------------------

COMPARED = (
    "row", "task", "items", "before", "after", "change_points", "low_points", "high_points", "lost", "gained", "item", "kind",
    "prompt", "response", "loss_before", "loss_after", "route",
)  # fmt: skip


def compared_csv(found: dict[str, Any]) -> str:
    """Return a comparison as CSV: a row for each task, for their mean, for each benchmark, and for each flipped row.

    found: as `side_by_side` gives it. before and after are shares, of a benchmark values in its unit.
    """
    rows = [{"row": "task"} | one for one in found["tasks"]]
    rows.append({"row": "mean", "task": "mean of the tasks"} | found["mean"])
    rows += [{"row": "benchmark", "task": one["benchmark"]} | one | {"kind": ""} for one in found["benchmarks"]]
    rows += [{"row": "flip"} | one for one in found["flips"]]
    rows += [{"row": "flip", "task": one["benchmark"]} | one for one in found["benchmark_flips"]]
    return _csv(COMPARED, rows)


def standings_csv(found: Standings) -> str:
    """Return the table of all versions as CSV, a row for each version in the order of the page; shares are 0..1."""
    fixed = (
        "version", "parent", "track", "state", "is_champion", "made", "learned", "mean", "mean_low", "mean_high",
        "kept_points", "against_points", "against_low", "against_high", "against", "verdict", "sentence", "size_bytes",
        "added_bytes", "parameters", "training_s", "tokens_per_s", "live_from", "live_until",
    )  # fmt: skip
    rows, extra = [], {}
    for one in found.rows:
        row = one.model_dump(mode="json", include=set(fixed) - {"mean", "against"})
        if one.mean:
            row |= {"mean": one.mean.value, "mean_low": one.mean.low, "mean_high": one.mean.high}
        if one.kept:
            row["kept_points"] = one.kept.points
        if one.against:
            row |= {"against_points": one.against.points, "against_low": one.against.low, "against_high": one.against.high,
                    "against": one.against.says}  # fmt: skip
        if one.live:
            row |= {"live_from": one.live[-1][0].isoformat()}
            row |= {"live_until": one.live[-1][1].isoformat()} if one.live[-1][1] else {}
        scores = {f"{task}{end}": getattr(score, name) for task, score in one.scores.items()
                  for end, name in (("", "value"), (" low", "low"), (" high", "high"))}  # fmt: skip
        scores |= {f"{r.benchmark} ({r.unit}, {r.on})": r.value for r in one.readings}
        extra |= dict.fromkeys(scores)
        rows.append(row | {name: value for name, value in scores.items() if name not in fixed})
    return _csv((*fixed, *(name for name in extra if name not in fixed)), rows)


def _csv(columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> str:
    out = io.StringIO()
    table = csv.DictWriter(out, list(columns), extrasaction="ignore", lineterminator="\r\n")
    table.writeheader()
    table.writerows({name: _plain_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _plain_cell(value: Any) -> Any:
    """Return a cell that a spreadsheet reads as text: a prompt that begins like a formula would be computed there."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
