"""Structured replies: is the reply JSON, and does it keep to a JSON Schema?

Source: JSON, RFC 8259 (NaN and Infinity are none); JSON Schema, draft 2020-12 or the one that `$schema` names, by the jsonschema
library. A schema that points to another address is refused: nothing is fetched.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field, field_validator

from clm_app.errors import BadData
from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, need_answer, shown
from clm_app.probes.kinds._replies import json_in


class StructuredSettings(KindSettings):
    """What the JSON must be like."""

    json_schema: dict | None = Field(
        None,
        description="JSON Schema of every reply; empty: any JSON, unless the item's rubric has a schema of its own",
    )
    equal: bool = Field(False, description="the JSON must also equal the expected one, whatever the order of its keys")
    fenced: bool = Field(False, description="let a ```json block around the JSON through")

    @field_validator("json_schema", mode="before")
    @classmethod
    def _from_text(cls, given: object) -> object:
        return json.loads(given) if isinstance(given, str) else given


class StructuredRubric(BaseModel):
    """What an item may say for itself."""

    model_config = ConfigDict(extra="forbid")

    json_schema: dict | None = Field(None, alias="schema", description="in place of the benchmark's")


class Structured(Kind):
    """Share of replies that are valid JSON of the right form."""

    title = "JSON"
    purpose = "Replies that a program reads: tool calls, forms, records."
    unit = "share valid"
    margin_points = 0.0  # a program that reads the reply breaks at the first one that it cannot read
    asks = "text"
    Settings, Rubric = StructuredSettings, StructuredRubric

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item whose schema is none, or that lacks the expected JSON where it is compared with."""
        super().check(item)
        if (schema := self._schema(item)) is not None:
            _refuse_unusable(schema, item)
        if self.settings.equal:
            need_answer(item)
            if not all(json_in(answer)[0] for answer in item.answers):
                raise BadData(
                    f"{shown(item)} expects {item.expected!r}, which is no JSON. Correct it, or set equal to off."
                )

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score, fault (empty; json, schema or value: the first that failed) and text."""
        fault = self._fault(item, heard.text)
        return {"item": item.key, "score": float(not fault), "fault": fault, "text": heard.text}

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return is_json and fits_schema: shares of all replies."""
        faults = Counter(one["fault"] for one in outcomes)
        is_json = len(outcomes) - faults["json"]
        return {"is_json": is_json / len(outcomes), "fits_schema": (is_json - faults["schema"]) / len(outcomes)}

    def _schema(self, item: BenchmarkItem) -> dict | None:
        own = self.rubric(item).json_schema
        return self.settings.json_schema if own is None else own

    def _fault(self, item: BenchmarkItem, text: str) -> str:
        is_json, value = json_in(text, self.settings.fenced)
        if not is_json:
            return "json"
        schema = self._schema(item)
        if schema is not None and not _fits(value, schema):
            return "schema"
        if self.settings.equal and not any(_is_same(value, json_in(answer)[1]) for answer in item.answers):
            return "value"
        return ""


def _is_same(one: object, other: object) -> bool:
    """Return whether two JSON values are the same; Python's == takes true for 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _fits(value: object, schema: dict) -> bool:
    try:
        return _validator(json.dumps(schema)).is_valid(value)
    except RecursionError:  # nested deeper than any reader follows, or a schema that points at itself
        return False


@lru_cache(maxsize=256)
def _validator(schema: str):
    """Return a validator that reads no other document. schema: as JSON."""
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    told = json.loads(schema)
    return validator_for(told, default=Draft202012Validator)(told, registry=Registry())


def _refuse_unusable(schema: dict, item: BenchmarkItem) -> None:
    from jsonschema.exceptions import SchemaError
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    if outside := [place for place in _references(schema) if not place.startswith("#")]:
        raise BadData(
            f"The schema of {shown(item)} points to {outside[0]!r}, and nothing outside of it is read. "
            'Copy that part into "$defs" and point to "#/$defs/...".'
        )
    try:
        validator = _validator(json.dumps(schema))
        validator.check_schema(schema)
    except SchemaError as err:
        raise BadData(f"The schema of {shown(item)} is no JSON Schema: {err.message}. Correct it.") from err
    whole = Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = Registry().with_resource(whole.id() or "", whole).resolver(whole.id() or "")
    for place in _references(schema):
        try:
            resolver.lookup(place)
        except Unresolvable as err:
            raise BadData(
                f"The schema of {shown(item)} points to {place!r}, which is not in it. Add that part, or correct the place."
            ) from err


def _references(part: object) -> Iterator[str]:
    """Yield every address that a schema points to."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)
