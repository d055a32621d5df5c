"""What people say of a verdict: approve what passed, reject it, or override what the gate refused, by name and with a reason.

The gate's policy decides whose word is needed: nobody's, one named person's, or two (four eyes), neither of whom asked for
the training. Without accounts a name is what its bearer writes; the audit trail keeps it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from sqlmodel import Session, select

from clm_app.errors import BadInput
from clm_app.judging.gate import GateSettings
from clm_app.registry import versions
from clm_app.workspace import Workspace
from store.db import record
from store.tables import Approval, Decision, Job, Run, Version

WAITING, ACCEPTED, REFUSED, UNDECIDED = "waiting", "accepted", "refused", "undecided"
Says = Literal["approve", "reject", "override"]
VOICES = {"alone": 0, "approval": 1, "four eyes": 2}
PAST = {"approve": "approved", "reject": "rejected", "override": "overridden"}
LEAST_REASON = 10  # characters of the reason for an override: "ok" is none


class Said(NamedTuple):
    """The version as it is now, how many more voices it takes, and the decision that was spoken about."""

    version: Version
    missing: int
    decision_id: int | None


def state_after(verdict: str, settings: GateSettings) -> str:
    """Return the state of a version that the gate has judged."""
    if verdict == "promote":
        return WAITING if VOICES[settings.policy] else ACCEPTED
    return UNDECIDED if verdict == "inconclusive" else REFUSED


def say(workspace: Workspace, name: str, says: Says, by: str, reason: str = "") -> Said:
    """Write down what a person says of a version's last decision, and change the version's state where that is enough.

    Raises:
        BadInput: the name or the reason is missing, the version is not in a state to speak about, or this person's word
            does not count here; nothing was changed.
        NotThere: there is no such version.
    """
    version, by, reason = versions.by_name(workspace, name), by.strip(), reason.strip()
    if not by:
        raise BadInput(f"Who says so? Write a name: the audit trail keeps it beside {version.name}.")
    if says != "approve" and len(reason) < LEAST_REASON:
        raise BadInput(
            f"The reason {reason!r} is shorter than {LEAST_REASON} characters; to {says} {version.name} needs one that a reader "
            "understands next year. Write it and try again."
        )
    with workspace.write() as session:
        row = session.get_one(Version, version.id)
        _refuse_state(row, says)
        decision, job = _of(session, row)
        policy = GateSettings(**decision.evidence["settings"]).policy if decision else "alone"
        _refuse_voice(session, row, decision, job, says, by, policy)
        session.add(Approval(
            decision_id=decision.id if decision else None, version_id=row.id, says=says, by=by, reason=reason
        ))  # fmt: skip
        session.flush()
        record(session, by, f"version.{PAST[says]}", f"version:{row.id}", name=row.name, reason=reason,
               decision=decision.id if decision else None)  # fmt: skip
        needed = 1 if says == "reject" else max(VOICES[policy], 1)
        missing = needed - len({a.by.lower() for a in spoken(session, row, says)})
        if missing <= 0:
            row.state = REFUSED if says == "reject" else ACCEPTED
            session.add(row)
            if says == "reject":
                _reject_what_stands_on(session, row, by)
    return Said(row, max(missing, 0), decision.id if decision else None)


def spoken(session: Session, version: Version, says: str | None = None) -> list[Approval]:
    """Return what was said of a version, oldest first."""
    found = select(Approval).where(Approval.version_id == version.id).order_by(Approval.id)
    return list(session.exec(found.where(Approval.says == says) if says else found))


def _of(session: Session, version: Version) -> tuple[Decision | None, Job | None]:
    decision = session.exec(
        select(Decision).where(Decision.version_id == version.id).order_by(Decision.id.desc())
    ).first()
    run = session.get(Run, version.run_id) if version.run_id else None
    return decision, session.get(Job, run.job_id) if run else None


def _refuse_state(version: Version, says: Says) -> None:
    if says in ("approve", "reject") and version.state != WAITING:
        raise BadInput(
            f"{version.name} is {version.state} and does not wait for anyone's word, so there is nothing to {says}."
        )
    if says == "override" and version.state not in (REFUSED, UNDECIDED):
        raise BadInput(
            f"{version.name} is {version.state}: only what the gate refused or left undecided can be overridden."
        )


def _refuse_voice(session: Session, version: Version, decision, job, says: Says, by: str, policy: str) -> None:
    """Refuse a second word of the same person and, under four eyes, the word of who asked for the training."""
    if any(a.by.lower() == by.lower() for a in spoken(session, version, says)):
        raise BadInput(f"{by} has said so of {version.name} already; under {policy} another person's word is needed.")
    if policy == "four eyes" and job and job.asked_by.lower() == by.lower() and says != "reject":
        raise BadInput(
            f"{job.asked_by} asked for the training of {version.name}, and four eyes need two other people. Let them speak."
        )
    if decision is None:
        raise BadInput(
            f"The gate has not judged {version.name}, so there is nothing to {says}. Train it through a job."
        )
    step = session.get(Version, version.parent_id) if version.parent_id else None
    while says == "approve" and step is not None:
        if step.state == WAITING:
            raise BadInput(
                f"{version.name} stands on {step.name}, which waits for approval itself. Decide on that one first."
            )
        step = session.get(Version, step.parent_id) if step.parent_id else None


def _reject_what_stands_on(session: Session, version: Version, by: str) -> None:
    """Refuse every waiting version that was trained from a rejected one."""
    for child in session.exec(select(Version).where(Version.parent_id == version.id, Version.state == WAITING)).all():
        child.state = REFUSED
        session.add(child)
        record(session, by, "version.refused", f"version:{child.id}", name=child.name,
               reason=f"it stands on {version.name}, which was rejected")  # fmt: skip
        _reject_what_stands_on(session, child, by)
