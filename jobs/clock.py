"""The clock: every tick asks the ledger for work; one worker thread does one job at a time."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from apscheduler.schedulers.background import BackgroundScheduler

from clm_app.errors import ClmError, plain
from clm_app.workspace import Workspace
from jobs.bisection import Bisection
from jobs.cycle import Cancelled, Cycle
from jobs.examination import Examination
from jobs.queue import Fenced, Queue
from jobs.suite import Suite
from store.tables import Job, Run
from store.tables._columns import now

log = logging.getLogger(__name__)
KINDS = {"learn": Cycle, "examine": Examination, "bisect": Bisection, "suite": Suite}  # who does a job of which kind


class Clock:
    """APScheduler over the ledger. `spawn` starts children; `on_deploy` is called after a live alias has moved."""

    def __init__(self, workspace: Workspace, spawn: Callable, on_deploy: Callable[[], None] = lambda: None) -> None:
        self.workspace, self.spawn, self.on_deploy = workspace, spawn, on_deploy
        self.queue = Queue(workspace, owner=f"process {os.getpid()}")
        self._scheduler = BackgroundScheduler(timezone="UTC")  # UTC: local zones misfire when clocks change
        self._busy, self._stopping = threading.Lock(), threading.Event()
        self._worker: threading.Thread | None = None

    def start(self) -> None:
        """Let go of what a dead process held, and begin to tick."""
        self.queue.release_the_dead()
        self._scheduler.add_job(
            self.tick, "interval", seconds=self.workspace.settings.tick_s, id="tick", next_run_time=now(),
            max_instances=1, coalesce=True, misfire_grace_time=None,
        )  # fmt: skip
        self._scheduler.start()

    def tick(self) -> None:
        """Hand the next job to the worker, if it is free."""
        if self._stopping.is_set() or not self._busy.acquire(blocking=False):
            return
        job = self.queue.claim()
        if job is None:
            self._busy.release()
            return
        self._worker = threading.Thread(target=self._work, args=(job,), name=f"job-{job.id}", daemon=True)
        self._worker.start()

    def _work(self, job: Job) -> None:
        try:
            result = KINDS[job.kind](self.workspace, self.queue, job, self._spawn, self.on_deploy).go()
            self.queue.end(job, "done", stage="done", result=result)
        except Cancelled:
            self._close_runs(job, "cancelled", None)
            self.queue.end(job, "cancelled", stage="cancelled; what was registered stays")
        except Fenced:
            log.warning("job %s was taken over", job.id)
        except Exception as error:  # the border of the worker: the row and the log are told
            if self._stopping.is_set():
                return  # the app is going; the job stays claimed and is taken up at the next start
            if not isinstance(error, ClmError):
                log.exception("job %s failed", job.id)
            self._close_runs(job, "failed", plain(error))
            self.queue.end(job, "failed", stage="failed", error=plain(error))
        finally:
            self._busy.release()

    def _spawn(self, *arguments, **named):
        if self._stopping.is_set():
            raise RuntimeError("the app is going")
        self._child = self.spawn(*arguments, **named)
        return self._child

    def _close_runs(self, job: Job, status: str, error: str | None) -> None:
        from sqlmodel import select

        with self.workspace.write() as session:
            for run in session.exec(select(Run).where(Run.job_id == job.id, Run.status.in_(("asked", "running")))):
                run.status, run.error, run.ended_at = status, error, now()
                session.add(run)

    def stop(self) -> None:
        """Stop ticking and end the running child; its job is taken up again at the next start."""
        self._stopping.set()
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
        if self._worker and self._worker.is_alive():
            child = getattr(self, "_child", None)
            if child:
                child.stop()
            self._worker.join(10)
