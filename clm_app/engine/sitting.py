"""The measuring child: `python -m clm_app.engine.sitting ORDER.json` lets one version sit one exam, and trains nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from clm_app.engine.child import bordered, leave
from clm_app.engine.order import Exam
from clm_app.events import Measured, Measuring, say


class Sitting(BaseModel):
    """What the child is told."""

    model_config = ConfigDict(extra="forbid")

    folder: Path = Field(description="outcomes are written to after/ in it")
    base: Path
    adapter: Path | None
    exam: Exam
    max_tokens: int = Field(
        description="tokens of prompt and answer that a row is cut to, as in the version's training"
    )
    threads: int = Field(0, description="CPU threads; 0 takes all cores")


def sit(order: Sitting) -> Measured:
    """Load the version, measure it, and say the figures."""
    import torch

    from clm_app.data.template import load_tokenizer
    from clm_app.engine import measure
    from clm_app.engine.batches import Encoded
    from clm_app.engine.routed import Routed
    from clm_app.routes import is_routed
    from clm_app.serving.merge import merged

    if order.threads:
        torch.set_num_threads(order.threads)
    exam, device = order.exam, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(Measuring(task=exam.task, split=exam.split, done=0, of=1))
    model = merged(order.base, None if is_routed(order.adapter) else order.adapter)
    if is_routed(order.adapter):
        model = Routed(model, order.adapter)
    encoded = Encoded(load_tokenizer(order.base), order.max_tokens)
    file = order.folder / "after" / f"{exam.snapshot_id}.{exam.split}.jsonl"
    return measure.sit(model.to(device), exam, encoded, device, file, say)


def main(file: Path) -> int:
    """Do the order in `file`; see `bordered`."""
    return bordered(lambda: sit(Sitting.model_validate_json(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
