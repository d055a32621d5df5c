"""The examining child: `python -m clm_app.engine.examiner SITTING.json`; one version sits benchmarks, loaded once.

What is heard of an item is appended, batch by batch, to the paper's .partial file. A child that is killed is started
again and goes on behind the last whole line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from clm_app.engine.child import bordered, leave
from clm_app.events import say


class ExaminationSettings(BaseModel):
    """How a version sits a benchmark."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = Field(
        128, ge=1, le=8192, description="longest reply that is read, in tokens; the rest is cut"
    )
    batch_tokens: int = Field(
        2048, ge=1, le=1_000_000, description="tokens in one forward pass, padding counted; less needs less memory"
    )


class Paper(BaseModel):
    """One benchmark's split to sit."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(description="names the outcomes: <key>.partial while it is sat, <key>.jsonl when it is whole")
    name: str
    kind: str = Field(description="a name on the shelf clm_app.probes.kinds")
    settings: dict = Field(description="the kind's knobs")
    split: str
    file: Path = Field(description="the items, one JSON line each")


class Sitting(BaseModel):
    """What the child is told: these weights sit these papers, as they were trained or as they are served."""

    model_config = ConfigDict(extra="forbid")

    folder: Path = Field(description="where outcomes are written")
    version: str
    base: Path
    adapter: Path | None
    on: Literal["trained", "served"]
    backend: str = Field(description="engine, or the backend that serves this version")
    converted: Path = Field(description="path without an ending for a copy in the backend's own format")
    threads: int = Field(ge=1, description="CPU threads to compute with")
    run: ExaminationSettings
    papers: list[Paper]


def main(file: Path) -> int:
    """Sit every paper of the sitting in `file`; see `bordered`."""
    return bordered(lambda: sit(Sitting.model_validate_json(file.read_text(encoding="utf-8"))))


def sit(sitting: Sitting) -> None:
    """Sit every paper, with the threads and the environment of a host where a version is heard as it is served."""
    if sitting.on == "served":
        from clm_app.serving.host import prepare_environment

        prepare_environment(sitting.threads)
    from clm_app.engine.examining import sit_all

    sit_all(sitting, say)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
