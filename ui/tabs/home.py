"""Home: what is live and why, what runs now, what was kept and what was lost."""

from __future__ import annotations

from clm_app.judging.matrix import Matrix
from ui import questions
from ui.parts.job_card import job_card
from ui.parts.live import Live, drawing
from ui.parts.words import ago, card, chip, count, figures, moment, percent, points, safe, table
from ui.tabs._base import Tab

STEPS = (
    ("Add data", "On the Data tab, give a file of prompts and responses per task, or take the built-in examples."),
    ("Learn", "On the Train tab, choose the tasks in order and press Start. Every task is measured after each one."),
    ("Talk to it", "On the Playground tab, talk to the live version, beside any other one."),
)


class Home(Tab):
    """Five cards that follow the record."""

    title = "Home"
    order = 0

    def build(self) -> list:
        """Make the drawing that everything on this tab is in."""
        self.cards = drawing(elem_id="clm-home")
        return []

    def live(self) -> list[Live]:
        """Return the one live part."""
        return [Live([self.cards], self._cards)]

    def _cards(self) -> str:
        empty = questions.count_tasks(self.workspace) == 0 and not questions.jobs(self.workspace, 1)
        first = _first_steps() if empty else ""
        return f'{first}<div class="clm-grid">{self._live()}{self._running()}{self._kept()}{self._audit()}</div>'

    def _live(self) -> str:
        story = questions.live_story(self.workspace)
        version, deployment, decision = story["version"], story["deployment"], story["decision"]
        before = f" It took over from {safe(story['previous'].name)}." if story["previous"] else ""
        since = f"{moment(deployment.created_at)} ({ago(deployment.created_at)})"
        if decision:
            why = f"The gate: {safe(decision.sentence)}"
        else:
            why = f"{safe(deployment.actor)} put it live: {safe(deployment.reason or 'no reason was given')}"
        return card(
            "Live now",
            f'<p class="clm-big">{safe(version.name)} {chip("live", "live")}</p>'
            f"<p>{safe(version.name)} has been live since {since}.{before}</p><p class='clm-why'>{why}</p>",
        )

    def _running(self) -> str:
        job = questions.job_in_view(self.workspace)
        if job is None:
            return card("Running", '<p class="clm-quiet">Nothing is running, and nothing has run yet.</p>')
        if job.status in questions.ENDED:
            last = '<p class="clm-quiet">Nothing is running. The last job:</p>'
            return card("Running", last + job_card(self.workspace, job))
        return card("Running", job_card(self.workspace, job))

    def _kept(self) -> str:
        job = questions.job_of_the_live_version(self.workspace)
        if job is None:
            return card("What was kept", '<p class="clm-quiet">Nothing is measured yet. After each task, every task is '
                                         "tested again, and what was kept is shown here.</p>")  # fmt: skip
        found = questions.matrices(self.workspace, job.id)
        main, naive = found.get("main"), found.get("naive")
        if main is None:
            return card("What was kept", '<p class="clm-quiet">Only the comparison run is measured yet.</p>')
        body = figures([
            ("Average accuracy", percent(main.average_accuracy),
             f"without protection: {percent(naive.average_accuracy)}" if naive else "no comparison run"),
            ("Backward transfer", points(main.backward_transfer),
             f"without protection: {points(naive.backward_transfer)}" if naive else "no comparison run"),
        ])  # fmt: skip
        text = f"<p>{safe(_kept_sentence(main, naive))}</p>"
        return card("What was kept", body + text + _by_task(main, naive), f"job {job.id}")

    def _audit(self) -> str:
        rows = [[moment(e.at), e.actor, said(e.action), e.detail.get("name") or e.subject.replace(":", " ")]
                for e in questions.audit(self.workspace, 8)]  # fmt: skip
        if not rows:
            return card("Last events", '<p class="clm-quiet">Nothing has happened yet.</p>')
        return card("Last events", table(["When", "Who", "What", "Which"], rows), "from the audit trail")


def said(action: str) -> str:
    """Return an audit action in words: "version.deployed" -> "version deployed"."""
    return action.replace(".", " ").replace("_", " ")


def _kept_sentence(main: Matrix, naive: Matrix | None) -> str:
    tasks = len(main.tasks)
    text = (
        f"After {count(tasks, 'task')}, {main.versions[-1]} answers {percent(main.average_accuracy)} of the test rows"
    )
    if naive is None:
        return f"{text}."
    behind = len(naive.tasks) < tasks
    after = f" after {len(naive.tasks)}" if behind else ""
    return f"{text}; the same training without protection answers {percent(naive.average_accuracy)}{after}."


def _by_task(main: Matrix, naive: Matrix | None) -> str:
    rows = []
    for j, task in enumerate(main.tasks):
        cells = [task, percent(main.values[j][j]), percent(main.last[j])]
        rows.append(cells + ([percent(naive.last[j] if j < len(naive.tasks) else None)] if naive else []))
    heads = ["Task", "When learned", "Now", *(["Now, unprotected"] if naive else [])]
    return table(heads, rows)


def _first_steps() -> str:
    items = "".join(f"<li><b>{safe(title)}</b><p>{safe(text)}</p></li>" for title, text in STEPS)
    return card("Three steps to begin", f'<ol class="clm-steps">{items}</ol>')
