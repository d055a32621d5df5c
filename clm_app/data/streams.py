"""Streams: which tasks are learned, in which order, and the file each one is read from."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from clm_app.data.reading import read_rows
from clm_app.data.rows import Row
from clm_app.errors import BadData
from clm_app.settings import Settings

DEMO = Path(__file__).parent.parent / "demo"
DEMO_TASKS = {"Desk lamps": "desk_lamps", "E-bikes": "bikes", "Mobile plans": "mobile", "Home energy": "energy"}
DEMO_BAD_TASK = ("Insurance (bad update)", "insurance")
DEMO_QUESTIONS = (
    "My lamp keeps flickering since this morning, what should I do?",
    "Can I bring the folded bike on the train?",
    "I am moving to you from another provider. Can I keep my number?",
)


class TaskSource(BaseModel):
    """One task of a stream: its name, and the file to read; without a file the task's newest snapshot is used."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=80, description="name of the task")
    path: str = Field("", description="file of rows; empty: the task exists already")


def demo_stream() -> list[TaskSource]:
    """Return the four support-desk tasks that the package ships."""
    return [TaskSource(name=name, path=str(DEMO / f"{stem}.jsonl")) for name, stem in DEMO_TASKS.items()]


def stream_from(path: Path | None, count: int | None, cache: Path) -> list[TaskSource]:
    """Return the tasks of a folder: CLINC150's domains, or one task per file of rows; None is the demo stream.

    count: at most so many, from the front. cache: where files that have to be made are written.

    Raises:
        BadData: there is no folder, or nothing in it to learn.
    """
    if path is None:
        return demo_stream()[:count]
    path = Path(path)
    if not path.exists():
        raise BadData(f"{path} does not exist. Name a folder of files with rows, or a clinc150 folder.")
    if (path / "domains.json").exists() and (path / "data_full.json.gz").exists():
        return clinc150(path, count, cache)
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".csv", ".json", ".parquet"))
    )
    if not files:
        raise BadData(f"{path} holds no .jsonl, .json, .csv or .parquet file. Put one file per task into it.")
    return [TaskSource(name=file.stem.replace("_", " "), path=str(file)) for file in files[:count]]


def clinc150(folder: Path, count: int | None, cache: Path) -> list[TaskSource]:
    """Write one file of rows per CLINC150 domain, with the published train, validation and test parts, and name them.

    The response is the intent in words: "freeze_account" becomes "freeze account".
    """
    domains: dict[str, list[str]] = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    with gzip.open(folder / "data_full.json.gz", "rt", encoding="utf-8") as handle:
        published = json.load(handle)
    cache.mkdir(parents=True, exist_ok=True)
    stream = []
    for domain, intents in list(domains.items())[:count]:
        file = cache / f"clinc150_{domain}.jsonl"
        with open(file, "w", encoding="utf-8", newline="\n") as out:
            for part in ("train", "val", "test"):
                for text, intent in published[part]:
                    if intent in intents:
                        out.write(
                            json.dumps({"prompt": text, "response": intent.replace("_", " "), "split": part}) + "\n"
                        )
        stream.append(TaskSource(name=domain.replace("_", " "), path=str(file)))
    return stream


def write_shuffled(source: Path, target: Path, settings: Settings, seed: int = 0) -> None:
    """Write the rows of `source` with their responses dealt out anew: a task that teaches nothing true."""
    rows = [row for row, _ in read_rows(source, settings).rows]
    answers = [(row.response, row.label) for row in rows]
    random.Random(seed).shuffle(answers)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", encoding="utf-8", newline="\n") as out:
        for row, (response, label) in zip(rows, answers, strict=True):
            out.write(Row(prompt=row.prompt, response=response, label=label).model_dump_json() + "\n")
