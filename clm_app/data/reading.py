"""Read rows from a file a person gives: JSONL, JSON, CSV or Parquet; every refusal names the place and the remedy."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clm_app.data.rows import Row
from clm_app.data.soundness import refuse_wrapped
from clm_app.errors import BadData
from clm_app.settings import Settings

PROMPTS = ("prompt", "question", "instruction", "input", "text", "query")
RESPONSES = ("response", "answer", "completion", "output", "intent", "label", "category")
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
          "test": "test"}  # fmt: skip
LEAST_ROWS = 10


@dataclass(frozen=True)
class Reading:
    """Rows as read, each with the split its file gave it (None: we split), and what was seen on the way."""

    rows: list[tuple[Row, str | None]]
    report: dict


def read_rows(path: Path, settings: Settings) -> Reading:
    """Return the rows of a .jsonl, .json, .csv (each also .gz) or .parquet file, exact duplicates dropped.

    Raises:
        BadData: the file cannot be read, has no usable columns, too few rows, a row that is too large, or prompts that
            stand in a chat template already.
    """
    path = Path(path)
    found = list(records(path, settings))
    if not found:
        raise BadData(f"{path.name} has no rows. Give a file with at least {LEAST_ROWS} rows of prompt and response.")
    prompt, response = _columns(found[0][1], path)
    rows, seen = [], set()
    for place, record in found:
        row = _row(record, prompt, response, f"{path.name}, {place}", settings)
        split = SPLITS.get(str(record.get("split", "")).lower())
        if (row.prompt.strip().lower(), row.response) not in seen:
            seen.add((row.prompt.strip().lower(), row.response))
            rows.append((row, split))
    if len(rows) < LEAST_ROWS:
        raise BadData(
            f"{path.name} has {len(rows)} different row{'s' * (len(rows) != 1)}; at least {LEAST_ROWS} are needed, so "
            "that training, validation and test each get some. Add rows and try again."
        )
    refuse_wrapped([row for row, _ in rows], path.name)
    return Reading(rows, _report([row for row, _ in rows], len(found)))


def _report(rows: list[Row], read: int) -> dict:
    labels = Counter(row.label for row in rows)
    prompts = Counter(row.prompt.strip().lower() for row in rows)
    sizes = sorted(len((row.prompt + row.response).encode()) for row in rows)
    return {
        "rows": len(rows), "duplicates_dropped": read - len(rows), "labels": len(labels),
        "smallest_label": min(labels.values()), "largest_label": max(labels.values()),
        "prompts_with_several_answers": sum(count > 1 for count in prompts.values()),
        "median_bytes": sizes[len(sizes) // 2], "longest_bytes": sizes[-1],
    }  # fmt: skip


def records(path: Path, settings: Settings) -> Iterable[tuple[str, dict]]:
    """Yield (place for a message, record) from a .jsonl, .json, .csv (each also .gz) or .parquet file.

    Raises:
        BadData: the file cannot be read, is too large or is not what its name says.
    """
    kind = "".join(path.suffixes[-2:]).lower().removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        size = path.stat().st_size
    except OSError as err:
        raise BadData(f"{path} cannot be read: {err.strerror}. Check the name and the permissions.") from err
    if path.is_dir():
        raise BadData(
            f"{path} is a folder; one file of rows is needed here. Name a .jsonl, .json, .csv or .parquet file."
        )
    if size > settings.max_file_mb * 1_000_000:
        raise BadData(
            f"{path.name} has {size / 1e6:.0f} MB; at most {settings.max_file_mb} MB are read at once. "
            "Split the file, or raise CLM_MAX_FILE_MB."
        )
    if kind == "parquet":
        return _parquet(path)
    if kind not in ("jsonl", "json", "csv"):
        raise BadData(
            f"{path.name} ends in {path.suffix or 'nothing'}; .jsonl, .json, .csv and .parquet are read. Convert it."
        )
    text = _text(path, settings)
    return {"jsonl": _jsonl, "json": _json, "csv": _csv}[kind](text, path)


def _text(path: Path, settings: Settings) -> str:
    limit = settings.max_file_mb * 1_000_000
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as handle:
            content = handle.read(limit + 1)
    except (OSError, EOFError, zlib.error) as err:
        why = "it was cut short" if isinstance(err, EOFError) else err
        raise BadData(f"{path.name} cannot be read: {why}. Check the file, and save it again.") from err
    if len(content) > limit:
        raise BadData(
            f"{path.name} unpacks to more than {settings.max_file_mb} MB. Split it, or raise CLM_MAX_FILE_MB."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = content[: err.start].count(b"\n") + 1
        raise BadData(
            f"{path.name}, line {line}: byte 0x{content[err.start]:02x} is not UTF-8. Save the file as UTF-8 and try again."
        ) from err


def _jsonl(text: str, path: Path) -> Iterable[tuple[str, dict]]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            is_last = number == len(lines)  # what ends a file with a line break was written to its end
            yield f"line {number}", _object(line, f"{path.name}, line {number}", is_last)


def _json(text: str, path: Path) -> Iterable[tuple[str, dict]]:
    try:
        content = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as err:
        cut = ", for it was cut short" if _is_cut(text, err) else ""
        raise BadData(f"{path.name} is not JSON{cut}: {err}. Give a list of objects, or a .jsonl file.") from err
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise BadData(f'{path.name} is not a list of objects. Give [{{"prompt": …, "response": …}}, …].')
    return [(f"item {number}", item) for number, item in enumerate(content, 1)]


def _is_cut(text: str, err: Exception) -> bool:
    """Say whether a text is no JSON since it lacks its end."""
    return isinstance(err, json.JSONDecodeError) and ("Unterminated" in err.msg or err.pos >= len(text.rstrip()))


def _object(line: str, place: str, is_last: bool) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as err:
        if is_last and _is_cut(line, err):
            raise BadData(
                f"{place} is not JSON: it is the last one and ends in the middle, so the file was cut short. Copy it again."
            ) from err
        raise BadData(f"{place} is not JSON: {err}. Each line is one object with prompt and response.") from err
    if not isinstance(record, dict):
        raise BadData(
            f'{place} is {type(record).__name__}, not an object. Each line is {{"prompt": …, "response": …}}.'
        )
    return record


def _csv(text: str, path: Path) -> Iterable[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            yield f"line {reader.line_num}", {(k or "").strip(): v for k, v in record.items()}
    except csv.Error as err:
        line = reader.reader.line_num  # DictReader's own count stands at the row before
        raise BadData(f"{path.name}, line {line}: {err}. Check the quotes in that line.") from err


def _parquet(path: Path) -> Iterable[tuple[str, dict]]:
    from store.db import query

    try:
        rows = query("SELECT * FROM read_parquet(?)", [str(path)])
    except Exception as err:  # a border: DuckDB raises many kinds for a broken file
        raise BadData(
            f"{path.name} is not a Parquet file that can be read ({str(err).splitlines()[0]}). Write it again."
        ) from err
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _columns(record: dict, path: Path) -> tuple[str, str]:
    if "messages" in record:
        return "messages", "messages"
    names = {name.lower(): name for name in record if isinstance(name, str)}
    prompt = next((names[n] for n in PROMPTS if n in names), None)
    response = next((names[n] for n in RESPONSES if n in names), None)
    if prompt is None or response is None:
        raise BadData(
            f"{path.name} has the columns {', '.join(map(str, record)) or 'none'}; a prompt column ({', '.join(PROMPTS)}) "
            f"and a response column ({', '.join(RESPONSES)}) are needed. Rename two columns and try again."
        )
    return prompt, response


def _row(record: dict, prompt: str, response: str, place: str, settings: Settings) -> Row:
    asked, answered = record.get(prompt), record.get(response)
    if prompt == "messages":
        asked, answered = _turn(record, place)
    for column, value in ((prompt, asked), (response, answered)):
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise BadData(
                f"{place}: {column} is {str(value)[:40]!r}; it must be a text that is not empty. Fill it or drop the row."
            )
    refuse_what_is_no_text(f"{asked}{answered}", place, settings)
    label = record.get("label") if response != "label" else None
    return Row(prompt=str(asked).strip(), response=str(answered).strip(), label=str(label or "").strip())


def refuse_what_is_no_text(text: str, place: str, settings: Settings) -> None:
    """Raise BadData where a row's texts together are too large, or cannot be written as UTF-8; `place` begins the sentence."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > settings.max_row_kb * 1000:
        raise BadData(
            f"{place}: the row has {size / 1000:.0f} kB; at most {settings.max_row_kb} kB fit a row. "
            "Shorten it, or raise CLM_MAX_ROW_KB."
        )
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise BadData(f"{place}: character {err.start} is half of a surrogate pair, not text. Mend that row.") from err


def _turn(record: dict, place: str) -> tuple[object, object]:
    """Return the last user and assistant texts of a chat record."""
    turns = record["messages"]
    try:
        by_role = {turn["role"]: turn["content"] for turn in turns}
        return by_role["user"], by_role["assistant"]
    except (TypeError, KeyError) as err:
        raise BadData(
            f"{place}: messages need a user and an assistant turn, each with role and content; missing {err}. Mend that row."
        ) from err
