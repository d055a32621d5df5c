"""Let versions sit benchmarks: what was heard before is taken from the record, the rest is asked of a child.

A version touches a benchmark's test items once. Equal weights, items and settings have one key, and an outcome that is
stored under it is never asked for again, unless a person says why. Which items judge is decided afterwards, so that a leak
that is found later changes the reading and needs no child.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from sqlmodel import select

from clm_app.engine.examiner import ExaminationSettings, Paper, Sitting
from clm_app.errors import BadData, ChildFailed
from clm_app.events import AnyEvent, Examined, Failed, Measuring
from clm_app.judging import benchmarks as shelf
from clm_app.registry import versions
from clm_app.serving.choice import choose
from clm_app.serving.router import converted_copy, host_threads
from clm_app.situations import refuse_damage
from clm_app.wishes import ExamineWish
from clm_app.workspace import Workspace
from jobs.queue import Cancelled, Queue
from store.db import record
from store.tables import Benchmark, BenchmarkReading, Job, Version

ATTEMPTS = 3  # children tried for one sitting; each goes on behind the last item that was heard
BEAT_S = 0.5
FORMAT = 1  # grows when the same weights would be heard otherwise, so that no older outcome is taken
Beat = Callable[[str, float], object]  # told what is done now and the share of it, 0..1; raises to stop


class Examination:
    """One examine job: every version of the wish sits every benchmark of it."""

    def __init__(
        self, workspace: Workspace, queue: Queue, job: Job, spawn: Callable, on_deploy: Callable[[], None]
    ) -> None:
        """on_deploy is what a cycle calls; an examination moves nothing."""
        self.workspace, self.queue, self.job, self.spawn = workspace, queue, job, spawn
        self.wish = ExamineWish(**job.wish)

    def go(self) -> dict:
        """Do the whole job and return {readings: their ids, in the order of the wish}.

        Raises:
            Cancelled: a person asked for it; what was heard is kept.
            ClmError: something is missing or damaged, or the child failed.
        """
        rows = [shelf.find(self.workspace, name) for name in self.wish.benchmarks]
        found: list[BenchmarkReading] = []
        for number, name in enumerate(self.wish.versions):
            found += examine(
                self.workspace, self.spawn, versions.by_name(self.workspace, name), rows, self.wish.split, self.wish.on,
                lambda stage, share, before=number: self.beat(stage, (before + share) / len(self.wish.versions)),
                run=self.wish.run, by=self.job.asked_by, since=self.job.created_at if self.wish.fresh else None,
            )  # fmt: skip
        return {"readings": [reading.id for reading in found]}

    def beat(self, stage: str, share: float) -> None:
        """Renew the lease and say where the job stands."""
        if self.queue.beat(self.job, status="running", stage=stage, done_share=share).is_cancel_asked:
            raise Cancelled


def examine(
    workspace: Workspace,
    spawn: Callable,
    version: Version,
    benchmarks: Sequence[Benchmark],
    split: str,
    on: str,
    beat: Beat,
    *,
    run: ExaminationSettings | None = None,
    by: str = "clock",
    since: datetime | None = None,
) -> list[BenchmarkReading]:
    """Return a version's reading on one split of each benchmark, in order; ask a child for what was never heard.

    on: trained (the weights in full precision) or served (through the backend that would serve them). since: what was
    heard before is asked again. beat: called about twice a second, and where nothing has to be asked not at all.

    Raises:
        BadModel: weights are missing or damaged. BadData: items are, or none is left that may judge.
        BadSettings: the backend that the settings name cannot serve this version.
        ChildFailed: the child said why it cannot go on, or was killed too often.
    """
    refuse_damage(workspace, version)
    run = run or ExaminationSettings()
    backend = (
        choose(workspace.settings.backend, *versions.weights(workspace, version))[0] if on == "served" else "engine"
    )
    asked = [Asked(version, row, split, on, backend, run) for row in benchmarks]
    heard = {one.key: _heard(workspace, one.key, since) for one in asked}
    if unheard := [one for one in asked if heard[one.key] is None]:
        _sit(workspace, spawn, unheard, beat)
        heard |= {one.key: _kept(workspace, one) for one in unheard}
    found = [_reading(workspace, one, heard[one.key], by, since) for one in asked]
    for one in unheard:
        for file in _folder(workspace).glob(f"{one.key}.*"):
            file.unlink()
    return found


@dataclass(frozen=True)
class Asked:
    """One version before one split of one benchmark."""

    version: Version
    row: Benchmark
    split: str
    on: str
    backend: str
    run: ExaminationSettings

    @property
    def key(self) -> str:
        """The SHA-256 that names what these weights say of these items; how many are asked at once is not in it."""
        told = [FORMAT, self.version.base_digest, self.version.object, self.row.object, self.row.kind, self.row.settings,
                self.split, self.on, self.backend, self.run.max_new_tokens]  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Heard(NamedTuple):
    """Outcomes that are stored: their object, and the seconds that hearing them took."""

    digest: str
    seconds: float


# --- asking a child ---------------------------------------------------------------------------------------------------


def _heard(workspace: Workspace, key: str, since: datetime | None) -> Heard | None:
    """Return the newest outcomes under a key whose object is still there, or None."""
    wanted = select(BenchmarkReading).where(BenchmarkReading.key == key).order_by(BenchmarkReading.id.desc())
    with workspace.read() as session:
        for reading in session.exec(wanted.where(BenchmarkReading.created_at >= since) if since else wanted):
            if _is_there(workspace, reading.object):
                return Heard(reading.object, reading.seconds)
    return None


def _is_there(workspace: Workspace, digest: str) -> bool:
    try:
        workspace.objects.path(digest)
    except KeyError:
        return False
    return True


def _folder(workspace: Workspace) -> Path:
    return workspace.home / "examinations"


def _sit(workspace: Workspace, spawn: Callable, asked: Sequence[Asked], beat: Beat) -> None:
    """Run the child until every paper is whole, starting it again where it was killed."""
    folder, first = _folder(workspace), asked[0]
    folder.mkdir(exist_ok=True)
    base, adapter = versions.weights(workspace, first.version)
    sitting = Sitting(
        folder=folder, version=first.version.name, base=base, adapter=adapter, on=first.on, backend=first.backend,
        converted=converted_copy(workspace, first.version), threads=workspace.settings.threads or _threads(first.on),
        run=first.run, papers=[_paper(workspace, one) for one in asked],
    )  # fmt: skip
    order = folder / f"{first.key}.order"
    order.write_text(sitting.model_dump_json(indent=1), encoding="utf-8")
    attempts = 0
    while not all((folder / f"{paper.key}.jsonl").exists() for paper in sitting.papers):
        attempts, listener = attempts + 1, Listener(sitting)
        child = spawn(
            ["python", "-m", "clm_app.engine.examiner", str(order)],
            name=f"examine-{first.version.name}", on_event=listener, on_text=None,
        )  # fmt: skip
        try:
            while child.wait(BEAT_S) is None:
                beat(*listener.now())
        finally:
            child.stop()
        if listener.failed:
            raise ChildFailed(listener.failed.sentence)
        if attempts == ATTEMPTS:
            raise ChildFailed(
                f"The examination of {first.version.name} was ended from outside {attempts} times, last with: "
                f"{child.last[-1] if child.last else 'no word'}. Memory may be short: try fewer batch_tokens; what was heard "
                "is kept."
            )


def _threads(on: str) -> int:
    """Return how many threads compute: those of a host where the version is heard as one serves it, else all cores."""
    return host_threads() if on == "served" else os.cpu_count() or 1


def _paper(workspace: Workspace, one: Asked) -> Paper:
    return Paper(
        key=one.key, name=shelf.title(one.row), kind=one.row.kind, settings=one.row.settings, split=one.split,
        file=shelf.file_of(workspace, one.row, one.split),
    )  # fmt: skip


class Listener:
    """Hears the examining child, and knows how far it is."""

    def __init__(self, sitting: Sitting) -> None:
        self.sitting, self.failed = sitting, None
        self.done = {paper.name: 0.0 for paper in sitting.papers}
        self.stage = f"loading {sitting.version}"

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, Failed):
            self.failed = event
        elif isinstance(event, Measuring):
            self.done[event.task] = event.done / max(event.of, 1)
            self.stage = f"{event.task}: asking {self.sitting.version}, {event.done:,} of {event.of:,} items"
        elif isinstance(event, Examined):
            self.done[event.task] = 1.0

    def now(self) -> tuple[str, float]:
        """Return (what is done now, share 0..1 of all papers)."""
        return self.stage, sum(self.done.values()) / len(self.done)


# --- what is written --------------------------------------------------------------------------------------------------


def _kept(workspace: Workspace, one: Asked) -> Heard:
    """Store what the child wrote and return it."""
    file = _folder(workspace) / f"{one.key}.jsonl"
    return Heard(workspace.objects.put(file), float(file.with_suffix(".seconds").read_text()))


def _reading(
    workspace: Workspace, one: Asked, heard: Heard, by: str, since: datetime | None = None
) -> BenchmarkReading:
    """Return the reading that these outcomes give with the items that may judge now; it is written where it is new.

    Raises:
        BadData: no item is left, since all leak into training rows or are too long for the model.
    """
    leaking = set(shelf.clean_items(workspace, one.row, one.split).left_out)
    lines = load_outcomes(workspace.objects.path(heard.digest))
    judging = [line for line in lines if line["item"] not in leaking and "too_long" not in line]
    left_out = {"leaking": sum(line["item"] in leaking for line in lines),
                "too_long": sum("too_long" in line and line["item"] not in leaking for line in lines)}  # fmt: skip
    if not judging:
        raise BadData(
            f"None of the {len(lines)} {one.split} items of {shelf.title(one.row)} can judge {one.version.name}: "
            f"{left_out['leaking']} stand in training rows, {left_out['too_long']} are too long for the model. Make a "
            "benchmark of other items."
        )
    with workspace.write() as session:
        alike = (BenchmarkReading.key == one.key, BenchmarkReading.version_id == one.version.id,
                 BenchmarkReading.object == heard.digest,
                 *([BenchmarkReading.created_at >= since] if since else []))  # fmt: skip
        same = session.exec(select(BenchmarkReading).where(*alike).order_by(BenchmarkReading.id.desc())).first()
        # Leaks are only ever added to, so that equal numbers are the same items.
        if same and same.figures["left_out"] == left_out:
            return same
        kind = shelf.kind_of(one.row)
        reading = BenchmarkReading(
            benchmark_id=one.row.id, version_id=one.version.id, split=one.split, on=one.on, backend=one.backend,
            key=one.key, unit=kind.unit, lower_is_better=kind.lower_is_better, items=len(judging), object=heard.digest,
            seconds=heard.seconds, figures=kind.figures(judging) | {"left_out": left_out},
            settings=one.run.model_dump() | {"kind": one.row.settings}, **kind.value(judging)._asdict(),
        )  # fmt: skip
        session.add(reading)
        session.flush()
        record(session, by, "benchmark.read", f"benchmark:{one.row.id}", name=shelf.title(one.row), reading=reading.id,
               version=one.version.name, split=one.split, on=one.on, value=reading.value, key=one.key)  # fmt: skip
    return reading


def load_outcomes(file: Path) -> list[dict]:
    """Return the lines of an outcomes file: of each item what was heard and what its kind makes of it."""
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
