"""Data: give a file, see what the checks found, keep it as a task, and look into its rows."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from clm_app.data import ingest
from clm_app.data.reading import Reading, read_rows
from clm_app.data.streams import demo_stream
from clm_app.errors import BadData, plain
from ui.parts.live import Live, drawing
from ui.parts.words import card, count, figures, moment, notice, table
from ui.tabs._base import Tab

SHOWN = 200  # rows; more is a matter for the search, not for the eye
KINDS = [".jsonl", ".json", ".csv", ".parquet", ".gz"]


class Data(Tab):
    """Left: give a file. Right: the tasks there are. Below: their rows."""

    title = "Data"
    order = 10

    def build(self) -> list:
        """Make the form, the list of tasks and the table of rows."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.file = gr.File(label="File of rows (JSONL, JSON, CSV, Parquet)", file_types=KINDS, height=150)
                self.task_name = gr.Textbox(label="Task name", placeholder="as it is shown everywhere", max_length=80)
                with gr.Row():
                    add = gr.Button("Keep as a task", variant="primary")
                    examples = gr.Button("Add the built-in examples")
                self.answer = drawing(elem_id="clm-data-answer")
            with gr.Column(scale=3, min_width=300):
                self.list = drawing()
        with gr.Row():
            self.task = gr.Dropdown(self._names(), value=self._first(), label="Task", min_width=200)
            self.split = gr.Dropdown(["train", "validation", "test"], value="train", label="Part", min_width=140)
            self.search = gr.Textbox(label="Search", placeholder="in prompt, response and label", min_width=200)
        self.rows = drawing(elem_id="clm-rows")
        proposed = gr.State("")
        checked = self.file.upload(
            self._check, [self.file, self.task_name, proposed], [self.answer, self.task_name, proposed]
        )
        return [
            checked,
            add.click(self._add, [self.file, self.task_name], [self.answer, self.file, self.task_name, self.task]),
            examples.click(self._add_examples, None, [self.answer, self.task]),
        ]

    def live(self) -> list[Live]:
        """Return the list, the choice of tasks and the rows."""
        return [
            Live([self.list], self._list),
            Live([self.task], self._choices, [self.task]),
            Live([self.rows], self._rows, [self.task, self.split, self.search]),
        ]

    def _names(self) -> list[str]:
        return [task.name for task, _ in ingest.tasks(self.workspace)]

    def _first(self) -> str | None:
        return next(iter(self._names()), None)

    def _choices(self, chosen: str | None):
        names = self._names()
        # The value is sent only where it has to change: an answer that is under way must not undo a newer choice.
        return gr.update(choices=names) if chosen in names else gr.update(choices=names, value=self._first())

    def _check(self, file: str, name: str, before: str):
        """Read the file and say what is in it; nothing is kept yet. The file proposes a name to change."""
        own = Path(file).name.split(".")[0].replace("_", " ")
        name = own if name.strip() in ("", before) else name
        try:
            found = read_rows(Path(file), self.workspace.settings)
        except Exception as err:  # the border of the form: the sentence stands where the eye is
            return notice(plain(err), "problem"), name, own
        return _report(found, Path(file).name), name, own

    def _add(self, file: str | None, name: str):
        """Freeze the file as a task. A refusal leaves the form as it is."""
        try:
            if not file:
                raise BadData("No file is chosen. Choose one with prompts and responses, then keep it as a task.")
            taken = ingest.snapshot(self.workspace, name, Path(file), self.house.actor)
        except Exception as err:
            return notice(plain(err), "problem"), gr.skip(), gr.skip(), gr.skip()
        rows = f"{taken.train_rows} to train, {taken.validation_rows} to validate, {taken.test_rows} to test"
        name = name.strip()
        chosen = gr.update(choices=self._names(), value=name)
        return notice(f"{name} is kept as a task: {rows}. Train it on the Train tab."), None, "", chosen

    def _add_examples(self):
        """Freeze the shipped example tasks that are not there yet."""
        try:
            wanted = [s for s in demo_stream() if ingest.find(self.workspace, s.name) is None]
            for source in wanted:
                ingest.snapshot(self.workspace, source.name, Path(source.path), self.house.actor)
        except Exception as err:
            return notice(plain(err), "problem"), gr.skip()
        added = ", ".join(s.name for s in wanted)
        said = (
            f"Added: {added}. Learn them on the Train tab." if added else "The built-in examples are all here already."
        )
        return notice(said), gr.update(choices=self._names(), value=self._first())

    def _list(self) -> str:
        found = ingest.tasks(self.workspace)
        if not found:
            return card("Tasks", '<p class="clm-quiet">No tasks yet. Give a file with at least ten rows of prompt and '
                                 "response, or add the built-in examples to try everything out.</p>")  # fmt: skip
        rows = [
            [task.name, f"{s.train_rows:,}", f"{s.validation_rows:,}", f"{s.test_rows:,}",
             str(s.report.get("labels", "–")), str(s.report.get("duplicates_dropped", "–")), moment(s.created_at)]
            for task, s in found
        ]  # fmt: skip
        heads = ["Task", "Train", "Validation", "Test", "Labels", "Duplicates dropped", "Added"]
        return card("Tasks", table(heads, rows), count(len(rows), "task"))

    def _rows(self, name: str | None, split: str, search: str) -> str:
        taken = {task.name: s for task, s in ingest.tasks(self.workspace)}.get(name)
        if taken is None:
            return '<p class="clm-quiet">There are no rows to show yet.</p>'
        rows, wanted = ingest.rows_of(self.workspace, taken, split), (search or "").strip().lower()
        found = [r for r in rows if wanted in f"{r.prompt}\n{r.response}\n{r.label}".lower()]
        shown = found[:SHOWN]
        among = f" that match, out of {len(rows):,}" if wanted else ""
        said = f"{len(shown):,} of {count(len(found), 'row')}{among}"
        drawn = table(
            ["Prompt", "Response", "Label"],
            [[r.prompt, r.response, r.label if r.label != r.response else "–"] for r in shown],
        )
        return card(name, f'<div class="clm-tall">{drawn}</div>', said)


def _report(found: Reading, file: str) -> str:
    report = found.report
    heads = figures([
        ("Rows", f"{report['rows']:,}", f"{count(report['duplicates_dropped'], 'duplicate')} dropped"),
        ("Labels", f"{report['labels']:,}", f"{report['smallest_label']} to {report['largest_label']} rows each"),
        ("Length", f"{report['median_bytes']:,} bytes", f"median; the longest is {report['longest_bytes']:,}"),
    ])  # fmt: skip
    several = report["prompts_with_several_answers"]
    warning = (
        f"{count(several, 'prompt')} with more than one answer: a model cannot get all of these right."
        if several
        else ""
    )
    sample = table(["prompt", "response"], [[r.prompt, r.response] for r, _ in found.rows[:3]], "the first rows")
    return card(f"{file} can be used", heads + notice(warning, "note") + sample, "nothing is kept yet")
