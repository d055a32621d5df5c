"""Choose the next token from its logits, the same way for every backend."""

from __future__ import annotations

import numpy as np

from clm_app.serving.chat import ChatOptions


class Sampler:
    """Greedy at temperature 0, otherwise drawn; a seed makes the draws the same every time."""

    def __init__(self, options: ChatOptions) -> None:
        self.temperature, self.top_p = options.temperature, options.top_p
        self.random = np.random.default_rng(None if options.seed is None else options.seed % 2**64)

    def __call__(self, logits: np.ndarray) -> int:
        """Return a token id. logits: (vocabulary,), any float type."""
        if self.temperature == 0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # a temperature close to 0 sends all but the best to -inf, as it should
            share = np.exp((logits.astype(np.float64) - logits.max()) / self.temperature)
        share /= share.sum()
        order = np.argsort(-share, kind="stable")
        kept = order[np.cumsum(share[order]) - share[order] < self.top_p] if self.top_p > 0 else order[:1]
        return int(self.random.choice(kept, p=share[kept] / share[kept].sum()))
