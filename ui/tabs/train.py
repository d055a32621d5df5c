"""Train: choose the tasks and how they are learned, start, watch what is learned and what is lost, stop."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
import pandas

from clm_app import wishes
from clm_app.catalog import shelf
from clm_app.data import ingest
from clm_app.data.streams import TaskSource
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadInput, plain
from clm_app.judging import benchmarks
from clm_app.judging.gate import GateSettings
from clm_app.registry import versions
from clm_app.repairs._base import RepairSettings
from store.series import progress
from store.tables import Job
from store.tables.work import ENDED
from ui import questions
from ui.parts.forms import SettingsForm
from ui.parts.heat_map import heat_map, legend
from ui.parts.job_card import job_card
from ui.parts.live import Live, drawing
from ui.parts.strategy_chooser import StrategyChooser, title
from ui.parts.verdict import VERDICTS
from ui.parts.words import card, chip, figures, notice, safe, span, table
from ui.tabs._base import Tab

NEWEST = 0  # the choice that follows the job at work


class Train(Tab):
    """Above: the wish. Below: the job, its curve, its retention matrices and what the gate said."""

    title = "Train"
    order = 20

    def build(self) -> list:
        """Make the form of a wish and the drawings of a job."""
        default = wishes.LearnWish.model_fields
        with gr.Accordion("A new job", open=True):
            self.tasks = gr.Dropdown(
                self._task_names(), value=[], multiselect=True, label="Tasks, in the order they are learned",
                info="choose them one after the other; the first chosen is learned first", elem_id="clm-tasks",
            )  # fmt: skip
            self.strategy = StrategyChooser(self.workspace, default["strategy"].default)
            with gr.Row():
                self.strategy.build_choice()
                automatic = ("Automatic (by model size)", "")
                self.method = self._pick("clm_app.methods", "Way to tune", default["method"], automatic)
                self.start_from = gr.Dropdown(self._version_names(), value="live", label="Start from")
            self.strategy.build_forms()
            with gr.Row():
                self.compare = gr.Checkbox(
                    value=True, label="Compare with a naive run",
                    info="learns the stream a second time without protection; takes about twice as long",
                )  # fmt: skip
                self.deploy = gr.Checkbox(
                    value=default["deploy"].default,
                    label="Put promoted versions live",
                    info=default["deploy"].description,
                )
                self.served = gr.Checkbox(
                    value=default["check_served"].default, label="Compare what would be served",
                    info="golden prompts, before a candidate is promoted",
                )  # fmt: skip
                self.benchmarks = gr.Dropdown(
                    self._benchmark_names(), value=[], multiselect=True, label="Benchmarks every candidate is held to",
                    info="made on the Benchmarks tab", min_width=220, elem_id="clm-held-to",
                )  # fmt: skip
            with gr.Accordion("Settings of the method, the training and the gate", open=False):
                methods = self._forms("clm_app.methods", self.method)
                gr.Markdown("**Training**")
                training = SettingsForm(TrainingSettings).build()
                gr.Markdown("**Gate**")
                gate = SettingsForm(GateSettings).build()
                gr.Markdown("**Repair before refusal**")
                repair = SettingsForm(RepairSettings).build()
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="clm-start")
                cancel = gr.Button("Cancel the running job", variant="stop", elem_id="clm-cancel")
            self.answer = drawing(elem_id="clm-train-answer")
        self._build_job()
        widgets = [w for form in (*methods.values(), training, gate, repair) for w in form.widgets.values()]
        asks = partial(self._start, methods, training, gate, repair)
        fixed = [
            self.tasks, self.method, self.start_from, self.compare, self.deploy, self.served, self.benchmarks,
        ]  # fmt: skip
        return [
            start.click(
                asks, [*fixed, *self.strategy.inputs, *widgets], [self.answer, self.job], concurrency_id="start"
            ),
            cancel.click(self._cancel, [self.job], self.answer, concurrency_id="cancel"),
        ]

    def _build_job(self) -> None:
        with gr.Row(equal_height=True, elem_classes="clm-section"):
            drawing("<h3>Progress</h3>", min_width=200)
            self.job = gr.Dropdown(self._job_choices(), value=NEWEST, label="Job in view", min_width=340, scale=0)
        self.progress = drawing(elem_id="clm-progress")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                self.curve = gr.LinePlot(
                    x="step", y="loss", title="Loss", x_title="step of this run", height=260, tooltip="axis",
                    y_title="nats per answer token", show_label=False, buttons=["fullscreen"], elem_id="clm-curve",
                )  # fmt: skip
            with gr.Column(scale=2, min_width=280):
                self.figures = drawing()
        self.matrices = drawing(elem_id="clm-matrices")
        self.decisions = drawing()

    def live(self) -> list[Live]:
        """Return the choices, and everything about the job in view."""
        return [
            Live([self.tasks], lambda: gr.update(choices=self._task_names())),
            Live([self.start_from], lambda: gr.update(choices=self._version_names())),
            Live([self.benchmarks], lambda: gr.update(choices=self._benchmark_names())),
            Live([self.job], lambda: gr.update(choices=self._job_choices())),
            *self.strategy.live(),
            Live([self.progress], self._progress, [self.job]),
            Live([self.curve, self.figures], self._curve, [self.job]),
            Live([self.matrices], self._matrices, [self.job]),
            Live([self.decisions], self._decisions, [self.job]),
        ]

    def _task_names(self) -> list[str]:
        return [task.name for task, _ in ingest.tasks(self.workspace)]

    def _benchmark_names(self) -> list[str]:
        return [benchmarks.title(row) for row in benchmarks.everything(self.workspace)]

    def _version_names(self) -> list[str]:
        return ["live", *(v.name for v in versions.everything(self.workspace))]

    def _job_choices(self) -> list[tuple[str, int]]:
        found = questions.jobs(self.workspace, 30, "learn")
        return [("the one at work, or the newest", NEWEST), *((_in_a_line(job), job.id) for job in found)]

    def _pick(self, package: str, label: str, field: Any, *first: tuple[str, str]) -> gr.Dropdown:
        choices = [*first, *((cls.title or name, name) for name, cls in shelf(package).items())]
        return gr.Dropdown(choices, value=field.default, label=label)

    def _forms(self, package: str, chooser: gr.Dropdown) -> dict[str, SettingsForm]:
        """Make a form for each class of a shelf; the one that is chosen is seen."""
        forms, groups = {}, []
        for name, cls in shelf(package).items():
            with gr.Column(visible=name == chooser.value) as group:
                gr.Markdown(f"**{cls.title or name}**")
                forms[name] = SettingsForm(cls.Settings).build()
            groups.append(group)
        names = list(forms)
        chooser.change(
            lambda chosen: [gr.update(visible=name == chosen) for name in names], chooser, groups,
            queue=False, show_progress="hidden",
        )  # fmt: skip
        return forms

    def _start(
        self, methods, training, gate, repair, tasks, method, start_from, compare, deploy, served, held_to, *values
    ):
        """Write the wish down. Nothing is trained in here: the clock finds the row."""
        try:
            if not tasks:
                raise BadInput("No task is chosen. Choose at least one; the Data tab adds new ones.")
            given: dict[int, dict] = {}
            chosen, left = values[: len(self.strategy.inputs)], list(values[len(self.strategy.inputs) :])
            strategy, strategy_settings = self.strategy.read(chosen)
            for form in (*methods.values(), training, gate, repair):
                given[id(form)], left = form.read(left[: len(form.widgets)]), left[len(form.widgets) :]
            wish = wishes.LearnWish(
                stream=[TaskSource(name=name) for name in tasks], strategy=strategy, method=method,
                strategy_settings=strategy_settings,
                method_settings=given[id(methods[method])] if method else {}, gate=given[id(gate)],
                training=given[id(training)], compare_naive=compare, deploy=deploy, start_from=start_from,
                repair=given[id(repair)], benchmarks=held_to, check_served=served,
            )  # fmt: skip
            job = wishes.ask(self.workspace, wish, self.house.actor)
        except Exception as err:  # the border of the form: the sentence stands beside the button
            return notice(plain(err), "problem"), gr.skip()
        return notice(
            f"Job {job.id} is asked for: {', '.join(tasks)}. It begins as soon as the clock finds it."
        ), NEWEST

    def _cancel(self, chosen: int):
        """Ask the job in view, or the one at work, to stop."""
        try:
            job = questions.job_in_view(self.workspace, chosen, "learn")
            if job is None or job.status in ENDED:
                raise BadInput("No job is running, so there is nothing to cancel.")
            wishes.cancel(self.workspace, job.id, self.house.actor)
        except Exception as err:
            return notice(plain(err), "problem")
        return notice(f"Job {job.id} was asked to stop; its last checkpoint is kept.", "note")

    def _in_view(self, chosen: int) -> Job | None:
        return questions.job_in_view(self.workspace, chosen, "learn")

    def _progress(self, chosen: int) -> str:
        job = self._in_view(chosen)
        if job is None:
            return '<p class="clm-quiet">No job yet. Choose tasks and press Start.</p>'
        return job_card(self.workspace, job) + "".join(map(_reason, questions.reasons(self.workspace, job.id)))

    def _curve(self, chosen: int):
        """Return the loss curve of the run that trains now, or the last one, and its figures."""
        job = self._in_view(chosen)
        found = questions.run_in_view(self.workspace, job.id) if job else None
        points = progress.curve(questions.events_file(self.workspace, found[0])) if found else []
        if not points:
            return gr.update(visible=False), ""
        run, task = found
        track = "" if run.track == "main" else f", {run.track} run"
        frame = pandas.DataFrame(points)[["step", "loss"]]
        plot = gr.update(value=frame, title=f"Loss: {task}{track}", visible=True)
        return plot, _figures(points[-1], run.status == "running")

    def _matrices(self, chosen: int) -> str:
        job = self._in_view(chosen)
        if job is None:
            return ""
        found, measuring = questions.matrices_now(self.workspace, job.id)
        if not found and not measuring:
            soon = "The retention matrix appears when the first task is learned and measured."
            return card("What was kept", f'<p class="clm-quiet">{soon}</p>')
        strategy = job.wish.get("strategy", "main")
        tasks = [source["name"] for source in job.wish.get("stream", [])]
        chosen = ", ".join(dict.fromkeys(reason["strategy"] for reason in questions.reasons(self.workspace, job.id)))
        titles = {"main": f"With {strategy}" + (f": {chosen}" if chosen else ""), "naive": "Naive: no protection"}
        now = {measuring.track: measuring} if measuring else {}
        drawn = "".join(
            heat_map(found.get(track), titles.get(track, track), tasks, now.get(track)) for track in found | now
        )
        return card("What was kept", f'<div class="clm-pair">{drawn}</div>{legend(list(found.values()))}')

    def _decisions(self, chosen: int) -> str:
        job = self._in_view(chosen)
        found = questions.decisions(self.workspace, job.id) if job else []
        if not found:
            return ""
        rows = [
            [
                f"<b>{safe(d['version'])}</b>",
                safe(d["task"]),
                chip(*VERDICTS.get(d["verdict"], (d["verdict"], "candidate"))),
                safe(d["sentence"]),
            ]
            for d in found
        ]
        return card("What the gate said", table(["Version", "Learned", "Verdict", "Why"], rows, is_safe=True))


def _reason(reason: dict[str, Any]) -> str:
    """Return what auto chose, for which tasks, and its sentence why."""
    tasks = reason["tasks"]
    of = tasks[0] if len(tasks) == 1 else f"{', '.join(tasks[:-1])} and {tasks[-1]}"
    return f'<p class="clm-why">Auto chose {safe(title(reason["strategy"]))} for {safe(of)}. {safe(reason["why"])}</p>'


def _in_a_line(job: Job) -> str:
    return f"Job {job.id}: {questions.job_title(job)}, {job.status}"


def _figures(latest: dict, is_running: bool) -> str:
    return figures([
        ("Step", f"{latest['step']:,} of {latest['of']:,}", ""),
        ("Loss", f"{latest['loss']:.3f}", "nats per answer token"),
        ("Learning rate", f"{latest['learning_rate']:.2g}", ""),
        ("Speed", f"{latest['tokens_per_s']:,.0f}", "tokens per second"),
        ("This run", f"{span(latest['eta_s'])} left" if is_running else "ended", ""),
        ("Memory", f"{latest['memory_mb']:,.0f} MB", "of the training child"),
    ])  # fmt: skip
