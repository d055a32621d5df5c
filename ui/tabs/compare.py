"""Compare: every version beside the live one, two of them item by item and word by word, and which update broke a task."""

from __future__ import annotations

from urllib.parse import quote

import gradio as gr

from clm_app.data import ingest
from clm_app.errors import BadInput, plain
from clm_app.judging import benchmarks, bisect
from clm_app.judging.pairwise import RUBRIC, JudgingSettings
from clm_app.judging.standing import standings
from clm_app.registry import versions
from ui import comparing, judging, questions
from ui.judging import JudgedWish
from ui.parts.broken import broken
from ui.parts.forms import meaning
from ui.parts.job_card import job_card
from ui.parts.judged import judged, judged_before
from ui.parts.live import Live, drawing
from ui.parts.radar import radar
from ui.parts.side_by_side import replies, side_by_side
from ui.parts.standing import standing_table
from ui.parts.trends import trends
from ui.parts.words import notice, safe
from ui.tabs._base import Tab

SPOKES = 3  # a radar of fewer tasks is a line
SOURCES = [
    ("the prompts above", "prompts"),
    ("a benchmark's validation items", "benchmark"),
    ("rows that flipped", "flipped"),
]


class Compare(Tab):
    """Above: the table of all versions with the trend of each task. Below: two versions, then the search for an update."""

    title = "Compare"
    order = 34

    def build(self) -> list:
        """Make the drawings, the choice of two versions, and the two forms below."""
        self.table = drawing(elem_id="clm-standing")
        self.trend = drawing(elem_id="clm-trend")
        with gr.Row(equal_height=True, elem_classes="clm-section"):
            drawing("<h3>With and without</h3>", min_width=200)
            self.before = gr.Dropdown(self._names(), value=None, label="Without", min_width=160, elem_id="clm-before")
            self.after = gr.Dropdown(self._names(), value=None, label="With", min_width=160, elem_id="clm-after")
            ask = gr.Button("Show what they reply", min_width=200, scale=0, elem_id="clm-replies-ask")
        self.compared = drawing(elem_id="clm-compared")
        self.replies = drawing(elem_id="clm-replies")
        asked = ask.click(self._replies, [self.before, self.after], self.replies, concurrency_id="replies")
        return [asked, *self._build_prompts(), self._build_bisect()]

    def _build_prompts(self) -> list:
        with gr.Accordion("Your own prompts, and other endpoints", open=False):
            with gr.Row():
                self.left = gr.Textbox(label="Left", value="live", info="a version, or the address of an endpoint",
                                       min_width=220, elem_id="clm-left")  # fmt: skip
                self.left_model = gr.Textbox(label="Its model", info="of an endpoint alone", min_width=160)
                self.right = gr.Textbox(label="Right", value="v0", info="a version, or an address such as "
                                        "http://127.0.0.1:8080/v1", min_width=220, elem_id="clm-right")  # fmt: skip
                self.right_model = gr.Textbox(label="Its model", info="of an endpoint alone", min_width=160)
            self.prompts = gr.Textbox(
                label="Prompts, one on each line", lines=3, max_length=20_000, elem_id="clm-prompts"
            )
            outside = gr.Checkbox(False, label="An address may be outside this machine",
                                  info="the prompts are sent there; to a judge the replies too")  # fmt: skip
            go = gr.Button("Ask both", elem_id="clm-prompts-ask")
            self.answers = drawing(elem_id="clm-prompts-answer")
            judge, given = self._build_judge()
            self.verdict = drawing(elem_id="clm-judge-answer")
            self.judged = drawing(elem_id="clm-judged")
        sides = [self.left, self.left_model, self.right, self.right_model]
        return [
            go.click(self._prompts, [*sides, self.prompts, outside], self.answers, concurrency_id="replies"),
            judge.click(self._judge, [*sides, self.prompts, outside, *given], self.verdict, concurrency_id="replies"),
        ]

    def _build_judge(self) -> tuple[gr.Button, list]:
        """Make the form of the judge; return its button and what it is given beside the two sides."""
        fields = JudgedWish.model_fields | JudgingSettings.model_fields
        with gr.Row(equal_height=True, elem_classes="clm-section"):
            drawing("<h3>Let a model judge</h3>", min_width=200)
            judge = gr.Textbox(label="Judge", value="live", info="a version, or the address of an endpoint", min_width=220,
                               elem_id="clm-judge")  # fmt: skip
            model = gr.Textbox(label="Its model", info="of an endpoint alone", min_width=160, elem_id="clm-judge-model")
            source = gr.Dropdown(SOURCES, value="prompts", label="Asked", min_width=200, elem_id="clm-judge-source")
            self.benchmark = gr.Dropdown([], label="Benchmark", info="its validation items", min_width=160)
            most = gr.Number(fields["most"].default, label="Most", info=meaning(fields["most"]), min_width=220)
        rubric = gr.Textbox(RUBRIC, label="Rubric", info=fields["rubric"].description, elem_id="clm-rubric")
        button = gr.Button("Let it judge", elem_id="clm-judge-ask")
        return button, [judge, model, source, self.benchmark, most, rubric]

    def _build_bisect(self):
        with gr.Accordion("Which update broke a task?", open=False):
            with gr.Row():
                self.task = gr.Dropdown([], label="Task", min_width=180, elem_id="clm-bisect-task")
                self.good = gr.Dropdown([("the best one of the line", "")], value="", label="Version that still knew it",
                                        info="empty: the best one of the line", min_width=180)  # fmt: skip
                self.bad = gr.Dropdown(["live"], value="live", label="Version that has lost it", min_width=180)
                field = bisect.BisectWish.model_fields["drop_points"]
                self.drop = gr.Number(field.default, label="Drop", info=field.description, min_width=180)
            find = gr.Button("Find the update", elem_id="clm-bisect")
            self.bisected = drawing(elem_id="clm-bisect-answer")
            self.search = drawing(elem_id="clm-bisect-job")
        return find.click(self._bisect, [self.task, self.good, self.bad, self.drop], self.bisected)

    def live(self) -> list[Live]:
        """Return the table, the trend, the choices, the comparison and the newest search."""
        return [
            Live([self.table], lambda: standing_table(standings(self.workspace)) + _exports("standings/export")),
            Live([self.trend], self._trend),
            Live([self.before, self.after], self._pairs, [self.before, self.after]),
            Live([self.compared], self._compare, [self.before, self.after]),
            Live([self.task, self.good, self.bad], self._choices, [self.task, self.good, self.bad]),
            Live([self.search], self._search),
            Live([self.benchmark], self._benchmarks, [self.benchmark]),
            Live([self.judged], lambda: judged_before(judging.before(self.workspace))),
        ]

    def _names(self) -> list[str]:
        return [v.name for v in versions.everything(self.workspace)]

    def _trend(self) -> str:
        found = standings(self.workspace)
        if not found.tasks:
            return ""
        rest = [row.version for row in found.rows if row.version != found.champion][: SPOKES - 1]
        web = radar(found, [found.champion, *rest]) if len(found.tasks) >= SPOKES else ""
        return f'<div class="clm-pair">{trends(found)}{web}</div>'

    def _pairs(self, before: str | None, after: str | None):
        """Offer every version; before a choice is made, the live one beside the one learned without protection."""
        names, now = self._names(), versions.live(self.workspace)
        after = gr.update(choices=names) if after in names else gr.update(choices=names, value=now.name)
        if before in names:
            return gr.update(choices=names), after
        return gr.update(choices=names, value=questions.counterpart(self.workspace, now)), after

    def _compare(self, before: str | None, after: str | None) -> str:
        if before is None or after is None:
            return '<p class="clm-quiet">Choose two versions that were measured on the same tasks.</p>'
        try:
            drawn = side_by_side(comparing.side_by_side(self.workspace, before, after))
        except BadInput as err:
            return notice(str(err), "note")
        return drawn + _exports(f"compare/export?before={quote(before)}&after={quote(after)}")

    def _replies(self, before: str | None, after: str | None) -> str:
        """Ask both versions for their replies to the rows that flipped; loading one may take a while."""
        try:
            if before is None or after is None:
                raise BadInput("Choose two versions first.")
            return replies(comparing.outputs(self.house, before, after))
        except Exception as err:  # the border of the form: the sentence stands beside the button
            return notice(plain(err), "problem")

    def _prompts(self, left: str, left_model: str, right: str, right_model: str, prompts: str, outside: bool) -> str:
        try:
            sides = [_side(*one, outside) for one in ((left, left_model), (right, right_model))]
            wish = comparing.PromptsWish(left=sides[0], right=sides[1], prompts=_lines(prompts))
            return replies(comparing.prompts(self.house, wish))
        except Exception as err:
            return notice(plain(err), "problem")

    def _judge(
        self, left: str, left_model: str, right: str, right_model: str, prompts: str, outside: bool, judge: str,
        judge_model: str, source: str, benchmark: str | None, most: float, rubric: str,
    ) -> str:  # fmt: skip
        """Let a model say whose replies are better. Each pair is asked twice, so it takes a while."""
        try:
            named = ((left, left_model), (right, right_model), (judge, judge_model))
            first, second, third = (_side(*one, outside) for one in named)
            wish = JudgedWish(
                left=first, right=second, judge=third, most=most, judging=JudgingSettings(rubric=rubric),
                **_source(source, prompts, benchmark),
            )  # fmt: skip
            return judged(judging.judged(self.house, wish))
        except Exception as err:
            return notice(plain(err), "problem")

    def _benchmarks(self, chosen: str | None):
        titles = [benchmarks.title(row) for row in benchmarks.everything(self.workspace)]
        return gr.update(choices=titles) if chosen in titles else gr.update(
            choices=titles, value=titles[0] if titles else None
        )  # fmt: skip

    def _choices(self, task: str | None, good: str | None, bad: str | None):
        tasks, names = [t.name for t, _ in ingest.tasks(self.workspace)], self._names()
        first = tasks[0] if tasks else None
        return (
            gr.update(choices=tasks) if task in tasks else gr.update(choices=tasks, value=first),
            gr.update(choices=[("the best one of the line", ""), *names]),
            gr.update(choices=["live", *names]),
        )

    def _bisect(self, task: str | None, good: str, bad: str, drop: float) -> str:
        try:
            if not task:
                raise BadInput("No task is chosen. Choose the one whose score got worse.")
            wish = bisect.BisectWish(task=task, good=good or "", bad=bad, drop_points=drop)
            job = bisect.ask(self.workspace, wish, self.house.actor)
        except Exception as err:
            return notice(plain(err), "problem")
        return notice(f"Job {job.id} looks for the update that broke {task}.")

    def _search(self) -> str:
        job = questions.job_in_view(self.workspace, kind="bisect")
        if job is None:
            return ""
        found = broken(bisect.Answer(**job.result)) if job.status == "done" else ""
        return job_card(self.workspace, job) + found


def _side(name: str, model: str, outside: bool) -> comparing.Side:
    name = name.strip()
    if "://" not in name:
        return comparing.Side(version=name)
    return comparing.Side(base_url=name, model=model.strip(), outside=outside)


def _lines(prompts: str) -> list[str]:
    """Return the prompts that were written, one on each line."""
    if not (found := [line.strip() for line in prompts.splitlines() if line.strip()]):
        raise BadInput("There is no prompt. Write one on each line.")
    return found


def _source(source: str, prompts: str, benchmark: str | None) -> dict:
    """Return what is asked, as a JudgedWish says it."""
    if source == "prompts":
        return {"prompts": _lines(prompts)}
    if source == "flipped":
        return {"flipped": True}
    if not benchmark:
        raise BadInput("There is no benchmark yet. Freeze one on the Benchmarks tab, or write prompts.")
    return {"benchmark": benchmark}


def _exports(path: str) -> str:
    joined = "&" if "?" in path else "?"
    links = [
        f'<a href="/api/{safe(path)}{joined}format={kind}" download>{kind.upper()}</a>' for kind in ("html", "csv")
    ]
    return f'<p class="clm-quiet">Keep this as one file: {" · ".join(links)}</p>'
