"""Models: where each version came from, what it can do, what the gate said of it and what people say; put one live."""

from __future__ import annotations

from functools import partial

import gradio as gr

from clm_app.data import withdrawal
from clm_app.errors import BadInput, plain
from clm_app.judging import approval
from clm_app.registry import versions
from ui import actions, questions
from ui.parts.kept_rows import kept_rows
from ui.parts.lineage import lineage
from ui.parts.live import Live, drawing
from ui.parts.verdict import verdict
from ui.parts.version_card import version_card
from ui.parts.words import card, moment, notice, table
from ui.tabs._base import Tab

PICK = """
const pick = event => {
  if (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ') return;
  const node = event.target.closest('[data-version], [data-row]');
  if (!node) return;
  event.preventDefault();
  trigger('pick', {chosen: node.dataset.version || node.dataset.row});
};
element.addEventListener('click', pick);
element.addEventListener('keydown', pick);
"""  # of a node of the graph, or of a kept row
KEEP_OPEN = """
const open = new Set();
element.addEventListener('toggle', event => {
  const task = event.target.dataset.task;
  event.target.open ? open.add(task) : open.delete(task);
}, true);
new MutationObserver(() => element.querySelectorAll('details').forEach(part => {
  if (open.has(part.dataset.task)) part.open = true;
})).observe(element, {childList: true, subtree: true});
"""  # a drawing that is sent anew would close what a person has opened


