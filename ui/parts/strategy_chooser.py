"""The choice of a way against forgetting, made from the shelf: what it is for, what it needs, what it cost here."""

from __future__ import annotations

from typing import Any

import gradio as gr

from clm_app.catalog import pick, shelf
from clm_app.errors import BadSettings
from clm_app.strategies._base import Strategy
from clm_app.strategies._combined import JOINER, SHELF, part_of
from clm_app.workspace import Workspace
from ui import questions
from ui.parts.forms import SettingsForm
from ui.parts.live import Live, drawing
from ui.parts.words import count, points, safe, span

HOLDING = ("loss", "after_backward", "after_step", "finish")  # moments in which a strategy changes what is learned


class StrategyChooser:
    """One strategy, those that go with it, and the form of each; the shelf is read, so a new file is a new choice."""

    def __init__(self, workspace: Workspace, default: str) -> None:
        self.workspace, self.default = workspace, default
        self.forms: dict[str, SettingsForm] = {}

    def build_choice(self) -> None:
        """Make the two dropdowns, where the caller stands in the page."""
        names = sorted(shelf(SHELF), key=lambda name: name != self.default)
        self.choice = gr.Dropdown(
            [(title(name), name) for name in names], value=self.default, label="Against forgetting", min_width=220,
            elem_id="clm-strategy",
        )  # fmt: skip
        self.also = gr.Dropdown(
            [], value=[], multiselect=True, visible=False, label="And also", min_width=220, elem_id="clm-also",
            info="hold the weights as well; both work in the same run",
        )  # fmt: skip

    def build_forms(self) -> None:
        """Make the lines about what is chosen and its settings; only what is chosen is seen."""
        self.about, groups = drawing(elem_id="clm-about"), []
        for name, cls in shelf(SHELF).items():
            with gr.Column(visible=name == self.default and bool(cls.Settings.model_fields)) as group:
                gr.Markdown(f"**Settings of {title(name)}**")
                self.forms[name] = SettingsForm(cls.Settings).build()
            groups.append(group)
        quiet = {"queue": False, "show_progress": "hidden"}
        self.choice.change(self._partners, [self.choice, self.also], self.also, **quiet)
        for chooser in (self.choice, self.also):
            chooser.change(self._seen, [self.choice, self.also], groups, **quiet)

    @property
    def inputs(self) -> list[gr.components.Component]:
        """The widgets that `read` takes the values of, in this order."""
        return [self.choice, self.also, *(w for form in self.forms.values() for w in form.widgets.values())]

    def read(self, values: list[Any]) -> tuple[str, dict]:
        """Return (strategy, its settings) as a wish names them."""
        choice, also, *left = values
        given = {}
        for name, form in self.forms.items():
            given[name], left = form.read(left[: len(form.widgets)]), left[len(form.widgets) :]
        names = self._chosen(choice, also)
        return JOINER.join(names), given[choice] if len(names) == 1 else {name: given[name] for name in names}

    def live(self) -> list[Live]:
        """Return the lines about what is chosen: what was measured of it changes with each job."""
        return [Live([self.about], self._about, [self.choice, self.also])]

    def _chosen(self, choice: str, also: list[str] | None) -> list[str]:
        """Return the names that work together; one that no longer goes with the choice is left out."""
        possible = partners(choice) if also else []
        return [choice, *(name for name in possible if name in also)]

    def _partners(self, choice: str, also: list[str]):
        possible = partners(choice)
        kept = [name for name in also or [] if name in possible]
        return gr.update(choices=[(title(name), name) for name in possible], value=kept, visible=bool(possible))

    def _seen(self, choice: str, also: list[str]) -> list:
        names = self._chosen(choice, also)
        has_knobs = {name for name, form in self.forms.items() if form.widgets}
        return [gr.update(visible=name in names and name in has_knobs) for name in self.forms]

    def _about(self, choice: str, also: list[str]) -> str:
        names = self._chosen(choice, also)
        told = "".join(_said_of(pick(SHELF, name)) for name in names)
        whole = JOINER.join(names)
        return f'<div class="clm-about">{told}<p>{safe(measured(questions.strategy_figures(self.workspace, whole)))}</p></div>'


def title(name: str) -> str:
    """Return what a person reads for a strategy, alone or joined with others."""
    cls = part_of(name)
    return cls.title or name


def partners(choice: str) -> list[str]:
    """Return the strategies that can be joined to this one: those that hold what is learned and choose no rows."""
    return [name for name, cls in shelf(SHELF).items() if name != choice and _holds(cls) and _go_together(choice, name)]


def _holds(cls: type[Strategy]) -> bool:
    changes = any(getattr(cls, moment) is not getattr(Strategy, moment) for moment in HOLDING)
    return changes and cls.mix is Strategy.mix and cls.weights_kind is None


def _go_together(one: str, other: str) -> bool:
    try:
        part_of(f"{one}{JOINER}{other}")
    except BadSettings:
        return False
    return True


def _said_of(cls: type[Strategy]) -> str:
    purpose = f" {safe(cls.purpose)}." if cls.purpose else ""
    return f"<p><b>{safe(cls.title or cls.name)}.</b>{purpose} <span>Needs: {safe(cls.needs)}.</span></p>"


def measured(found: dict[str, Any]) -> str:
    """Return in one sentence what a strategy cost and kept on this machine; see `questions.strategy_figures`."""
    if not found["runs"]:
        return "Not yet measured here."
    time = f"{span(found['seconds'])} of training a run (median of {count(found['runs'], 'run')})"
    if found["times_naive"] is not None:
        time += f", {found['times_naive']:.1f} times what naive takes for the same task"
    if found["backward_transfer"] is None:
        return f"Measured here: {time}; what it keeps is known after a job of two tasks."
    return f"Measured here: {time}; backward transfer {points(found['backward_transfer'])} (mean of {count(found['jobs'], 'job')})."
