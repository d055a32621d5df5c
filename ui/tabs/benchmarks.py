"""Benchmarks: freeze items to judge by, see which of them leak into training rows, let versions sit them, read the results."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from clm_app import wishes
from clm_app.catalog import shelf
from clm_app.data import ingest
from clm_app.errors import BadInput, plain
from clm_app.judging import benchmarks
from clm_app.probes.kinds._base import SHELF
from clm_app.registry import versions
from store.tables import Benchmark, BenchmarkReading
from ui import questions
from ui.parts.forms import SettingsForm
from ui.parts.job_card import job_card
from ui.parts.live import Live, drawing
from ui.parts.standing import in_unit
from ui.parts.suite import suite
from ui.parts.words import card, chip, count, moment, notice, safe, table
from ui.tabs._base import Tab

SHOWN = 100  # items and readings
EXAMPLE = '{"prompt": "My lamp flickers.", "expected": "Check the plug."}'
FILES = [".jsonl", ".json", ".csv", ".parquet", ".gz"]


class Benchmarks(Tab):
    """Left: make one. Right: what there is. Below: its items, the examination, and what it said of each version."""

    title = "Benchmarks"
    order = 32

    def build(self) -> list:
        """Make the form, the list, the choice of one and the examination."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                make, given = self._build_form()
            with gr.Column(scale=3, min_width=300):
                self.list = drawing(elem_id="clm-benchmarks")
        with gr.Row(equal_height=True, elem_classes="clm-section"):
            drawing("<h3>Let versions sit it</h3>", min_width=200)
            self.one = gr.Dropdown([], value=None, label="Benchmark", info="its newest versions first", min_width=200,
                                   elem_id="clm-benchmark")  # fmt: skip
            self.versions = gr.Dropdown(["live"], value=["live"], multiselect=True, label="Versions", info="each sits it",
                                        min_width=200)  # fmt: skip
            self.on = gr.Dropdown(
                ["trained", "served"], value="trained", label="Artefact", min_width=200,
                info="in full precision, or through its backend",
            )  # fmt: skip
            self.split = gr.Dropdown(
                ["test", "validation"], value="test", label="Part", min_width=200,
                info="test judges, once; the other is for searching",
            )  # fmt: skip
            start = gr.Button("Start", variant="primary", min_width=120, scale=0, elem_id="clm-examine")
        self.answer = drawing(elem_id="clm-examine-answer")
        self.progress = drawing(elem_id="clm-examine-job")
        self.readings = drawing(elem_id="clm-readings")
        self.items = drawing(elem_id="clm-items")
        asked = start.click(
            self._examine, [self.one, self.versions, self.on, self.split], self.answer, concurrency_id="start"
        )
        frozen = make.click(self._make, given, [self.made, self.file, self.one], concurrency_id="start")
        return [frozen, asked, self._build_suites()]

    def _build_suites(self):
        with gr.Accordion("Public suites (lm-evaluation-harness)", open=False):
            drawing('<p class="clm-quiet">Tasks of the harness from YAML files of this machine, with their data; no hub is '
                    "asked.</p>")  # fmt: skip
            self.suite = SettingsForm(wishes.SuiteWish).build()
            start = gr.Button("Run the tasks", elem_id="clm-suite")
            answer = drawing(elem_id="clm-suite-answer")
            self.suites = drawing(elem_id="clm-suite-job")
        return start.click(self._ask_suite, list(self.suite.widgets.values()), answer, concurrency_id="start")

    def _build_form(self) -> tuple[gr.Button, list]:
        """Make the form; return its button and what it is given."""
        kinds = shelf(SHELF)
        self.name = gr.Textbox(label="Name", info="other items under a name that is taken become its next version",
                               max_length=80, elem_id="clm-benchmark-name")  # fmt: skip
        self.kind = gr.Dropdown([(cls.title, name) for name, cls in kinds.items()], value="exact_match", label="Kind",
                                elem_id="clm-kind")  # fmt: skip
        self.about = drawing(_about("exact_match"))
        self.forms, groups = {}, []
        with gr.Accordion("Settings of this kind", open=False):
            for name, cls in kinds.items():
                with gr.Column(visible=name == "exact_match") as group:
                    self.forms[name] = SettingsForm(cls.Settings).build()
                groups.append(group)
        self.source = gr.Radio([("a file", "file"), ("written here", "items"), ("a task's held-out rows", "task")],
                               value="file", label="Items from", elem_id="clm-source")  # fmt: skip
        self.file = gr.File(label="JSONL, JSON, CSV or Parquet: prompt, expected, rubric, choices, label, split",
                            file_types=FILES, height=170)  # fmt: skip
        self.written = gr.Textbox(label="Items, a JSON object on each line", placeholder=EXAMPLE, lines=5, visible=False,
                                  max_length=200_000, elem_id="clm-items-written")  # fmt: skip
        self.task = gr.Dropdown([], label="Task", visible=False, elem_id="clm-benchmark-task")
        make = gr.Button("Freeze as a benchmark", variant="primary", elem_id="clm-freeze")
        self.made = drawing(elem_id="clm-benchmark-answer")
        quiet = {"queue": False, "show_progress": "hidden"}
        self.kind.change(
            lambda kind: [_about(kind), *(gr.update(visible=name == kind) for name in kinds)],
            self.kind, [self.about, *groups], **quiet,
        )  # fmt: skip
        self.source.change(
            lambda source: [gr.update(visible=source == name) for name in ("file", "items", "task")],
            self.source, [self.file, self.written, self.task], **quiet,
        )  # fmt: skip
        widgets = [w for form in self.forms.values() for w in form.widgets.values()]
        given = [self.name, self.kind, self.source, self.file, self.written, self.task, *widgets]
        return make, given

    def live(self) -> list[Live]:
        """Return the list, the choices, the running examination, its readings and the items."""
        return [
            Live([self.list], self._list),
            Live([self.task], lambda: gr.update(choices=[t.name for t, _ in ingest.tasks(self.workspace)])),
            Live([self.one], self._choices, [self.one]),
            Live([self.versions], lambda: gr.update(choices=["live", *self._version_names()])),
            Live([self.progress], self._progress),
            Live([self.readings], self._readings, [self.one]),
            Live([self.items], self._items, [self.one, self.split]),
            Live([self.suites], self._suites),
        ]

    def _version_names(self) -> list[str]:
        return [v.name for v in versions.everything(self.workspace)]

    def _titles(self) -> list[str]:
        return [benchmarks.title(row) for row in benchmarks.everything(self.workspace)]

    def _choices(self, chosen: str | None):
        titles = self._titles()
        return gr.update(choices=titles) if chosen in titles else gr.update(
            choices=titles, value=titles[0] if titles else None
        )  # fmt: skip

    def _make(self, name: str, kind: str, source: str, file: str | None, written: str, task: str | None, *values: Any):
        """Freeze the items. A refusal leaves the form as it is."""
        try:
            row = self._frozen(name, kind, self._knobs(kind, list(values)), source, file, written, task)
        except Exception as err:  # the border of the form: the sentence stands beside the button
            return notice(plain(err), "problem"), gr.skip(), gr.skip()
        leaking = len(benchmarks.leakage_of(row).keys)
        said = f"{benchmarks.title(row)} is frozen: {row.validation_items} items to search with, {row.test_items} to judge with."
        if leaking:
            said += f" {count(leaking, 'item')} of them stand in training rows and will not judge."
        title = benchmarks.title(row)
        return notice(said, "note" if leaking else "good"), None, gr.update(choices=self._titles(), value=title)

    def _knobs(self, kind: str, values: list) -> dict[str, Any]:
        for name, form in self.forms.items():
            mine, values = values[: len(form.widgets)], values[len(form.widgets) :]
            if name == kind:
                return {knob: value for knob, value in form.read(mine).items() if value is not None}
        return {}

    def _frozen(self, name, kind, knobs, source, file, written, task) -> Benchmark:
        actor = self.house.actor
        if source == "task":
            if not task:
                raise BadInput("No task is chosen. Choose the one whose held-out rows are taken.")
            return benchmarks.from_task(self.workspace, task, kind, knobs, actor, name)
        if source == "items":
            return benchmarks.from_items(self.workspace, name, _parsed(written), kind, knobs, actor)
        if not file:
            raise BadInput("No file is chosen. Choose one with prompts and what is expected.")
        return benchmarks.from_file(self.workspace, name or Path(file).stem, Path(file), kind, knobs, actor)

    def _list(self) -> str:
        found = benchmarks.everything(self.workspace)
        if not found:
            return card("Benchmarks", '<p class="clm-quiet">None yet. Freeze a file of items, or a task\'s held-out rows. A '
                                      "job can hold every candidate to benchmarks beside its tasks.</p>")  # fmt: skip
        rows = []
        for row in found:
            leaking = len(benchmarks.leakage_of(row).keys)
            leaks = chip(f"{leaking} leak", "refused") if leaking else "none"
            kind = shelf(SHELF)[row.kind].title if row.kind in shelf(SHELF) else row.kind
            rows.append([f"<b>{safe(benchmarks.title(row))}</b>", safe(kind), f"{row.validation_items:,}",
                         f"{row.test_items:,}", leaks, safe(row.source), moment(row.created_at)])  # fmt: skip
        heads = ["Name", "Kind", "Validation", "Test", "Leaks", "From", "Frozen"]
        return card("Benchmarks", table(heads, rows, is_safe=True), "frozen: other items make a new version")

    def _examine(self, name: str | None, chosen: list[str], on: str, split: str) -> str:
        """Write the wish down; the clock finds it."""
        try:
            if not name:
                raise BadInput("There is no benchmark yet. Freeze one above.")
            if not chosen:
                raise BadInput("No version is chosen. Choose at least one.")
            wish = wishes.ExamineWish(benchmarks=[name], versions=chosen, on=on, split=split)
            job = wishes.ask_examination(self.workspace, wish, self.house.actor)
        except Exception as err:
            return notice(plain(err), "problem")
        return notice(f"Job {job.id} is asked for: {', '.join(chosen)} before {name}.")

    def _progress(self) -> str:
        job = questions.job_in_view(self.workspace, kind="examine")
        return job_card(self.workspace, job) if job else ""

    def _ask_suite(self, *values: Any) -> str:
        try:
            told = {knob: value for knob, value in self.suite.read(list(values)).items() if value is not None}
            if not told.get("folder") or not told["tasks"]:
                raise BadInput("A suite needs a folder with YAML files, and the names of tasks in it. Fill in both.")
            job = wishes.ask_suite(self.workspace, wishes.SuiteWish(**told), self.house.actor)
        except Exception as err:
            return notice(plain(err), "problem")
        return notice(f"Job {job.id} runs {questions.job_title(job)}.")

    def _suites(self) -> str:
        job = questions.job_in_view(self.workspace, kind="suite")
        if job is None:
            return ""
        return job_card(self.workspace, job) + (suite(job.result) if job.status == "done" else "")

    def _readings(self, name: str | None) -> str:
        if not name:
            return ""
        row, names = benchmarks.find(self.workspace, name), questions.version_names(self.workspace)
        found = benchmarks.readings(self.workspace, row)[:SHOWN]
        if not found:
            return card(f"What {name} says", '<p class="clm-quiet">No version has sat it yet.</p>')
        rows = [_reading(reading, names) for reading in found]
        heads = ["Version", "Value", "95 % interval", "Items", "Artefact", "Part", "Took", "Further figures"]
        drawn = table(heads, rows, "Newest first; items that stand in training rows are left out", is_safe=True)
        return card(f"What {name} says", f'<div class="clm-wide">{drawn}</div>')

    def _items(self, name: str | None, split: str) -> str:
        if not name:
            return ""
        row = benchmarks.find(self.workspace, name)
        leaking = benchmarks.leakage_of(row).keys
        found = benchmarks.items_of(self.workspace, row, split)
        rows = [
            [safe(item.prompt), safe(item.expected if isinstance(item.expected, str) else " | ".join(item.expected)),
             safe(json.dumps(item.rubric, ensure_ascii=False) if item.rubric else " | ".join(item.choices) or "–"),
             chip("in training rows", "refused") if item.key in leaking else "–"] for item in found[:SHOWN]
        ]  # fmt: skip
        drawn = table(["Prompt", "Expected", "Rubric or choices", "Leaks"], rows, is_safe=True)
        return card(f"Items of {name}", f'<div class="clm-tall">{drawn}</div>', f"{count(len(found), f'{split} item')}")


def _about(kind: str) -> str:
    cls = shelf(SHELF)[kind]
    margin = "" if cls.margin_points is None else f" The gate lets {cls.margin_points:g} points be lost."
    return f'<p class="clm-quiet">{safe(cls.purpose)}{margin}</p>'


def _parsed(written: str) -> list[dict]:
    found = []
    for number, line in enumerate(written.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as err:
            raise BadInput(f"Line {number} is not JSON: {err}. Write {EXAMPLE}") from err
        if not isinstance(item, dict):
            raise BadInput(f"Line {number} is no JSON object. Write {EXAMPLE}")
        found.append(item)
    return found


def _reading(reading: BenchmarkReading, names: dict[int, str]) -> list[str]:
    of = partial(in_unit, unit=reading.unit)
    further = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in reading.figures.items() if isinstance(value, float)
    )
    who = names.get(reading.version_id, reading.endpoint)
    return [f"<b>{safe(who)}</b>", safe(of(reading.value)), safe(f"{of(reading.low)} to {of(reading.high)}"),
            f"{reading.items:,}", safe(f"{reading.on}, {reading.backend}"), safe(reading.split),
            f"{reading.seconds:.1f} s", safe(further or "–")]  # fmt: skip