class Models(Tab):
    """The graph; beneath it the card of the chosen version, its verdict, what can be done with it, and what it keeps."""

    title = "Models"
    order = 30

    def build(self) -> list:
        """Make the graph, the card and the two ways to change what is live."""
        self.graph = drawing(js_on_load=PICK, elem_id="clm-graph")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                self.version = gr.Dropdown(
                    self._names(), value=None, label="Version", info="or choose one in the graph", elem_id="clm-version"
                )
                self.card = drawing(elem_id="clm-version-card")
                self.verdict = drawing(elem_id="clm-verdict")
            with gr.Column(scale=2, min_width=300):
                self.reason = gr.Textbox(label="Reason", info="kept in the history and the audit trail", max_length=500)
                with gr.Row():
                    make = gr.Button("Make this version live", variant="primary", elem_id="clm-make-live")
                    back = gr.Button("Roll back to the previous version", elem_id="clm-roll-back")
                self.wanted = gr.State(None)
                with gr.Group(visible=False) as self.confirmation:
                    self.question = drawing(elem_id="clm-confirm")
                    with gr.Row():
                        yes = gr.Button("Yes, make it live", variant="primary", elem_id="clm-yes")
                        no = gr.Button("No, change nothing", elem_id="clm-no")
                self.answer = drawing(elem_id="clm-models-answer")
                said = self._build_voices()
                self.history = drawing()
        drawing("<h3>Kept rows</h3>", elem_classes="clm-section")
        self.kept = drawing(js_on_load=PICK + KEEP_OPEN, elem_id="clm-kept")
        with gr.Row(equal_height=True):
            self.row = gr.Textbox(
                label="Row to withdraw", info="choose it above; it is never rehearsed again", max_length=64,
                min_width=200, elem_id="clm-row",
            )  # fmt: skip
            self.row_reason = gr.Textbox(
                label="Why it is withdrawn", info="kept in the audit trail", max_length=500, min_width=200,
                elem_id="clm-row-reason",
            )  # fmt: skip
            withdraw = gr.Button("Withdraw this row", variant="stop", min_width=200, scale=0, elem_id="clm-withdraw")
        self.withdrawn = drawing(elem_id="clm-withdrawn")
        chosen = self.kept.pick(self._picked, None, self.row, queue=False, show_progress="hidden")
        withdrawn = withdraw.click(
            self._withdraw, [self.row, self.row_reason], [self.withdrawn, self.row, self.row_reason],
            concurrency_id="withdraw",
        )  # fmt: skip
        picked = self.graph.pick(self._picked, None, self.version, queue=False, show_progress="hidden")
        asked = [self.wanted, self.question, self.confirmation, self.answer]
        make.click(self._ask, [self.version, self.reason], asked, queue=False)
        back.click(self._ask_back, [self.reason], asked, queue=False)
        no.click(lambda: (None, gr.update(visible=False)), None, [self.wanted, self.confirmation], queue=False)
        deployed = yes.click(
            self._deploy,
            [self.wanted, self.reason],
            [self.answer, self.confirmation, self.reason],
            concurrency_id="deploy",
        )
        return [picked, deployed, chosen, withdrawn, *said]

    def _build_voices(self) -> list:
        """Make what a named person can say of the chosen version's verdict; seen where there is something to say."""
        with gr.Group(visible=False) as self.voices:
            self.asked = drawing(elem_id="clm-voices")
            self.by = gr.Textbox(label="Your name", info="kept in the audit trail", max_length=100, elem_id="clm-by")
            self.why = gr.Textbox(
                label="Why", info="needed to reject and to override", max_length=500, elem_id="clm-say-why"
            )
            with gr.Row():
                self.buttons = {
                    "approve": gr.Button("Approve", variant="primary", elem_id="clm-approve"),
                    "reject": gr.Button("Reject", variant="stop", elem_id="clm-reject"),
                    "override": gr.Button("Override the gate", variant="stop", elem_id="clm-override"),
                }
        self.spoken = drawing(elem_id="clm-say-answer")
        return [
            button.click(
                partial(self._say, says), [self.version, self.by, self.why], [self.spoken, self.why],
                concurrency_id="deploy",
            ) for says, button in self.buttons.items()
        ]  # fmt: skip

    def live(self) -> list[Live]:
        """Return the choices, the graph, the card, the verdict, who has to speak, the history and the kept rows."""
        return [
            Live([self.version], self._choices, [self.version]),
            Live([self.graph, self.card], self._chosen, [self.version]),
            Live([self.history], self._history),
            Live([self.verdict], self._verdict, [self.version]),
            Live([self.voices, self.asked, *self.buttons.values()], self._voices, [self.version]),
            Live([self.kept], self._kept, [self.version]),
        ]

    def _names(self) -> list[str]:
        return [v.name for v in versions.everything(self.workspace)]

    def _choices(self, chosen: str | None):
        live, names = versions.live(self.workspace).name, self._names()
        return gr.update(choices=names) if chosen in names else gr.update(choices=names, value=live)

    def _picked(self, event: gr.EventData) -> str:
        return event.chosen

    def _chosen(self, chosen: str | None) -> tuple[str, str]:
        live = versions.live(self.workspace)
        version = versions.by_name(self.workspace, chosen or live.name)
        graph = lineage(versions.everything(self.workspace), live.id, version.name)
        return card("Lineage", graph, "parents to the left"), version_card(self.workspace, version, live.id)

    def _verdict(self, chosen: str | None) -> str:
        told = questions.judgement(self.workspace, versions.by_name(self.workspace, chosen or "live"))
        return "".join(verdict(d, told["words"], told["prompts"]) for d in reversed(told["decisions"]))

    def _voices(self, chosen: str | None) -> list:
        """Show what can be said of the chosen version: of a waiting one yes or no, of a refused one only an override."""
        version = versions.by_name(self.workspace, chosen or "live")
        can = {"approve": version.state == approval.WAITING, "reject": version.state == approval.WAITING,
               "override": version.state in (approval.REFUSED, approval.UNDECIDED)}  # fmt: skip
        asked = {
            approval.WAITING: f"{version.name} passed the gate and waits for approval by name.",
            approval.REFUSED: f"The gate refused {version.name}. Overriding it needs a name and a reason.",
            approval.UNDECIDED: f"The gate could not decide on {version.name}. Overriding it needs a name and a reason.",
        }.get(version.state, "")
        return [
            gr.update(visible=any(can.values())), notice(asked, "note"),
            *(gr.update(visible=can[says]) for says in self.buttons),
        ]  # fmt: skip

    def _say(self, says: str, chosen: str | None, by: str, why: str):
        """Write down what a person says. A refusal leaves the form as it is."""
        try:
            if chosen is None:
                raise BadInput("No version is chosen. Choose one in the graph.")
            said = actions.say(self.house, chosen, says, by, why)
        except Exception as err:
            return notice(plain(err), "problem"), gr.skip()
        if said.missing:
            return notice(f"{by} has spoken for {chosen}; one more person has to.", "note"), ""
        live = versions.live(self.workspace).name
        return notice(f"{chosen} is {said.version.state}; {live} is live."), ""

    def _kept(self, chosen: str | None) -> str:
        version = versions.by_name(self.workspace, chosen or "live")
        return kept_rows(version.name, questions.kept_rows(self.workspace, version))

    def _withdraw(self, key: str, reason: str):
        """Take a row back. A refusal leaves the form as it is."""
        try:
            if not key.strip():
                raise BadInput("No row is chosen. Choose one among the kept rows above.")
            row = withdrawal.withdraw(self.workspace, key, reason, self.house.actor)
        except Exception as err:
            return notice(plain(err), "problem"), gr.skip(), gr.skip()
        return notice(f"Row {row.key} is withdrawn: no run that is ordered from now on rehearses it."), "", ""

    def _history(self) -> str:
        rows = [
            [moment(d["created_at"]), d["version"], d["previous"] or "–", d["actor"], d["reason"]]
            for d in questions.deployments(self.workspace)[:100]
        ]  # fmt: skip
        return card("What was live when", table(["When", "Live", "Before", "Who", "Why"], rows))

    def _ask(self, name: str | None, reason: str):
        """Ask once more before anything changes; a missing reason is said first."""
        try:
            version, live = versions.by_name(self.workspace, name or "live"), versions.live(self.workspace)
            if version.id == live.id:
                raise BadInput(f"{version.name} is live already. Choose another version.")
            if missing := actions.NOT_PASSED.get(version.state):
                raise BadInput(f"{version.name} {missing}.")
            if not reason.strip():
                raise BadInput(f"Making {version.name} live needs a reason, which the history keeps. Write one above.")
        except Exception as err:
            return None, "", gr.update(visible=False), notice(plain(err), "problem")
        warning = ""
        if version.track != "main":
            warning = " It comes from a comparison run without protection."
        said = (
            f"Make {version.name} live instead of {live.name}?{warning} People talk to it from their next message on."
        )
        return version.name, notice(said, "note"), gr.update(visible=True), ""

    def _ask_back(self, reason: str):
        before = actions.previous_live(self.house)
        if before is None:
            said = "No other version has been live yet, so there is nothing to roll back to."
            return None, "", gr.update(visible=False), notice(said, "problem")
        return self._ask(before.name, reason.strip() or "roll back")

    def _deploy(self, name: str | None, reason: str):
        """Load the version, then move the alias. A refusal leaves everything as it was."""
        try:
            if name is None:
                raise BadInput("Nothing is waiting for a yes. Choose a version first.")
            actions.make_live(self.house, name, reason.strip() or "rolled back to the version before")
        except Exception as err:
            return notice(plain(err), "problem"), gr.update(visible=False), gr.skip()
        return notice(f"{name} is live."), gr.update(visible=False), ""
