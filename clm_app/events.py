"""What a child process says: one typed event, one JSON line on its standard output; anything else is log text."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Event(BaseModel):
    """The frame of every event; `at` is UNIX time in seconds, set by the child."""

    model_config = ConfigDict(extra="forbid")


class Started(Event):
    """The training child has its model and data and begins, or goes on, at `step`."""

    kind: Literal["started"] = "started"
    step: int
    of: int = Field(description="steps in the whole run")
    rows: int = Field(description="rows in the final mix")
    rehearsed: dict[str, int] = Field(description="rows replayed, by snapshot id")
    device: str
    parameters: int
    trained_parameters: int


class Progress(Event):
    """Where the training stands; about twice a second at most."""

    kind: Literal["progress"] = "progress"
    step: int
    of: int
    loss: float = Field(description="mean nats per answer token since the last event")
    learning_rate: float
    tokens_per_s: float
    eta_s: float
    memory_mb: float = Field(description="resident memory of the child, or GPU memory it holds")
    at: float


class Checkpointed(Event):
    """A checkpoint is committed: whole, synced and renamed."""

    kind: Literal["checkpointed"] = "checkpointed"
    step: int
    folder: str


class Measuring(Event):
    """A measurement of one task's split has begun."""

    kind: Literal["measuring"] = "measuring"
    task: str
    split: str
    done: int
    of: int


class Measured(Event):
    """One snapshot's split is measured; `outcomes` is a file with one JSON line per item."""

    kind: Literal["measured"] = "measured"
    snapshot_id: int
    split: str
    items: int
    exact_match: float
    answer_loss: float
    outcomes: str
    when: Literal["root", "before", "after", "repaired"] = Field(
        description="with the base at the root of the lineage, the parent's weights, the trained or the repaired ones"
    )


class Probed(Event):
    """One probe is read; `outcomes` is a file with one JSON line per item."""

    kind: Literal["probed"] = "probed"
    probe: str
    value: float
    unit: str
    lower_is_better: bool
    low: float
    high: float
    items: int
    ruler: str = Field(description="digest of items and knobs: readings compare only where it is the same")
    figures: dict[str, float]
    outcomes: str
    when: Literal["before", "after", "repaired"] = Field(
        description="on the parent's weights, on the trained ones, or on the repaired ones"
    )


class Examined(Event):
    """One benchmark's split is sat; `outcomes` is a file with one JSON line per item."""

    kind: Literal["examined"] = "examined"
    key: str = Field(description="names weights, benchmark, split and settings")
    task: str = Field(description="name of the benchmark")
    split: str
    items: int
    outcomes: str
    seconds: float = Field(description="of hearing it, whatever the number of children")


class Scored(Event):
    """One task, or group of tasks, of the lm-evaluation-harness was run."""

    kind: Literal["scored"] = "scored"
    task: str
    figures: dict[str, dict[str, dict[str, float | None]]] = Field(
        description='{task of the group: {metric: {"value", "standard_error"}}}'
    )
    files: str = Field(description="SHA-256 over the task's YAML files; its data is not in it")
    seconds: float


class Trained(Event):
    """The weights are written, whole and synced."""

    kind: Literal["trained"] = "trained"
    folder: str
    weights_kind: Literal["adapter", "full", "routed"]
    figures: dict
    memory: dict[str, str] = Field(description='what the strategy keeps: {"new": file of kept rows, "state": folder}')


class Comparing(Event):
    """The check of export parity stands at this stage."""

    kind: Literal["comparing"] = "comparing"
    stage: str = Field(description="what is done now, such as: asking the served artefact")
    share: float = Field(description="of the whole check, 0..1")


class Compared(Event):
    """The served artefact was compared with the trained weights."""

    kind: Literal["compared"] = "compared"
    verdict: Literal["same", "differs"]
    cause: str = Field(description="one word for the first difference, such as bos_twice; empty where there is none")
    sentence: str
    evidence: dict


class Repairing(Event):
    """A candidate that hurt a past task is being repaired; one way of the ladder begins."""

    kind: Literal["repairing"] = "repairing"
    rung: str
    done: int
    of: int


class Ready(Event):
    """A serving host listens."""

    kind: Literal["ready"] = "ready"
    port: int
    backend: str
    seconds: float = Field(description="from start to loaded")


class Finished(Event):
    """The child did everything it was asked for."""

    kind: Literal["finished"] = "finished"


class Failed(Event):
    """The child cannot go on; the sentence is for the person."""

    kind: Literal["failed"] = "failed"
    sentence: str
    detail: str = ""


AnyEvent = Annotated[
    Started
    | Progress
    | Checkpointed
    | Measuring
    | Measured
    | Probed
    | Examined
    | Scored
    | Trained
    | Comparing
    | Compared
    | Repairing
    | Ready
    | Finished
    | Failed,
    Field(discriminator="kind"),
]
_READER = TypeAdapter(AnyEvent)
MARK = "\x1e"  # ASCII record separator: a library that prints JSON of its own is not mistaken for an event


def say(event: Event) -> None:
    """Print the event as one line and flush it."""
    sys.stdout.write(MARK + event.model_dump_json() + "\n")
    sys.stdout.flush()


def heard(line: str) -> AnyEvent | None:
    """Return the event on this line, or None where the line is log text."""
    return _READER.validate_json(line[len(MARK) :]) if line.startswith(MARK) else None
