"""Auto: choose the way against forgetting from what is known before a run, and say why.

What it knows of each way: LOG.md, "Which strategy", measured by benchmarks/retention.py. Where a new task's prompts would
be sent is probed with the router, which reads text alone (see clm_app/routes.py). Two tasks that it cannot tell apart and
whose rows may not be kept get an adapter each: what the router confuses is lost, where distillation in one adapter lost
2.85 of 3.08 nats (LoRA, tests' stream).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Choice, Situation, Strategy, listed
from clm_app.strategies.adapters import Adapters, AdaptersSettings, confused, shared


class AutoSettings(BaseModel):
    """What may be kept."""

    model_config = ConfigDict(extra="forbid")

    may_keep_rows: bool = Field(True, description="whether rows of past tasks may be kept and rehearsed")
    rows_share: float = Field(0.05, ge=0, le=1, description="largest share of a past task's rows to keep")


class Auto(Strategy):
    """Task adapters wherever the line of versions allows them; rehearsal where it does not."""

    title = "Auto (chooses, and says why)"
    purpose = "Takes what lost least in our own measurements for this model, method and line of versions"
    needs = "decided before each run, and written on its card"
    Settings = AutoSettings

    @classmethod
    def choose(cls, situation: Situation, settings: AutoSettings) -> Choice:
        """Return task adapters, replay or distillation with the reason."""
        rows = settings.rows_share if settings.may_keep_rows else 0.0
        if not settings.may_keep_rows:
            situation = situation._replace(kept=dict.fromkeys(situation.kept or (), 0))
        is_small_enough = situation.method != "full" or situation.parameters < Adapters.full_below
        if situation.parent_kind == "routed" or (situation.learned_tasks == 0 and is_small_enough):
            return _adapters(situation, rows)
        return _one_set_of_weights(situation, rows)


def _adapters(situation: Situation, rows: float) -> Choice:
    """Return task adapters: an own one, a past task's, or that past task's because there is no room for more."""
    folders, found, task = situation.folders or {}, situation.routing, situation.task
    count, settings = len(set(folders.values())), {"rows_share": rows}
    if situation.kept and not any(situation.kept.values()):
        settings["share"] = 0.0  # rows that may not be kept are not rehearsed either, though earlier runs kept some
    if task in folders:
        return Choice("adapters", settings, (
            f"Task adapters: {task} was learned before, so its own adapter is trained on{_beside(situation, task)}."
        ))  # fmt: skip
    if found is None:
        return Choice("adapters", settings, (
            "Task adapters: each task keeps weights of its own, so that only the router can confuse them, and no old "
            "rows are needed."
        ))  # fmt: skip
    if has_no_room := count + 1 > situation.room:
        settings["most_adapters"] = count
    other, share = confused(found, task)
    past = shared(found, task, AdaptersSettings(**settings), count)
    asked = f"{share:.0%} of its held-out prompts look like {other}"
    if past is None:
        return Choice("adapters", settings, (
            f"Task adapters: {found.routed_to.get(task, 0.0):.0%} of its held-out prompts find it beside {_tasks(len(folders))}, "
            "so it keeps weights of its own, and only the router can confuse them."
        ))  # fmt: skip
    if has_no_room:
        why = asked if share > AdaptersSettings().same_above else f"{past} is the likest task"
        return Choice("adapters", settings, (
            f"Task adapters: memory and disk have room for {situation.room:.0f} of {situation.adapter_gb:.2g} GB each, "
            f"and there are {count}; {why}, so it shares the adapter of {past}{_beside(situation, past)}."
        ))  # fmt: skip
    if rows and _kept_in(situation, past):
        return Choice("adapters", settings, (
            f"Task adapters: {asked}, so it shares the adapter of {past}{_beside(situation, past)}."
        ))  # fmt: skip
    cause = f"no rows of {past} are kept" if rows else "no old rows may be kept"
    return Choice("adapters", settings | {"same_above": 1.0}, (
        f"Task adapters: {asked}, and {cause} to rehearse in one adapter for both, so it keeps weights of its own; "
        f"expect the router to confuse about {share:.0%} of its prompts with {other}."
    ))  # fmt: skip


def _one_set_of_weights(situation: Situation, rows: float) -> Choice:
    """Return replay where there are rows to rehearse, or nothing to rehearse yet; else distillation."""
    kept = {task: count for task, count in (situation.kept or {}).items() if task != situation.task}
    cause = (
        f"method {situation.method} was asked for" if situation.learned_tasks == 0 else
        f"the version to go on from holds {_tasks(situation.learned_tasks, 'learned ')} in one set of weights"
    )  # fmt: skip
    missing = [task for task, count in kept.items() if not count]
    if rows and (not kept or len(missing) < len(kept)):
        count = max(1, round(rows * situation.new_rows))
        gap = (
            f" No rows of {listed(missing)} are kept, so that nothing protects what it knew of them." if missing else ""
        )
        return Choice("replay", {"rows_per_task": count}, (
            f"Replay of at most {count} kept rows of each task: {cause}, so that task adapters cannot be used.{gap}"
        ))  # fmt: skip
    why = f"no rows of {listed(missing)} are kept" if rows else "no old rows may be kept"
    return Choice("lwf", {}, f"Distillation from the version before: {cause}, and {why}.")


def _beside(situation: Situation, past: str) -> str:
    """Return the words that say what is rehearsed in the adapter of a past task."""
    if not (kept := _kept_in(situation, past)):
        return ", and nothing holds what that has learned: no rows of it are kept"
    return f" and rehearses {kept} kept row{'s' * (kept > 1)}"


def _kept_in(situation: Situation, past: str) -> int:
    """Return how many rows are kept of all tasks in the adapter of a past one."""
    folders, kept = situation.folders or {}, situation.kept or {}
    return sum(kept.get(task, 0) for task, folder in folders.items() if folder == folders[past])


def _tasks(count: int, which: str = "") -> str:
    return f"{count} {which}task{'s' * (count > 1)}"
