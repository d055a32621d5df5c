"""Perplexity: how well does the model foresee the benchmark's own texts? In bits per byte, which no tokenizer can flatter.

Bits per byte = sum of -log2 P(token | tokens before) over all tokens / bytes of UTF-8: Gao et al. 2020, The Pile
(arXiv:2101.00027), section 3.1. Perplexity = exp(the same sum in nats / tokens), Jelinek et al. 1977; it compares only models
that share a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings


class PerplexitySettings(KindSettings):
    """How a text is read."""

    window_tokens: int = Field(
        256, ge=8, le=131_072, description="tokens read at once; a longer text is read in pieces, each on its own"
    )


class Perplexity(Kind):
    """Bits per byte of running text."""

    title = "Bits per byte"
    purpose = (
        "Texts of a field that the model should go on speaking, such as manuals or reports. Needs no right answers."
    )
    unit = "bits per byte"
    lower_is_better = True
    asks = "texts"
    Settings = PerplexitySettings

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score (bits per byte of this text), loss (summed nats), tokens, bytes. The text is what is `asked`."""
        size = len(self.asked(item).encode())
        loss = round(heard.nats, 6)
        return {
            "item": item.key,
            "score": loss / math.log(2) / size,
            "loss": loss,
            "tokens": heard.tokens,
            "bytes": size,
        }

    def parts(self, outcome: dict) -> tuple[float, float]:
        """Return (bits, bytes)."""
        return outcome["loss"] / math.log(2), outcome["bytes"]

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return loss (nats per token) and perplexity."""
        loss = sum(one["loss"] for one in outcomes) / max(1, sum(one["tokens"] for one in outcomes))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # a float ends at exp(709)
