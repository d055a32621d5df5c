"""The terminal's view of the loop: ask over HTTP, follow with a progress bar, show what came of it.

Everything here goes through the app's public door, so the demo shows nothing that a person's own program could not do.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from clm_app.data import streams
from clm_app.errors import BadInput, ClmError
from clm_app.judging.matrix import Matrix
from clm_app.settings import Settings
from store.tables.work import ENDED
from ui import cli

LOOK_S = 0.5
DEMO_MARGIN_POINTS = 10.0  # its tasks have 84 test items each: enough to exclude a loss of ten points, not one of two
BAD_RATE = 0.05  # learning rate of the bad update: ten times LoRA's default for the starter


class Door:
    """The app's HTTP door as a terminal uses it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = httpx.Client(base_url=address, timeout=300)

    def ask(self, wish: dict[str, Any]) -> dict[str, Any]:
        """Ask for a learn job and return its row; BadInput with the app's own sentence where it refuses."""
        answer = self._client.post("/api/learn", json=wish)
        if answer.is_error:
            raise BadInput(answer.json()["error"])
        return answer.json()

    def story(self, job_id: int) -> dict[str, Any]:
        """Return a job with its runs, decisions and matrices."""
        return self._client.get(f"/api/jobs/{job_id}").raise_for_status().json()

    def live(self) -> str:
        """Return the name of the live version."""
        return self._client.get("/api/health").raise_for_status().json()["live"]

    def chat(self, question: str):
        """Yield (text, version) pieces of the live version's reply as they arrive."""
        body = {"model": "live", "stream": True, "messages": [{"role": "user", "content": question}]}
        with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.is_error:
                answer.read()
                raise ClmError(answer.json()["error"]["message"])
            version = answer.headers.get("x-clm-version", "")
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise ClmError(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        yield choice["delta"].get("content") or "", version


def follow(door: Door, job_id: int, console: Console) -> dict[str, Any]:
    """Show a job's progress until it has ended, and return its story; each decision is printed as it falls."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    said = 0
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"job {job_id}", total=1.0)
        while True:
            story = door.story(job_id)
            progress.update(bar, description=story["stage"] or story["status"], completed=story["done_share"])
            for decision in story["decisions"][said:]:
                colour = {"promote": "green", "hold": "red"}.get(decision["verdict"], "yellow")
                progress.console.print(f"[{colour}]{decision['version']}[/] {decision['sentence']}")
                for cause in decision["evidence"].get("causes", ()):
                    progress.console.print(f"[dim]{cause['sentence']}[/]")
            said = len(story["decisions"])
            if story["status"] in ENDED:
                return story
            time.sleep(LOOK_S)


def learn(door: Door, wish: dict[str, Any], console: Console) -> dict[str, Any]:
    """Ask, follow and show the matrices; ClmError with the job's own sentence where it failed."""
    job = door.ask(wish)
    console.print(f"Job {job['id']}: {len(wish['stream'])} task(s), strategy {wish.get('strategy', 'auto')}.")
    story = follow(door, job["id"], console)
    if story["status"] != "done":
        raise ClmError(story["error"] or f"Job {job['id']} was {story['status']}.")
    for track, plain in story["matrices"].items():
        plain = {name: plain[name] for name in Matrix.model_fields}
        console.print(
            cli.matrix_table(Matrix(**plain), title="retention" if track == "main" else f"{track} comparison")
        )
    return story


def wish_for(stream: list[streams.TaskSource], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return a learn wish over a stream, with only those knobs set that the person chose."""
    training = {
        name: chosen[name]
        for name in ("epochs", "seed", "learning_rate", "least_steps")
        if chosen.get(name) is not None
    }
    wish: dict[str, Any] = {"stream": [source.model_dump() for source in stream], "training": training}
    wish |= {name: chosen[name] for name in ("strategy", "method") if chosen.get(name)}
    return wish | {"compare_naive": bool(chosen.get("naive"))}


def demo(
    door: Door, home: Path, data: Path | None, count: int | None, chosen: dict[str, Any], console: Console
) -> None:
    """Learn a stream beside a naive run, try a bad update, and ask the live version three questions."""
    cache = home / "cache"
    count = count or (5 if data else None)
    console.rule("1 of 3: learn a stream of tasks, and keep the old ones")
    tasks = streams.stream_from(data, None, cache)
    stream = tasks[:count]
    gate = {} if data else {"margin_points": DEMO_MARGIN_POINTS}
    learn(door, wish_for(stream, chosen) | {"gate": gate}, console)
    live = door.live()

    console.rule("2 of 3: a bad update, which the gate must refuse")
    source = Path(tasks[len(stream)].path) if data and len(tasks) > len(stream) else streams.DEMO / "insurance.jsonl"
    shuffled = cache / "bad_update.jsonl"
    streams.write_shuffled(source, shuffled, Settings(home=home))
    console.print(f"One more task with its answers shuffled, and a learning rate of {BAD_RATE:g}, far too high.")
    bad = [streams.TaskSource(name="Bad update", path=str(shuffled))]
    knobs = chosen | {"naive": False, "learning_rate": BAD_RATE, "epochs": 0.5, "least_steps": 20}
    learn(door, wish_for(bad, knobs) | {"gate": gate}, console)
    after = door.live()
    if after != live:
        raise ClmError(f"The bad update went live as {after}. That is a defect of the gate: please report it.")
    console.print(f"[bold]The live version is {live}, as before.[/]")

    console.rule("3 of 3: three questions to the live version")
    for question in questions(stream, data):
        console.print(f"[bold]You:[/] {question}")
        version = None
        for text, by in door.chat(question):
            if version is None:
                version = by
                console.print(f"[cyan]{by}:[/] ", end="")
            console.print(text, end="", markup=False, highlight=False)
        console.print()


def questions(stream: list[streams.TaskSource], data: Path | None) -> list[str]:
    """Return three questions: the demo's own, or test prompts of the first, a middle and the last task."""
    if data is None:
        return list(streams.DEMO_QUESTIONS)
    from clm_app.data.reading import read_rows

    picked = [stream[0], stream[len(stream) // 2], stream[-1]]
    found = []
    for source in picked:
        rows = read_rows(Path(source.path), Settings()).rows
        found.append(next((row for row, split in rows if split == "test"), rows[0][0]).prompt)
    return found
