"""A decision can be derived again: from the outcomes that its evidence is bound to, by the same rule, to the same sentence."""

from __future__ import annotations

from typing import NamedTuple

from clm_app.errors import BadInput, NotThere
from clm_app.judging.gate import Floor, GateSettings, Guessing, Noise, Pair, Verdict, judge, pair
from clm_app.workspace import Workspace
from store.tables import Decision


class Derived(NamedTuple):
    """What the gate says of the same outcomes today, and whether it is what it said then.

    A repair, or a refusal for what is no question of outcomes (damaged weights, a served artefact that differs), stands
    beside it in the evidence, as `repair` and `blocked`.
    """

    verdict: Verdict
    is_same: bool


def derived(workspace: Workspace, decision_id: int) -> Derived:
    """Judge again from the stored outcomes of a decision.

    Raises:
        NotThere: there is no such decision, or the outcomes it is bound to are gone.
        BadInput: it was made before decisions were bound to outcomes, or by a person.
    """
    with workspace.read() as session:
        found = session.get(Decision, decision_id)
    if found is None:
        raise NotThere(f"There is no decision {decision_id}. GET /api/jobs/<id> lists those of a job.")
    told = found.evidence
    if not told.get("new", {}).get("bound_to"):
        raise BadInput(f"Decision {decision_id} is not bound to outcomes, so it cannot be derived again.")
    again = judge(
        _pair(workspace, told["new"]), [_pair(workspace, line) for line in told["old"]], GateSettings(**told["settings"]),
        floors=[Floor(**floor) for floor in told["general"]], noise=Noise(**told["noise"]) if told["noise"] else None,
        looks=told["looks"], guessing=Guessing(**told["guessing"]) if told.get("guessing") else None,
    )  # fmt: skip
    return Derived(again, again.model_dump(include={"verdict", "sentence"}) == told["gate"])


def _pair(workspace: Workspace, line: dict) -> Pair:
    bound = line["bound_to"]
    if not bound:
        return Pair(task=line["task"], before=[], after=[], left_out=line["left_out"], **line["own"])
    try:
        before = workspace.objects.path(bound["before"]) if bound.get("before") else None
        after = workspace.objects.path(bound["after"])
    except KeyError as err:
        raise NotThere(
            f"The outcomes of {line['task']} that the decision is bound to are gone: {err}. Put the object back from a backup."
        ) from err
    return pair(line["task"], before, after, bound_to=bound, left_out=line["left_out"], **line["own"])
