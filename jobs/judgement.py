"""A candidate before the gate: everything that is asked of it, the decision, and who has to agree before it goes live.

Each question keeps its answer in a row (measurements, readings of benchmarks, parity), so that a judgement that was cut
off is simply made again; the decision, the version's state and its deployment are written together, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property

from sqlmodel import Session, select

from clm_app.catalog import shelf
from clm_app.data.ingest import rows_of
from clm_app.data.rows import Row
from clm_app.errors import BadData, BadModel
from clm_app.judging import approval, parity
from clm_app.judging import benchmarks as shelf_of_benchmarks
from clm_app.judging.causes import Case, Cause, causes, guessing
from clm_app.judging.causes import told as with_causes
from clm_app.judging.gate import Floor, Noise, Pair, Verdict, judge, pair
from clm_app.probes._base import SHELF, Probe
from clm_app.provenance import code_version
from clm_app.registry import versions
from clm_app.registry.versions import lineage, measurement
from clm_app.situations import refuse_damage
from clm_app.wishes import LearnWish
from clm_app.workspace import Workspace
from jobs.examination import examine
from jobs.queue import Queue
from store.db import record
from store.tables import (
    Benchmark,
    BenchmarkReading,
    Decision,
    Job,
    ProbeReading,
    Run,
    Snapshot,
    Task,
    Version,
)  # fmt: skip

MAIN = "main"


class Judgement:
    """One candidate of one run. `beat` is told what is asked now, and raises where the job was cancelled."""

    def __init__(
        self, workspace: Workspace, queue: Queue, job: Job, wish: LearnWish, run: Run, version: Version, spawn: Callable,
        beat: Callable[[str], object],
    ) -> None:  # fmt: skip
        self.workspace, self.queue, self.job, self.wish = workspace, queue, job, wish
        self.run, self.version, self.spawn, self.beat = run, version, spawn, beat
        with workspace.read() as session:
            self.parent = session.get_one(Version, run.parent_version_id)
            self.figures = session.get_one(Run, run.id).figures

    def decide(self) -> Version:
        """Ask everything, write what is decided, move the live alias if it may; return the version as it is then."""
        told, repair, looks, verdicts = self.outcomes(), self.figures.get("repair"), 1, []
        if repair and repair["passed"]:
            verdicts.append(self.judged(self.outcomes(repair["first"]), looks, repair["first_weights"]))
            looks += repair["certificate"]["test_looks"]
        verdict = _after_repair(self.judged(told, looks), repair)
        if verdict.verdict == "promote":
            verdict = self.blocked(verdict)
        verdict = self.explained(verdict, told[0])
        return self.write([*verdicts, verdict])

    # --- what is asked ------------------------------------------------------------------------------------------------

    def outcomes(self, instead: dict[str, str] | None = None) -> tuple[Pair, list[Pair]]:
        """Return (the new task, every old task) as parent and candidate answered their test items.

        instead: {snapshot id: digest of outcomes} of the candidate as it was before it was repaired.
        """
        with self.workspace.read() as session:
            known = lineage(session, self.parent)
            old = [(s, t) for s, t in known if s.task_id != self.run.task_id]
            new = session.get_one(Snapshot, self.run.snapshot_id), session.get_one(Task, self.run.task_id)
            pairs = [self._paired(session, taken, task, instead or {}) for taken, task in (new, *old)]
        return pairs[0], pairs[1:]

    def _paired(self, session: Session, taken: Snapshot, task: Task, instead: dict[str, str]) -> Pair:
        before, after = (measurement(session, v.id, taken.id) for v in (self.parent, self.version))
        bound = {"snapshot": taken.object, "before": before.object if before else "",
                 "after": instead.get(str(taken.id)) or after.object}  # fmt: skip
        files = [self.workspace.objects.path(bound[when]) if bound[when] else None for when in ("before", "after")]
        return pair(task.name, *files, bound_to=bound)

    def judged(self, told: tuple[Pair, list[Pair]], looks: int, first_weights: str | None = None) -> Verdict:
        """Ask the gate, and bind its evidence to the weights and the code.

        first_weights: digest of the candidate's weights before they were repaired, which no probe and no benchmark read.
        """
        (new, old), noise = told, self.figures.get("noise")
        others, floors = ([], []) if first_weights else (self.benchmarks(), self.floors())
        verdict = judge(
            new, [*old, *others], self.wish.gate, floors=floors, looks=looks, noise=Noise(**noise) if noise else None,
            guessing=guessing(self.rows),
        )  # fmt: skip
        weights = {
            when: {"version": v.name, "base": v.base_digest, "object": v.object}
            for when, v in (("before", self.parent), ("after", self.version))
        }
        weights["after"]["object"] = first_weights or weights["after"]["object"]
        return verdict.model_copy(
            update={
                "evidence": verdict.evidence
                | {
                    "weights": weights,
                    "code": code_version(),
                    "gate": verdict.model_dump(include={"verdict", "sentence"}),
                }
            }
        )

    def floors(self) -> list[Floor]:
        """Return each general probe before and after, where both were read with the same ruler."""
        found = []
        with self.workspace.read() as session:
            for name, cls in shelf(SHELF).items():
                before, after = (newest_reading(session, v.id, name) for v in (self.parent, self.version))
                if before and after and before.ruler == after.ruler:
                    found.append(self._floor(cls, before, after))
        return found

    def _floor(self, cls: type[Probe], before: ProbeReading, after: ProbeReading) -> Floor:
        lines = [load_lines(self.workspace.objects.path(reading.object)) for reading in (before, after)]
        change = cls(cls.Settings()).change(*lines)
        return Floor(
            probe=cls.name, title=cls.title, unit=after.unit, before=before.value, after=after.value, change=change.value,
            low=change.low, high=change.high, lower_is_better=after.lower_is_better,
            bound_to={"before": before.object, "after": after.object},
        )  # fmt: skip

    def benchmarks(self) -> list[Pair]:
        """Return every benchmark that this job holds its candidates to, as parent and candidate answer it when served."""
        rows = [shelf_of_benchmarks.find(self.workspace, name) for name in self.wish.benchmarks]
        for version in (self.parent, self.version) if rows else ():
            with contextlib.suppress(BadData):  # of one without a usable item: the others are heard, by the same child
                self._examined(version, rows)
        return [self._of_benchmark(row) for row in rows]

    def _examined(self, version: Version, rows: list[Benchmark]) -> list[BenchmarkReading]:
        """Return a version's readings as it is served; what was heard before costs nothing."""
        return examine(
            self.workspace, self.spawn, version, rows, "test", "served", lambda stage, _: self.beat(f"gate: {stage}")
        )

    def _of_benchmark(self, row: Benchmark) -> Pair:
        """Return one benchmark's pair; without items where every one stands in training rows, which decides nothing."""
        kind, left_out = (
            shelf_of_benchmarks.kind_of(row),
            shelf_of_benchmarks.clean_items(self.workspace, row, "test").left_out,
        )
        own = {"margin_points": kind.margin_points, "lower_is_better": kind.lower_is_better,
               "is_share": kind.unit.startswith("share")}  # fmt: skip
        title = shelf_of_benchmarks.title(row)
        try:
            before, after = (self._examined(version, [row])[0] for version in (self.parent, self.version))
        except BadData:
            return Pair(task=title, before=[], after=[], left_out=left_out, **own)
        files = [self.workspace.objects.path(found.object) for found in (before, after)]
        bound = {"benchmark": row.object, "before": before.object, "after": after.object}
        return pair(title, *files, left_out=left_out, bound_to=bound, **own)

    def blocked(self, verdict: Verdict) -> Verdict:
        """Return the verdict, or a refusal where the stored weights are damaged or the served artefact differs."""
        self.beat("gate: are the stored weights whole")
        try:
            refuse_damage(self.workspace, self.version)
        except BadModel as err:
            return _block(verdict, f"Refused: {err}", Cause("weights_damaged", str(err)))
        if not self.wish.check_served:
            return verdict
        reading = parity.check(
            self.workspace, self.spawn, self.version, lambda stage, _: self.beat(f"gate: as served, {stage}")
        )
        if reading.verdict == "differs":
            cause = Cause(reading.evidence["cause"], reading.sentence)
            return _block(verdict, f"Refused: what would be served is not what was trained. {reading.sentence}", cause)
        return verdict.model_copy(update={"evidence": verdict.evidence | {"served": reading.sentence}})

    def explained(self, verdict: Verdict, new: Pair) -> Verdict:
        """Return the verdict with the causes that can be named of what went wrong."""
        if "blocked" in verdict.evidence:
            return verdict
        return with_causes(verdict, causes(Case(verdict, new, self.rows, self.figures, self.wish.training.model_dump())))

    @cached_property
    def rows(self) -> list[Row]:
        """The training rows of the new task."""
        with self.workspace.read() as session:
            return rows_of(self.workspace, session.get_one(Snapshot, self.run.snapshot_id), "train")

    # --- what is decided ----------------------------------------------------------------------------------------------

    def write(self, verdicts: list[Verdict]) -> Version:
        """Write the decisions, the state and, where nobody else has to agree, the deployment."""
        with self.workspace.write() as session:
            self.queue.held(session, self.job)
            version = session.get_one(Version, self.version.id)
            for verdict in verdicts:
                decision = Decision(version_id=version.id, against_version_id=self.parent.id, **verdict.model_dump())
                session.add(decision)
                session.flush()
            version.state = approval.state_after(verdict.verdict, self.wish.gate)
            session.add(version)
            session.flush()
            record(session, "gate", f"version.{version.state}", f"version:{version.id}", decision=decision.id,
                   sentence=verdict.sentence)  # fmt: skip
            if version.state == approval.ACCEPTED and self.wish.deploy:
                versions.deploy(session, version, decision_id=decision.id, actor="gate", reason=verdict.sentence)
        return version


