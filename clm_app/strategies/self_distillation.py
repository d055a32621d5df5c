"""Self-distillation of the targets: the version before says each given answer in its own words, and these are learned.

Source: Yang et al. 2024 (SDFT, arXiv:2402.13669). What a model would say by itself is near what it knows, so learning it
changes less; a rewritten answer that no longer holds the given one is dropped and the given answer is learned.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from clm_app.data.rows import Row
from clm_app.judging.wording import token_f1, words
from clm_app.strategies._base import Strategy
from clm_app.strategies.synthesised import ROWS, continued, drawing, likeliest

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine

FILE = "rewritten.json"  # {"figures": counts and losses, "answers": {key of a given row: its rewritten answer}}
TEMPLATE = (
    "{prompt}\n\nThe right answer to this is:\n{response}\n\n"
    "Answer in your own words, with everything that the right answer says. Write nothing but the answer."
)


class SelfDistillationSettings(BaseModel):
    """How the version before is asked, how it writes, and what passes."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field(
        TEMPLATE, max_length=10_000, description="what the version before is asked; {prompt} and {response} stand for a "
        "row's own",
    )  # fmt: skip
    temperature: float = Field(
        0.0,
        ge=0,
        le=10,
        description="of the rewritten answers; 0 takes the likeliest token each time, above it is drawn",
    )
    answer_tokens: int = Field(
        128, ge=1, le=8192, description="longest rewritten answer in tokens; one that goes on fails"
    )
    check: Literal["label", "f1"] = Field(
        "label", description="what a rewritten answer has to hold: the row's label word for word (the given answer, where "
        "the label is no part of it), or enough of the given answer's words",
    )  # fmt: skip
    least_f1: float = Field(
        0.6, ge=0, le=1, description="least token F1 of a rewritten answer with the given one, 0..1, for check f1"
    )

    @field_validator("template")
    @classmethod
    def _both_are_named(cls, value: str) -> str:
        missing = [name for name in ("{prompt}", "{response}") if name not in value]
        if missing:
            raise ValueError(
                f"The template does not name {' and '.join(missing)}. Put in where the row's own shall stand."
            )
        return value


class SelfDistillation(Strategy):
    """Each new row is learned with the rewritten answer where that passes; kept rows and rehearsal stay as given."""

    title = "Self-distillation of the targets"
    purpose = (
        "For chat models that follow an instruction, and answers whose wording is free: learning stays near what the model "
        "would say; a small model rewrites next to nothing, and a task scored word for word loses by it"
    )
    needs = "no old rows; the version before rewrites every new answer once, which takes a generation of each"
    needs_parent = True
    promise = (
        "The version before finds what is learned likelier than what was given, and nothing is learned that fails the check "
        "(test_what_is_learned_is_nearer_to_what_the_version_before_would_say)"
    )
    Settings = SelfDistillationSettings

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._answers: dict[str, str] = {}  # {key of a given row: its rewritten answer}

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Let the version before rewrite the answers, or read what it wrote before this run was cut off."""
        file = engine.order.folder / FILE
        if not file.exists():
            import torch

            with torch.random.fork_rng():  # the training's own draws are the same after a kill
                self._rewrite(engine, engine.parent(engine.spare))
            found = {"figures": self.figures, "answers": self._answers}
            file.with_suffix(".draft").write_text(json.dumps(found), encoding="utf-8")
            file.with_suffix(".draft").replace(file)
        found = json.loads(file.read_text(encoding="utf-8"))
        self.figures, self._answers = found["figures"], found["answers"]

    def retarget(self, source: str, row: Row) -> Row:
        """Return a new row with its rewritten answer, where there is one."""
        answer = self._answers.get(row.key) if source == "new" else None
        return Row(prompt=row.prompt, response=answer, label=row.label) if answer else row

    def _rewrite(self, engine: Engine, parent: torch.nn.Module) -> None:
        """Rewrite every new row's answer once, and count what became of them.

        figures: rows; rewritten, of which learned; same (word for word the given one), unfinished and lost (what it has
        to hold), which stay as given; nats per token of the given and of the learned answers by the version before.
        """
        from clm_app.data.template import prompt_ids
        from clm_app.engine.measure import outcomes

        tokenizer, device = engine.tokenizer, next(parent.parameters()).device
        given = list({row.key: row for row in engine.new}.values())
        asked = [prompt_ids(tokenizer, [{"role": "user", "content": self._question(row)}]) for row in given]
        count, choose = Counter(), self._choice(device)
        order = sorted(range(len(given)), key=lambda i: len(asked[i]))
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            written = continued(
                parent,
                [asked[i] for i in chosen],
                {tokenizer.eos_token_id},
                self.settings.answer_tokens,
                choose,
                tokenizer,
            )
            for i, (ids, _, is_ended) in zip(chosen, written, strict=True):
                answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
                verdict = self._verdict(given[i], answer, is_ended)
                count[verdict] += 1
                if verdict == "rewritten":
                    self._answers[given[i].key] = answer
        self.figures = {"rows": len(given)} | {v: count[v] for v in ("rewritten", "same", "unfinished", "lost")}
        for name, rows in (("given", given), ("learned", [self.retarget("new", row) for row in given])):
            lines = outcomes(parent, rows, engine.encoded, device)
            nats = sum(line["loss"] for line in lines) / sum(line["tokens"] for line in lines)
            self.figures[f"{name}_nats_before"] = round(nats, 4)

    def _question(self, row: Row) -> str:
        return re.sub(r"\{(prompt|response)\}", lambda found: getattr(row, found[1]), self.settings.template)

    def _choice(self, device: torch.device):
        """Return what chooses the next token: the likeliest, or a draw that is the same for the same seed."""
        if not self.settings.temperature:
            return likeliest
        import torch

        return drawing(self.settings.temperature, torch.Generator(device).manual_seed(self.seed))

    def _verdict(self, row: Row, answer: str, is_ended: bool) -> str:
        """Return what became of a rewritten answer: rewritten, same, unfinished or lost."""
        if not (is_ended and answer):
            return "unfinished"
        if answer == row.response:
            return "same"
        if self.settings.check == "f1":
            return "rewritten" if token_f1(answer, row.response) >= self.settings.least_f1 else "lost"
        return "rewritten" if holds(answer, row) else "lost"


def holds(answer: str, row: Row) -> bool:
    """Say whether an answer holds the row's label word for word, or its response where the label is no part of that."""
    said, given, label = (f" {' '.join(words(text))} " for text in (answer, row.response, row.label))
    return (label if label in given else given) in said
