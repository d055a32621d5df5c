"""The model card of a version, as Markdown: made from rows that exist, and what no row says is said to be not measured.

Source: Hugging Face's model card layout, a YAML head with a model index and sections beneath it (Mitchell et al. 2019,
arXiv:1810.03993). The card can leave the house: it names folders and files without their places, and test rows by their
keys unless their text is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlmodel import Session, select

from clm_app import __version__
from clm_app.data.rows import load
from clm_app.data.withdrawal import withdrawn_keys
from clm_app.errors import BadModel
from clm_app.judging.gate import exact_outcomes
from clm_app.judging.standing import Standing, standings, wilson
from clm_app.registry import versions
from clm_app.registry.versions import measurement
from clm_app.workspace import Workspace
from store.tables import (
    Approval,
    Decision,
    Deployment,
    Measurement,
    ParityReading,
    ProbeReading,
    Run,
    Snapshot,
    Task,
    Version,
)  # fmt: skip

NOT_MEASURED = "not measured"
LOSSES_SHOWN = 20  # lost rows that are named, of each task
PLAIN = (str, int, float, bool)


class Evidence(NamedTuple):
    """Everything the record holds of one version."""

    version: Version
    row: Standing
    line: list[tuple[Version, Run | None, Task | None, Snapshot | None]]  # from the base to the version
    learned: list[tuple[Snapshot, Task]]
    measured: dict[tuple[int, str, str], Measurement]  # {(snapshot, split, metric): the newest}
    probes: list[ProbeReading]
    decisions: list[Decision]
    approvals: list[Approval]
    parity: list[ParityReading]
    deployments: list[Deployment]
    names: dict[int, str]  # of versions
    withdrawn: dict[int, int]  # {snapshot: its training rows that were taken back since}
    losses: list[tuple[Task, int, int, list[str]]]  # (task, lost, gained, keys of lost rows), since the parent
    licence: str | None

    @property
    def run(self) -> Run | None:
        """The run that made the version; None for a base."""
        return self.line[-1][1]


def model_card(workspace: Workspace, version: Version, *, has_prompts: bool = False) -> str:
    """Return the card as Markdown. has_prompts: write out the prompts of lost test rows, which may be private."""
    found = evidence(workspace, version)
    sections = [
        ("Where it comes from", _lineage(found)), ("What it learned from", _data(found)), ("How it was trained", _training(found)),
        ("What was measured", _measurements(found)), ("Benchmarks", _benchmarks(found)), ("General knowledge", _probes(found)),
        ("What it lost", _losses(workspace, found, has_prompts)), ("What was decided", _decisions(found)),
        ("What is served", _parity(found)), ("Not known", _unknown(found)),
    ]  # fmt: skip
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    return f"---\n{_head(found)}---\n\n# {version.name}\n\n{_opening(found)}\n\n{body}\n"


def evidence(workspace: Workspace, version: Version) -> Evidence:
    """Return what the record holds of a version."""
    row = next(row for row in standings(workspace).rows if row.version == version.name)
    with workspace.read() as session:
        line = _line(session, version)
        learned = versions.lineage(session, version)
        measured = {(m.snapshot_id, m.split, m.metric): m for m in _all(session, Measurement, version)}
        probes = {p.probe: p for p in _all(session, ProbeReading, version)}
        return Evidence(
            version, row, line, learned, measured, list(probes.values()), _all(session, Decision, version),
            _all(session, Approval, version), _all(session, ParityReading, version), _all(session, Deployment, version),
            dict(session.exec(select(Version.id, Version.name)).all()), _withdrawn(workspace, session, learned),
            _lost(workspace, session, version, learned), licence(workspace, version),
        )  # fmt: skip


def licence(workspace: Workspace, version: Version) -> str | None:
    """Return the licence that the base's own card names; None where it names none, or there is no card."""
    from huggingface_hub.repocard import metadata_load

    with workspace.read() as session:
        root = _line(session, version)[0][0]
    try:
        base = versions.weights(workspace, root).base
    except (BadModel, KeyError):
        return None
    card = base.parent / "card.md" if base == versions.STARTER else base / "README.md"
    told = metadata_load(card) if card.exists() else None
    said = (told or {}).get("license")
    return said if isinstance(said, str) else None


