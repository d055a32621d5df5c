"""What a run's child has measured so far, read from the end of the lines it wrote: runs/<id>/events.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

BLOCK = 16_384  # bytes
TRAINING = tuple(f'{{"kind":"{kind}"'.encode() for kind in ("started", "progress", "checkpointed"))
TRAINED = b'{"kind":"trained"'


def since_trained(events: Path) -> list[dict] | None:
    """Return what the child has said since its weights were written, oldest first; None while it is not that far.

    Reads backwards until a line tells: one block of the file while it trains, however long that takes.
    """
    try:
        handle = open(events, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    with handle:
        start, text = handle.seek(0, 2), b""
        while start:
            step = min(BLOCK, start)
            start -= step
            handle.seek(start)
            text = handle.read(step) + text
            lines = text.split(b"\n")[bool(start) : -1]  # the first may be cut; the last is being written
            for place in reversed(range(len(lines))):
                if lines[place].startswith(TRAINED):
                    return [json.loads(line) for line in lines[place + 1 :]]
                if lines[place].startswith(TRAINING):
                    return None
    return None
