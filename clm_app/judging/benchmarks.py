"""Benchmarks: items to judge by, frozen under a name and a version, and without what leaked into training.

Nothing changes a benchmark. The same content under the same name is the version that is there; other content is the next
version, and what was read on the old one stays true of the old one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sqlmodel import select

from clm_app.data import ingest
from clm_app.data.reading import records
from clm_app.errors import BadData, NotThere
from clm_app.judging.items import PARTS, Given, given
from clm_app.judging.leakage import LeakReport, is_outdated, leaks
from clm_app.judging.papers import load, made
from clm_app.probes.kinds._base import BenchmarkItem, Kind
from clm_app.situations import stored
from clm_app.workspace import Workspace
from store.db import record
from store.objects import ObjectIsDamaged
from store.tables import Benchmark, BenchmarkReading

PAGE = "page"  # the source of items that were written in the page


class Clean(NamedTuple):
    """The items of one split that may judge, and the keys of those left out since training rows have them."""

    items: list[BenchmarkItem]
    left_out: list[str]


# --- making one -------------------------------------------------------------------------------------------------------


def from_file(workspace: Workspace, name: str, path: Path, kind: str, settings: dict, by: str) -> Benchmark:
    """Read a .jsonl, .json, .csv (each also .gz) or .parquet file and freeze its items; see `freeze`.

    Columns: prompt, expected, rubric, choices, label, split; the names that training files use for the first two do too.

    Raises:
        BadInput: name, kind, settings or file cannot be used; nothing was changed.
    """
    path, way = Path(path), made(kind, settings)
    return freeze(workspace, name, way, given(records(path, workspace.settings), way, workspace.settings, path.name),
                  path.name, by)  # fmt: skip


def from_items(workspace: Workspace, name: str, items: Sequence[dict], kind: str, settings: dict, by: str) -> Benchmark:
    """Freeze items that were written in the page: {prompt, expected, rubric, choices, label, split}, prompt alone needed.

    Raises:
        BadInput: as `from_file`.
    """
    way = made(kind, settings)
    told = ((f"item {number}", item) for number, item in enumerate(items, 1))
    return freeze(workspace, name, way, given(told, way, workspace.settings, "the page"), PAGE, by)


def from_task(workspace: Workspace, task: str, kind: str, settings: dict, by: str, name: str = "") -> Benchmark:
    """Freeze the held-out rows of a task's newest snapshot as they are: its validation and its test part.

    name: of the benchmark; empty takes the task's.

    Raises:
        NotThere: no such task. BadInput: as `from_file`.
    """
    found = next((one for one in ingest.tasks(workspace) if one[0].key == task.strip().lower()), None)
    if found is None:
        raise NotThere(f"There is no task {task!r}. Add its rows on the Data tab first.")
    known, taken = found
    stored(workspace, taken.object, f"The rows of {known.name}")
    way = made(kind, settings)
    told = (
        (f"{part} row {number}", {"prompt": row.prompt, "expected": row.response, "label": row.label, "split": part})
        for part in PARTS for number, row in enumerate(ingest.rows_of(workspace, taken, part), 1)
    )  # fmt: skip
    return freeze(workspace, name or known.name, way, given(told, way, workspace.settings, known.name),
                  f"held-out rows of {known.name}, snapshot {taken.id}", by)  # fmt: skip


def freeze(workspace: Workspace, name: str, kind: Kind, found: Given, source: str, by: str) -> Benchmark:
    """Write the items down as a version of this name, with what the leakage check says; the same content is there once.

    Raises:
        BadData: the name cannot be used; nothing was changed.
    """
    name = name.strip()
    if not re.fullmatch(r"[^\x00-\x1f/\\@]{1,80}", name):
        raise BadData(
            f"The benchmark name {name[:90]!r} needs 1 to 80 characters without slashes, @ or line breaks. Choose another."
        )
    settings, digest = kind.settings.model_dump(mode="json"), _put(workspace, found)
    same = next((one for one in everything(workspace, name) if _is_same(one, kind.name, settings, digest)), None)
    if same:
        return same
    report = leaks(workspace, [item for part in PARTS for item in found.parts[part]])
    with workspace.write() as session:
        newest = session.exec(
            select(Benchmark.version).where(Benchmark.key == name.lower()).order_by(Benchmark.version.desc())
        ).first()
        row = Benchmark(
            name=name, key=name.lower(), version=(newest or 0) + 1, kind=kind.name, settings=settings, object=digest,
            validation_items=len(found.parts["validation"]), test_items=len(found.parts["test"]), source=source, by=by,
            report=found.report | {"leakage": report.model_dump(mode="json")},
        )  # fmt: skip
        session.add(row)
        session.flush()
        record(session, by, "benchmark.made", f"benchmark:{row.id}", name=title(row), kind=kind.name, object=digest,
               test_items=row.test_items, leaking=len(report.keys))  # fmt: skip
    return row


def _is_same(row: Benchmark, kind: str, settings: dict, digest: str) -> bool:
    return (row.kind, row.settings, row.object) == (kind, settings, digest)


def _put(workspace: Workspace, found: Given) -> str:
    with tempfile.TemporaryDirectory(dir=workspace.home) as folder:
        for part in PARTS:
            lines = (item.model_dump_json() + "\n" for item in found.parts[part])
            (Path(folder) / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        return workspace.objects.put(Path(folder))


# --- finding one ------------------------------------------------------------------------------------------------------


def title(row: Benchmark) -> str:
    """Return the name that means this version and no other: name@version."""
    return f"{row.name}@{row.version}"


def find(workspace: Workspace, name: str) -> Benchmark:
    """Return the benchmark "name", its newest version, or "name@3".

    Raises:
        NotThere: there is none; the message lists those there are.
    """
    bare, _, number = name.rpartition("@") if "@" in name else (name, "", "")
    found = everything(workspace, bare)
    for row in found:
        if not number or number == str(row.version):
            return row
    there = ", ".join(map(title, found or everything(workspace)[:12])) or "none yet"
    raise NotThere(f"There is no benchmark {name!r}. Benchmarks are {there}.")


def everything(workspace: Workspace, name: str = "") -> list[Benchmark]:
    """Return every version of every benchmark, or of the one of this name, newest first."""
    wanted = select(Benchmark).order_by(Benchmark.id.desc())
    with workspace.read() as session:
        return list(session.exec(wanted.where(Benchmark.key == name.strip().lower()) if name.strip() else wanted))


def readings(workspace: Workspace, row: Benchmark) -> list[BenchmarkReading]:
    """Return what this version of a benchmark was read with, newest first."""
    with workspace.read() as session:
        return list(session.exec(
            select(BenchmarkReading).where(BenchmarkReading.benchmark_id == row.id).order_by(BenchmarkReading.id.desc())
        ))  # fmt: skip


def kind_of(row: Benchmark) -> Kind:
    """Return the kind of a benchmark with the knobs that it was made with."""
    return made(row.kind, row.settings)


# --- its items --------------------------------------------------------------------------------------------------------


def file_of(workspace: Workspace, row: Benchmark, split: str) -> Path:
    """Return the file of one split, after reading the whole benchmark against its digest.

    Raises:
        BadData: the object is gone or was changed.
    """
    stored(workspace, row.object, f"The items of {title(row)}")
    try:
        return workspace.objects.verify(row.object) / f"{split}.jsonl"
    except ObjectIsDamaged as err:
        raise BadData(f"The items of {title(row)} are not what was frozen: {err}") from err


def items_of(workspace: Workspace, row: Benchmark, split: str) -> list[BenchmarkItem]:
    """Return every item of one split, leaking ones included.

    Raises:
        BadData: as `file_of`.
    """
    return load(file_of(workspace, row, split))


def leakage_of(row: Benchmark) -> LeakReport:
    """Return what the leakage check said when it looked last."""
    return LeakReport(**row.report.get("leakage", {}))


def checked(workspace: Workspace, row: Benchmark) -> LeakReport:
    """Return the leakage of a benchmark, looked for again where a snapshot or a version is younger than the last look."""
    known = leakage_of(row)
    if not is_outdated(workspace, known):
        return known
    items = [item for part in PARTS for item in items_of(workspace, row, part)]
    report = leaks(workspace, items, known)
    with workspace.write() as session:
        now = session.get_one(Benchmark, row.id)
        now.report = row.report = now.report | {"leakage": report.model_dump(mode="json")}
        session.add(now)
        if fresh := report.keys - known.keys:
            record(session, "system", "benchmark.leaks_found", f"benchmark:{row.id}", name=title(row), items=len(fresh),
                   tasks=sorted({leak.task for leak in report.leaks if leak.item in fresh}))  # fmt: skip
    return report


def clean_items(workspace: Workspace, row: Benchmark, split: str) -> Clean:
    """Return the items of a split that no training row has, and the keys of those left out; see `checked`.

    Raises:
        BadData: as `file_of`.
    """
    leaking = checked(workspace, row).keys
    items = items_of(workspace, row, split)
    return Clean([i for i in items if i.key not in leaking], [i.key for i in items if i.key in leaking])
