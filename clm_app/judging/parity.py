"""Export parity: does the artefact that is served answer as the weights that were trained?

Golden prompts go through both, in a child process, stage by stage from the rendered text to the task scores; the first
stage that differs names the cause (clm_app/judging/stages.py). What is seen is kept as a ParityReading.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlmodel import select

from clm_app.data.ingest import tasks
from clm_app.errors import BadSettings, ChildFailed, plain
from clm_app.events import AnyEvent, Compared, Comparing, Failed
from clm_app.registry import versions
from clm_app.serving.chat import Message
from clm_app.serving.choice import choose
from clm_app.serving.gguf import FORMAT
from clm_app.serving.handle import Spawn
from clm_app.serving.router import converted_copy, host_threads
from clm_app.workspace import Workspace
from store.db import record
from store.tables import ParityReading, Version

BEAT_S = 0.5
DIFFERS, SAME = "differs", "same"


class Bounds(BaseModel):
    """How far a served artefact of one precision may be from the trained weights. Log-probabilities are natural."""

    model_config = ConfigDict(extra="forbid")

    log_probability: float = Field(
        ge=0, description="largest difference of one token, in nats, over tokens that either side gives 1 % or more"
    )
    divergence: float = Field(ge=0, description="mean Kullback-Leibler divergence of the first token, in nats")
    top1: float = Field(
        ge=0, le=1, description="least share of prompts with the same likeliest first token, but for chance"
    )
    top5: float = Field(ge=0, le=1, description="least mean share of the five likeliest first tokens in common")
    answer: float = Field(ge=0, description="largest mean difference over the right answers, in nats per token")
    replies: float = Field(ge=0, le=1, description="least share of greedy replies that are the same, but for chance")


class ParitySettings(BaseModel):
    """Which prompts, how many, and how far the two sides may be apart.

    Where the bounds come from, with room for a few dozen prompts: what whole starters tuned for a domain of CLINC150 were
    seen to differ by (LOG.md, "Export parity": largest log-probability and mean divergence 5e-6 and 3e-9 in float32, 0.11
    and 2e-4 in bfloat16, 0.30 and 2e-3 at Q8_0 and Q6_K, 1.2 and 0.018 at Q5_K_M and Q4), and llama.cpp's scoreboard of
    Llama 3 8B (tools/perplexity/README.md: mean divergence and share of the same likeliest token 0.0014 and 97.7 % at
    Q8_0, 0.0055 and 96.0 % at Q6_K, 0.031 and 91.9 % at Q4_K_M, 0.33 to 0.45 and 71.1 % at Q2_K).
    """

    model_config = ConfigDict(extra="forbid")

    prompts_per_task: int = Field(3, ge=1, le=100, description="golden prompts of each task, from its validation rows")
    most_tasks: int = Field(10, ge=0, le=1000, description="most tasks to take golden prompts and scored rows from")
    scored_rows: int = Field(
        160,
        ge=0,
        le=100_000,
        description="validation rows that are scored on both sides, over all tasks; 0: none. 133 without a flip exclude a "
        "loss of 2 points",
    )
    reply_tokens: int = Field(24, ge=1, le=1024, description="tokens of each greedy reply that are compared")
    longest_tokens: int = Field(
        1024, ge=64, le=8192, description="tokens of the longest golden prompt, where the model reads as many"
    )
    margin_points: float = Field(2.0, ge=0, le=100, description="loss of a task's score that is let pass, in points")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="level of the tests on task scores and on shares")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the draw of prompts and rows")
    float32: Bounds = Field(
        Bounds(log_probability=0.01, divergence=1e-4, top1=0.98, top5=0.98, answer=0.005, replies=0.95),
        description="bounds of an artefact in float32",
    )
    half: Bounds = Field(
        Bounds(log_probability=0.35, divergence=0.003, top1=0.95, top5=0.9, answer=0.02, replies=0.8),
        description="bounds in float16 or bfloat16",
    )
    q8: Bounds = Field(
        Bounds(log_probability=0.7, divergence=0.01, top1=0.93, top5=0.9, answer=0.05, replies=0.75),
        description="bounds of 8 and 6 bits a weight",
    )
    q4: Bounds = Field(
        Bounds(log_probability=2.0, divergence=0.1, top1=0.85, top5=0.75, answer=0.2, replies=0.5),
        description="bounds of 5 and 4 bits a weight; fewer bits are held to them too",
    )


class Golden(BaseModel):
    """One golden prompt: a conversation, and the right answer where it is known."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="such as Colours 2, or unicode")
    messages: list[Message]
    answer: str = Field("", description="empty: not known, so that only the first token and the reply are compared")


class Artefact(BaseModel):
    """Folders that one side is loaded from."""

    model_config = ConfigDict(extra="forbid")

    base: Path
    adapter: Path | None = None


class ParityOrder(BaseModel):
    """What the child is told: the two sides, and what to ask them."""

    model_config = ConfigDict(extra="forbid")

    version: str
    trained: Artefact = Field(description="folders that the training child wrote and measured")
    served: Artefact = Field(description="folders that the backend is given")
    backend: str = Field(description="a name on the shelf clm_app.serving.backends")
    converted: Path = Field(description="path without an ending of a copy in another format, as a host is told")
    digests: dict[str, str] = Field(default_factory=dict, description="{folder: SHA-256 that it had when registered}")
    held_out: dict[str, Path] = Field(default_factory=dict, description="{task: its validation rows}")
    settings: ParitySettings = Field(default_factory=ParitySettings)
    threads: int = Field(1, ge=1, description="CPU threads to compute with")


