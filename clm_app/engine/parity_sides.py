"""Export parity, the two sides: the served artefact asked as a host asks it, the trained weights as training measured them.

The served side goes through its own prompt, router, cache of keys and values and token loop; the trained side reads
prompt and answer in one pass without a cache, with adapters applied and not merged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jinja2 import TemplateError

from clm_app.data.rows import Row
from clm_app.data.template import PLAIN, rendered
from clm_app.engine.batches import Encoded
from clm_app.engine.measure import outcomes
from clm_app.engine.routed import Routed
from clm_app.errors import BadInput
from clm_app.judging.parity import Artefact, Golden
from clm_app.judging.stages import Facts, Seen
from clm_app.routes import BASE, Router, asked, is_routed
from clm_app.serving.backends._base import Backend
from clm_app.serving.chat import ChatOptions, Message

# --- the served side -------------------------------------------------------------------------------------------------


def facts(tokenizer, ends: frozenset[int]) -> Facts:
    """Return what a tokenizer in use says, and which ids end a reply."""
    controls = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return Facts(
        template=tokenizer.chat_template, has_template=tokenizer.chat_template != PLAIN, vocabulary=tokenizer.get_vocab(),
        controls=controls, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, ends=frozenset(ends),
    )  # fmt: skip


def tokens_of_served(backend: Backend, golden: Golden) -> Seen:
    """Return the text, ids and route that the served side makes of a conversation."""
    told = [message.model_dump() for message in golden.messages]
    router = getattr(getattr(backend, "routed", None), "router", None)
    try:
        return Seen(
            text=rendered(backend.prompt.tokenizer, told), ids=list(backend.prompt.ids(golden.messages)),
            route=None if router is None else router.route(asked(golden.messages)),
        )  # fmt: skip
    except TemplateError as error:
        return Seen(refusal=str(error))
    except BadInput as error:
        cause = error.__cause__
        return Seen(refusal=str(cause if isinstance(cause, TemplateError) else error))


def distributions(backend: Backend, messages: list[Message], ids: list[int], answer: list[int]) -> np.ndarray:
    """Return log-probabilities (answer tokens, or 1, vocabulary): each next token, with the right answer so far given."""
    found: list[np.ndarray] = []

    def given(logits: np.ndarray) -> int:
        found.append(log_softmax(logits))
        return answer[len(found) - 1] if answer else 0

    with backend.answering(messages), contextlib.closing(backend.tokens(ids, given)) as tokens:
        for _ in range(max(1, len(answer))):
            next(tokens)
    return np.stack(found)


def is_exact(backend: Backend, row: Row, prompt: list[int], answer: list[int]) -> bool:
    """Say whether a greedy reply is exactly the row's response: it stops at the first token that is not."""

    def greedy(logits: np.ndarray) -> int:
        return int(logits.argmax())

    messages = [Message(role="user", content=row.prompt)]
    with backend.answering(messages), contextlib.closing(backend.tokens(prompt, greedy)) as tokens:
        return all(next(tokens) == right for right in answer)


def reply_of(backend: Backend, messages: list[Message], longest: int) -> tuple[list[int], str]:
    """Return the greedy reply as people get it: (token ids with the end token, text)."""
    made: list[int] = []
    plain_tokens = backend.tokens

    def noted(ids: list[int], choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        for token in plain_tokens(ids, choose):
            made.append(token)
            yield token

    backend.tokens = noted
    try:
        pieces = list(backend.stream(messages, ChatOptions(max_tokens=longest), lambda: False))
    finally:
        backend.tokens = plain_tokens
    return made, "".join(piece.text for piece in pieces)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float32, of logits (vocabulary,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return (wide - np.log(np.exp(wide).sum())).astype(np.float32)


# --- the trained side ------------------------------------------------------------------------------------------------


class Trained:
    """The weights as they were trained and measured, in float32: adapters applied, not merged."""

    def __init__(self, artefact: Artefact, router: Router | None) -> None:
        """router: of a version with one adapter per task, read already; what it has solved need not be solved again."""
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(artefact.base, dtype=torch.float32, local_files_only=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if is_routed(artefact.adapter):
            base = Routed(base, artefact.adapter)
            base.router = router
        elif artefact.adapter is not None:
            from peft import PeftModel

            base = PeftModel.from_pretrained(base, str(artefact.adapter))
        self.model = base.to(self.device).eval()

    @torch.inference_mode()
    def distributions(self, ids: list[int], answer: list[int], route: str | None, mistake: str = "") -> np.ndarray:
        """Return log-probabilities (answer tokens, or 1, vocabulary) from one pass; mistake: see `mistakes`."""
        kept = max(1, len(answer))
        read = torch.tensor([[*ids, *answer[:-1]]], device=self.device)
        with self._answering(route, mistake) as model:
            logits = model(input_ids=read, use_cache=False, logits_to_keep=kept).logits[0, -kept:]
        return torch.log_softmax(logits.double(), -1).float().cpu().numpy()

    def reply(self, ids: list[int], longest: int, route: str | None, ends: frozenset[int]) -> list[int]:
        """Return the greedy reply, its end token included."""
        made: list[int] = []
        while len(made) < longest and not (made and made[-1] in ends):
            made.append(int(self.distributions([*ids, *made], [], route)[0].argmax()))
        return made

    def right(self, rows: list[Row], encoded: Encoded) -> list[bool]:
        """Say of each row whether it is answered exactly, as training measures it."""
        return [line["exact"] for line in outcomes(self.model, rows, encoded, self.device)]

    def mistakes(self) -> dict[str, str]:
        """Return {a wrong way to use the adapter: the sentence for it}; empty for a model without one."""
        found = {}
        if isinstance(self.model, Routed) or hasattr(self.model, "peft_config"):
            found["adapter_missing"] = (
                "The adapter is not applied: the served artefact answers exactly as the bare base. Merge the adapter and "
                "export again."
            )
        if self._lora_layers():
            found["adapter_twice"] = (
                "The adapter is applied twice: the served artefact answers as the base with twice the adapter's change. "
                "Export from the base that the adapter was trained on, not from a merged one."
            )
        if isinstance(self.model, Routed):
            found |= {
                f"other_adapter:{task}": f"The adapter of {task} answers every task. Serve with the version's own router."
                for task in self.model.router.tasks
            }
        return found

    def merged(self) -> torch.nn.Module:
        """Return the model with its adapter merged in; nothing else may be asked of this object afterwards."""
        return self.model.merge_and_unload() if hasattr(self.model, "peft_config") else self.model

    @contextlib.contextmanager
    def _answering(self, route: str | None, mistake: str) -> Iterator[torch.nn.Module]:
        kind, _, task = mistake.partition(":")
        with contextlib.ExitStack() as stack:
            if kind == "adapter_twice":
                stack.enter_context(self._twice())
            if isinstance(self.model, Routed):
                route = {"adapter_missing": BASE, "other_adapter": task}.get(kind, route or BASE)
                yield stack.enter_context(self.model.using(route))
                return
            if kind == "adapter_missing":
                stack.enter_context(self.model.disable_adapter())
            yield self.model

    def _lora_layers(self) -> list[torch.nn.Module]:
        return [module for module in self.model.modules() if getattr(module, "lora_A", None)]

    @contextlib.contextmanager
    def _twice(self) -> Iterator[None]:
        layers = self._lora_layers()
        then = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling.update({name: 2 * scale for name, scale in layer.scaling.items()})
        try:
            yield
        finally:
            for layer, scaling in zip(layers, then, strict=True):
                layer.scaling.update(scaling)
