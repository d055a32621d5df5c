"""What the page says of retention: figures with their intervals, what they are compared with, and the row in the making."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy
import pytest
import torch
from sqlmodel import select

from clm_app.data.rows import Row, dump
from clm_app.data.template import load_tokenizer
from clm_app.engine.batches import Encoded
from clm_app.engine.loop import Engine
from clm_app.engine.measure import outcomes
from clm_app.engine.order import Order
from clm_app.engine.settings import TrainingSettings
from clm_app.judging.matrix import Matrix, Measuring, being_measured, judged
from clm_app.registry import versions
from store.series import measured
from store.tables import Job, Measurement, Run, Snapshot, Task, Version
from tests.smallest import TASKS, make_rows
from ui import questions
from ui.parts.heat_map import heat_map, legend

KNOBS = {"epochs": 15, "least_steps": 1, "batch_rows": 8, "learning_rate": 5e-3, "prompt_dropout": 0.0}
CPU = torch.device("cpu")


# --- a record made by hand -------------------------------------------------------------------------------------------


def answers(right: int, of: int = 20) -> list[bool]:
    return [item < right for item in range(of)]


def row(number: int) -> Row:
    return Row(prompt=f"question {number}", response="yes")


class Record:
    """Writes a stream into a workspace as jobs do: a version for each task, and outcomes behind each measurement."""

    def __init__(self, workspace, tasks: str) -> None:
        self.workspace, self.base = workspace, versions.base_version(workspace)
        folder = workspace.home / "rows"
        folder.mkdir()
        dump([row(i) for i in range(20)], folder / "test.jsonl")
        frozen = workspace.objects.put(folder)
        with workspace.write() as session:
            for place, name in enumerate(tasks, 1):
                session.add(Task(name=name, key=name))
                session.flush()
                session.add(
                    Snapshot(task_id=place, object=frozen, train_rows=1, validation_rows=1, test_rows=1, source="")
                )

    def measure(self, version_id: int, snapshot_id: int, exact: list[bool]) -> None:
        lines = [json.dumps({"item": row(i).key, "exact": e, "loss": 1.0, "tokens": 1}) for i, e in enumerate(exact)]
        digest = self.workspace.objects.put_bytes("\n".join(lines).encode())
        with self.workspace.write() as session:
            session.add(
                Measurement(
                    version_id=version_id, task_id=snapshot_id, snapshot_id=snapshot_id, split="test", items=len(exact),
                    metric="exact_match", value=sum(exact) / len(exact), object=digest,
                )
            )  # fmt: skip

    def learn(self, rows: list[list[list[bool] | None]], strategy: str = "replay", seed: int = 0, **more) -> int:
        """Write a job whose version i answered rows[i][j]; return its id. more: states, epochs, snapshots of the tasks."""
        with self.workspace.write() as session:
            job = Job(kind="learn", wish={"strategy": strategy})
            session.add(job)
            session.flush()
            parent, made = self.base.id, []
            for place, taken in enumerate(more.get("snapshots", range(1, len(rows) + 1))):
                run = Run(job_id=job.id, position=place, task_id=taken, snapshot_id=taken, parent_version_id=parent,
                          strategy=strategy, method="lora", seed=seed, folder=f"runs/{job.id}-{place}", status="done",
                          settings={"training": {"epochs": more.get("epochs", 1), "seed": seed}})  # fmt: skip
                session.add(run)
                session.flush()
                state = more.get("states", ["accepted"] * len(rows))[place]
                version = Version(name=f"job{job.id}-{place}", parent_id=parent, run_id=run.id, kind="adapter",
                                  base_path="", base_digest="", state=state)  # fmt: skip
                session.add(version)
                session.flush()
                made.append((version.id, taken))
                parent = version.id if state == "accepted" else parent
        for (version_id, _), row in zip(made, rows, strict=True):
            for (_, taken), exact in zip(made, row, strict=True):
                if exact is not None:
                    self.measure(version_id, taken, exact)
        return job.id


@pytest.fixture
def record(workspace):
    """A record of three tasks, of which nothing is learned yet."""
    return Record(workspace, "abc")


# After a: 18 of 20 right of a, 4 of b; after b: 12, 16 and 6; after c: 10, 14 and 20.
STREAM = [
    [answers(18), answers(4), None],
    [answers(12), answers(16), answers(6)],
    [answers(10), answers(14), answers(20)],
]


def test_a_head_start_is_counted_from_the_base_and_only_where_the_base_was_measured(record):
    job = record.learn(STREAM)
    assert judged(record.workspace, job).figures["forward_transfer"] is None
    record.measure(record.base.id, 2, answers(2))
    record.measure(record.base.id, 3, answers(2))
    found = judged(record.workspace, job)
    assert found.before == [None, 0.1, 0.1]
    # b: 0.2 - 0.1 = 0.1; c: 0.3 - 0.1 = 0.2
    assert found.figures["forward_transfer"] == pytest.approx(0.15)
    low, high = found.intervals["forward_transfer"]
    assert low < 0.15 < high


def test_every_figure_lies_in_its_interval_and_those_that_cannot_be_said_have_none(record):
    found = judged(record.workspace, record.learn(STREAM))
    assert found.figures["backward_transfer"] == pytest.approx(-0.25)  # a: 0.5 - 0.9; b: 0.7 - 0.8
    assert set(found.intervals) == {"average_accuracy", "backward_transfer", "forgetting"}
    for name, (low, high) in found.intervals.items():
        assert low < found.figures[name] < high, name
    plain = questions.plain_matrix(found)
    assert plain["intervals"] == {name: list(ends) for name, ends in found.intervals.items()}
    assert plain["intransigence"] is None and plain["average_accuracy"] == found.average_accuracy


def test_an_interval_follows_a_new_measurement_and_a_new_version(record):
    job = record.learn([row[:2] for row in STREAM[:2]])
    before = judged(record.workspace, job)
    assert judged(record.workspace, job) == before
    with record.workspace.read() as session:
        newest = max(v.id for v in session.exec(select(Version)))
    record.measure(newest, 1, answers(2))  # 0.6 before
    after = judged(record.workspace, job)
    assert after.average_accuracy == pytest.approx((0.1 + 0.8) / 2) != before.average_accuracy
    low, high = after.intervals["average_accuracy"]
    assert low < after.average_accuracy < high < before.average_accuracy


def test_where_the_outcomes_are_gone_the_figures_stay_and_have_no_interval(record):
    job = record.learn(STREAM)
    with record.workspace.write() as session:
        session.exec(select(Measurement)).first().object = "0" * 64
    found = judged(record.workspace, job)
    assert found.intervals == {} and found.average_accuracy == pytest.approx(2.2 / 3)
    assert "(" not in heat_map(found, "Kept", list("abc")).split("</figcaption>")[0]


def test_what_was_not_learned_is_counted_from_a_joint_run_of_the_same_snapshots(record):
    job = record.learn(STREAM)
    joint = [[answers(18), None, None], [answers(17), answers(18), None], [answers(17), answers(17), answers(18)]]
    assert judged(record.workspace, job).figures["intransigence"] is None
    record.learn(joint, strategy="joint", snapshots=[2, 1, 3])  # in another order, so after other tasks
    assert judged(record.workspace, job).figures["intransigence"] is None
    record.learn(joint, strategy="joint", states=["accepted", "refused", "accepted"])
    cut = judged(record.workspace, job)
    assert cut.joint == [0.9, 0.9, None], "the third was not learned on top of the second"
    record.learn(joint, strategy="joint")
    found = judged(record.workspace, job)
    assert found.joint == [0.9, 0.9, 0.9]
    # a: 0.9 - 0.9; b: 0.9 - 0.8; c: 0.9 - 1.0
    assert found.figures["intransigence"] == pytest.approx(0.0, abs=1e-9)
    low, high = found.intervals["intransigence"]
    assert low < 0 < high


def test_jobs_that_differ_in_their_seed_alone_are_taken_together(record):
    better = [
        [answers(19), answers(4), None],
        [answers(17), answers(17), answers(6)],
        [answers(17), answers(17), answers(20)],
    ]
    job = record.learn(STREAM, seed=0)
    assert judged(record.workspace, job).over_seeds == {}
    record.learn(better, seed=1, epochs=2)
    record.learn(better, seed=1, strategy="ewc")
    assert judged(record.workspace, job).seeds == [0], "another recipe says nothing of the seed"
    record.learn(better, seed=1)
    found = judged(record.workspace, job)
    assert found.seeds == [0, 1]
    mean, low, high = found.over_seeds["average_accuracy"]
    assert mean == pytest.approx((2.2 / 3 + 2.7 / 3) / 2) and low < mean < high
    own = found.intervals["average_accuracy"]
    assert high - low > own[1] - own[0], "the seeds lie farther apart than the items alone would put them"
    assert "Mean over 2 seeds" in heat_map(found, "Kept", list("abc"))


def test_ten_tasks_of_450_items_do_not_hold_up_a_page(workspace):
    rng, record = numpy.random.default_rng(0), Record(workspace, "abcdefghij")
    known = rng.random((10, 450))
    rows = [[list(known[j] < 0.85 - 0.01 * (i - j)) if j <= i else None for j in range(10)] for i in range(10)]
    job = record.learn([[one and [bool(e) for e in one] for one in row] for row in rows])
    took = []
    for _ in range(3):
        began = time.process_time()
        judged(workspace, job)
        took.append(time.process_time() - began)
    assert took[0] < 2.0 and min(took[1:]) < 0.1, took


# --- the row in the making -------------------------------------------------------------------------------------------

TRAINED = {"kind": "trained", "folder": "", "weights_kind": "adapter", "figures": {}, "memory": {}}


def said(*events: dict) -> str:
    return "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events)


def begun(task: str, split: str = "test") -> dict:
    return {"kind": "measuring", "task": task, "split": split, "done": 0, "of": 3}


def found_out(snapshot_id: int, share: float, when: str = "after", split: str = "test") -> dict:
    return {"kind": "measured", "snapshot_id": snapshot_id, "split": split, "items": 20, "exact_match": share,
            "answer_loss": 1.0, "outcomes": "", "when": when}  # fmt: skip


@pytest.fixture
def half_way(record):
    """(record, job id, events file): two tasks are learned, and the child of the third is at work."""
    job = record.learn([row[:2] for row in STREAM[:2]])
    with record.workspace.write() as session:
        session.add(Run(job_id=job, position=2, task_id=3, snapshot_id=3, parent_version_id=record.base.id, seed=0,
                        strategy="replay", method="lora", folder="runs/now", status="running"))  # fmt: skip
    events = record.workspace.home / "runs" / "now" / "events.jsonl"
    events.parent.mkdir(parents=True)
    return record, job, events


def test_the_row_in_the_making_fills_cell_by_cell(half_way):
    record, job, events = half_way
    look = lambda: being_measured(record.workspace, job)  # noqa: E731
    assert look() is None, "the child has said nothing yet"
    events.write_text(said(begun("c"), found_out(3, 0.1, "root"), begun("c"), found_out(3, 0.2, "before")))
    assert look() is None, "what the base and the version before know is not the new version's row"
    with open(events, "a") as file:
        file.write(said({"kind": "started"}, {"kind": "progress", "step": 1}, {"kind": "checkpointed"}))
    assert look() is None
    with open(events, "a") as file:
        file.write(said(TRAINED, begun("c", "validation"), found_out(3, 0.7, split="validation"), begun("a")))
    assert look() == Measuring(track="main", tasks=list("abc"), values=[None, None, None], now=0)
    with open(events, "a") as file:
        file.write(said(found_out(1, 0.5), begun("b"))[:-40])
    assert look().values == [0.5, None, None] and look().now is None, "a torn line is not read"
    events.write_text(said(TRAINED, found_out(1, 0.5), begun("b"), found_out(99, 0.3), begun("general text", "probe")))
    assert look().values == [0.5, None, None], "a task of another job has no column"
    events.write_text(said(TRAINED, found_out(1, 0.9), {"kind": "started"}, TRAINED, found_out(2, 0.4)))
    assert look().values == [None, 0.4, None], "what a killed child said of other weights is not this row"


def test_a_row_is_in_the_making_or_registered_and_never_both(half_way):
    record, job, events = half_way
    events.write_text(said(TRAINED, found_out(1, 0.5), begun("b")))
    found, measuring = questions.matrices_now(record.workspace, job)
    assert len(found["main"].versions) == 2 and measuring.now == 1
    story = questions.job_story(record.workspace, job)
    assert story["measuring"] == {"track": "main", "tasks": ["a", "b", "c"], "values": [0.5, None, None], "now": 1}
    with record.workspace.write() as session:
        run = session.exec(select(Run).where(Run.folder == "runs/now")).one()
        session.add(Version(name="v3", parent_id=2, run_id=run.id, kind="adapter", base_path="", base_digest=""))
    assert questions.matrices_now(record.workspace, job)[1] is None


def test_the_row_in_the_making_is_drawn_as_such_and_changes_no_figure(half_way):
    record, job, events = half_way
    whole = heat_map(*questions.matrices_now(record.workspace, job)[0].values(), "Kept", list("abc"))
    events.write_text(said(TRAINED, found_out(1, 0.5), begun("b")))
    found, measuring = questions.matrices_now(record.workspace, job)
    html = heat_map(found["main"], "Kept", list("abc"), measuring)
    assert html.split("</figcaption>")[0] == whole.split("</figcaption>")[0]
    row = html.split('<tr class="clm-measuring">')[1].split("</tr>")[0]
    assert "measuring" in row and ">50</td>" in row and 'aria-label="b is being measured"' in row
    first = heat_map(None, "Kept", list("abc"), Measuring(track="main", tasks=["a"], values=[None], now=0))
    assert "average accuracy" not in first and first.count("<td") == 1 + 3, "a head's corner and a cell for each task"


def test_a_page_reads_the_end_of_the_events_alone_however_long_a_run_trains(tmp_path, monkeypatch):
    read = []

    class Counting:
        def __init__(self, *given) -> None:
            self.handle = open(*given)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.handle.close()

        def seek(self, *given) -> int:
            return self.handle.seek(*given)

        def read(self, size: int) -> bytes:
            read.append(size)
            return self.handle.read(size)

    monkeypatch.setattr(measured, "open", Counting, raising=False)
    training = said({"kind": "progress", "step": 1, "loss": 1.0}) * 100_000
    events = tmp_path / "events.jsonl"
    events.write_text(training)
    assert measured.since_trained(events) is None and sum(read) == measured.BLOCK
    many = [found_out(n, 0.5) for n in range(300)]  # more than one block
    events.write_text(training + said(TRAINED, *many))
    read.clear()
    assert measured.since_trained(events) == many
    assert sum(read) < len(said(*many)) + 2 * measured.BLOCK
    assert measured.since_trained(tmp_path / "none") is None


# --- on the page -----------------------------------------------------------------------------------------------------


def test_the_legend_says_what_is_shown_and_nothing_else():
    one = Matrix(tasks=["a"], versions=["v1"], values=[[0.5]])
    assert "average accuracy" in legend([one]) and "backward transfer" not in legend([one])
    assert "in brackets" not in legend([one])
    two = Matrix(
        tasks=list("ab"), versions=["v1", "v2"], values=[[0.9, 0.2], [0.6, 0.8]], before=[0.0, 0.1], joint=[0.9, 0.9],
        intervals={"forgetting": (0.2, 0.4)},
    )  # fmt: skip
    html = heat_map(two, "Kept", list("ab")).replace("\N{NO-BREAK SPACE}", " ")
    for figure in ("average accuracy <strong>70 %", "backward transfer <strong>−30.0 points",
                   "forgetting <strong>30.0 points</strong> (20.0 to 40.0)", "forward transfer <strong>+10.0 points",
                   "intransigence <strong>5.0 points"):  # fmt: skip
        assert figure in html
    assert legend([one, two]).count("<dt>") == 6 and "in brackets" in legend([one, two])
    assert legend([]) == ""


def test_two_versions_are_compared_with_an_interval_over_the_same_items(record):
    from ui.parts.with_without import with_without

    record.learn(STREAM)
    told = questions.compare(record.workspace, "job1-1", "job1-2")
    for one, change in zip(told["tasks"], (-10.0, -10.0, 70.0), strict=True):
        assert one["change_points"] == pytest.approx(change)
        assert one["low_points"] < change < one["high_points"], "two or fourteen of twenty flipped"
    assert told["mean"]["change_points"] == pytest.approx(50 / 3)
    assert told["mean"]["low_points"] < 50 / 3 < told["mean"]["high_points"]
    html = with_without(told).replace("\N{NO-BREAK SPACE}", " ")
    a = told["tasks"][0]
    assert f"−10.0 points (−{-a['low_points']:.1f} to {abs(a['high_points']):.1f})" in html
    assert '<span class="clm-quiet">−10.0' in html, "two of twenty may be chance"
    assert "mean of the tasks" in html and '<span class="">+70.0' in html


# --- measured by a real child ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(tiny_model, tmp_path_factory) -> Path:
    """A base that answers two of the four words of "Animals" before anything is learned."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("knowing")
    known = dict(list(TASKS["Animals"].items())[:2])
    dump([Row(**row) for row in make_rows(32, known)], folder / "rows.jsonl")
    order = Order(
        folder=folder, base=tiny_model, adapter=None, rows=folder / "rows.jsonl", kept={}, strategy="naive",
        strategy_settings={}, method="full", method_settings={}, training=TrainingSettings(**KNOBS | {"epochs": 30}),
        before=[], after=[], threads=1,
    )  # fmt: skip
    Engine(order, lambda event: None).run()
    return folder / "weights"