def _after_repair(verdict: Verdict, repair: dict | None) -> Verdict:
    """Return the verdict with what the ladder did: its certificate where it passed, a refusal where nothing did."""
    sentence, told = verdict.sentence, verdict.evidence | {"repair": repair}
    if verdict.verdict == "repair":
        tried = ", ".join(step["rung"] for step in repair["tried"]) if repair else ""
        sentence = sentence.replace("Needs repair", "Refused", 1).removesuffix(".")
        sentence += f"; no repair passed (tried: {tried})." if tried else "; no repair was tried."
        return verdict.model_copy(update={"verdict": "hold", "sentence": sentence, "evidence": told})
    if repair and verdict.verdict == "promote":
        sentence = f"{sentence.removesuffix('.')}; it was repaired first, by {repair['rung']}."
    return verdict.model_copy(update={"sentence": sentence, "evidence": told})


def _block(verdict: Verdict, sentence: str, cause: Cause) -> Verdict:
    evidence = verdict.evidence | {"blocked": sentence}
    return with_causes(
        verdict.model_copy(update={"verdict": "hold", "sentence": sentence, "evidence": evidence}), [cause]
    )


def newest_reading(session: Session, version_id: int, probe: str) -> ProbeReading | None:
    """Return the newest reading of a probe on a version, or None."""
    found = select(ProbeReading).where(ProbeReading.version_id == version_id, ProbeReading.probe == probe)
    return session.exec(found.order_by(ProbeReading.id.desc())).first()


def load_lines(file) -> list[dict]:
    """Return the JSON lines of an outcomes file."""
    import json

    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
