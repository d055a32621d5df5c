"""One row: what a person asks and what the model shall answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Row(BaseModel):
    """A prompt, its response, and the label that balanced replay counts by (the response where none is given)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1)
    response: str = Field(min_length=1)
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _label_is_response(cls, value: dict) -> dict:
        return value | {"label": value.get("label") or value.get("response")} if isinstance(value, dict) else value

    @property
    def key(self) -> str:
        """Twelve hex digits that name this row's content."""
        return hashlib.sha256(json.dumps([self.prompt, self.response]).encode()).hexdigest()[:12]


def load(path: Path) -> list[Row]:
    """Return the rows of a JSONL file that this app wrote."""
    with open(path, encoding="utf-8") as lines:
        return [Row.model_validate_json(line) for line in lines]


def dump(rows: Iterable[Row], path: Path) -> None:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(row.model_dump_json() + "\n" for row in rows)
