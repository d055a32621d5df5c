"""A job at a glance: what it does now, how far it is, how long it still takes, and where in its stream it is."""

from __future__ import annotations

from clm_app.workspace import Workspace
from store.tables import Job
from store.tables.work import ENDED
from ui import questions
from ui.parts.words import ago, chip, count, notice, percent, safe, span

STATES = {
    "done": "learned",
    "refused": "refused",
    "running": "learning now",
    "failed": "failed",
    "cancelled": "cancelled",
}


def job_card(workspace: Workspace, job: Job) -> str:
    """Return progress bar, stage, time left and stream of one job."""
    share = min(max(job.done_share, 0.0), 1.0)
    return (
        f'<div class="clm-job"><div class="clm-job-line"><b>Job {job.id}</b> {chip(job.status, job.status)}'
        f'<span>{safe(job.stage)}</span><span class="clm-right">{_time(job)}</span><b>{percent(share)}</b></div>'
        f'<div class="clm-bar clm-bar-{safe(job.status)}" role="progressbar" aria-label="Job {job.id}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share * 100:.0f}" style="--share:{share:.4f}">'
        f"</div>{stream_line(workspace, job)}{notice(job.error or '', 'problem')}</div>"
    )


def stream_line(workspace: Workspace, job: Job) -> str:
    """Return the tasks of the stream in order, each with how far it is, one line per track; of another job what it is."""
    if job.kind != "learn":
        return f'<p class="clm-quiet">{safe(questions.job_title(job))}</p>'
    names = [source["name"] for source in job.wish.get("stream", [])]
    runs = [run for run, _ in questions.runs_of(workspace, job.id)]
    refused = questions.refused_runs(workspace, job.id)
    tracks = sorted({run.track for run in runs} | {"main"}, key=lambda t: (t != "main", t))
    states = {(r.track, r.position): "refused" if r.id in refused else r.status for r in runs}
    return "".join(_track(track, names, states, job) for track in tracks)


def _track(track: str, names: list[str], states: dict[tuple[str, int], str], job: Job) -> str:
    label = "stream" if track == "main" else track
    items = ""
    for position, name in enumerate(names):
        status = states.get((track, position), "asked")
        said = STATES.get(status, "not begun" if job.status in ENDED else "waiting")
        current = ' aria-current="step"' if status == "running" else ""
        items += f'<li class="clm-step-{safe(status)}"{current}>{safe(name)}<small>{said}</small></li>'
    spoken = f"{safe(label)}: {count(len(names), 'task')}"
    return f'<div class="clm-stream"><span>{safe(label)}</span><ol aria-label="{spoken}">{items}</ol></div>'


def _time(job: Job) -> str:
    if job.status in ENDED:
        took = (
            f", took {span((questions.aware(job.ended_at) - questions.aware(job.started_at)).total_seconds())}"
            if job.ended_at and job.started_at
            else ""
        )
        return f"ended {ago(job.ended_at)}{took}" if job.ended_at else ""
    if job.is_cancel_asked:
        return "stopping at the next step"
    left = questions.seconds_left(job)
    return f"about {span(left)} left" if left is not None else f"asked {ago(job.created_at)}"