# --- from the record -----------------------------------------------------------------------------------------------------


def _all(session: Session, table: type, version: Version) -> list:
    return list(session.exec(select(table).where(table.version_id == version.id).order_by(table.id)))


def _line(session: Session, version: Version) -> list[tuple[Version, Run | None, Task | None, Snapshot | None]]:
    found, step = [], version
    while step is not None:
        run = session.get(Run, step.run_id) if step.run_id else None
        made = (session.get_one(Task, run.task_id), session.get_one(Snapshot, run.snapshot_id)) if run else (None, None)
        found.append((step, run, *made))
        step = session.get(Version, step.parent_id) if step.parent_id else None
    return found[::-1]


def _withdrawn(workspace: Workspace, session: Session, learned: list[tuple[Snapshot, Task]]) -> dict[int, int]:
    keys, found = withdrawn_keys(session), {}
    for taken, _ in learned if keys else ():
        try:
            rows = load(workspace.objects.path(taken.object) / "train.jsonl")
        except KeyError:
            continue
        found[taken.id] = sum(row.key in keys for row in rows)
    return found


def _lost(
    workspace: Workspace, session: Session, version: Version, learned: list[tuple[Snapshot, Task]]
) -> list[tuple[Task, int, int, list[str]]]:
    """Return, of each task that both the version and its parent were measured on, what flipped."""
    found = []
    for taken, task in learned if version.parent_id else ():
        pair = [measurement(session, place, taken.id) for place in (version.parent_id, version.id)]
        if None in pair:
            continue
        try:
            old, new = (exact_outcomes(workspace.objects.path(m.object)) for m in pair)
        except KeyError:
            continue
        lost = sorted(item for item in old.keys() & new.keys() if old[item] and not new[item])
        gained = sum(new[item] and not old[item] for item in old.keys() & new.keys())
        found.append((task, len(lost), gained, lost))
    return found


# --- the head --------------------------------------------------------------------------------------------------------------


