"""What the search for the update that broke a task promises: the right one, in few measurements, none of them made twice."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from sqlmodel import select
from transformers import AutoModelForCausalLM

from clm_app.data.rows import Row, dump, load
from clm_app.data.template import load_tokenizer
from clm_app.engine.batches import Encoded
from clm_app.engine.measure import outcomes
from clm_app.errors import BadInput, BadModel, NotThere
from clm_app.judging import bisect
from clm_app.judging.bisect import BisectWish, find, first_broken
from clm_app.wishes import cancel
from jobs.bisection import Bisection
from jobs.cycle import Cancelled
from jobs.queue import Queue
from jobs.supervisor import spawn
from store.tables import AuditEvent, Job, Measurement, Snapshot, Version
from tests.recorded import Line, right
from tests.smallest import TASKS, make_rows


class Measures:
    """Stands in for the children: measures a version as it is told, and counts."""

    def __init__(self, line: Line, truth: dict[str, list[bool]]) -> None:
        self.line, self.truth, self.asked = line, truth, []

    def __call__(self, version, taken):
        self.asked.append(version.name)
        self.line.measure(version, taken.id, self.truth[version.name])
        with self.line.workspace.read() as session:
            return bisect.measurement(session, version.id, taken.id)


def a_line(workspace, shares: list[int], known: set[int]) -> tuple[Line, Measures]:
    """Return a line whose version i + 1 has shares[i] of 100 rows of task A right, of which only `known` ones are measured."""
    line = Line(workspace, "A", "B")
    truth = {}
    for i, share in enumerate(shares):
        version = line.learn(1 if i == 0 else 2, {1: right(share)} if i in known else {})
        truth[version.name] = right(share)
    return line, Measures(line, truth)


@pytest.mark.parametrize("last", [1, 2, 3, 7, 8, 9, 64, 100])
def test_halving_finds_every_break_and_looks_no_more_often_than_it_must(last):
    for first in range(1, last + 1):
        looked = []

        def look(place, first=first, looked=looked):
            looked.append(place)
            return place >= first

        assert first_broken(last, {}, look) == first
        assert len(looked) == len(set(looked)) <= 1 + math.ceil(math.log2(last))
    assert first_broken(last, {last: False}, pytest.fail) is None


def test_what_is_known_narrows_the_search_and_is_not_looked_at_again():
    looked = []

    def look(place):
        looked.append(place)
        return place >= 41

    assert first_broken(100, {40: False, 43: True, 100: True}, look) == 41 and set(looked) <= {41, 42}
    assert first_broken(100, {place: place >= 41 for place in range(101)}, pytest.fail) == 41


def test_where_all_was_measured_the_answer_costs_nothing(workspace):
    line, measures = a_line(workspace, [90, 90, 88, 60, 58, 57], known=set(range(6)))
    found = find(workspace, BisectWish(task="a"), measures)
    assert (found.good, found.last_good, found.first_broken, found.bad) == ("v2", "v3", "v4", "v6")
    assert measures.asked == [] and found.measured == 0 and found.known == 5 and found.is_steady
    assert (found.learned, found.strategy, found.verdict) == ("B", "replay", "promote")
    assert found.decision == "Promote: said of v4." and found.run_id == 4
    assert found.sentence == (
        "v4, which learned B with replay, broke A: 88 % right in v3, 60 % in v4 (30 of 100 rows lost and 0 gained since v2, "
        "p < 0.001). 0 measured now, 5 known before, of 5 versions."
    )


def test_of_thirty_unmeasured_updates_five_are_measured_and_the_next_search_measures_none(workspace):
    shares = [90] * 19 + [40] * 13
    line, measures = a_line(workspace, shares, known={0, 31})
    found = find(workspace, BisectWish(task="A"), measures)
    assert found.first_broken == "v20" and found.last_good == "v19"
    assert found.measured == len(measures.asked) == 5 == math.ceil(math.log2(31)) and found.known == 2
    again = find(workspace, BisectWish(task="A", good="v1"), measures)
    assert again.first_broken == "v20" and again.measured == 0 and len(measures.asked) == 5


def test_ends_that_were_never_measured_are_measured_too(workspace):
    line, measures = a_line(workspace, [90, 90, 50, 50, 50], known=set())
    found = find(workspace, BisectWish(task="A"), measures)
    assert found.good == "v1", "where it was learned"
    assert found.first_broken == "v3" and found.measured == len(measures.asked) <= found.most == 4


def test_a_break_that_was_mended_in_between_is_told_and_the_one_that_holds_is_found(workspace):
    line, measures = a_line(workspace, [90, 50, 88, 90, 55, 54], known=set(range(6)))
    found = find(workspace, BisectWish(task="A", good="v1"), measures)
    assert found.first_broken == "v5" and not found.is_steady
    assert "v2 was worse, v3 better again" in found.sentence


def test_a_small_loss_and_a_loss_by_chance_are_no_break(workspace):
    line, measures = a_line(workspace, [90, 87], known={0, 1})
    assert find(workspace, BisectWish(task="A"), measures).first_broken is None
    assert find(workspace, BisectWish(task="A", drop_points=2), measures).first_broken is None, "3 lost of 3: p = 0.125"
    assert "no more than chance (p = 0.125)" in find(workspace, BisectWish(task="A", drop_points=2), measures).sentence
    assert find(workspace, BisectWish(task="A", drop_points=2, alpha=0.2), measures).first_broken == "v2"
    assert "less than 5 points" in find(workspace, BisectWish(task="A"), measures).sentence


def test_what_cannot_be_searched_is_refused_in_a_sentence_and_nothing_is_asked(workspace):
    line, _ = a_line(workspace, [90, 50], known={0, 1})
    side = line.learn(2, {1: right(10)}, parent=line.base, track="naive", state="comparison")
    for wish, kind, said in [
        ({"task": "Z"}, NotThere, "no task 'Z'"),
        ({"task": "A", "bad": "v9"}, NotThere, "no version 'v9'"),
        ({"task": "A", "good": side.name}, BadInput, "does not stand on naive-3"),
        ({"task": "A", "good": "v2"}, BadInput, "no update between v2 and v2"),
        ({"task": "B", "bad": "v1"}, BadInput, "Name the good version yourself"),
    ]:
        with pytest.raises(kind, match=said):
            bisect.ask(workspace, BisectWish(**wish), "me")
    shutil.rmtree(workspace.objects.path(side.object).parent)
    with pytest.raises(BadModel, match="are gone"):
        bisect.ask(workspace, BisectWish(task="B", good="v0", bad=side.name), "me")
    with workspace.read() as session:
        assert session.exec(select(Job).where(Job.kind == "bisect")).first() is None


def test_the_wish_names_the_versions_of_the_moment_it_was_asked(workspace):
    line, _ = a_line(workspace, [90, 50], known={0, 1})
    asked = bisect.ask(workspace, BisectWish(task="a"), "me")
    line.learn(2, {1: right(95)})
    assert asked.wish | {"task": "A", "good": "v1", "bad": "v2"} == asked.wish
    with workspace.read() as session:
        event = session.exec(select(AuditEvent).order_by(AuditEvent.id.desc())).first()
    assert (event.action, event.actor, event.detail["bad"]) == ("job.asked", "me", "v2")


# --- with a real child -----------------------------------------------------------------------------------------------------


def exact(folder, rows) -> list[bool]:
    """Return which rows the weights in a folder answer exactly, measured in this process."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [one["exact"] for one in outcomes(model, rows, Encoded(load_tokenizer(folder), 512), torch.device("cpu"))]


