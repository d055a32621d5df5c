"""From a file to an immutable snapshot: read, split once, freeze, record."""

from __future__ import annotations

import errno
import random
import re
import tempfile
from collections import defaultdict
from pathlib import Path

from sqlmodel import select

from clm_app.data.reading import Reading, read_rows
from clm_app.data.rows import Row, dump, load
from clm_app.errors import BadData, OutOfRoom
from clm_app.workspace import Workspace
from store.db import record
from store.tables import Snapshot, Task

SHARES = {"validation": 0.15, "test": 0.15}  # the rest is for training


def snapshot(
    workspace: Workspace, name: str, path: Path, actor: str, *, is_new: bool = True, seed: int = 0
) -> Snapshot:
    """Read a file and freeze it as a snapshot of the task `name`; `is_new` refuses a name that is taken.

    The same content is not frozen twice: a task's existing snapshot is returned for it.

    Raises:
        BadData: the name or the file cannot be used; nothing was changed.
    """
    name = name.strip()
    if not re.fullmatch(r"[^\x00-\x1f/\\]{1,80}", name):
        raise BadData(
            f"The task name {name[:90]!r} needs 1 to 80 characters without slashes or line breaks. Choose another."
        )
    if is_new and find(workspace, name):
        raise BadData(f"A task named {name!r} exists already. Choose another name, or open that task.")
    reading = read_rows(path, workspace.settings)
    digest, counts = freeze(workspace, reading, seed)
    with workspace.write() as session:
        task = session.exec(select(Task).where(Task.key == name.lower())).first()
        if task is None:
            task = Task(name=name, key=name.lower())
            session.add(task)
            session.flush()
            record(session, actor, "task.created", f"task:{task.id}", name=name)
        found = session.exec(select(Snapshot).where(Snapshot.task_id == task.id, Snapshot.object == digest)).first()
        if found:
            return found
        taken = Snapshot(task_id=task.id, object=digest, source=str(path), report=reading.report, **counts)
        session.add(taken)
        session.flush()
        record(session, actor, "snapshot.taken", f"snapshot:{taken.id}", task=name, object=digest, **counts)
    return taken


def find(workspace: Workspace, name: str) -> Task | None:
    """Return the task of this name, whatever case it is written in."""
    with workspace.read() as session:
        return session.exec(select(Task).where(Task.key == name.strip().lower())).first()


def freeze(workspace: Workspace, reading: Reading, seed: int) -> tuple[str, dict[str, int]]:
    """Split the rows, store the three files as one object, and return its digest and the row counts.

    Raises:
        OutOfRoom: the disk is full; nothing was changed.
    """
    parts = split(reading.rows, seed)
    try:
        with tempfile.TemporaryDirectory(dir=workspace.home) as folder:
            for part, rows in parts.items():
                dump(rows, Path(folder) / f"{part}.jsonl")
            digest = workspace.objects.put(Path(folder))
    except OSError as err:
        if err.errno != errno.ENOSPC:
            raise
        raise OutOfRoom(
            f"The disk is full, so {workspace.home} cannot take {len(reading.rows)} rows; nothing was changed. "
            "Free some space and try again."
        ) from err
    return digest, {f"{part}_rows": len(rows) for part, rows in parts.items()}


def split(rows: list[tuple[Row, str | None]], seed: int) -> dict[str, list[Row]]:
    """Return {train, validation, test}: as the file says where every row says it, else by label.

    A part that the file does not publish is taken from its training rows. Rows with the same prompt stay together,
    whatever their labels, so that nothing is tested that was trained.
    """
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    said = {given for _, given in rows}
    is_published = "train" in said and None not in said
    for row, given in rows:
        parts[given if is_published else "train"].append(row)
    wanted = {part: share for part, share in SHARES.items() if not parts[part]}
    if not wanted:
        return parts
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in parts["train"]:
        by_prompt[row.prompt.lower()].append(row)
    by_label: dict[str, list[list[Row]]] = defaultdict(list)
    for group in by_prompt.values():
        by_label[group[0].label].append(group)
    alone = [label for label, groups in by_label.items() if len(groups) == 1]
    by_label[""] = [group for label in alone for group in by_label.pop(label)]  # answers that occur once: split as one
    parts["train"] = []
    rng = random.Random(seed)
    owed = dict.fromkeys(wanted, 0.0)  # carried from label to label, so that many small labels still fill every part
    for label in sorted(by_label):
        groups = by_label[label]
        rng.shuffle(groups)
        whole = len(groups)
        for part, share in wanted.items():
            owed[part] += share * whole
            while owed[part] >= 0.5 and len(groups) > 1:
                parts[part] += groups.pop()
                owed[part] -= 1
        for group in groups:
            parts["train"] += group
    for part in parts.values():
        rng.shuffle(part)
    return _filled(parts, rng)


def _filled(parts: dict[str, list[Row]], rng: random.Random) -> dict[str, list[Row]]:
    """Give an empty part rows from training; happens where there are few prompts."""
    for part in SHARES:
        if not parts[part]:
            rng.shuffle(parts["train"])
            prompt = parts["train"][-1].prompt.lower()
            parts[part] = [row for row in parts["train"] if row.prompt.lower() == prompt]
            parts["train"] = [row for row in parts["train"] if row.prompt.lower() != prompt]
            if not parts["train"]:
                raise BadData(
                    f"All rows share the prompt {prompt[:60]!r}, so nothing would be left to test on. Add other prompts."
                )
    return parts


def tasks(workspace: Workspace) -> list[tuple[Task, Snapshot]]:
    """Return every task with its newest snapshot, oldest task first."""
    with workspace.read() as session:
        newest = {s.task_id: s for s in session.exec(select(Snapshot).order_by(Snapshot.id))}
        return [(t, newest[t.id]) for t in session.exec(select(Task).order_by(Task.id)) if t.id in newest]


def rows_of(workspace: Workspace, taken: Snapshot, part: str) -> list[Row]:
    """Return the rows of one part: train, validation or test."""
    return load(workspace.objects.path(taken.object) / f"{part}.jsonl")