def right(model: Path, rows: list[Row]) -> float:
    """Return a model's exact match on rows, measured in this process."""
    from transformers import AutoModelForCausalLM

    lines = outcomes(AutoModelForCausalLM.from_pretrained(model), rows, Encoded(load_tokenizer(model), 512), CPU)
    return sum(line["exact"] for line in lines) / len(lines)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_child_measures_the_base_itself_whatever_it_goes_on_from(
    method, knowing, tiny_model, order_for, train, exam_on, tmp_path
):
    rows = [Row(**row) for row in make_rows(40, TASKS["Animals"])]
    dump(rows, tmp_path / "test.jsonl")
    base = knowing if method == "lora" else tiny_model  # tiny_model: what a parent with weights of its own would be
    order = order_for(
        base=base, root=knowing, method=method, at_root=[exam_on(tmp_path / "test.jsonl")],
        after=[exam_on(tmp_path / "test.jsonl")],
    )  # fmt: skip
    seen = train(order)
    at_root, after = seen.measured
    assert (at_root.when, after.when) == ("root", "after") and at_root.exact_match == right(knowing, rows) == 0.5
    again = order_for("again", base=base, root=knowing, method=method)
    without = train(again).weights
    assert all(torch.equal(seen.weights[name], tensor) for name, tensor in without.items()), "it changes no training"


