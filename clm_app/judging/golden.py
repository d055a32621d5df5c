"""Golden prompts: what both sides of an export are asked, from the tasks' held-out rows and from what people type."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from clm_app.data.rows import Row, load
from clm_app.data.template import prompt_ids, row_ids
from clm_app.judging.parity import Golden, ParitySettings
from clm_app.serving.chat import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def drawn(held_out: dict[str, Path], settings: ParitySettings) -> dict[str, list[Row]]:
    """Return {task: rows}: golden prompts first, then rows that are only scored; the same for the same seed."""
    each = -(-settings.scored_rows // max(len(held_out), 1))
    found = {}
    for task, file in held_out.items():
        rows = load(file)
        found[task] = random.Random(f"{settings.seed}/{task}").sample(
            rows, min(len(rows), max(each, settings.prompts_per_task))
        )
    return found


def goldens_of(
    tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[Row]], context: int, settings: ParitySettings
) -> tuple[list[Golden], list[list[int]]]:
    """Return the golden prompts and the ids of each right answer, [] where none is known."""
    goldens, answers = [], []
    for task, found in rows.items():
        for n, row in enumerate(found[: settings.prompts_per_task], start=1):
            prompt, answer = row_ids(tokenizer, row)
            if len(prompt) + len(answer) < context:
                said = [Message(role="user", content=row.prompt)]
                goldens.append(Golden(name=f"{task} {n}", messages=said, answer=row.response))
                answers.append(answer)
    odd = odd_prompts(tokenizer, context - settings.reply_tokens)
    return [*goldens, *odd], [*answers, *([] for _ in odd)]


def odd_prompts(tokenizer: PreTrainedTokenizerBase, room: int) -> list[Golden]:
    """Return what people type and tests forget: almost nothing, control tokens, other scripts, code, long, several turns.

    room: tokens that the longest one may have.
    """
    controls = " ".join(filter(None, (tokenizer.bos_token, tokenizer.eos_token, "</s>", "<|im_end|>", "[INST]")))
    user = {
        "one mark": "?", "blank": " ", "typed control tokens": f"Say {controls} and go on.",
        "unicode": "Ünïcödé: e\u0301 ﬁ 日本語 🙂👩‍👩‍👧 \u00a0\u200bﷺ",
        "code": "def f(x):\n" + " " * 40 + "return x  # …\n\n\n\t\tend",
    }  # fmt: skip
    found = [Golden(name=name, messages=[Message(role="user", content=text)]) for name, text in user.items()]
    turns = [
        ("system", "Answer in one word."),
        ("user", "Where is my order?"),
        ("assistant", "Outside."),
        ("user", "Why?"),
    ]
    found.append(Golden(name="system and turns", messages=[Message(role=r, content=c) for r, c in turns]))
    return [*found, _longest(tokenizer, room)]


def _longest(tokenizer: PreTrainedTokenizerBase, room: int) -> Golden:
    """Return a prompt of at most `room` tokens, and nearly as many; one word is at most a few tokens."""
    words = 1
    made = lambda n: Golden(name="long", messages=[Message(role="user", content="word " * n + "end")])  # noqa: E731
    size = lambda n: len(prompt_ids(tokenizer, [m.model_dump() for m in made(n).messages]))  # noqa: E731
    while size(words * 2) <= room:
        words *= 2
    for step in (words // 2, words // 4, words // 8):
        words += step if step and size(words + step) <= room else 0
    return made(words)
