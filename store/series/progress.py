"""The curve of a run, read from the lines its child wrote: runs/<id>/events.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from store.db import query

TAIL = 16_384  # bytes
COLUMNS = ("{kind: 'VARCHAR', step: 'BIGINT', \"of\": 'BIGINT', loss: 'DOUBLE', learning_rate: 'DOUBLE', "
           "tokens_per_s: 'DOUBLE', eta_s: 'DOUBLE', memory_mb: 'DOUBLE', \"at\": 'DOUBLE'}")  # fmt: skip


def curve(events: Path, points: int = 400) -> list[dict]:
    """Return at most `points` progress events in order of step; where a step was run twice, the later line counts.

    A torn last line (the child was killed while writing) is left out.
    """
    if not events.exists() or not events.stat().st_size:
        return []
    return query(
        f"""
        WITH lines AS (
            SELECT * FROM read_json(?, format='newline_delimited', ignore_errors=true, columns={COLUMNS})
            WHERE kind = 'progress' AND step IS NOT NULL
            QUALIFY row_number() OVER (PARTITION BY step ORDER BY "at" DESC) = 1
        ), numbered AS (SELECT *, row_number() OVER (ORDER BY step) AS n, count(*) OVER () AS total FROM lines)
        SELECT step, "of", loss, learning_rate, tokens_per_s, eta_s, memory_mb, "at" FROM numbered
        WHERE n % greatest(1, total // ?) = 0 OR n = total ORDER BY step
        """,
        [str(events), points],
    )


def latest(events: Path) -> dict | None:
    """Return the newest progress event, or None before the first; reads the file's end alone, as pages ask often."""
    try:
        with open(events, "rb") as handle:
            handle.seek(max(0, handle.seek(0, 2) - TAIL))
            lines = handle.read().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):  # what follows the last line break is a line being written
        if line.startswith('{"kind":"progress"'):
            return json.loads(line)
    rows = curve(events, 1)  # a long measurement has filled the end of the file
    return rows[-1] if rows else None
