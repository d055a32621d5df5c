"""Latency: how long does a person wait for a reply, and for its first word?

Percentiles rather than means tell of waiting, as one slow reply in twenty is what is remembered (Dean and Barroso 2013, The Tail at
Scale); as in MLPerf Inference (Reddi et al. 2020, arXiv:1911.02549). The value is the mean, since it alone is a sum over items.
Seconds compare only where both versions were measured on the same machine, with nothing else running.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings


class LatencySettings(KindSettings):
    """What is still quick enough."""

    limit_s: float = Field(
        2.0, gt=0, description="seconds in which a reply should be whole; the share that is, is a figure"
    )


class Latency(Kind):
    """Seconds per reply, median and 95th percentile, tokens per second."""

    title = "Latency"
    purpose = "How fast a version answers on this machine, through the backend that serves it."
    unit = "seconds per reply"
    lower_is_better = True
    asks = "text"
    Settings = LatencySettings

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score (seconds), first_s (None: not known), tokens (of the reply) and text."""
        return {"item": item.key, "score": heard.seconds, "first_s": heard.first_s or None,
                "tokens": heard.completion_tokens, "text": heard.text}  # fmt: skip

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return p50_s, p95_s, first_p50_s, first_p95_s (None where not known), tokens_per_s (None without seconds) and
        within_limit (share).
        """
        seconds = [one["score"] for one in outcomes]
        first = [one["first_s"] for one in outcomes if one["first_s"] is not None]
        total = sum(seconds)
        return {
            "p50_s": _quantile(seconds, 0.5), "p95_s": _quantile(seconds, 0.95),
            "first_p50_s": _quantile(first, 0.5), "first_p95_s": _quantile(first, 0.95),
            "tokens_per_s": sum(one["tokens"] for one in outcomes) / total if total else None,
            "within_limit": sum(one <= self.settings.limit_s for one in seconds) / len(seconds),
        }  # fmt: skip


def _quantile(values: list[float], share: float) -> float | None:
    import numpy

    return float(numpy.quantile(values, share)) if values else None
