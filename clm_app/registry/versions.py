"""Versions: where their weights lie, which one is live, and the whole lineage of one on a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from sqlmodel import Session, select

from clm_app.errors import BadModel, NotThere
from clm_app.workspace import Workspace
from store.db import record
from store.objects import folder_digest
from store.tables import (
    Approval,
    AuditEvent,
    Decision,
    Deployment,
    Measurement,
    ParityReading,
    Run,
    Snapshot,
    Task,
    Version,
)  # fmt: skip

STARTER = Path(__file__).parent.parent / "starter" / "model"


class Weights(NamedTuple):
    """Folders to load a version from: a full-precision base, and an adapter over it or None."""

    base: Path
    adapter: Path | None  # one adapter, or a folder with routes.json and one adapter per task


def weights(workspace: Workspace, version: Version) -> Weights:
    """Return the folders of a version. A full-weights version is its own base."""
    if version.kind == "full":
        return Weights(workspace.objects.path(version.object), None)
    base = version.base_path
    folder = STARTER if base == "starter" else Path(base.removeprefix("object:"))
    if base.startswith("object:"):
        folder = workspace.objects.path(base.removeprefix("object:"))
    if not (folder / "config.json").exists():
        raise BadModel(
            f"{version.name} stands on {folder}, which is gone. Put the folder back, or choose another version."
        )
    return Weights(folder, workspace.objects.path(version.object) if version.object else None)


def base_reference(version: Version) -> tuple[str, str]:
    """Return (base_path, base_digest) for a child of this version: a full version is its children's base."""
    if version.kind == "full":
        return f"object:{version.object}", version.object or ""
    return version.base_path, version.base_digest


def model_folder(name: str) -> Path:
    """Return the folder that `base_model` names.

    Raises:
        BadModel: it is no folder with config.json, weights and a tokenizer.
    """
    folder = STARTER if name == "starter" else Path(name).expanduser().resolve()
    missing = [f for f in ("config.json", "tokenizer.json") if not (folder / f).exists()]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise BadModel(
            f"{folder} is no Hugging Face model folder: {', '.join(missing)} missing. "
            "Name a folder with config.json, safetensors weights and tokenizer.json, or 'starter'."
        )
    return folder


def base_version(workspace: Workspace) -> Version:
    """Return v0, made from settings.base_model and deployed at the first call."""
    with workspace.read() as session:
        found = session.exec(select(Version).where(Version.kind == "base").order_by(Version.id)).first()
    if found:
        return found
    name = workspace.settings.base_model
    folder = model_folder(name)
    with workspace.write() as session:
        version = Version(
            name="v0", kind="base", state="base", base_digest=folder_digest(folder),
            base_path="starter" if name == "starter" else str(folder), parameters=count_parameters(folder),
        )  # fmt: skip
        session.add(version)
        session.flush()
        record(session, "system", "version.registered", f"version:{version.id}", name="v0", base=version.base_path)
        deploy(session, version, decision_id=None, actor="system", reason="the base model, before anything was learned")
    return version


