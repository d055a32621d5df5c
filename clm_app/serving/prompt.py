"""A conversation becomes token ids, the same ids for every backend.

The text of a turn can never act as a control token: wherever it spells a special token, a zero-width space is put
after that token's first character, so the model reads the same letters as ordinary text. Text that spells none (all
text that training has seen) is left as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

from clm_app.errors import BadInput, BadModel
from clm_app.serving.chat import Message

LARGEST_CONTEXT = 8192  # tokens; the cache of keys and values grows with it, and this app trains on far shorter rows
APART = "\u200b"  # zero-width space
# For a folder without a chat template, as base models come; `{% generation %}` marks what training would learn.
FALLBACK_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:{{ '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
)


class Prompt:
    """The tokenizer, the template and the limits of one model folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as err:
            raise BadModel(
                f"The tokenizer in {folder} cannot be read: {err}. Put the whole model folder back."
            ) from err
        config = _json(folder / "config.json")
        self.has_own_template = bool(self.tokenizer.chat_template)
        self.template = None if self.has_own_template else FALLBACK_TEMPLATE
        self.ends = end_ids(folder, self.tokenizer.eos_token_id)
        self.context = int(
            min(
                config.get("max_position_embeddings") or LARGEST_CONTEXT,
                self.tokenizer.model_max_length,
                LARGEST_CONTEXT,
            )
        )
        self.specials = sorted(
            (t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True
        )

    def ids(self, messages: list[Message]) -> list[int]:
        """Return the token ids of the conversation with the opening of the reply.

        Raises:
            BadInput: the template refuses the turns, or they leave no room for a reply.
        """
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": self.harmless(m.content)} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as err:
            raise BadInput(f"This model's chat template refuses the conversation: {err}. Change its turns.") from err
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= self.context:
            raise BadInput(
                f"The conversation has {len(ids)} tokens; this model reads {self.context}. "
                "Shorten it or start a new one."
            )
        return ids

    def harmless(self, content: str) -> str:
        """Return content in which no special token is spelled; usually the very same text."""
        for special in self.specials:
            while special in content:
                content = content.replace(special, special[0] + APART + special[1:] if special[1:] else "")
        return content


def end_ids(folder: Path, end: int | None) -> frozenset[int]:
    """Return every token id that ends a reply: the tokenizer's, and those of generation_config.json and config.json."""
    found = {end}
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        found.update(value if isinstance(value, list) else [value])
    return frozenset(found - {None})


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