@pytest.fixture(scope="module")
def taught(open_app, knowing, tmp_path_factory):
    """(app, story): two tasks learned with every weight, beside a naive run, from a base that knows some of the second."""
    folder, app = tmp_path_factory.mktemp("stream"), open_app("figures", CLM_BASE_MODEL=str(knowing))
    stream = []
    for name in ("Colours", "Animals"):
        labels = TASKS[name]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(64, labels)))
        stream.append({"name": name, "path": str(folder / f"{name}.jsonl")})
    job = app.learn(
        stream=stream, training=KNOBS, compare_naive=True, method="full", strategy="replay",
        strategy_settings={"rows_per_task": 20}, gate={"least_items": 1, "alpha": 0.4, "margin_points": 100},
    )  # fmt: skip
    return app, app.follow(job["id"])


def test_forward_transfer_of_a_real_job_is_the_one_worked_by_hand(taught, knowing):
    app, story = taught
    assert story["status"] == "done", story["error"]
    main, naive = story["matrices"]["main"], story["matrices"]["naive"]
    tests = [[Row(**{k: row[k] for k in ("prompt", "response")}) for row in app.get(f"/api/tasks/{name}/rows?split=test")]
             for name in ("Colours", "Animals")]  # fmt: skip
    assert main["before"] == naive["before"] == [right(knowing, rows) for rows in tests]
    assert main["before"][1] > 0.2, "the base knew some of the second task"
    for matrix in (main, naive):
        assert matrix["forward_transfer"] == pytest.approx(matrix["values"][0][1] - matrix["before"][1])
        low, high = matrix["intervals"]["forward_transfer"]
        assert low <= matrix["forward_transfer"] <= high
    of_base = [
        m["snapshot_id"] for m in app.get("/api/versions/v0")["measurements"]
        if m["metric"] == "exact_match" and m["split"] == "test"
    ]  # fmt: skip
    assert sorted(of_base) == sorted(set(of_base)) and len(of_base) == 2, "each snapshot once, by both runs together"


def test_each_interval_of_a_real_job_holds_its_figure(taught):
    _, story = taught
    for matrix in story["matrices"].values():
        assert {"average_accuracy", "backward_transfer", "forgetting", "forward_transfer"} == set(matrix["intervals"])
        for name, (low, high) in matrix["intervals"].items():
            assert low <= matrix[name] <= high, name
    assert story["measuring"] is None
