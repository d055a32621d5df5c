"""The contract of a backend: load one version, then give the next token; everything around that is the same for all.

A file on this shelf is read by the app's own process too (to ask whether it is available), so what is slow to import
is imported where it is used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from clm_app.serving.chat import ChatOptions, Message, Piece
from clm_app.serving.prompt import Prompt
from clm_app.serving.reply import Reply
from clm_app.serving.sampling import Sampler

LOOK_S = 0.05  # how often a conversation that waits for its turn looks whether its reader has left


class Backend:
    """One loaded version. A subclass loads it after calling this constructor, and overrides `tokens`."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""

    def __init__(self, base: Path, adapter: Path | None, threads: int, converted: Path) -> None:
        """base, adapter: folders; converted: path without an ending for a copy in another format (see Order)."""
        self.prompt = Prompt(base)
        self._turn = threading.Lock()

    @classmethod
    def is_available(cls) -> str | None:
        """Return None where it can run on this machine, else the sentence that says how to add it."""
        return None

    @classmethod
    def supports(cls, base: Path, adapter: Path | None = None) -> str | None:
        """Return None where it can load this model folder with this adapter, else the reason; reads small files only."""
        return None

    def answering(self, messages: list[Message]) -> contextlib.AbstractContextManager:
        """Return a context in which `tokens` answers this conversation: where a version has an adapter per task, its own."""
        return contextlib.nullcontext()

    def tokens(self, ids: list[int], choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        """Yield reply tokens without end, each computed when it is asked for.

        ids: the whole prompt. choose: takes float logits (vocabulary,) and returns the token, which is also read next.
        """
        raise NotImplementedError

    def stream(
        self, messages: list[Message], options: ChatOptions, is_cancelled: Callable[[], bool]
    ) -> Iterator[Piece]:
        """Yield a reply; the last piece has the finish_reason. One reply at a time, in any number of threads.

        Raises:
            BadInput: the conversation does not fit.
        """
        ids = self.prompt.ids(messages)
        room = self.prompt.context - len(ids)
        limit = min(options.max_tokens or room, room)
        while not self._turn.acquire(timeout=LOOK_S):
            if is_cancelled():
                yield Piece(finish_reason="cancelled", prompt_tokens=len(ids))
                return
        try:
            with self.answering(messages):
                yield from self._reply(ids, options, limit, is_cancelled)
        finally:
            self._turn.release()

    def _reply(
        self, ids: list[int], options: ChatOptions, limit: int, is_cancelled: Callable[[], bool]
    ) -> Iterator[Piece]:
        reply, count, reason = Reply(self.prompt.tokenizer, options.stop), 0, "length"
        for token in self.tokens(ids, Sampler(options)):
            count += 1
            if is_cancelled() or token in self.prompt.ends:
                reason = "stop" if token in self.prompt.ends else "cancelled"
                break
            if text := reply.push(token):
                yield Piece(text=text, prompt_tokens=len(ids), completion_tokens=count)
            if reply.is_stopped:
                reason = "stop"
            if reply.is_stopped or count == limit:
                break
        yield Piece(text=reply.rest(), finish_reason=reason, prompt_tokens=len(ids), completion_tokens=count)


CONTRACT = Backend
