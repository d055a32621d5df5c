"""How a conversation becomes token ids, the same in training, measuring and serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clm_app.data.rows import Row
from clm_app.errors import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
JOINER = "\u2060"  # word joiner: invisible, and enough that "<|end|>" typed by a person is text and not a control token


def load_tokenizer(folder) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder; one without a chat template gets the plain one, a line per turn.

    Raises:
        BadModel: the folder has no usable tokenizer, or the tokenizer has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as err:
        reason = str(err).splitlines()[0]
        raise BadModel(
            f"{folder} has no tokenizer that can be read ({reason}). Copy the model's tokenizer files there."
        ) from err
    if tokenizer.eos_token_id is None:
        raise BadModel(
            f"The tokenizer in {folder} names no end token, so a reply could never stop. Set eos_token in its config."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN
    return tokenizer


def neutral(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the text with every control token in it broken by an invisible character."""
    for special in tokenizer.all_special_tokens:
        if len(special) > 1 and special in text:
            text = text.replace(special, special[0] + JOINER + special[1:])
    return text


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """Return the ids of a conversation up to where the assistant speaks; contents cannot smuggle control tokens in."""
    safe = [{"role": m["role"], "content": neutral(tokenizer, m["content"])} for m in messages]
    text = tokenizer.apply_chat_template(safe, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def row_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Return (prompt ids, answer ids); the answer ends with the end token, as generation must end.

    Prompt and answer are tokenised apart, as in serving, where the model continues a finished prompt.
    """
    answer = tokenizer.encode(neutral(tokenizer, row.response), add_special_tokens=False)
    return prompt_ids(tokenizer, [{"role": "user", "content": row.prompt}]), [*answer, tokenizer.eos_token_id]
