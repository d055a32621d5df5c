"""The update cycle: for each task of a stream, snapshot, train, measure, gate, register, deploy.

Every step looks at what the rows and files say is done already, so a cycle that was cut off anywhere is simply run
again: finished runs are skipped, a half-trained one goes on from its last committed checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from sqlmodel import Session, select

from clm_app import hardware
from clm_app.catalog import pick
from clm_app.data.ingest import find, snapshot, tasks
from clm_app.data.streams import TaskSource
from clm_app.data.withdrawal import counted, withdrawn_keys, without
from clm_app.engine.memory import refuse_what_does_not_fit
from clm_app.engine.order import Exam, Order
from clm_app.errors import ChildFailed, ClmError
from clm_app.events import AnyEvent, Failed, Measuring, Progress, Started
from clm_app.probes._base import made as made_probes
from clm_app.provenance import code_version
from clm_app.registry import versions
from clm_app.registry.versions import lineage, measurement
from clm_app.situations import situation, vocabulary_of
from clm_app.strategies._base import Choice, Situation
from clm_app.strategies._combined import choose, part_of
from clm_app.wishes import LearnWish
from clm_app.workspace import Workspace
from jobs.judgement import MAIN, Judgement
from jobs.queue import Cancelled, Queue
from store.db import record
from store.tables import Job, Measurement, ProbeReading, Run, Snapshot, Task, Version
from store.tables._columns import now

ATTEMPTS = 3  # children tried for one run; each goes on from the last checkpoint
BEAT_S = 1.0
NAIVE = "naive"
STATES = (
    "accepted",
    "refused",
    "comparison",
    "waiting",
    "undecided",
)  # of what a job made; the first three are always told


class Cycle:
    """One learn job, from its wish to its last deployment."""

    def __init__(
        self, workspace: Workspace, queue: Queue, job: Job, spawn: Callable, on_deploy: Callable[[], None]
    ) -> None:
        self.workspace, self.queue, self.job, self.spawn, self.on_deploy = workspace, queue, job, spawn, on_deploy
        self.wish = LearnWish(**job.wish)
        self.tracks = [MAIN, NAIVE] if self.wish.compare_naive else [MAIN]

    def go(self) -> dict:
        """Do the whole job and return its result.

        Raises:
            Cancelled: a person asked for it; what is registered stays.
            ClmError: a step refused or a child failed; what is registered stays.
        """
        for number, track in enumerate(self.tracks):
            for position, source in enumerate(self.wish.stream):
                self.beat(f"{self.label(track, position)}: reading", self.share(number, position, 0.0))
                self.update(track, number, position, source)
        return self.result()

    def update(self, track: str, number: int, position: int, source: TaskSource) -> None:
        """Take one task from its file to a decision, unless that was done before."""
        taken = self.take_snapshot(source)
        run = self.open_run(track, position, taken)
        candidate = self.version_of(run)
        if candidate is None:
            order = self.write_order(run, taken)
            self.train(run, order, number)
            candidate = self.register(run, order)
        if candidate.state != "candidate":
            return
        label, share = self.label(track, position), self.share(number, position, 0.99)
        self.beat(f"{label}: gate", share)
        judgement = Judgement(
            self.workspace, self.queue, self.job, self.wish, run, candidate, self.spawn,
            lambda stage: self.beat(f"{label}: {stage}", share),
        )  # fmt: skip
        if judgement.decide().state == "accepted" and self.wish.deploy:
            self.on_deploy()

    # --- the steps ----------------------------------------------------------------------------------------------------

    def take_snapshot(self, source: TaskSource) -> Snapshot:
        """Freeze the task's rows; a task without a file is taken as it was last frozen."""
        if source.path:
            seed = self.wish.training.seed
            return snapshot(self.workspace, source.name, Path(source.path), self.job.asked_by, is_new=False, seed=seed)
        task = find(self.workspace, source.name)
        return next(taken for known, taken in tasks(self.workspace) if task and known.id == task.id)

    def open_run(self, track: str, position: int, taken: Snapshot) -> Run:
        """Return the run of this place in the stream, written down with everything that is needed to do it again."""
        with self.workspace.read() as session:
            found = session.exec(
                select(Run).where(Run.job_id == self.job.id, Run.track == track, Run.position == position)
            ).first()
            if found:
                return found
            parent = self.parent(session, track)
        choice, known = self.choose(track, parent, taken)  # takes seconds: nobody's writing waits for it
        with self.workspace.write() as session:
            self.queue.held(session, self.job)
            run = Run(
                job_id=self.job.id, track=track, position=position, task_id=taken.task_id, snapshot_id=taken.id,
                parent_version_id=parent.id, strategy=choice.strategy, method=self.method_for(track, choice, parent),
                seed=self.wish.training.seed, folder="", code_version=code_version(), libraries=hardware.libraries(),
                hardware=hardware.description(), settings={
                    "training": self.wish.training.model_dump(),
                    "strategy": choice.settings, "why": choice.why,
                    **({"routing": known.routing._asdict()} if known.routing else {}),
                    "method": self.wish.method_settings, "gate": self.wish.gate.model_dump(),
                },
            )  # fmt: skip
            session.add(run)
            session.flush()
            run.folder = f"runs/{run.id}"
            session.add(run)
            record(session, self.job.asked_by, "run.opened", f"run:{run.id}", job=self.job.id, track=track)
            return run

    def choose(self, track: str, parent: Version, taken: Snapshot) -> tuple[Choice, Situation]:
        """Return which strategy does this run, and why: the one asked for, or what auto chooses; and what it was told."""
        with self.workspace.read() as session:
            task = session.get_one(Task, taken.task_id).name
        known = situation(self.workspace, self.wish, parent, task, taken.train_rows, taken)
        if track != MAIN:
            return Choice(NAIVE, {}, ""), known
        choice = choose(self.wish.strategy, self.wish.strategy_settings, known)
        if self.is_routed_by_repair(parent) and part_of(choice.strategy).weights_kind != "routed":
            choice = Choice("adapters", {}, (
                f"Task adapters: {parent.name} was repaired by keeping weights of its own for a task, and {choice.strategy} "
                "cannot go on from that."
            ))  # fmt: skip
        part_of(choice.strategy).refuse_situation(known)
        return choice, known

    def is_routed_by_repair(self, version: Version) -> bool:
        """Say whether a version, or one it stands on, has weights of its own for a task only since it was repaired."""
        with self.workspace.read() as session:
            while version.kind == "routed":
                run = session.get_one(Run, version.run_id)
                if (run.figures.get("repair") or {}).get("rung") == "route" and run.strategy != "adapters":
                    return True
                version = session.get_one(Version, version.parent_id)
        return False

    def method_for(self, track: str, choice: Choice, parent: Version) -> str:
        """Return the way to tune: as asked, else what fits size and strategy; a comparison is tuned as the main track."""
        return self.wish.method_for(parent.parameters, choice.strategy if track == MAIN else "")

    def parent(self, session: Session, track: str) -> Version:
        """Return the version to go on from: the track's last one that passed the gate, else where the stream starts."""
        states = ("accepted", "waiting") if track == MAIN else ("comparison",)
        made = session.exec(
            select(Version).join(Run, Run.id == Version.run_id)
            .where(Run.job_id == self.job.id, Run.track == track, Version.state.in_(states)).order_by(Run.position.desc())
        ).first()  # fmt: skip
        if made:
            return made
        first = session.exec(select(Run).where(Run.job_id == self.job.id, Run.position == 0, Run.track == MAIN)).first()
        if first:  # the comparison starts where the main track started, wherever live has moved since
            start = session.get_one(Version, first.parent_version_id)
            while track != MAIN and start.kind == "routed":  # naive trains one set of weights: from the base under them
                start = session.get_one(Version, start.parent_id)
            return start
        return versions.by_name(self.workspace, self.wish.start_from)

    def write_order(self, run: Run, taken: Snapshot) -> Order:
        """Write the child's order, with the exams of every task seen so far; refuse what cannot fit."""
        folder = self.workspace.home / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "order.json"
        if file.exists():
            return Order.model_validate_json(file.read_text(encoding="utf-8"))
        with self.workspace.read() as session:
            parent = session.get_one(Version, run.parent_version_id)
            known = lineage(session, parent)
            learned = {s.task_id for s, _ in known}
            known += self.refused_before(session, run, learned)
            past = [(s, t) for s, t in known if s.task_id != taken.task_id]
            seen = [*past, (taken, session.get_one(Task, taken.task_id))]
            root, withdrawn = self.root(session, parent), withdrawn_keys(session)
            taught, then = counted(self.workspace, session, parent), vocabulary_of(session, parent)
            is_new_to_root = root.id != parent.id and measurement(session, root.id, taken.id) is None
            names = dict(session.exec(select(Snapshot.id, Task.name).join(Task, Task.id == Snapshot.task_id)).all())
            unmeasured = [  # a comparison has no gate that needs the past tasks, only the head start on the new one
                (s, t) for s, t in (seen if run.track == MAIN else seen[-1:])
                if measurement(session, parent.id, s.id) is None
            ]  # fmt: skip
            probes = made_probes(self.workspace.settings.probes)
            unread = [p.name for p in probes if not is_read(session, parent.id, p.name, p.ruler)]
            answered = {
                str(s.id): self.workspace.objects.path(found.object) for s, _ in seen
                if (found := measurement(session, parent.id, s.id)) is not None
            }  # fmt: skip
        base, adapter = versions.weights(self.workspace, parent)
        method, way = pick("clm_app.methods", run.method), part_of(run.strategy)
        knobs = self.wish.training
        refuse_what_does_not_fit(
            parent.parameters, base, method.weights_kind, knobs.batch_rows, knobs.max_tokens, self.workspace.home,
            method.base_bits, way.needs_parent,
        )  # fmt: skip
        kept = {s: self.workspace.objects.path(digest) for s, digest in parent.memory.items() if s.isdigit()}
        kept.pop(str(taken.id), None)
        kept = {s: without(file, withdrawn, folder / "kept" / f"{s}.jsonl") for s, file in kept.items()}
        state = parent.memory.get(f"state/{run.strategy}")
        order = Order(
            folder=folder, base=base, adapter=adapter, rows=self.split_file(taken, "train"),
            root=versions.weights(self.workspace, root).base,
            at_root=[self.exam(*seen[-1], "test")] if is_new_to_root else [],
            learned=[t.name for s, t in known if s.task_id in learned], routing=run.settings.get("routing"),
            withdrawn=sorted(withdrawn) if taught else [], counted=taught, vocabulary=then,
            task=seen[-1][1].name, kept=kept, kept_tasks={s: names[int(s)] for s in kept},
            held_out={
                str(s.id): self.split_file(s, "validation") for s, _ in past if s.task_id in learned
            } if way.needs_held_out_rows else {},
            state=self.workspace.objects.path(state) if state else None,
            strategy=run.strategy, strategy_settings=run.settings["strategy"], method=run.method,
            method_settings=run.settings["method"], training=knobs, threads=self.workspace.settings.threads,
            before=[self.exam(s, t, "test") for s, t in unmeasured],
            gate=self.wish.gate.model_dump(), repair=self.wish.repair.model_dump() if run.track == MAIN else None,
            live_outcomes=answered, search={str(s.id): self.split_file(s, "validation") for s, _ in seen},
            taught=[(t.name, self.split_file(s, "train")) for s, t in seen],
            after=[self.exam(taken, seen[-1][1], "validation"), *(self.exam(s, t, "test") for s, t in seen)],
            probes={p.name: p.settings.model_dump(mode="json") for p in probes}, probes_before=unread,
        )  # fmt: skip
        draft = folder / ".order.json"
        draft.write_text(order.model_dump_json(indent=1), encoding="utf-8")
        draft.replace(file)
        return order

    def root(self, session: Session, version: Version) -> Version:
        """Return the base that a line of versions began with."""
        while version.parent_id is not None:
            version = session.get_one(Version, version.parent_id)
        return version

    def refused_before(self, session: Session, run: Run, known: set[int]) -> list[tuple[Snapshot, Task]]:
        """Return the tasks of this stream that were tried and refused: they are measured all the same, as not known."""
        runs = session.exec(
            select(Run).where(Run.job_id == run.job_id, Run.track == run.track, Run.position < run.position)
            .order_by(Run.position)
        ).all()  # fmt: skip
        return [
            (session.get_one(Snapshot, r.snapshot_id), session.get_one(Task, r.task_id))
            for r in runs if r.task_id not in known
        ]  # fmt: skip

    def train(self, run: Run, order: Order, number: int) -> None:
        """Run the child until its result is there, starting it again where it was killed.

        Raises:
            ChildFailed: it said why it cannot go on, or was killed too often.
            Cancelled: a person asked for it.
        """
        result = order.folder / "result.json"
        while not result.exists():
            with self.workspace.write() as session:
                row = session.get_one(Run, run.id)
                row.attempt, row.status, row.started_at = row.attempt + 1, "running", row.started_at or now()
                session.add(row)
            listener = Listener(order.folder / "events.jsonl")
            child = self.spawn(
                ["python", "-m", "clm_app.engine.child", str(order.folder / "order.json")],
                name=f"run-{run.id}", on_event=listener, on_text=listener.text,
            )  # fmt: skip
            try:
                while child.wait(BEAT_S) is None:
                    stage, share = listener.now(self.label(run.track, run.position))
                    if self.beat(stage, self.share(number, run.position, share)).is_cancel_asked:
                        raise Cancelled
            finally:
                child.stop()
            if listener.failed:
                raise ChildFailed(listener.failed.sentence)
            if not result.exists() and row.attempt >= ATTEMPTS + self.job.attempts - 1:
                raise ChildFailed(
                    f"The training of run {run.id} was ended from outside {row.attempt} times, last with: "
                    f"{child.last[-1] if child.last else 'no word'}. Memory may be short: try smaller batch_rows, then start again."
                )

    def register(self, run: Run, order: Order) -> Version:
        """Write the version and what was measured of it together, from the child's result; the gate judges it afterwards.

        A candidate that was repaired is registered as what the repair made of it; what it was before stays in the run's
        figures, by digest.
        """
        result = json.loads((order.folder / "result.json").read_text(encoding="utf-8"))
        trained, objects = result["trained"], self.workspace.objects
        repair = result.get("repair") or {}
        made = repair if repair.get("passed") else trained
        weights = objects.put(Path(made["folder"]), alike=order.adapter)
        places = {"new": str(run.snapshot_id), "state": f"state/{run.strategy}"}
        memory = dict(trained["memory"])
        if repair.get("passed"):  # a state is of the trained weights: the one before stays
            memory.pop("state", None)
        kept = {places[name]: objects.put(Path(found)) for name, found in memory.items()}
        figures = [(m, objects.put(Path(m["outcomes"]))) for m in result["measured"]]
        told = {"noise": result.get("noise"), "repair": None}
        if repair:
            first = {
                str(m["snapshot_id"]): digest for m, digest in figures if (m["when"], m["split"]) == ("after", "test")
            }
            told["repair"] = {name: repair[name] for name in ("tried", "passed", "rung", "certificate")}
            told["repair"] |= {
                "first": first,
                "first_weights": objects.put(Path(trained["folder"]), alike=order.adapter),
            }
            again = [(m, objects.put(Path(m["outcomes"]))) for m in repair["measured"]] if repair["passed"] else []
            seen = {(m["snapshot_id"], m["split"]) for m, _ in again}
            figures = again + [
                (m, d) for m, d in figures if m["when"] != "after" or (m["snapshot_id"], m["split"]) not in seen
            ]  # fmt: skip
        probed = [(p, objects.put(Path(p["outcomes"]))) for p in result.get("probed", [])]
        with self.workspace.write() as session:
            self.queue.held(session, self.job)
            parent = session.get_one(Version, run.parent_version_id)
            base_path, base_digest = versions.base_reference(parent)
            version = Version(
                name=self.next_name(session, run), track=run.track, parent_id=parent.id, run_id=run.id,
                kind=made["weights_kind"], base_path=base_path, base_digest=base_digest, object=weights,
                method=run.method, strategy=run.strategy, settings=run.settings, seed=run.seed,
                parameters=parent.parameters, trained_parameters=trained["figures"]["trained_parameters"],
                memory=parent.memory | kept, state="candidate" if run.track == MAIN else "comparison",
            )  # fmt: skip
            session.add(version)
            session.flush()
            record(session, "clock", "version.registered", f"version:{version.id}", name=version.name, run=run.id,
                   parent=parent.name, object=weights)  # fmt: skip
            self._write_figures(
                session, {"root": self.root(session, parent), "before": parent}, version, figures, probed
            )
            row = session.get_one(Run, run.id)
            row.status, row.ended_at, row.figures = "done", now(), trained["figures"] | told
            row.rehearsed = trained["figures"]["rehearsed"]
            session.add(row)
        for spent in ("checkpoints", "weights", "repaired"):  # in the object store now, as far as they are needed
            shutil.rmtree(order.folder / spent, ignore_errors=True)
        return version

    def _write_figures(
        self, session: Session, others: dict[str, Version], version: Version, figures: list, probed: list
    ) -> None:
        """Write measurements and readings of probes; others: {when it was measured: the version that was}."""
        for measured, digest in figures:
            of = others.get(measured["when"], version)
            for metric in ("exact_match", "answer_loss"):
                session.add(Measurement(
                    version_id=of.id, snapshot_id=measured["snapshot_id"], split=measured["split"], metric=metric,
                    task_id=session.get_one(Snapshot, measured["snapshot_id"]).task_id, value=measured[metric],
                    items=measured["items"], object=digest,
                ))  # fmt: skip
        for read, digest in probed:
            told = {name: read[name] for name in read.keys() & ProbeReading.model_fields.keys()}
            session.add(ProbeReading(version_id=others.get(read["when"], version).id, object=digest, **told))

    # --- small things -------------------------------------------------------------------------------------------------

    def split_file(self, taken: Snapshot, split: str) -> Path:
        """Return the file of one part of a snapshot."""
        return self.workspace.objects.path(taken.object) / f"{split}.jsonl"

    def exam(self, taken: Snapshot, task: Task, split: str) -> Exam:
        """Return the exam of one part of a snapshot."""
        return Exam(snapshot_id=taken.id, task=task.name, split=split, file=self.split_file(taken, split))

    def version_of(self, run: Run) -> Version | None:
        """Return the version that a run made, or None."""
        with self.workspace.read() as session:
            return session.exec(select(Version).where(Version.run_id == run.id)).first()

    def next_name(self, session: Session, run: Run) -> str:
        """Return v1, v2, … on the main track and naive-<job>-<place> on a comparison."""
        if run.track != MAIN:
            return f"{run.track}-{run.job_id}-{run.position + 1}"
        return f"v{len(session.exec(select(Version.id).where(Version.track == MAIN)).all())}"

    def label(self, track: str, position: int) -> str:
        """Return what a person reads of a place in the stream."""
        where = f"{self.wish.stream[position].name} ({position + 1} of {len(self.wish.stream)})"
        return where if track == MAIN else f"{track} comparison: {where}"

    def share(self, number: int, position: int, within: float) -> float:
        """Return how much of the job is done, 0..1."""
        return (number * len(self.wish.stream) + position + within) / (len(self.tracks) * len(self.wish.stream))

    def beat(self, stage: str, share: float) -> Job:
        """Renew the lease and say where the job stands."""
        row = self.queue.beat(self.job, status="running", stage=stage, done_share=share)
        if row.is_cancel_asked:
            raise Cancelled
        return row

    def result(self) -> dict:
        """Return what the job made, by version name."""
        with self.workspace.read() as session:
            made = session.exec(
                select(Version)
                .join(Run, Run.id == Version.run_id)
                .where(Run.job_id == self.job.id)
                .order_by(Version.id)
            ).all()
        return {
            state: found for state in STATES
            if (found := [v.name for v in made if v.state == state]) or state in STATES[:3]
        }  # fmt: skip