def count_parameters(folder: Path) -> int:
    """Return the number of weights in a folder's safetensors files, read from their headers alone."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size
    return total


def live(workspace: Workspace) -> Version:
    """Return the version that people talk to."""
    base_version(workspace)
    with workspace.read() as session:
        return session.get_one(Version, newest_deployment(session).version_id)


def newest_deployment(session: Session, alias: str = "live") -> Deployment | None:
    """Return the last move of an alias, or None before the first."""
    return session.exec(select(Deployment).where(Deployment.alias == alias).order_by(Deployment.id.desc())).first()


def by_name(workspace: Workspace, name: str) -> Version:
    """Return the version of this name; "live" is the deployed one.

    Raises:
        NotThere: no such version; the message lists the newest names.
    """
    if name == "live":
        return live(workspace)
    with workspace.read() as session:
        found = session.exec(select(Version).where(Version.name == name)).first()
        if found:
            return found
        names = session.exec(select(Version.name).order_by(Version.id.desc()).limit(12)).all()
    raise NotThere(f"There is no version {name!r}. Versions are live, {', '.join(names)}.")


def lineage(session: Session, version: Version) -> list[tuple[Snapshot, Task]]:
    """Return what a version has learned on its way from the base, oldest first; of a task learned twice, the newest."""
    learned: dict[int, tuple[Snapshot, Task]] = {}
    step: Version | None = version
    while step is not None and step.run_id is not None:
        run = session.get_one(Run, step.run_id)
        if run.task_id not in learned:
            learned[run.task_id] = session.get_one(Snapshot, run.snapshot_id), session.get_one(Task, run.task_id)
        step = session.get(Version, step.parent_id)
    return list(reversed(learned.values()))


def measurement(session: Session, version_id: int, snapshot_id: int) -> Measurement | None:
    """Return a version's newest exact match on a snapshot's test rows, or None where it was not measured."""
    return session.exec(
        select(Measurement).where(
            Measurement.version_id == version_id, Measurement.snapshot_id == snapshot_id,
            Measurement.split == "test", Measurement.metric == "exact_match",
        ).order_by(Measurement.id.desc())
    ).first()  # fmt: skip


def everything(workspace: Workspace) -> list[Version]:
    """Return every version, newest first."""
    with workspace.read() as session:
        return list(session.exec(select(Version).order_by(Version.id.desc())))


def deployments(workspace: Workspace) -> list[Deployment]:
    """Return every move of the live alias, newest first."""
    with workspace.read() as session:
        return list(session.exec(select(Deployment).order_by(Deployment.id.desc())))


def deploy(session: Session, version: Version, *, decision_id: int | None, actor: str, reason: str) -> Deployment:
    """Point the live alias at a version, in the caller's transaction, with its audit event."""
    before = newest_deployment(session)
    moved = Deployment(
        version_id=version.id, previous_version_id=before.version_id if before else None,
        decision_id=decision_id, actor=actor, reason=reason,
    )  # fmt: skip
    session.add(moved)
    session.flush()
    record(session, actor, "version.deployed", f"version:{version.id}", name=version.name, reason=reason,
           deployment=moved.id, previous=moved.previous_version_id)  # fmt: skip
    return moved


def card(workspace: Workspace, version: Version) -> dict:
    """Return everything that led to a version and everything that was said of it, as plain values."""
    with workspace.read() as session:
        run = session.get(Run, version.run_id) if version.run_id else None
        parent = session.get(Version, version.parent_id) if version.parent_id else None
        snapshot = session.get(Snapshot, run.snapshot_id) if run else None
        measured = session.exec(
            select(Measurement, Task.name).join(Task, Task.id == Measurement.task_id)
            .where(Measurement.version_id == version.id).order_by(Measurement.id)
        ).all()  # fmt: skip
        decisions = session.exec(select(Decision).where(Decision.version_id == version.id).order_by(Decision.id)).all()
        moves = session.exec(
            select(Deployment).where(Deployment.version_id == version.id).order_by(Deployment.id)
        ).all()
        audit = session.exec(select(AuditEvent).where(AuditEvent.subject == f"version:{version.id}")).all()
        words = session.exec(select(Approval).where(Approval.version_id == version.id).order_by(Approval.id)).all()
        parity = session.exec(
            select(ParityReading).where(ParityReading.version_id == version.id).order_by(ParityReading.id)
        ).all()
        task = session.get(Task, run.task_id) if run else None
    plain = lambda row: row.model_dump(mode="json") if row else None  # noqa: E731
    return {
        "version": plain(version), "parent": parent.name if parent else None, "task": task.name if task else None,
        "run": plain(run), "snapshot": plain(snapshot),
        "measurements": [plain(m) | {"task": name} for m, name in measured],
        "decisions": [plain(d) for d in decisions], "deployments": [plain(d) for d in moves],
        "audit": [plain(a) for a in audit], "approvals": [plain(a) for a in words], "parity": [plain(p) for p in parity],
    }  # fmt: skip
