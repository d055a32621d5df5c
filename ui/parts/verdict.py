"""One decision of the gate as a person reads it: the sentence, then the evidence task by task, then what it is bound to."""

from __future__ import annotations

from typing import Any

from ui.parts.words import card, chip, count, moment, percent, safe, table

VERDICTS = {  # {verdict: (word, colour)}
    "promote": ("promoted", "accepted"), "hold": ("refused", "refused"), "repair": ("needs repair", "waiting"),
    "inconclusive": ("undecided", "undecided"),
}  # fmt: skip
STATUS = {"kept": "accepted", "hurt": "refused", "unclear": "undecided"}
CAPTION = (
    "The same test items before and after. Lower bound: with 95 % certainty the change is no lower; a task is kept where that "
    "excludes a loss of the margin, Holm over the tasks"
)
OUTCOMES = {"passed": "accepted", "failed": "refused", "no place": "refused"}
SHOWN = 30  # flips


def verdict(decision: dict[str, Any], words: list[dict[str, Any]] = (), prompts: dict[str, str] | None = None) -> str:
    """Return a decision with its evidence as HTML.

    decision: a row of Decision as plain values. words: what people said of it. prompts: {item: its prompt}, for the flips.
    """
    told, (word, colour) = decision["evidence"], VERDICTS.get(decision["verdict"], (decision["verdict"], "candidate"))
    said = "".join(
        f"<p>{safe(w['by'])}: <b>{safe(w['says'])}</b>{', ' + safe(w['reason']) if w['reason'] else ''} "
        f"<small>{moment(w['at'])}</small></p>" for w in words if w["decision_id"] == decision["id"]
    )  # fmt: skip
    body = (
        f'<p>{chip(word, colour)} <span class="clm-verdict">{safe(decision["sentence"])}</span></p>{said}'
        f"{_causes(decision)}{_tasks(told)}{_floors(told)}{_repair(told)}{_flips(told, prompts or {})}{_bound(decision)}"
    )
    return card("What the gate decided", body, moment(decision["created_at"]))


def _causes(decision: dict[str, Any]) -> str:
    """Return the causes that were named, but for one that the sentence has already."""
    causes = decision["evidence"].get("causes") or []
    rest = [cause["sentence"] for cause in causes if cause["sentence"] not in decision["sentence"]]
    return "".join(f'<p class="clm-why">{safe(sentence)}</p>' for sentence in rest)


def _tasks(told: dict[str, Any]) -> str:
    if "gain_lower_points" not in told.get("new", {}):
        return ""  # a decision of an earlier release
    new = told["new"]
    rows = [[
        f"{safe(new['task'])} <small>new</small>", f"{new['items']:,}", percent(new["before"]), percent(new["after"]),
        _points(new["change_points"]), _points(new["gain_lower_points"]), "above 0", _p(new["p"]),
        chip("learned", "accepted") if new["learned"] else chip("not learned", "refused"),
    ]]  # fmt: skip
    for line in told["old"]:
        by = " <small>by likelihood</small>" if line["by"] == "likelihood" else ""
        rows.append([
            safe(line["task"]), f"{line['items']:,}", _score(line, "before"), _score(line, "after"),
            _points(line["change_points"]), _points(line["lower_points"]), f"−{line['margin_points']:g}",
            _p(line["p_kept"] if line["status"] != "hurt" else line["p"]),
            f"{chip(line['status'], STATUS[line['status']])}{by}{_needed(line)}",
        ])  # fmt: skip
    heads = ["Task", "Items", "Before", "After", "Change", "Lower bound", "Margin", "p", ""]
    return f'<div class="clm-wide">{table(heads, rows, CAPTION, is_safe=True)}</div>'


def _score(line: dict[str, Any], when: str) -> str:
    return percent(line[when]) if line.get("own", {}).get("is_share", True) else f"{line[when]:.3g}"


def _needed(line: dict[str, Any]) -> str:
    return f" <small>about {line['items_needed']:,} items needed</small>" if line["status"] == "unclear" else ""


