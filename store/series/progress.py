"""The curve of a run, read from the lines its child wrote: runs/<id>/events.jsonl."""

from __future__ import annotations

from pathlib import Path

from store.db import query

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
    """Return the newest progress event, or None before the first."""
    rows = curve(events)
    return rows[-1] if rows else None
