"""The tokenizer of a model folder as serving uses it: a conversation becomes the ids that training saw."""

from __future__ import annotations

import json
from pathlib import Path

from clm_app.data.template import load_tokenizer, prompt_ids
from clm_app.errors import BadInput
from clm_app.serving.chat import Message

LARGEST_CONTEXT = 8192  # tokens; the cache of keys and values grows with it, and this app trains on far shorter rows


class Prompt:
    """The tokenizer, the template and the limits of one model folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        config = _json(folder / "config.json")
        self.ends = end_ids(folder, self.tokenizer.eos_token_id)
        self.context = int(
            min(
                config.get("max_position_embeddings") or LARGEST_CONTEXT,
                self.tokenizer.model_max_length,
                LARGEST_CONTEXT,
            )
        )

    def ids(self, messages: list[Message]) -> list[int]:
        """Return the token ids of the conversation with the opening of the reply.

        Raises:
            BadInput: the template refuses the turns, or they leave no room for a reply.
        """
        from jinja2 import TemplateError

        try:
            ids = prompt_ids(self.tokenizer, [{"role": m.role, "content": m.content} for m in messages])
        except TemplateError as err:
            raise BadInput(f"This model's chat template refuses the conversation: {err}. Change its turns.") from err
        if len(ids) >= self.context:
            raise BadInput(
                f"The conversation has {len(ids)} tokens; this model reads {self.context}. "
                "Shorten it or start a new one."
            )
        return ids


def end_ids(folder: Path, end: int | None) -> frozenset[int]:
    """Return every token id that ends a reply: the tokenizer's, and those of generation_config.json and config.json."""
    found = {end}
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        found.update(value if isinstance(value, list) else [value])
    return frozenset(found - {None})


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
