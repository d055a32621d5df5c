"""General text: how well does the model still foresee plain English? In bits per byte, which no tokenizer can flatter.

Bits per byte = sum of -log2 P(token | tokens before) over all tokens / bytes of UTF-8: Gao et al. 2020, The Pile
(arXiv:2101.00027), section 3.1. Loss = the same sum in nats / tokens; perplexity = exp(loss), Jelinek et al. 1977. These
two compare only models that share a tokenizer. Each passage begins with the start token and its end is not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from clm_app.probes._base import Item, Likelihood, Probe, key_of


class GeneralText(Probe):
    """Sixty short passages of everyday subjects, written for this probe, so that no model was trained on them."""

    title = "General text"
    unit = "bits per byte"
    lower_is_better = True
    own_file = Path(__file__).with_name("general_text.txt")
    form = "Write plain text, with an empty line between two passages."

    def read(self, text: str) -> list[Item]:
        """Return one item for each passage; passages are parted by empty lines."""
        passages = (" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n"))
        return [Item(key_of(passage), (passage,)) for passage in passages if passage]

    def outcome(self, item: Item, found: Sequence[Likelihood]) -> dict:
        """Return item, loss (summed nats), tokens and bytes."""
        (text,), (whole,) = item.texts, found
        return {"item": item.key, "loss": round(whole.nats, 6), "tokens": whole.tokens, "bytes": len(text.encode())}

    def parts(self, outcome: dict) -> tuple[float, float]:
        """Return (bits, bytes)."""
        return outcome["loss"] / math.log(2), outcome["bytes"]

    def figures(self, outcomes: Sequence[dict]) -> dict[str, float]:
        """Return loss (nats per token) and perplexity."""
        loss = sum(outcome["loss"] for outcome in outcomes) / sum(outcome["tokens"] for outcome in outcomes)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # a float ends at exp(709)
