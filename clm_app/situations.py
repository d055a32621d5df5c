"""What is known before a run: whether the version to start from is whole, what is kept of its tasks, and the room there is.

Nothing is loaded. What is missing is refused here, where a person asks for the run, and once more before each run of a
job, since the version that it goes on from may be another one by then.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sqlmodel import Session

from clm_app.catalog import pick
from clm_app.data.ingest import rows_of
from clm_app.data.rows import load
from clm_app.data.vocabulary import refuse_other_template, refuse_other_tokens
from clm_app.data.withdrawal import counted, withdrawn_keys
from clm_app.engine.memory import GB, disk_gb, free_gb, needed_gb
from clm_app.errors import BadData, BadModel
from clm_app.registry import versions
from clm_app.routes import Router, routing
from clm_app.strategies._base import Situation
from clm_app.workspace import Workspace
from store.objects import ObjectIsDamaged
from store.tables import Run, Snapshot, Task, Version

if TYPE_CHECKING:
    from clm_app.wishes import LearnWish

READ_WHOLE_GB = 0.5  # weights up to this size are read whole: 0.9 GB/s, so 16 GB would take 18 s (LOG.md, "Bad input")


def situation(
    workspace: Workspace, wish: LearnWish, parent: Version, task: str, new_rows: int, taken: Snapshot | None = None
) -> Situation:
    """Return what is known before a task is learned from this version.

    taken: the task's rows, where they are frozen already; then the router is asked which past task its prompts look like.

    Raises:
        BadModel: the version's weights are missing or damaged.
        BadData: rows that a run needs are missing.
        BadSettings: the version was learned with other tokens than its base has now.
    """
    refuse_damage(workspace, parent)
    base, adapter = versions.weights(workspace, parent)
    with workspace.read() as session:
        refuse_other_vocabulary(session, parent, base)
        learned, withdrawn = versions.lineage(session, parent), withdrawn_keys(session)
        for snapshot, past in learned:
            stored(workspace, snapshot.object, f"The rows of {past.name}, which {parent.name} has learned,")
        kept = rows_kept(workspace, session, parent, withdrawn, taken)
        seen = counted(workspace, session, parent) if taken and withdrawn else []
    known = {
        "parent_kind": parent.kind, "parameters": parent.parameters, "learned_tasks": len(learned), "new_rows": new_rows,
        "method": wish.method, "task": task, "parent": parent.name,
        "kept": {past.name: kept.get(past.name, 0) for _, past in learned},
    }  # fmt: skip
    if taken is None or parent.kind != "routed":
        return Situation(**known)
    router = Router.load(adapter)
    folders = dict(router.folders)
    router.take_out(withdrawn, ((name, load(file)) for name, file in seen))
    parts = (rows_of(workspace, taken, part) for part in ("train", "validation"))
    found = None if task in folders else routing(router, task, *parts)
    return Situation(**known, folders=folders, routing=found, **_room(workspace, wish, parent, base, adapter))


def _room(workspace: Workspace, wish: LearnWish, parent: Version, base: Path, adapter: Path) -> dict[str, float]:
    """Return adapter_gb, the size of the version's largest adapter, and room, how many of them fit in all.

    In memory they lie beside what training takes, on disk once in the run's folder and the new one in the store.
    """
    sizes = [_size(folder) / GB for folder in (adapter / "adapters").iterdir()]
    method, knobs = pick("clm_app.methods", wish.method_for(parent.parameters, "adapters")), wish.training
    (free, cards), kind, one = free_gb(), method.weights_kind, max(sizes, default=0.0)
    memory = free - needed_gb(
        parent.parameters,
        base,
        kind,
        knobs.batch_rows,
        knobs.max_tokens,
        bool(cards),
        method.base_bits,
        needs_parent=True,
    )
    disk = shutil.disk_usage(workspace.home).free / GB - disk_gb(parent.parameters, kind)
    room = max(0, math.floor(min(memory / one, disk / one - 1))) if one else math.inf
    return {"adapter_gb": one, "room": room}


def rows_kept(
    workspace: Workspace, session: Session, version: Version, withdrawn: set[str], taken: Snapshot | None
) -> dict[str, int]:
    """Return {task: its rows that may be rehearsed}, of the tasks that a version keeps rows of.

    taken: the rows that are learned now, whose kept part is not rehearsed beside them.
    """
    found: dict[str, int] = {}
    for place, digest in version.memory.items():
        if not place.isdigit() or (taken and place == str(taken.id)):
            continue
        name = session.get_one(Task, session.get_one(Snapshot, int(place)).task_id).name
        rows = load(stored(workspace, digest, f"The rows that {version.name} keeps of {name}"))
        found[name] = found.get(name, 0) + sum(row.key not in withdrawn for row in rows)
    return found


def stored(workspace: Workspace, digest: str, what: str) -> Path:
    """Return where an object of rows lies.

    Raises:
        BadData: it is gone; `what` begins the sentence.
    """
    try:
        return workspace.objects.path(digest)
    except KeyError as err:
        raise BadData(
            f"{what} are gone: there is no object {digest[:12]} in {workspace.objects.root}. Put it back from a backup, give "
            "the same file in again, or start from another version."
        ) from err


def vocabulary_of(session: Session, version: Version) -> str:
    """Return the digest of the tokens that a version was trained with; empty for a base, and where it was not noted."""
    run = session.get(Run, version.run_id) if version.run_id else None
    return run.figures.get("vocabulary", "") if run else ""


def refuse_other_vocabulary(session: Session, version: Version, base: Path) -> None:
    """Raise BadSettings where the base's tokens or chat template are not those that the version was trained with."""
    if then := vocabulary_of(session, version):
        refuse_other_tokens(base, then, version.name)
    run = session.get(Run, version.run_id) if version.run_id else None
    if run and run.figures.get("template") is not None:  # older runs did not note it
        refuse_other_template(base, run.figures["template"], version.name)


def refuse_damage(workspace: Workspace, version: Version) -> None:
    """Look at the weights that a run would start from.

    Existence and length are always looked at; up to READ_WHOLE_GB each stored file is read and compared with its digest.

    Raises:
        BadModel: something is missing, cut short or changed.
    """
    under = version.base_path.removeprefix("object:") if version.base_path.startswith("object:") else None
    for digest in {version.object, under} - {None}:
        try:
            place = workspace.objects.path(digest)
            _refuse_cut_files(place, version.name)
            if _size(place) <= READ_WHOLE_GB * GB:
                workspace.objects.verify(digest)
        except KeyError as err:
            raise BadModel(
                f"The weights of {version.name} are gone: there is no object {digest[:12]} in {workspace.objects.root}. Put "
                "it back from a backup, or start from another version."
            ) from err
        except ObjectIsDamaged as err:
            raise BadModel(
                f"The weights of {version.name} are not what was stored: files in {place} were changed. Put them back from "
                "a backup, or start from another version."
            ) from err
    for folder in filter(None, versions.weights(workspace, version)):
        _refuse_cut_files(folder, version.name)


def _refuse_cut_files(folder: Path, version: str) -> None:
    for file in sorted(folder.rglob("*.safetensors")):
        if file.stat().st_size != whole_size(file):
            raise BadModel(
                f"{file}, which {version} stands on, is {file.stat().st_size:,} bytes long and not as long as it "
                "says itself: it was cut short. Put it back from a backup, or start from another version."
            )


def whole_size(file: Path) -> int:
    """Return how long a safetensors file is by its own header; -1 where even that is cut short."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > file.stat().st_size:
            return -1
        header = json.loads(handle.read(length))
    return 8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)


def _size(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())
