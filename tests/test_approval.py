"""A verdict that waits for people waits for the right ones, by name; an override has a reason and leaves its trace."""

from __future__ import annotations

import httpx
import pytest
from sqlmodel import select

from clm_app.errors import BadInput
from clm_app.judging.approval import say, spoken, state_after
from clm_app.judging.gate import GateSettings
from clm_app.registry import versions
from store.tables import AuditEvent, Decision, Deployment, Job, Run, Snapshot, Task, Version
from ui.house import House
from ui.server import make_app


@pytest.fixture
def judged(workspace):
    """Return a function that registers a version which the gate has judged under a policy, and returns its name."""
    versions.base_version(workspace)

    def make(name: str, state: str, policy: str = "approval", parent: str = "v0", deploy: bool = True) -> str:
        before = versions.by_name(workspace, parent)
        with workspace.write() as session:
            task = session.exec(select(Task)).first() or Task(name="Bikes", key="bikes")
            session.add(task)
            session.flush()
            taken = Snapshot(task_id=task.id, object="x", train_rows=1, validation_rows=1, test_rows=1, source="")
            job = Job(kind="learn", wish={"deploy": deploy}, asked_by="Ada", status="done")
            session.add_all([taken, job])
            session.flush()
            run = Run(job_id=job.id, position=0, task_id=task.id, snapshot_id=taken.id, parent_version_id=before.id,
                      strategy="naive", method="lora", seed=0, folder="")  # fmt: skip
            session.add(run)
            session.flush()
            version = Version(name=name, parent_id=before.id, run_id=run.id, kind="base", base_path=before.base_path,
                              base_digest=before.base_digest, state=state)  # fmt: skip
            session.add(version)
            session.flush()
            session.add(Decision(
                version_id=version.id, against_version_id=before.id, verdict="promote", sentence="Promoted.",
                evidence={"settings": GateSettings(policy=policy).model_dump()},
            ))  # fmt: skip
        return name

    return make


@pytest.mark.parametrize("verdict, policy, state", [
    ("promote", "alone", "accepted"), ("promote", "approval", "waiting"), ("promote", "four eyes", "waiting"),
    ("hold", "alone", "refused"), ("inconclusive", "approval", "undecided"),
])  # fmt: skip
def test_the_policy_decides_who_has_the_last_word(verdict, policy, state):
    assert state_after(verdict, GateSettings(policy=policy)) == state


def test_one_named_person_lets_a_waiting_version_through(workspace, judged):
    said = say(workspace, judged("v1", "waiting"), "approve", "Bea")
    assert (said.version.state, said.missing) == ("accepted", 0)
    with workspace.read() as session:
        event = session.exec(select(AuditEvent).where(AuditEvent.action == "version.approved")).one()
    assert (event.actor, event.detail["name"]) == ("Bea", "v1")


def test_four_eyes_are_two_people_neither_of_whom_asked(workspace, judged):
    judged("v1", "waiting", "four eyes")
    with pytest.raises(BadInput, match="Ada asked for the training of v1, and four eyes need two other people"):
        say(workspace, "v1", "approve", "ada")
    assert say(workspace, "v1", "approve", "Bea").missing == 1
    with pytest.raises(BadInput, match="bea has said so of v1 already"):
        say(workspace, "v1", "approve", "bea ")
    assert say(workspace, "v1", "approve", "Cem").version.state == "accepted"


def test_what_was_refused_goes_through_only_by_a_named_override_with_a_reason(workspace, judged):
    judged("v1", "refused", "alone")
    with pytest.raises(BadInput, match="v1 is refused and does not wait for anyone's word"):
        say(workspace, "v1", "approve", "Bea")
    with pytest.raises(BadInput, match="The reason 'ok' is shorter than 10 characters"):
        say(workspace, "v1", "override", "Bea", "ok")
    with pytest.raises(BadInput, match="Who says so"):
        say(workspace, "v1", "override", " ", "the test rows were wrong")
    assert say(workspace, "v1", "override", "Bea", "the test rows were wrong").version.state == "accepted"
    with workspace.read() as session:
        (word,) = spoken(session, versions.by_name(workspace, "v1"))
        event = session.exec(select(AuditEvent).where(AuditEvent.action == "version.overridden")).one()
    assert (word.by, word.reason) == ("Bea", "the test rows were wrong") and event.detail["reason"] == word.reason


def test_an_override_under_four_eyes_takes_two_people_too(workspace, judged):
    judged("v1", "undecided", "four eyes")
    assert say(workspace, "v1", "override", "Bea", "few rows, looked at by hand").missing == 1
    assert versions.by_name(workspace, "v1").state == "undecided"
    assert say(workspace, "v1", "override", "Cem", "few rows, looked at by hand").version.state == "accepted"


def test_a_rejected_version_takes_with_it_what_stands_on_it(workspace, judged):
    judged("v1", "waiting")
    judged("v2", "waiting", parent="v1")
    with pytest.raises(BadInput, match="v2 stands on v1, which waits for approval itself"):
        say(workspace, "v2", "approve", "Bea")
    say(workspace, "v1", "reject", "Bea", "answers are rude to people")
    assert [versions.by_name(workspace, name).state for name in ("v1", "v2")] == ["refused", "refused"]


async def _ask(workspace, path: str, body: dict) -> httpx.Response:
    door = httpx.ASGITransport(make_app(House(workspace)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=door, base_url="http://127.0.0.1") as client:
        return await client.post(path, json=body)


def ask(workspace, path: str, **body) -> httpx.Response:
    import asyncio

    return asyncio.run(_ask(workspace, path, body))


def test_through_the_door_the_last_word_puts_the_version_live_and_the_history_says_whose(workspace, judged):
    judged("v1", "waiting")
    early = ask(workspace, "/api/versions/v1/deploy", reason="now, please")
    assert early.status_code == 400 and "v1 waits for approval" in early.text
    answer = ask(workspace, "/api/versions/v1/say", says="approve", by="Bea")
    assert answer.json() == {"version": "v1", "state": "accepted", "missing": 0}
    assert versions.live(workspace).name == "v1"
    with workspace.read() as session:
        moved = session.exec(select(Deployment).order_by(Deployment.id.desc())).first()
    assert (moved.actor, moved.reason) == ("Bea", "approve by Bea") and moved.decision_id is not None


def test_a_refused_version_has_no_back_door(workspace, judged):
    judged("v1", "refused")
    answer = ask(workspace, "/api/versions/v1/deploy", reason="I want it")
    assert answer.status_code == 400 and "was refused by the gate" in answer.text
    assert versions.live(workspace).name == "v0"
    forced = ask(workspace, "/api/versions/v1/say", says="override", by="Bea", reason="the test rows were wrong")
    assert forced.json()["state"] == "accepted" and versions.live(workspace).name == "v1"
    assert ask(workspace, "/api/versions/v1/say", says="nod", by="Bea").status_code in (400, 422)


def test_a_job_that_was_told_not_to_deploy_has_its_version_accepted_and_not_live(workspace, judged):
    judged("v1", "waiting", deploy=False)
    assert ask(workspace, "/api/versions/v1/say", says="approve", by="Bea").json()["state"] == "accepted"
    assert versions.live(workspace).name == "v0"
