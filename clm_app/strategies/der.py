"""DER++: rehearse kept rows, and on them answer as the model did when it had just learned them.

Source: Buzzega et al. 2020, arXiv:2004.07211, equation 6. Of a vocabulary of many thousands only the likeliest tokens
are stored, the others as one sum, so the distance is a divergence of distributions instead of one of logits.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from clm_app.data.rows import Row
from clm_app.errors import BadSettings
from clm_app.strategies.replay import Replay, ReplaySettings

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

FILE, ROWS_AT_ONCE = "answers.safetensors", 64
NOTHING = -1e4  # log-probability that fills up rows stored with fewer tokens
LEAST = 1e-6  # of probability: below it the sum of the tokens that were not stored says nothing


class DerSettings(ReplaySettings):
    """Replay's knobs, and what the stored answers weigh."""

    weight: float = Field(
        0.5, gt=0, le=1000, description="this times the divergence from the stored answers, in nats per answer token "
        "of the rehearsed rows, is added to the loss",
    )  # fmt: skip
    top: int = Field(20, ge=1, le=1024, description="likeliest tokens stored for each answer token, 6 bytes each")


class Stored(NamedTuple):
    """What the model said of one row's answer when it was learned, token by token."""

    values: torch.Tensor  # float16 (answer tokens, top): log-probabilities
    ids: torch.Tensor  # int32 (answer tokens, top): the tokens they are of


class Der(Replay):
    """Replay whose kept rows remember the model's own answer distribution."""

    title = "DER++ (rehearse rows and their old answers)"
    purpose = "Keeps more than replay does from the same kept rows: how sure the model was, and what else it thought of"
    needs = (
        "kept rows of past tasks; the mix grows by share / (1 - share); on disk 6 bytes times `top` for each kept "
        "answer token, and at the end one forward pass over the rows kept"
    )
    needs_old_rows = True
    Settings = DerSettings

    def __init__(self, settings: DerSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.stored: dict[str, Stored] = {}  # {row key: what was said when it was learned}
        self.kept_now: list[Row] = []

    def refuse(self, order: Order) -> None:
        """Refuse stored answers whose token ids mean other tokens here."""
        super().refuse(order)
        if order.state is None:
            return
        from safetensors import safe_open

        from clm_app.data.template import load_tokenizer

        with safe_open(order.state / FILE, framework="pt") as file:
            is_same = file.metadata()["vocabulary"] == vocabulary(load_tokenizer(order.base))
        if not is_same:
            raise BadSettings(
                "The answers stored for strategy der are token ids of another vocabulary: the tokenizer or the base "
                "changed since. Start from a version with the same tokenizer, or choose strategy replay."
            )

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Read the stored answers of the rows that are still kept."""
        self.engine, self.model = engine, model
        if engine.order.state:
            kept = {row.key for rows in engine.kept.values() for row in rows}
            found = read(engine.order.state / FILE)
            self.stored = {key: stored for key, stored in found.items() if key in kept}
        self.figures["rows_with_answers"] = len(self.stored)

    def loss(self, model, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss with `weight` times the divergence from the stored answers added."""
        import torch

        from clm_app.engine.batches import IGNORED

        here, values, ids = [], [], []
        lengths = (targets != IGNORED).sum(1).tolist()
        for i, ((source, row), length) in enumerate(zip(batch["rows"], lengths, strict=True)):
            if source != "new" and row.key in self.stored:
                stored = self.stored[row.key]
                count = min(length, len(stored.values))
                start = targets.shape[1] - length
                here.append(logits[i, start : start + count])
                values.append(stored.values[:count].float())
                ids.append(stored.ids[:count])
        if not here:
            return loss
        device = logits.device
        told = torch.cat(values).to(device), torch.cat(ids).to(device).long()
        return loss + self.settings.weight * divergence(*told, torch.cat(here))

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return what replay keeps, and remember which rows these are."""
        self.kept_now = super().keep(new, rng)
        return self.kept_now

    def save(self, folder: Path) -> None:
        """Write what the model says now of the rows kept now, beside what was said of older ones."""
        from safetensors.torch import save_file

        self.stored |= answers(self.engine, self.model, self.kept_now, self.settings.top)
        if not self.stored:
            return
        save_file(packed(self.stored), folder / FILE, {"vocabulary": vocabulary(self.engine.tokenizer)})
        self.figures |= {"stored_rows": len(self.stored), "stored_bytes": (folder / FILE).stat().st_size}


def divergence(values: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(stored || now) in nats, the mean over answer tokens, all tokens that were not stored taken as one.

    values, ids: float32 and int64 (positions, top), log-probabilities and tokens; logits: (positions, vocabulary).
    """
    import torch

    is_stored = values > NOTHING
    now = logits.float().log_softmax(-1).gather(-1, ids)
    then = values.exp()
    then = torch.cat([then, (1 - then.sum(-1, keepdim=True)).clamp(min=LEAST)], -1)
    then = then / then.sum(-1, keepdim=True)  # float16 rounds: the stored sum may be a little over 1
    others = (1 - (now.exp() * is_stored).sum(-1, keepdim=True)).clamp(min=LEAST)
    now = torch.cat([now, others.log()], -1)
    return (torch.xlogy(then, then) - then * now).sum(-1).mean()


def answers(engine: Engine, model: torch.nn.Module, rows: list[Row], top: int) -> dict[str, Stored]:
    """Return {row key: the likeliest `top` tokens at each place of its answer}, as the model sees them now."""
    import torch

    from clm_app.engine.batches import IGNORED, answer_logits, tensors

    found, was_training = {}, model.training
    model.eval()
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chosen = rows[start : start + ROWS_AT_ONCE]
        with torch.no_grad():
            logits, targets = answer_logits(model, tensors(chosen, engine.encoded, engine.device))
        best = logits.log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
        for i, row in enumerate(chosen):
            is_answer = targets[i] != IGNORED
            values, ids = best.values[i][is_answer], best.indices[i][is_answer]
            found[row.key] = Stored(values.to(torch.float16).cpu(), ids.to(torch.int32).cpu())
    model.train(was_training)
    return found


def packed(stored: dict[str, Stored]) -> dict[str, torch.Tensor]:
    """Return all rows in a few tensors; rows stored with another `top` are filled up with impossible tokens."""
    import torch
    from torch.nn.functional import pad

    top = max(s.values.shape[1] for s in stored.values())
    return {
        "keys": torch.tensor([list(key.encode()) for key in stored], dtype=torch.uint8),
        "tokens": torch.tensor([len(s.values) for s in stored.values()], dtype=torch.int32),
        "values": torch.cat([pad(s.values, (0, top - s.values.shape[1]), value=NOTHING) for s in stored.values()]),
        "ids": torch.cat([pad(s.ids, (0, top - s.ids.shape[1])) for s in stored.values()]),
    }


def read(file: Path) -> dict[str, Stored]:
    """Return what `packed` was given, by row key."""
    from safetensors.torch import load_file

    found = load_file(file)
    keys, tokens = [bytes(key.tolist()).decode() for key in found["keys"]], found["tokens"].tolist()
    return {
        key: Stored(values, ids)
        for key, values, ids in zip(keys, found["values"].split(tokens), found["ids"].split(tokens), strict=True)
    }


def vocabulary(tokenizer) -> str:
    """Return a digest of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
