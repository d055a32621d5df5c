"""Token ids become text as they come: no half character is ever shown, and a stop text ends the reply unseen."""

from __future__ import annotations

from typing import Any

BROKEN = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character


class Reply:
    """The text of one reply. What `push` and `rest` return, put together, is what decoding all ids at once gives."""

    def __init__(self, tokenizer: Any, stop: list[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.is_stopped = False
        self._ids: list[int] = []
        self._start = self._middle = 0  # ids before _middle are told; decoding goes on from _start, for its spaces
        self._told = 0  # characters already told of the ids from _middle on
        self._held = ""  # told to nobody yet: it may be the beginning of a stop text

    def push(self, token: int) -> str:
        """Return the text that this token makes certain; often "", never half a character."""
        self._ids.append(token)
        fresh = self._fresh()
        certain = fresh.rstrip(BROKEN)
        text = certain[self._told :]
        self._told = max(self._told, len(certain))
        if not fresh.endswith(BROKEN):
            self._start, self._middle, self._told = self._middle, len(self._ids), 0
        return self._up_to_stop(text)

    def rest(self) -> str:
        """Return what was held back; call it once, when no token follows."""
        if self.is_stopped:
            return ""
        text = self._up_to_stop(self._fresh()[self._told :])
        return text if self.is_stopped else text + self._held

    def _fresh(self) -> str:
        return self._decode(self._start, None)[len(self._decode(self._start, self._middle)) :]

    def _decode(self, start: int, end: int | None) -> str:
        return self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _up_to_stop(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]
