"""What a person decides on the page or over the API, done the same way from both."""

from __future__ import annotations

from clm_app.errors import BadInput
from clm_app.judging import approval
from clm_app.registry import versions
from store.tables import Deployment, Job, Run, Version
from ui.house import House

NOT_PASSED = {  # {state: what has to happen before such a version may go live}
    approval.REFUSED: "was refused by the gate. Override the gate by name and with a reason, or choose another version",
    approval.UNDECIDED: "was left undecided by the gate. Add test rows and train again, or override the gate by name",
    approval.WAITING: "waits for approval. Approve it by name, or choose another version",
    "candidate": "has not been judged yet. Wait for the gate",
}


def make_live(
    house: House, name: str, reason: str, decision_id: int | None = None, actor: str | None = None
) -> Deployment:
    """Let people talk to the version of this name from the next message on.

    It is loaded first, so that a version which cannot answer never goes live; then the record changes, then the
    router lets the old one finish. decision_id, actor: where an approval or an override stands behind it.

    Raises:
        BadInput: the reason is empty, the version is live already or has not passed the gate; nothing was changed.
        NotThere: there is no such version.
        ClmError: the version cannot be loaded; nothing was changed.
    """
    version, reason = versions.by_name(house.workspace, name), reason.strip()
    if not reason:
        raise BadInput(f"Making {version.name} live needs a reason, which the history keeps. Write one and try again.")
    if versions.live(house.workspace).id == version.id:
        raise BadInput(f"{version.name} is live already. Choose another version.")
    if missing := NOT_PASSED.get(version.state):
        raise BadInput(f"{version.name} {missing}.")
    if house.router is not None:
        house.router.warm(version.name)
    with house.workspace.write() as session:
        moved = versions.deploy(session, version, decision_id=decision_id, actor=actor or house.actor, reason=reason)
    if house.router is not None:
        house.router.switch()
    return moved


def say(house: House, name: str, says: approval.Says, by: str, reason: str = "") -> approval.Said:
    """Write down what a person says of a verdict; where that was the last word needed, the version goes live.

    It is loaded before anything is written, so that a word which cannot be followed changes nothing. A job that was told
    not to deploy has its version accepted and not put live.

    Raises:
        BadInput: see `approval.say`; nothing was changed.
        ClmError: the version cannot be loaded; nothing was changed.
    """
    if says != "reject" and house.router is not None:
        house.router.warm(versions.by_name(house.workspace, name).name)
    said = approval.say(house.workspace, name, says, by, reason)
    if said.version.state == approval.ACCEPTED and _is_to_be_deployed(house, said.version):
        why = f"{says} by {by.strip()}" + (f": {reason.strip()}" if reason.strip() else "")
        make_live(house, said.version.name, why, said.decision_id, by.strip())
    return said


def _is_to_be_deployed(house: House, version: Version) -> bool:
    with house.workspace.read() as session:
        run = session.get(Run, version.run_id) if version.run_id else None
        return run is not None and bool(session.get_one(Job, run.job_id).wish.get("deploy", True))


def previous_live(house: House) -> Version | None:
    """Return the version that was live before this one, or None where there was none."""
    now_live = versions.live(house.workspace).id
    for move in versions.deployments(house.workspace):
        if move.version_id != now_live:
            with house.workspace.read() as session:
                return session.get(Version, move.version_id)
    return None
