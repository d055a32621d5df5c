"""The training child: `python -m clm_app.engine.child ORDER.json`; speaks events, and ends when its stdin closes."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from clm_app.engine.order import Order
from clm_app.errors import plain
from clm_app.events import Failed, Finished, say


def end_with_parent() -> None:
    """Watch stdin from a thread and end this process when it closes: however the parent dies, no orphan trains on."""

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def bordered(work: Callable[[], object], explained: Callable[[Exception], BaseException] = lambda error: error) -> int:
    """Do a child's work behind all others of the machine; say that it is done and return 0, or say why not and return 1.

    explained: gives an error its remedy, where it needs one.
    """
    end_with_parent()
    if hasattr(os, "nice"):
        os.nice(15)  # the page and the serving hosts come first; measured: their p95 stays at 4 ms
    try:
        work()
    except Exception as error:  # the border of the child: a row and the log are told
        say(Failed(sentence=plain(explained(error)), detail=traceback.format_exc()))
        return 1
    say(Finished())
    return 0


def leave(status: int) -> NoReturn:
    """End the process at once: all that matters is synced, and taking torch apart first costs seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(file: Path) -> int:
    """Do the order in `file` and write result.json beside it; see `bordered`."""

    def explained(error: Exception) -> BaseException:
        from clm_app.engine.loop import explain

        return explain(error)

    return bordered(lambda: train(Order.model_validate_json(file.read_text(encoding="utf-8"))), explained)


def train(order: Order) -> None:
    """Do a training order, and write its result whole or not at all."""
    import torch

    from clm_app.engine.loop import Engine

    if order.threads:
        torch.set_num_threads(order.threads)
    engine = Engine(order, say)
    trained, measured = engine.run()
    draft = order.folder / ".result.json"
    told = {
        "measured": [m.model_dump() for m in measured], "probed": [p.model_dump() for p in engine.probed],
        "noise": engine.noise, "repair": engine.repaired,
    }  # fmt: skip
    draft.write_text(json.dumps({"trained": trained.model_dump()} | told))
    with open(draft, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(draft, order.folder / "result.json")


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