def _floors(told: dict[str, Any]) -> str:
    found = []
    for floor in told.get("general") or []:
        of = percent if floor["unit"].startswith("share") else "{:.2f}".format
        found.append(f"{floor['title']}: {of(floor['before'])} → {of(floor['after'])}")
    if flips := told.get("negative_flips"):
        found.append(
            f"negative flips over all old tasks: {flips['lost']:,} of {flips['items']:,} ({flips['percent']:.1f} %)"
        )
    if noise := told.get("noise"):
        found.append(
            f"noise floor, the same weights measured twice: {count(noise['flips'], 'flip')} in {noise['items']:,}"
        )
    if served := told.get("served"):
        found.append(f"as served: {served.rstrip('.')}")
    return "".join(f"<p>{safe(line[0].upper() + line[1:])}.</p>" for line in found)


def _repair(told: dict[str, Any]) -> str:
    repair = told.get("repair")
    if not repair:
        return ""
    heading = f"Repaired by {repair['rung']}" if repair["passed"] else "No repair passed"
    rows = [
        [safe(step["rung"]), chip(step["outcome"], OUTCOMES.get(step["outcome"], "candidate")), safe(step.get("reason", "–")),
         f"{step.get('cost_share', 0.0):.1%}"] for step in repair["tried"]
    ]  # fmt: skip
    certificate = repair.get("certificate") or {}
    facts = "".join(
        f"<dt>{safe(name.replace('_', ' '))}</dt><dd>{safe(value)}</dd>" for name, value in certificate.items()
        if not isinstance(value, dict | list)
    )  # fmt: skip
    heads = ["Rung", "", "Why", "Cost"]
    steps = (
        table(heads, rows, "The ladder, cheapest rung first; cost as a share of the training", is_safe=True)
        if rows
        else ""
    )
    return f'<details><summary>{safe(heading)}</summary>{steps}<dl class="clm-facts">{facts}</dl></details>'


def _flips(told: dict[str, Any], prompts: dict[str, str]) -> str:
    flips = told.get("flips") or {"shown": [], "counted": 0}
    if not flips["shown"]:
        return ""
    rows = [
        [chip(f["kind"], "refused" if f["kind"] == "lost" else "accepted"), safe(f["task"]),
         safe(prompts.get(f["item"], f["item"])), f"{f['loss_before']:.2f} → {f['loss_after']:.2f}"]
        for f in flips["shown"][:SHOWN]
    ]  # fmt: skip
    drawn = table(["", "Task", "Prompt", "Nats per token"], rows, "Worst first", is_safe=True)
    return (
        f"<details><summary>{count(flips['counted'], 'flipped item')}</summary>"
        f'<div class="clm-tall clm-wide">{drawn}</div></details>'
    )


def _bound(decision: dict[str, Any]) -> str:
    told = decision["evidence"]
    if "weights" not in told:
        return ""
    facts = [
        (f"weights {when}", f"{w['version']}: base {w['base'][:12]}, {(w['object'] or 'no adapter')[:12]}")
        for when, w in told["weights"].items()
    ]
    facts += [
        ("code", told["code"]),
        ("error rate", f"{told['alpha']:g}, one-sided, {count(told['looks'], 'look')} at the items"),
    ]
    for line in (told["new"], *told["old"]):
        bound = ", ".join(f"{name} {str(digest)[:12]}" for name, digest in line["bound_to"].items() if digest)
        left = (
            f"; {count(len(line['left_out']), 'item')} left out, as training rows hold them" if line["left_out"] else ""
        )
        facts.append((line["task"], bound + left))
    drawn = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in facts)
    again = f'<p><a href="/api/decisions/{decision["id"]}/derived" target="_blank">Derive this decision again</a></p>'
    return f'<details><summary>What this is bound to</summary><dl class="clm-facts">{drawn}</dl>{again}</details>'


def _points(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _p(value: float) -> str:
    return "&lt;\N{NO-BREAK SPACE}0.001" if value < 0.001 else f"{value:.3f}"
