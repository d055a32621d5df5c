"""Read a probe: the likelihood of whole texts, many in one forward pass, and what the probe makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from clm_app.data.template import load_tokenizer, neutral
from clm_app.engine.batches import IGNORED
from clm_app.engine.routed import Routed
from clm_app.events import Probed
from clm_app.probes._base import Item, Likelihood, Probe, made
from clm_app.routes import is_routed

TOKENS = 512  # in one forward pass: on one core the starter reads both probes in 1.1 s so, in 1.9 s eight times as wide


@torch.no_grad()
def likelihoods(model: torch.nn.Module, texts: Sequence[str], tokenizer, window: int) -> list[Likelihood]:
    """Return how likely the model finds each text, after the start token; the end of a text is not asked for.

    A tokenizer without a start token opens a text with its end token, as such models saw texts follow one another. A
    text of more than `window` tokens is read in pieces, each after a start token of its own.
    """
    model.eval()
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    window = min(window, getattr(model.config, "max_position_embeddings", None) or window)
    pieces = [
        (place, [start, *ids[first : first + window - 1]])
        for place, ids in enumerate(tokenizer.encode(neutral(tokenizer, t), add_special_tokens=False) for t in texts)
        for first in range(0, len(ids), window - 1)
    ]
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for batch in _batches(pieces):
        for (place, ids), loss in zip(batch, _losses(model, [ids for _, ids in batch], tokenizer), strict=True):
            nats[place] += loss
            tokens[place] += len(ids) - 1
    return [Likelihood(*one) for one in zip(nats, tokens, strict=True)]


def _batches(pieces: list[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield pieces of similar length together, as many as TOKENS allows."""
    ordered = sorted(pieces, key=lambda piece: len(piece[1]), reverse=True)
    while ordered:
        count = max(1, TOKENS // len(ordered[0][1]))
        yield ordered[:count]
        ordered = ordered[count:]


def _losses(model: torch.nn.Module, rows: list[list[int]], tokenizer) -> list[float]:
    """Return -log P of each row after its first token, in nats. Padding is on the right, where nothing looks at it."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    targets = torch.full((len(rows), width - 1), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets).sum(1).tolist()


def outcomes(model: torch.nn.Module, probe: Probe, tokenizer) -> list[dict]:
    """Return one dict per item of the probe, in order; see its `outcome`.

    A model with one adapter per task reads each item through the adapter that the router names for the item's first
    text, as it would answer that text as a prompt; added as `route`. All texts of an item go through the same one.
    """
    if not isinstance(model, Routed):
        return _outcomes(model, probe, probe.items, tokenizer)
    found: list[dict] = [{}] * len(probe.items)
    for task, places in model.groups([item.texts[0] for item in probe.items]).items():
        with model.using(task) as answering:
            lines = _outcomes(answering, probe, [probe.items[i] for i in places], tokenizer)
        for i, line in zip(places, lines, strict=True):
            found[i] = line | {"route": task}
    return found


def _outcomes(model: torch.nn.Module, probe: Probe, items: list[Item], tokenizer) -> list[dict]:
    texts = [text for item in items for text in item.texts]
    found = iter(likelihoods(model, texts, tokenizer, probe.settings.window_tokens))
    return [probe.outcome(item, [next(found) for _ in item.texts]) for item in items]


def reading(model: torch.nn.Module, probe: Probe, tokenizer, file: Path) -> Probed:
    """Read one probe and write its outcomes to `file`, whose folder says when: before or after."""
    found = outcomes(model, probe, tokenizer)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    return Probed(
        probe=probe.name, unit=probe.unit, lower_is_better=probe.lower_is_better, ruler=probe.ruler, items=len(found),
        figures=probe.figures(found), outcomes=str(file), when=file.parent.name, **probe.value(found)._asdict(),
    )  # fmt: skip


def of_folder(folder: Path, base: Path, weights: Path | None = None, settings: dict | None = None) -> list[Probed]:
    """Return the reading of every probe on weights that a run wrote, their outcomes as files in `folder`.

    base: full weights; weights: one adapter over them, or one per task with its router. settings: see `made`.
    """
    from clm_app.serving.merge import merged

    model = merged(base, None if is_routed(weights) else weights)
    if is_routed(weights):
        model = Routed(model, weights)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(base)
    return [
        reading(model, probe, tokenizer, folder / "after" / f"{probe.name}.jsonl") for probe in made(settings or {})
    ]