def _head(found: Evidence) -> str:
    """Return the YAML head; Hugging Face's own library writes it, so that its readers read it."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation", dataset_type="private", dataset_name=task.name, dataset_split="test",
            dataset_revision=taken.object, metric_type="exact_match", metric_value=round(m.value, 6),
            metric_name="exact match, share of test rows", metric_args=_interval(m),
        )
        for taken, task in found.learned if (m := found.measured.get((taken.id, "test", "exact_match")))
    ]  # fmt: skip
    results += [
        EvalResult(
            task_type="text-generation", dataset_type="private", dataset_name=r.benchmark, dataset_split="test",
            metric_type=r.kind, metric_value=round(r.value, 6), metric_name=f"{r.unit}, {r.on}",
            metric_args={"low": round(r.low, 6), "high": round(r.high, 6), "items": r.items},
        )
        for r in found.row.readings
    ]  # fmt: skip
    library = {"adapter": "peft"}.get(found.version.kind, "transformers")
    head = ModelCardData(
        license=found.licence, base_model=_base_name(found), library_name=library, pipeline_tag="text-generation",
        tags=["clm", "continual-learning"], datasets=[f"sha256:{taken.object}" for taken, _ in found.learned] or None,
        model_name=found.version.name if results else None, eval_results=results or None,
    )  # fmt: skip
    return head.to_yaml() + "\n"


def _interval(m: Measurement) -> dict[str, float]:
    low, high = wilson(m.value, m.items)
    return {"low": round(low, 6), "high": round(high, 6), "items": m.items}


def _base_name(found: Evidence) -> str:
    root = found.line[0][0]
    return "CLM starter" if root.base_path == "starter" else Path(root.base_path).name


# --- the sections ----------------------------------------------------------------------------------------------------------


def _opening(found: Evidence) -> str:
    version, row = found.version, found.row
    state = "live" if row.is_champion else version.state
    learned = ", ".join(task.name for _, task in found.learned) or "nothing yet"
    size = NOT_MEASURED if row.size_bytes is None else f"{row.size_bytes:,} bytes on disk"
    return (
        f"A version of {_cell(_base_name(found))} that has learned {len(found.learned)} task(s): {_cell(learned)}. State: {state}. "
        f"{version.parameters:,} parameters, {version.trained_parameters:,} of them trained in its own run; {size}. Made on "
        f"{version.created_at:%Y-%m-%d}. This card was written by CLM {__version__}; every figure in it is from the record."
    )


def _lineage(found: Evidence) -> str:
    rows = [
        [v.name, task.name if task else "the base", run.strategy if run else "–", run.method if run else "–",
         str(run.seed) if run else "–", v.state, _short(v.object or v.base_digest)]
        for v, run, task, _ in found.line
    ]  # fmt: skip
    digests = f"Base: sha256 `{found.version.base_digest}`. Weights: `{found.version.object or 'the base itself'}`."
    return (
        _table(["Version", "Learned", "Against forgetting", "Tuned by", "Seed", "State", "Digest"], rows)
        + f"\n\n{digests}"
    )


def _data(found: Evidence) -> str:
    if not found.learned:
        return "Nothing was learned yet."
    rows = [
        [task.name, f"`{taken.object}`", f"{taken.train_rows:,}", f"{taken.validation_rows:,}", f"{taken.test_rows:,}",
         Path(taken.source).name or "–", str(found.withdrawn.get(taken.id, 0))]
        for taken, task in found.learned
    ]  # fmt: skip
    heads = ["Task", "Snapshot, sha256", "Train", "Validation", "Test", "Read from", "Withdrawn since"]
    return (
        f"{_table(heads, rows)}\n\nA withdrawn row is in no rehearsal of a run that was ordered after its withdrawal; weights "
        "that had learned it are not changed by that."
    )


def _training(found: Evidence) -> str:
    run = found.run
    if run is None:
        return "It was not trained here."
    facts = [("strategy", run.strategy), ("method", run.method), ("seed", run.seed)]
    facts += [(name, value) for name, value in _flat(run.settings) if name != "why"]
    facts += [
        (f"run.{name}", run.figures.get(name, NOT_MEASURED)) for name in ("steps", "seconds", "tokens_per_s", "loss")
    ]
    facts += [("rows rehearsed", sum(run.rehearsed.values())), ("code", run.code_version or NOT_MEASURED)]
    facts += [(f"library.{name}", value) for name, value in _flat(run.libraries)]
    facts += [(f"machine.{name}", value) for name, value in _flat(run.hardware)]
    why = run.settings.get("why")
    chosen = f"Chosen by auto: {_cell(why)}\n\n" if why else ""
    return chosen + _table(["What", "Value"], [[name, str(value)] for name, value in facts])


def _measurements(found: Evidence) -> str:
    rows = [_measured(found, taken, task) for taken, task in found.learned]
    if not rows:
        return f"Tasks: {NOT_MEASURED}."
    kept, mean = found.row.kept, found.row.mean
    said = [
        f"Mean over {sum(s.is_shared for s in found.row.scores.values())} tasks shared with the live version: "
        f"{_percent(mean.value)} ({_percent(mean.low)} to {_percent(mean.high)})." if mean else f"Mean: {NOT_MEASURED}.",
        f"Since each earlier task was just learned (backward transfer, {kept.tasks} tasks): {kept.points:+.1f} points "
        f"({kept.low:+.1f} to {kept.high:+.1f})." if kept else f"Change since each task was learned: {NOT_MEASURED}.",
    ]  # fmt: skip
    heads = ["Task", "Exact match, test", "95 % interval", "Test rows", "Loss, nats per token", "Validation"]
    return "\n\n".join([_table(heads, rows), *said])


def _measured(found: Evidence, taken: Snapshot, task: Task) -> list[str]:
    test, loss, held = (
        found.measured.get((taken.id, *place))
        for place in (("test", "exact_match"), ("test", "answer_loss"), ("validation", "exact_match"))
    )
    if test is None:
        return [task.name, NOT_MEASURED, "–", "–", "–", "–"]
    ends = " to ".join(map(_percent, wilson(test.value, test.items)))
    return [
        task.name, _percent(test.value), ends, f"{test.items:,}", f"{loss.value:.3f}" if loss else NOT_MEASURED,
        _percent(held.value) if held else NOT_MEASURED,
    ]  # fmt: skip


def _benchmarks(found: Evidence) -> str:
    rows = [
        [
            r.benchmark,
            r.kind,
            f"{r.value:.4g}",
            f"{r.low:.4g} to {r.high:.4g}",
            r.unit,
            f"{r.items:,}",
            f"{r.on}, {r.backend}",
        ]
        for r in found.row.readings
    ]
    heads = ["Benchmark", "Kind", "Value", "95 % interval", "Unit", "Items", "Measured on"]
    return _table(heads, rows) if rows else f"Benchmarks: {NOT_MEASURED}."


def _probes(found: Evidence) -> str:
    rows = [[p.probe, f"{p.value:.4g}", f"{p.low:.4g} to {p.high:.4g}", p.unit, f"{p.items:,}"] for p in found.probes]
    heads = ["Probe", "Value", "95 % interval", "Unit", "Items"]
    return _table(heads, rows) if rows else f"General text and ability: {NOT_MEASURED}."


def _losses(workspace: Workspace, found: Evidence, has_prompts: bool) -> str:
    if not found.losses:
        return f"Known losses: {NOT_MEASURED}, since no parent was measured on the same rows."
    parent = found.names[found.version.parent_id]
    rows = [[task.name, str(lost), str(gained)] for task, lost, gained, _ in found.losses]
    said = [_table(["Task", f"Right in {parent}, wrong now", f"Wrong in {parent}, right now"], rows)]
    for task, lost, _, keys in found.losses:
        if lost:
            shown = _prompts(workspace, found, task, keys[:LOSSES_SHOWN]) if has_prompts else keys[:LOSSES_SHOWN]
            more = f" and {lost - LOSSES_SHOWN} more" if lost > LOSSES_SHOWN else ""
            said.append(f"{_cell(task.name)}, rows lost: {', '.join(f'`{one}`' for one in shown)}{more}.")
    return "\n\n".join(said)


def _prompts(workspace: Workspace, found: Evidence, task: Task, keys: Sequence[str]) -> list[str]:
    taken = next(taken for taken, known in found.learned if known.id == task.id)
    rows = {row.key: row.prompt for row in load(workspace.objects.path(taken.object) / "test.jsonl")}
    return [_cell(rows.get(key, key)).replace("`", "'") for key in keys]


def _decisions(found: Evidence) -> str:
    said = [f"- {d.created_at:%Y-%m-%d}, {d.verdict}, against {found.names[d.against_version_id]}: {_cell(d.sentence)}"
            for d in found.decisions]  # fmt: skip
    said += [
        f"- {a.at:%Y-%m-%d}, {a.says} by {_cell(a.by)}{f': {_cell(a.reason)}' if a.reason else ''}"
        for a in found.approvals
    ]
    said += [f"- {d.created_at:%Y-%m-%d}, put live by {_cell(d.actor)}: {_cell(d.reason)}" for d in found.deployments]
    return "\n".join(said) if said else "Nothing was decided of it."


def _parity(found: Evidence) -> str:
    said = [f"- {p.backend}: {p.verdict}. {_cell(p.sentence)}" for p in found.parity]
    return "\n".join(said) if said else f"Whether the served artefact answers as the trained one: {NOT_MEASURED}."


def _unknown(found: Evidence) -> str:
    unmeasured = [t.name for taken, t in found.learned if (taken.id, "test", "exact_match") not in found.measured]
    gaps = [
        ("Energy and carbon", True), ("Licence of the base: its folder names none", found.licence is None),
        ("Benchmarks", not found.row.readings), ("General text and ability", not found.probes),
        ("Parity of the served artefact", not found.parity),
        (f"Tasks: {', '.join(map(_cell, unmeasured))}", bool(unmeasured)),
    ]  # fmt: skip
    return "\n".join(
        f"- {name}: {NOT_MEASURED}." if ":" not in name else f"- {name}." for name, is_open in gaps if is_open
    )


# --- Markdown ----------------------------------------------------------------------------------------------------------------


def _flat(document: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Yield nested settings as (dotted name, value); what is no plain value is told by its length."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, list):
            plain = all(isinstance(one, PLAIN) for one in value)
            yield f"{before}{name}", ", ".join(map(str, value)) if plain else f"{len(value)} entries"
        elif value is not None:
            yield f"{before}{name}", value


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return text that stays in its cell and is no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _short(digest: str) -> str:
    return f"`{digest[:12]}`"
