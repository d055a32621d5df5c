"""Models: where each version came from, what it can do, what the gate said of it; put one live, or the one before."""

from __future__ import annotations

import gradio as gr

from clm_app.errors import BadInput, plain
from clm_app.registry import versions
from ui import actions, questions
from ui.parts.lineage import lineage
from ui.parts.live import Live, drawing
from ui.parts.version_card import version_card
from ui.parts.words import card, moment, notice, table
from ui.tabs._base import Tab

PICK = """
const pick = event => {
  if (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ') return;
  const node = event.target.closest('[data-version]');
  if (!node) return;
  event.preventDefault();
  trigger('pick', {version: node.dataset.version});
};
element.addEventListener('click', pick);
element.addEventListener('keydown', pick);
"""


class Models(Tab):
    """The graph; beneath it the card of the chosen version beside what can be done with it."""

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
                self.history = drawing()
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
        return [picked, deployed]

    def live(self) -> list[Live]:
        """Return the graph, the choices, the card and the history."""
        return [
            Live([self.version], self._choices, [self.version]),
            Live([self.graph, self.card], self._chosen, [self.version]),
            Live([self.history], self._history),
        ]

    def _names(self) -> list[str]:
        return [v.name for v in versions.everything(self.workspace)]

    def _choices(self, chosen: str | None):
        live, names = versions.live(self.workspace).name, self._names()
        return gr.update(choices=names) if chosen in names else gr.update(choices=names, value=live)

    def _picked(self, event: gr.EventData) -> str:
        return event.version

    def _chosen(self, chosen: str | None) -> tuple[str, str]:
        live = versions.live(self.workspace)
        version = versions.by_name(self.workspace, chosen or live.name)
        graph = lineage(versions.everything(self.workspace), live.id, version.name)
        return card("Lineage", graph, "parents to the left"), version_card(self.workspace, version, live.id)

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
            if not reason.strip():
                raise BadInput(f"Making {version.name} live needs a reason, which the history keeps. Write one above.")
        except Exception as err:
            return None, "", gr.update(visible=False), notice(plain(err), "problem")
        warning = {"refused": " The gate refused it.", "candidate": " The gate has not judged it."}.get(
            version.state, ""
        )
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
