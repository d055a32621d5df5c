"""What a person decides on the page or over the API, done the same way from both."""

from __future__ import annotations

from clm_app.errors import BadInput
from clm_app.registry import versions
from store.tables import Deployment, Version
from ui.house import House


def make_live(house: House, name: str, reason: str) -> Deployment:
    """Let people talk to the version of this name from the next message on.

    It is loaded first, so that a version which cannot answer never goes live; then the record changes, then the
    router lets the old one finish.

    Raises:
        BadInput: the reason is empty, or the version is live already; nothing was changed.
        NotThere: there is no such version.
        ClmError: the version cannot be loaded; nothing was changed.
    """
    version, reason = versions.by_name(house.workspace, name), reason.strip()
    if not reason:
        raise BadInput(f"Making {version.name} live needs a reason, which the history keeps. Write one and try again.")
    if versions.live(house.workspace).id == version.id:
        raise BadInput(f"{version.name} is live already. Choose another version.")
    if house.router is not None:
        house.router.warm(version.name)
    with house.workspace.write() as session:
        moved = versions.deploy(session, version, decision_id=None, actor=house.actor, reason=reason)
    if house.router is not None:
        house.router.switch()
    return moved


def previous_live(house: House) -> Version | None:
    """Return the version that was live before this one, or None where there was none."""
    now_live = versions.live(house.workspace).id
    for move in versions.deployments(house.workspace):
        if move.version_id != now_live:
            with house.workspace.read() as session:
                return session.get(Version, move.version_id)
    return None
