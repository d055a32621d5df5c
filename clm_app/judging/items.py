"""Read the items of a benchmark from records of a file or of the page, and part them into validation and test."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import ValidationError

from clm_app.data.reading import PROMPTS, RESPONSES, SPLITS, refuse_what_is_no_text
from clm_app.errors import BadData, plain
from clm_app.judging import leakage
from clm_app.probes.kinds._base import BenchmarkItem, Kind
from clm_app.settings import Settings

EXPECTED = ("expected", *RESPONSES)
PARTS = ("validation", "test")
SEED = 0  # of the split: the same items are parted the same way, so that they are the same benchmark
COLUMNS = (
    f"a prompt column ({', '.join(PROMPTS)}) is needed, and mostly an answer column ({', '.join(EXPECTED)}); rubric, choices, "
    "label and split are read where they are there"
)


class Given(NamedTuple):
    """The items of each part, and what was seen on the way."""

    parts: dict[str, list[BenchmarkItem]]
    report: dict


def given(records: Iterable[tuple[str, dict]], kind: Kind, settings: Settings, source: str) -> Given:
    """Return the items of (place for a message, record) pairs, checked by their kind and parted.

    source: what the records came from, for a message. An item that comes twice is taken once; a row that its file gave
    to training is left out, since it is no item to judge by.

    Raises:
        BadData: a record is not usable, or nothing is left to test on.
    """
    found: dict[str, tuple[BenchmarkItem, str | None]] = {}
    count = trained = 0
    columns: dict[str, str] | None = None
    for place, record in records:
        columns = _columns(record, source) if columns is None else columns
        item, part = _item(record, columns, f"{source}, {place}", settings)
        count += 1
        if part == "train":
            trained += 1
            continue
        try:
            kind.check(item)
        except BadData as err:
            raise BadData(f"{source}, {place}: {err}") from err
        found.setdefault(item.key, (item, part))
    parts = _parted(list(found.values()), source, trained)
    prompts = [{leakage.plain(item.prompt) for item in parts[part]} for part in PARTS]
    return Given(parts, {
        "items": len(found), "duplicates_dropped": count - trained - len(found), "training_rows_left_out": trained,
        "prompts_in_both_parts": len(prompts[0] & prompts[1]), "classes": len({item.group for item, _ in found.values()}),
    })  # fmt: skip


def _columns(record: dict, source: str) -> dict[str, str]:
    """Return {field of an item: column}, decided by the first record."""
    names = {name.lower(): name for name in record if isinstance(name, str)}
    found = {name: names[name] for name in ("rubric", "choices", "label", "split") if name in names}
    for field, known in (("prompt", PROMPTS), ("expected", EXPECTED)):
        if (name := next((names[n] for n in known if n in names), None)) is not None:
            found[field] = name
    if "prompt" not in found:
        raise BadData(
            f"{source} has the columns {', '.join(map(str, record)) or 'none'}; {COLUMNS}. Rename the columns."
        )
    return found


def _item(record: dict, columns: dict[str, str], place: str, settings: Settings) -> tuple[BenchmarkItem, str | None]:
    """Return the item of a record, and the part that the record gives it, `train` included."""
    told = {field: record.get(column) for field, column in columns.items()}
    part = str(told.pop("split", None) or "").strip().lower()
    if part and part not in SPLITS:
        raise BadData(f"{place}: split is {part[:40]!r}; it is one of {', '.join(SPLITS)}, or left empty in every row.")
    if not isinstance(told["prompt"], str | int | float) or not str(told["prompt"]).strip():
        raise BadData(
            f"{place}: prompt is {str(told['prompt'])[:40]!r}; it must be a text that is not empty. Fill it in."
        )
    refuse_what_is_no_text(json.dumps(told, ensure_ascii=False, default=str), place, settings)
    try:
        item = BenchmarkItem(
            prompt=str(told["prompt"]).strip(), expected=_expected(told.get("expected")),
            rubric=_read(told.get("rubric"), dict, place, "rubric") or {},
            choices=[_text(c) for c in _read(told.get("choices"), list, place, "choices") or []],
            label=_text(told.get("label")),
        )  # fmt: skip
    except ValidationError as err:
        raise BadData(f"{place}: {plain(err)}") from err
    return item, SPLITS.get(part)


def _expected(value: Any) -> str | list[str]:
    """Return the right answer as text, or several; what is no text is taken as JSON writes it."""
    if isinstance(value, list):
        return [_text(one) for one in value]
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read(value: Any, kind: type, place: str, field: str) -> Any:
    """Return a list or an object as it is, or from the JSON that a CSV cell has; None where there is none.

    A cell of choices may also name them with | between.
    """
    if isinstance(value, str) and kind is list and "|" in value and not value.lstrip().startswith("["):
        return [part for part in value.split("|") if part.strip()]
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as err:
            raise BadData(f"{place}: {field} is not JSON: {err}. Write {'[…]' if kind is list else '{…}'}.") from err
    if value is None or value == "":
        return None
    if not isinstance(value, kind):
        word = "a list" if kind is list else "an object"
        raise BadData(f"{place}: {field} is {type(value).__name__}; it must be {word}. Correct it or leave it empty.")
    return value


def _parted(items: list[tuple[BenchmarkItem, str | None]], source: str, trained: int) -> dict[str, list[BenchmarkItem]]:
    """Return {validation, test}: as the records say, else half and half; all in the order in which they came."""
    said = {part for _, part in items}
    if None in said and (said - {None} or (trained and items)):
        raise BadData(
            f"{source} gives some rows a split and others none. Give all of them one, or leave the column out."
        )
    if None in said:
        is_test = _halved([item for item, _ in items])
        items = [(item, PARTS[is_test[item.key]]) for item, _ in items]
    parts = {part: [item for item, given_ in items if given_ == part] for part in PARTS}
    if not parts["test"]:
        raise BadData(
            f"{source} has no item to test on ({len(items)} in all{', after the training rows' if trained else ''}). Give at "
            "least one row the split test, or leave the column out: then the items are halved by their prompts."
        )
    return parts


def _halved(items: list[BenchmarkItem]) -> dict[str, bool]:
    """Return {item's key: is for testing}, one half of the prompts of each class; equal prompts stay together."""
    together: dict[str, list[BenchmarkItem]] = defaultdict(list)
    for item in items:
        together[leakage.plain(item.prompt)].append(item)
    groups = list(together.values())
    random.Random(SEED).shuffle(groups)
    groups.sort(key=lambda group: group[0].group)
    return {item.key: place % 2 == 0 for place, group in enumerate(groups) for item in group}