def test_a_child_measures_what_is_missing_and_a_cancelled_search_keeps_what_it_measured(
    workspace, tiny_model, order_for, train
):
    seen = train(order_for("knowing", n=48, method="full", training={"epochs": 12, "learning_rate": 5e-3}))
    knowing, line = Path(seen.trained.folder), Line(workspace, "A", "B")
    rows = workspace.home / "colours"
    dump([Row(**row) for row in make_rows(100, TASKS["Colours"])], rows / "test.jsonl")
    with workspace.write() as session:
        taken = session.get_one(Snapshot, 1)
        taken.object = workspace.objects.put(rows)
        session.add(taken)
    line.rows = lambda task: load(rows / "test.jsonl")
    good, broken = (workspace.objects.put(folder) for folder in (knowing, tiny_model))
    knows, forgot = (exact(folder, load(rows / "test.jsonl")) for folder in (knowing, tiny_model))
    for task, weights, known in ((1, good, {1: knows}), (2, broken, {}), (2, broken, {1: forgot})):
        line.learn(task, known, weights=weights)

    queue, children = Queue(workspace, "test"), []
    queue.end(queue.claim(), "done", stage="done")  # the job that made the line
    bisect.ask(workspace, BisectWish(task="A"), "me")
    job = queue.claim()

    def counted(*arguments, **named):
        children.append(named["name"])
        return spawn(*arguments, **named)

    result = Bisection(workspace, queue, job, counted, lambda: None).go()
    assert (result["good"], result["first_broken"], result["measured"]) == ("v1", "v2", 1)
    assert children == [f"bisect-{job.id}-v2"], "one child for the one version that was not measured"
    assert [one["value"] for one in result["looks"]] == [sum(knows) / 100, sum(forgot) / 100, sum(forgot) / 100]
    assert sum(forgot) < 50 < sum(knows)
    assert Bisection(workspace, queue, job, pytest.fail, lambda: None).go()["measured"] == 0, "it is in the record now"
    cancel(workspace, job.id, "me")
    with pytest.raises(Cancelled):
        Bisection(workspace, queue, job, pytest.fail, lambda: None).go()
    with workspace.read() as session:
        v2 = session.exec(select(Version).where(Version.name == "v2")).one()
        assert {m.metric for m in session.exec(select(Measurement).where(Measurement.version_id == v2.id))} == {
            "exact_match", "answer_loss",
        }  # fmt: skip
