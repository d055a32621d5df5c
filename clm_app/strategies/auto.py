"""Auto: choose the way against forgetting from what is there, and say why.

What it knows of each way: LOG.md, "Which strategy", measured by benchmarks/retention.py.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Choice, Situation, Strategy


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
        if situation.parent_kind == "routed" or (situation.learned_tasks == 0 and situation.method in ("", "lora")):
            return Choice("adapters", {"rows_share": rows}, (
                "Task adapters: each task keeps weights of its own, so that only the router can confuse them, and no old "
                "rows are needed."
            ))  # fmt: skip
        cause = (
            f"method {situation.method} was asked for" if situation.learned_tasks == 0 else
            f"the version to go on from holds {situation.learned_tasks} learned task"
            f"{'s' * (situation.learned_tasks > 1)} in one set of weights"
        )  # fmt: skip
        if rows:
            count = max(1, round(rows * situation.new_rows))
            return Choice("replay", {"rows_per_task": count}, (
                f"Replay of at most {count} kept rows of each task: {cause}, so that task adapters cannot be used."
            ))  # fmt: skip
        return Choice("lwf", {}, f"Distillation from the version before: {cause}, and no old rows may be kept.")