class Listener:
    """Hears a training child: keeps its events as lines, and knows where it stands."""

    def __init__(self, file: Path) -> None:
        self.file, self.failed, self._last, self._said = file, None, None, time.monotonic()

    def __call__(self, event: AnyEvent) -> None:
        with open(self.file, "a", encoding="utf-8") as lines:
            lines.write(event.model_dump_json() + "\n")
        if isinstance(event, Failed):
            self.failed = event
        self._last = event

    def text(self, line: str) -> None:
        """Keep a line that is no event, for whoever looks for the cause of a failure."""
        with open(self.file.with_name("log.txt"), "a", encoding="utf-8") as log:
            log.write(line)

    def now(self, label: str) -> tuple[str, float]:
        """Return (what is done now, share of the run 0..1): nine tenths are training, the rest is measuring."""
        match self._last:
            case Progress(step=step, of=of, eta_s=eta):
                return f"{label}: training, step {step} of {of}, {eta:.0f} s to go", 0.05 + 0.85 * step / of
            case Started(step=step, of=of):
                return f"{label}: training, step {step} of {of}", 0.05
            case Measuring(task=task, done=done, of=of):
                return f"{label}: measuring {task}", 0.9 + 0.09 * done / of
            case None:
                return f"{label}: loading the model", 0.01
            case _:
                return f"{label}: measuring", 0.9


def is_read(session: Session, version_id: int, probe: str, ruler: str) -> bool:
    """Say whether a version has a reading of this probe with the same items and knobs."""
    found = select(ProbeReading.id).where(ProbeReading.version_id == version_id, ProbeReading.probe == probe)
    return session.exec(found.where(ProbeReading.ruler == ruler)).first() is not None


__all__ = ["Cancelled", "ClmError", "Cycle"]
