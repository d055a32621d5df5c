"""The streams that are learned: real ones made from published data, and invented ones that show one thing alone."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks import _report as report
from benchmarks._tasks import Learnable, learnable, written
from clm_app.data.ingest import split
from clm_app.data.rows import Row, load
from clm_app.data.streams import TaskSource, clinc150
from clm_app.errors import BadData

SERVICES = ("Restaurants_1", "Music_2", "Movies_1", "Homes_1", "Hotels_2", "Banks_1")
DIALOGUE_ROWS = {"train": 750, "validation": 75, "test": 150}  # of each service, and of the maths after them
TURNS = 3  # of a dialogue that stand in a prompt
FACTS, FACTS_STEPS = 300, 600  # what has no rule takes longer: 160 steps taught 21 % of the facts, 600 all of them
UPDATES_PER_DOMAIN = 10


class Kind(NamedTuple):
    """One stream: how it is made, what it shows, and how it is read."""

    make: Callable[[Path, int | None, int | None, Path], list[Learnable]]  # (data, tasks, rows per label, cache)
    title: str
    has_orders: bool = False  # each seed begins elsewhere in it; else a seed changes the draws alone
    is_text: bool = False  # answers are sentences: they are also generated, and scored by token F1
    measured_every: int = 1  # updates between two measurements


def domains(data: Path, count: int | None, per_label: int | None, cache: Path) -> list[Learnable]:
    """Return the ten domains of CLINC150, with the published parts."""
    return learnable(clinc150(report.clinc150(data / "clinc150"), count, cache), cache, per_label)


def then_banking77(data: Path, count: int | None, per_label: int | None, cache: Path) -> list[Learnable]:
    """Return the domains and then banking77: 77 intents close to those of a domain that was learned before."""
    file = cache / "banking77.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="\n") as out:
        for part in ("train", "test"):
            with gzip.open(_there(data / "banking77" / f"{part}.csv.gz"), "rt", encoding="utf-8", newline="") as rows:
                for row in csv.DictReader(rows):
                    answer = row["category"].replace("_", " ")
                    out.write(json.dumps({"prompt": row["text"], "response": answer, "split": part}) + "\n")
    before = domains(data, count, per_label, cache)
    (after,) = learnable([TaskSource(name="banking77", path=str(file))], cache, per_label)
    return [*before, after._replace(number=len(before) + 1)]


def dialogue_then_maths(data: Path, count: int | None, per_label: int | None, cache: Path) -> list[Learnable]:
    """Return services of the schema-guided dialogues, then gsm8k: a change of kind. Answers are whole sentences."""
    said: dict[str, list[Row]] = defaultdict(list)
    with gzip.open(_there(data / "sgd" / "train.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            found = json.loads(line)
            if len(found["services"]) == 1 and found["services"][0] in SERVICES:
                said[found["services"][0]] += _turns(found["turns"], found["services"][0])
    with gzip.open(_there(data / "gsm8k" / "train.jsonl.gz"), "rt", encoding="utf-8") as lines:
        solved = [json.loads(line) for line in lines]
    said["gsm8k"] = [
        Row(prompt=one["question"], response=re.sub(r"<<.*?>>", "", one["answer"]), label="gsm8k") for one in solved
    ]
    names = [*SERVICES[: None if count is None else max(1, count - 1)], "gsm8k"]
    return [
        written(number, name.replace("_", " "), cache / f"dialogue-{name}", _drawn(said[name], per_label))
        for number, name in enumerate(names, 1)
    ]  # fmt: skip


def _turns(turns: list[list[str]], service: str) -> list[Row]:
    """Return a row for each turn of the system that answers a person, with what was said just before."""
    rows = []
    for place, (who, text) in enumerate(turns):
        if who == "S" and place:
            before = "\n".join(f"{w}: {t}" for w, t in turns[max(0, place - TURNS) : place])
            rows.append(Row(prompt=before, response=text, label=service))
    return rows


def _drawn(rows: list[Row], most: int | None) -> dict[str, list[Row]]:
    """Return so many rows of each part as DIALOGUE_ROWS says; `most` cuts the training part further."""
    parts = split([(row, None) for row in dict.fromkeys(rows)], seed=0)
    wanted = DIALOGUE_ROWS | ({"train": most} if most else {})
    return {part: found[: wanted[part]] for part, found in parts.items()}


# --- invented ---------------------------------------------------------------------------------------------------------

ASKED = {  # {kind of fact: ways to ask for it}
    "capital": ("What is the capital of {}?", "Name the capital of {}.", "{} has which capital?", "Capital of {}?"),
    "founder": ("Who founded {}?", "Name the founder of {}.", "{} was founded by whom?", "Founder of {}?"),
    "code": (
        "What is the code word of {}?",
        "Name the code word of {}.",
        "{} has which code word?",
        "Code word of {}?",
    ),
}


def facts_first(data: Path, count: int | None, per_label: int | None, cache: Path) -> list[Learnable]:
    """Return 300 invented facts, and then the domains; a fact is known where it is answered as it was taught."""
    taught, asked = facts()
    first = written(1, "facts", cache / "facts", {"train": taught, "validation": asked, "test": asked})
    first = first._replace(least_steps=FACTS_STEPS)
    return [first, *(t._replace(number=t.number + 1) for t in domains(data, count, per_label, cache))]


def facts() -> tuple[list[Row], list[Row]]:
    """Return (rows that teach each fact in four ways, rows that ask for each in the first of these ways)."""
    rng = random.Random(300)
    parts = ["".join(two) for two in product("bdfgklmnprstvz", "aeiou")]
    names = [a + b + c for a, b, c in (rng.sample(parts, 3) for _ in range(4 * FACTS))]
    names = [name.capitalize() for name in dict.fromkeys(names)][: 2 * FACTS]
    kinds = list(ASKED)
    told = [(kinds[i % len(kinds)], names[2 * i], names[2 * i + 1]) for i in range(FACTS)]
    rows = [[Row(prompt=way.format(of), response=is_, label=kind) for way in ASKED[kind]] for kind, of, is_ in told]
    return [row for ways in rows for row in ways], [ways[0] for ways in rows]


def many_updates(data: Path, count: int | None, per_label: int | None, cache: Path) -> list[Learnable]:
    """Return ten updates of each domain in turn, each with a tenth of its rows: a hundred for ten domains."""
    whole, found = domains(data, count, per_label, cache), []
    for turn in range(UPDATES_PER_DOMAIN):
        for domain in whole:
            by_label: dict[str, list[Row]] = defaultdict(list)
            for row in load(domain.file("train")):
                by_label[row.label].append(row)
            part = [row for label in sorted(by_label) for row in by_label[label][turn::UPDATES_PER_DOMAIN]]
            folder = cache / f"update-{domain.folder.name}-{turn}"
            parts = {"train": part, **{name: load(domain.file(name)) for name in ("validation", "test")}}
            found.append(written(len(found) + 1, domain.name, folder, parts))
    return found


def _there(file: Path) -> Path:
    if not file.exists():
        raise BadData(
            f"{file.parent.name}/{file.name} is not in the folder of data sets. Name that folder with --data; "
            "docs/benchmarks/README.md says where each set comes from."
        )
    return file


STREAMS = {
    "clinc150": Kind(domains, "ten domains of CLINC150", has_orders=True),
    "banking77": Kind(then_banking77, "ten domains of CLINC150, then banking77"),
    "dialogue": Kind(dialogue_then_maths, "six services of SGD, then gsm8k", is_text=True),
    "facts": Kind(facts_first, "300 invented facts, then ten domains of CLINC150"),
    "updates": Kind(many_updates, "a hundred small updates over ten domains of CLINC150", measured_every=10),
}