def check(
    workspace: Workspace,
    spawn: Spawn,
    version: Version,
    beat: Callable[[str, float], object] = lambda stage, share: None,
    *,
    again: bool = False,
) -> ParityReading:
    """Compare a version as it is served with what was trained, write the reading down and return it.

    What was read of the same weights, backend, converter and settings is returned as it is, unless `again`.
    beat: told about twice a second what is done and the share of the work, 0..1; what it raises ends the child.

    Raises:
        BadSettings: the settings are out of their bounds, or the backend asked for cannot load the version.
        BadModel: the version's folders are gone.
        ChildFailed: the child ended before it could say anything; nothing is written.
    """
    order = order_for(workspace, version)
    key = key_of(version, order)
    with workspace.read() as session:
        rows = select(ParityReading).where(ParityReading.version_id == version.id).order_by(ParityReading.id.desc())
        found = next((row for row in session.exec(rows) if row.evidence.get("key") == key), None)
    if found and not again:
        return found
    started = time.monotonic()
    said = _ask(workspace, spawn, order, beat)
    reading = ParityReading(
        version_id=version.id, backend=order.backend, verdict=said.verdict, sentence=said.sentence,
        evidence=said.evidence | {"cause": said.cause, "key": key}, seconds=round(time.monotonic() - started, 2),
    )  # fmt: skip
    with workspace.write() as session:
        session.add(reading)
        session.flush()
        record(session, "parity", f"version.parity_{said.verdict}", f"version:{version.id}", reading=reading.id,
               backend=order.backend, cause=said.cause, sentence=said.sentence)  # fmt: skip
    return reading


def readings(workspace: Workspace, version: Version) -> list[ParityReading]:
    """Return what was read of a version, newest first."""
    with workspace.read() as session:
        rows = select(ParityReading).where(ParityReading.version_id == version.id).order_by(ParityReading.id.desc())
        return list(session.exec(rows))


def order_for(workspace: Workspace, version: Version) -> ParityOrder:
    """Return the child's order: the backend and the arguments that a host of this version would have."""
    base, adapter = versions.weights(workspace, version)
    backend, _ = choose(workspace.settings.backend, base, adapter)
    digests = {str(base): version.object if version.kind == "full" else version.base_digest}
    if adapter is not None:
        digests[str(adapter)] = version.object
    try:
        settings = ParitySettings(**workspace.settings.parity)
    except ValidationError as err:
        raise BadSettings(f"The export parity check cannot be set so: {plain(err)}") from err
    weights = Artefact(base=base, adapter=adapter)
    return ParityOrder(
        version=version.name, trained=weights, served=weights, backend=backend, digests=digests, settings=settings,
        converted=converted_copy(workspace, version), threads=host_threads(), held_out=_held_out(workspace, version, settings),
    )  # fmt: skip


def _held_out(workspace: Workspace, version: Version, settings: ParitySettings) -> dict[str, Path]:
    """Return the validation rows of what a version has learned, newest first; of a bare base, of every task there is."""
    with workspace.read() as session:
        learned = versions.lineage(session, version)
    known = learned or [(taken, task) for task, taken in tasks(workspace)]
    newest = list(reversed(known))[: settings.most_tasks]
    return {task.name: workspace.objects.path(taken.object) / "validation.jsonl" for taken, task in newest}


def key_of(version: Version, order: ParityOrder) -> str:
    """Return the SHA-256 of what a reading depends on: the weights, the backend, the converter and the settings."""
    told = [version.base_digest, version.object, order.backend, FORMAT, order.settings.model_dump()]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _ask(workspace: Workspace, spawn: Spawn, order: ParityOrder, beat: Callable[[str, float], object]) -> Compared:
    folder = workspace.home / "cache" / "orders"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"parity-{order.version}-{secrets.token_hex(4)}.json"
    file.write_text(order.model_dump_json(), encoding="utf-8")
    heard = _Heard()
    child = spawn(
        ["python", "-m", "clm_app.engine.parity_child", str(file)], name=f"parity-{order.version}", on_event=heard
    )
    try:
        while child.wait(BEAT_S) is None:
            beat(heard.stage, heard.share)
    finally:
        child.stop()
        file.unlink(missing_ok=True)
    if heard.compared is None:
        last = heard.failure or (child.last[-1] if child.last else "it left no word")
        raise ChildFailed(
            f"{order.version} could not be compared with what was trained; the check ended while {heard.stage}: {last}. "
            "Close other programs and check again."
        )
    return heard.compared


class _Heard:
    """Hears the child: where it stands, and what it found."""

    def __init__(self) -> None:
        self.stage, self.share, self.failure = "starting", 0.0, ""
        self.compared: Compared | None = None

    def __call__(self, event: AnyEvent) -> None:
        match event:
            case Comparing(stage=stage, share=share):
                self.stage, self.share = stage, share
            case Compared():
                self.compared = event
            case Failed(sentence=sentence):
                self.failure = sentence
