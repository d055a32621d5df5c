"""How a conversation becomes token ids, the same in training, measuring and serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clm_app.data.rows import Row
from clm_app.errors import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a folder without a chat template, as base models come; `{% generation %}` marks what training learns.
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:{{ '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
)
APART = "\u200b"  # zero-width space: enough that "<|end|>" typed by a person is text and not a control token


def load_tokenizer(folder) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder; one without a chat template gets the plain one, a line for each turn.

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
    """Return the text with every control token in it broken apart; usually the very same text."""
    for special in _specials(tokenizer):
        while special in text:
            text = text.replace(special, special[0] + APART + special[1:] if special[1:] else "")
    return text


def _specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return every control token, longest first; kept on the tokenizer, since reading them costs milliseconds."""
    if not hasattr(tokenizer, "clm_specials"):
        found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokenizer.clm_specials = sorted(found, key=len, reverse=True)
    return tokenizer.clm_specials


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """Return the text of a conversation up to where the assistant speaks; contents cannot smuggle control tokens in."""
    safe = [{"role": m["role"], "content": neutral(tokenizer, m["content"])} for m in messages]
    return tokenizer.apply_chat_template(safe, add_generation_prompt=True, tokenize=False)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """Return the ids of `rendered`: the template alone says where a conversation begins and ends."""
    return tokenizer.encode(rendered(tokenizer, messages), add_special_tokens=False)


def row_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Return (prompt ids, answer ids); the answer ends with the end token, as generation must end.

    Prompt and answer are tokenised apart, as in serving, where the model continues a finished prompt.
    """
    answer = tokenizer.encode(neutral(tokenizer, row.response), add_special_tokens=False)
    return prompt_ids(tokenizer, [{"role": "user", "content": row.prompt}]), [*answer, tokenizer.eos_token_id]
