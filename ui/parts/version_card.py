"""The card of one version: its lineage, how it was made, what was measured of it and what was decided."""

from __future__ import annotations

from typing import Any

from clm_app.registry import versions
from clm_app.workspace import Workspace
from store.tables import Version
from ui import questions
from ui.parts.words import card, chip, moment, percent, points, safe, span, table


def version_card(workspace: Workspace, version: Version, live_id: int) -> str:
    """Return the card as HTML."""
    told = versions.card(workspace, version)
    state = chip("live", "live") if version.id == live_id else chip(version.state, version.state)
    return card(
        version.name,
        f"<p>{state} {chip('comparison', 'naive') if version.track != 'main' else ''}</p>"
        f"{_decision(told)}{_reason(told)}{_facts(told)}{_measurements(told)}"
        f"{_readings(workspace, version)}{_deployments(told)}{_how(told)}",
        f"made {moment(version.created_at)}",
    )


def _decision(told: dict[str, Any]) -> str:
    return "".join(f'<p class="clm-why">The gate: {safe(d["sentence"])}</p>' for d in told["decisions"])


def _reason(told: dict[str, Any]) -> str:
    why = told["version"]["settings"].get("why")
    return f'<p class="clm-why">Auto chose {safe(told["version"]["strategy"])}. {safe(why)}</p>' if why else ""


def _facts(told: dict[str, Any]) -> str:
    version, run, snapshot = told["version"], told["run"], told["snapshot"]
    facts = [("Parent", told["parent"] or "none: this is where the line begins"), ("Weights", _weights(version))]
    if run:
        facts += [
            ("Learned", f"{told['task']}, task {run['position'] + 1} of job {run['job_id']}"),
            ("Snapshot", f"{snapshot['object'][:12]}, {snapshot['train_rows']:,} rows to train" if snapshot else "–"),
            ("Against forgetting", version["strategy"] or run["strategy"]),
            ("Way to tune", version["method"] or run["method"]),
            ("Rehearsed", f"{sum(run['rehearsed'].values()):,} kept rows of {len(run['rehearsed'])} past tasks"
                          if run["rehearsed"] else "nothing"),
            ("Seed", str(run["seed"])),
            ("Took", span(run["figures"].get("seconds"))),
        ]  # fmt: skip
    return _list(facts)


def _weights(version: dict[str, Any]) -> str:
    trained, whole = version["trained_parameters"], version["parameters"]
    part = f", {trained:,} of them trained" if trained else ""
    return f"{version['kind']}, {whole:,} parameters{part}"


def _measurements(told: dict[str, Any]) -> str:
    by_task: dict[str, dict[tuple[str, str], dict]] = {}
    for m in told["measurements"]:
        by_task.setdefault(m["task"], {})[m["split"], m["metric"]] = m
    if not by_task:
        return ""
    rows = []
    for task, found in by_task.items():
        test, held = found.get(("test", "exact_match")), found.get(("validation", "exact_match"))
        loss = found.get(("test", "answer_loss"))
        rows.append([
            task, percent(test["value"]) if test else "–", percent(held["value"]) if held else "–",
            f"{loss['value']:.3f}" if loss else "–", f"{test['items']:,}" if test else "–",
        ])  # fmt: skip
    return table(
        ["Task", "Test", "Validation", "Loss", "Test rows"], rows, "Exact match; loss in nats per answer token"
    )


def _readings(workspace: Workspace, version: Version) -> str:
    return "".join(f"<p>{safe(reading_in_words(found))}</p>" for found in questions.readings(workspace, version))


def reading_in_words(found: dict[str, Any]) -> str:
    """Return one answer of `questions.readings` as a sentence: value, interval, and what changed since the parent.

    A change is called better or worse only where its 95 % interval lies on one side of zero.
    """
    is_share, since = found["unit"].startswith("share"), found["since"]
    of = percent if is_share else "{:.2f}".format
    unit = found["unit"].removeprefix("share").strip()
    said = f"{found['title']}: {of(found['value'])} {unit} (95 % interval {of(found['low'])} to {of(found['high'])})"
    if since is None:
        return f"{said}."
    change = points(since["value"]) if is_share else f"{since['value']:+.2f}".replace("-", "−")
    is_noise, is_worse = since["low"] <= 0 <= since["high"], (since["value"] > 0) == found["lower_is_better"]
    verdict = "no clear change" if is_noise else "worse" if is_worse else "better"
    return f"{said}, {change} since {since['version']}: {verdict}."


def _deployments(told: dict[str, Any]) -> str:
    rows = [
        [moment(d["created_at"]), "gate" if d["decision_id"] else d["actor"], d["reason"]] for d in told["deployments"]
    ]
    return table(["When", "Who", "Why"], rows, "When it was put live") if rows else ""


def _how(told: dict[str, Any]) -> str:
    run, version = told["run"], told["version"]
    if not run:
        return _details("Base", [("folder", version["base_path"]), ("digest", version["base_digest"])])
    settings = [(n, str(v)) for n, v in _flat(version["settings"] or run["settings"]) if n != "why"]
    told_by = [(name, str(value)) for name, value in _flat(run["figures"].get("strategy", {}))]
    machine = [("code", run["code_version"] or "–"), *((n, str(v)) for n, v in _flat(run["libraries"]))]
    machine += [(name, str(value)) for name, value in _flat(run["hardware"])]
    snapshot = told["snapshot"]["object"] if told["snapshot"] else "–"
    digests = [("snapshot", snapshot), ("weights", version["object"] or "–"), ("base", version["base_digest"])]
    return (
        _details("Settings", settings)
        + _details(f"What {version['strategy']} says of this run", told_by)
        + _details("Code, libraries and hardware", machine)
        + _details("Digests", digests)
    )


def _flat(document: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as (dotted name, value)."""
    found = []
    for name, value in document.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((f"{before}{name}", ", ".join(map(str, value)) if isinstance(value, list) else value))
    return found


def _details(title: str, facts: list[tuple[str, str]]) -> str:
    return f"<details><summary>{safe(title)}</summary>{_list(facts)}</details>" if facts else ""


def _list(facts: list[tuple[str, str]]) -> str:
    return '<dl class="clm-facts">' + "".join(f"<dt>{safe(n)}</dt><dd>{safe(v)}</dd>" for n, v in facts) + "</dl>"
