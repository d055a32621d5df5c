"""A benchmark as whoever sits it sees it: its items in a file, and its kind with the knobs; no database is needed."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from clm_app.catalog import pick
from clm_app.errors import BadSettings, plain
from clm_app.probes.kinds._base import SHELF, BenchmarkItem, Kind


def made(kind: str, settings: dict) -> Kind:
    """Return the kind with its knobs.

    Raises:
        BadSettings: the kind or a knob is unknown, or a value is out of its bounds.
    """
    cls = pick(SHELF, kind)
    try:
        return cls(cls.Settings(**settings))
    except (ValidationError, TypeError) as err:
        raise BadSettings(f"A benchmark of kind {kind} cannot be set so: {plain(err)}") from err


def load(file: Path) -> list[BenchmarkItem]:
    """Return the items of a file that this app wrote."""
    with open(file, encoding="utf-8") as lines:
        return [BenchmarkItem.model_validate_json(line) for line in lines]
