"""The suite child: `python -m clm_app.engine.suite_child ORDER.json`; one version runs tasks of the lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from clm_app.engine.child import end_with_parent
from clm_app.errors import plain
from clm_app.events import Event, Failed, Finished, Measuring, Scored, say
from clm_app.judging import harness
from clm_app.judging.harness import HarnessSettings

TELL_EVERY_S = 0.5


class SuiteOrder(BaseModel):
    """What the child is told."""

    model_config = ConfigDict(extra="forbid")

    version: str
    base: Path
    adapter: Path | None
    threads: int = Field(0, description="CPU threads; 0 takes all cores")
    settings: HarnessSettings = Field(description="only the tasks that are not scored yet")


def score(order: SuiteOrder, say: Callable[[Event], object]) -> None:
    """Load the version once, run one task after the other, and say each one's figures as soon as they are there.

    Raises:
        NotThere, BadSettings, BadData: as `harness.run`; what was said before holds.
    """
    import torch

    from clm_app.data.template import load_tokenizer
    from clm_app.engine.routed import Routed
    from clm_app.routes import is_routed
    from clm_app.serving.merge import merged

    if order.threads:
        torch.set_num_threads(order.threads)
    tasks = order.settings.tasks
    say(Measuring(task=tasks[0], split="suite", done=0, of=1))
    model = merged(order.base, None if is_routed(order.adapter) else order.adapter)
    if is_routed(order.adapter):
        model = Routed(model, order.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = load_tokenizer(order.base)
    for task in tasks:
        began, one = time.perf_counter(), order.settings.model_copy(update={"tasks": [task]})
        digest = _digest(harness.refuse(one))
        figures = harness.run(model, tokenizer, one, _telling(task, say))
        say(Scored(task=task, figures=figures, files=digest, seconds=time.perf_counter() - began))


def _telling(task: str, say: Callable[[Event], object]) -> Callable[[int, int], None]:
    """Return what says how far a task is, about twice a second at most."""
    told = 0.0

    def tell(done: int, of: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            say(Measuring(task=task, split="suite", done=done, of=of))

    return tell


def _digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def main(file: Path) -> int:
    """Do the order in `file` and return 0, or say why not and return 1."""
    end_with_parent()
    if hasattr(os, "nice"):
        os.nice(15)  # as the training child: the page and the serving hosts come first
    try:
        score(SuiteOrder.model_validate_json(file.read_text(encoding="utf-8")), say)
    except Exception as error:  # the border of the child: a row and the log are told
        say(Failed(sentence=plain(error), detail=traceback.format_exc()))
        return 1
    say(Finished())
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch apart costs seconds, and all that matters is said
