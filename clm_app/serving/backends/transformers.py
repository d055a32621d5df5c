"""Serve with transformers: any causal model it can load, on a CUDA GPU or the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clm_app.routes import asked, is_routed
from clm_app.serving.backends._base import Backend
from clm_app.serving.chat import Message


class Transformers(Backend):
    """float32 on the CPU, bfloat16 on a GPU; one pass over the prompt, then one per token over a key-value cache."""

    title = "transformers"

    def __init__(self, base: Path, adapter: Path | None, threads: int, converted: Path) -> None:
        import torch

        from clm_app.engine.routed import Routed
        from clm_app.serving.merge import merged

        super().__init__(base, adapter, threads, converted)
        torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        routed = is_routed(adapter)
        model = merged(base, None if routed else adapter)
        if routed:
            model = Routed(model, adapter)
        self.model = model.to("cuda", torch.bfloat16) if self.device == "cuda" else model
        self.routed = self.model if routed else None

    @contextlib.contextmanager
    def answering(self, messages: list[Message]) -> Iterator[None]:
        """Choose the adapter that the router names for what the person said."""
        if self.routed is None:
            yield
            return
        with self.routed.using(self.routed.router.route(asked(messages))) as self.model:
            yield

    def tokens(self, ids: list[int], choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        """Yield reply tokens without end; see the contract."""
        cache, fresh = None, ids
        while True:
            logits, cache = self._forward(fresh, cache)
            token = choose(logits)
            yield token
            fresh = [token]

    def _forward(self, ids: list[int], cache: Any) -> tuple[np.ndarray, Any]:
        """Return the last position's logits (vocabulary,), float32, and the cache grown by these ids."""
        import torch

        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return out.logits[0, -1].float().cpu().numpy(), out.past_key_values
