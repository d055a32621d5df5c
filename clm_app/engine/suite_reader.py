"""How the lm-evaluation-harness reads a version: it counts the rows read, and a version with one adapter per task is routed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lm_eval.models.huggingface import HFLM

from clm_app.engine.routed import Routed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reader(HFLM):
    """The harness's own reader of a loaded model, on all of its requests.

    Through a router all requests of an item go where its first context leads, as that text would as a prompt: the whole
    context, with solved examples where there are any.
    """

    def __init__(
        self,
        model: PreTrainedModel | Routed,
        tokenizer: PreTrainedTokenizerBase,
        batch_rows: int,
        tell: Callable[[int, int], object],
    ) -> None:
        self.routed = model if isinstance(model, Routed) else None
        self.tell, self.done, self.of = tell, 0, 0
        super().__init__(pretrained=model.model if self.routed else model, tokenizer=tokenizer, batch_size=batch_rows)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (nats of the continuation, is greedy) of each request."""
        return self._each(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the nats of each whole text."""
        return self._each(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the reply to each request."""
        return self._each(super().generate_until, requests)

    def _each(self, ask: Callable[..., list], requests: list[Instance]) -> list:
        self.of += len(requests)
        if self.routed is None:
            return ask(requests, disable_tqdm=True)
        first: dict[tuple, str] = {}
        contexts = [first.setdefault((one.task_name, one.doc_id), one.args[0]) for one in requests]
        found: list = [None] * len(requests)
        for task, places in self.routed.groups(contexts).items():
            with self.routed.using(task) as self._model:
                heard = ask([requests[i] for i in places], disable_tqdm=True)
            for place, one in zip(places, heard, strict=True):
                found[place] = one
        return found

    def _model_call(self, inps, *rest, **named):
        self._tell(len(inps))
        return super()._model_call(inps, *rest, **named)

    def _model_generate(self, context, *rest, **named):
        self._tell(len(context))
        return super()._model_generate(context, *rest, **named)

    def _tell(self, rows: int) -> None:
        """Count rows. Requests of one context are read as one row, and a long text as several: the count is a guess."""
        self.done = min(self.done + rows, self.of)
        self.tell(self.done, self.of)
