"""Rows become batches: token ids, padded on the left so that every answer ends at the last column."""

from __future__ import annotations

import random

import torch

from clm_app.data.rows import Row
from clm_app.data.template import row_ids

IGNORED = -100
WINDOW = 32  # batches whose rows are sorted by length together: padding stays small and the order stays mixed


class Encoded:
    """Rows with their token ids, each row encoded once however often it is drawn."""

    def __init__(self, tokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens, self.cut_rows = tokenizer, max_tokens, 0
        self._known: dict[str, tuple[list[int], list[int]]] = {}

    def __call__(self, row: Row) -> tuple[list[int], list[int]]:
        """Return (prompt ids, answer ids); a long prompt loses its start, a longer answer its end."""
        if row.key not in self._known:
            prompt, answer = row_ids(self.tokenizer, row)
            if len(prompt) + len(answer) > self.max_tokens:
                self.cut_rows += 1
                answer = answer[: self.max_tokens - 1]
                prompt = prompt[-(self.max_tokens - len(answer)) :]
            self._known[row.key] = prompt, answer
        return self._known[row.key]


def batches(
    rows: list[tuple[str, Row]], encoded: Encoded, size: int, rng: random.Random
) -> list[list[tuple[str, Row]]]:
    """Return (source, row) pairs in batches of similar length, in random order; all that is drawn comes from `rng`."""
    found = []
    for start in range(0, len(rows), size * WINDOW):
        window = sorted(rows[start : start + size * WINDOW], key=lambda pair: sum(map(len, encoded(pair[1]))))
        found += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(found)
    return found


def tensors(
    rows: list[Row], encoded: Encoded, device: torch.device, hidden_share: float = 0.0
) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and position_ids (rows, tokens), and labels (rows, longest answer + 1).

    labels holds the last columns alone, IGNORED where no answer token is to be predicted; its width is what
    `logits_to_keep` asks of the model, so that no logits are computed for prompts. hidden_share: share of prompt
    tokens that no position may look at, drawn anew each time from torch's generator.
    """
    ids = [encoded(row) for row in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in ids)
    keep = max(len(answer) for _, answer in ids) + 1
    pad = encoded.tokenizer.pad_token_id
    inputs = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(inputs), torch.full((len(rows), keep), IGNORED)
    for i, (prompt, answer) in enumerate(ids):
        inputs[i, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        mask[i, width - len(prompt) - len(answer) :] = 1
        labels[i, keep - len(answer) :] = torch.tensor(answer)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if hidden_share:
        is_prompt = torch.arange(width) < width - torch.tensor([[len(answer) + 1] for _, answer in ids])
        mask &= ~(
            (torch.rand(mask.shape) < hidden_share) & is_prompt
        )  # the last prompt token stays: it opens the answer
    batch = {"input_ids": inputs, "attention_mask": mask, "position_ids": positions, "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def answer_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits, targets): float32 (rows, kept - 1, vocabulary) and (rows, kept - 1), shifted onto each other."""
    keep = batch["labels"].shape[1]
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
        logits_to_keep=keep, use_cache=False,
    ).logits  # fmt: skip
    return logits[:, -keep:-1].float(), batch["labels"][:, 1:]
