"""Self-synthesised rehearsal: the version before writes the rows to rehearse, so that none has to be kept.

It writes a prompt by going on where the chat template lets the user speak, as in Xu et al. 2024 (Magpie,
arXiv:2406.08464), and then answers it; that it is rehearsed with its own answers is Huang et al. 2024 (SSR,
arXiv:2403.01244). A model that was only ever taught answers writes prompts of no past task, so prompts are learned too,
at a weight, as in Sun et al. 2020 (LAMOL, arXiv:1909.03329): what has to be rehearsed later must be learned so now.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.data.rows import Row, dump, load
from clm_app.strategies._base import Strategy
from clm_app.strategies.replay import draw_evenly, rehearsal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from clm_app.engine.loop import Engine

ROWS = 32  # written at once
TRIES = 5  # times `rows` that are written at most, until so many have passed
MARK = "\x1fuser\x1f"  # stands for the user's text in the template


class SynthesisedSettings(BaseModel):
    """How much is written, what passes, and how much of the mix it is."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(0.5, ge=0, le=0.9, description="share of the final mix that is rehearsal, 0..0.9")
    rows: int = Field(200, ge=1, le=1_000_000, description="rows that the version before writes, at most")
    temperature: float = Field(
        1.0, gt=0, le=10, description="of the sampled prompts; below 1 likelier ones, above 1 more varied ones"
    )
    prompt_tokens: int = Field(64, ge=1, le=8192, description="longest prompt in tokens; one that goes on is dropped")
    answer_tokens: int = Field(64, ge=1, le=8192, description="longest answer in tokens; one that goes on is dropped")
    prompt_characters: int = Field(4, ge=1, le=10_000, description="shortest prompt in characters")
    least_certainty: float = Field(
        -0.5, ge=-100, le=0, description="least mean log-probability of an answer's tokens, in nats; 0 is certain"
    )
    prompt_weight: float = Field(
        0.25, ge=0, le=10,
        description="weight of learning to write prompts beside answers; 0 saves the second look at each batch",
    )  # fmt: skip


class Synthesised(Strategy):
    """Rehearsal of rows that the version before wrote itself; duplicates and doubtful answers are dropped."""

    title = "Self-written rehearsal"
    purpose = "Rehearsal where no old row may be kept; it can only rehearse what the version before can still write"
    needs = "no old rows; the version before writes prompts and answers, and each step looks at its batch twice"
    needs_parent = True
    Settings = SynthesisedSettings

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._rows: list[Row] = []

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Let the version before write the rows, or read what it wrote before this run was cut off."""
        if not engine.order.has_learned:
            return
        file = engine.order.folder / "synthesised.jsonl"
        if not file.exists():
            import torch

            with torch.random.fork_rng():  # the training's own draws are the same after a kill
                dump(self._written(engine, engine.parent()), file.with_suffix(".draft"))
            file.with_suffix(".json").write_text(json.dumps(self.figures), encoding="utf-8")
            file.with_suffix(".draft").replace(file)
        self._rows = load(file)
        counts = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        self.figures = {"rows": len(self._rows)} | counts

    def mix(self, new: list[Row], kept: dict[str, list[Row]], rng: random.Random) -> list[tuple[str, Row]]:
        """Return the new rows once, and so many written rows that they are `share` of the whole."""
        wanted = rehearsal(len(new), self.settings.share)
        rows = [("new", row) for row in new] + [("self", row) for row in draw_evenly(self._rows, wanted, rng)]
        rng.shuffle(rows)
        return rows

    def loss(self, model, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Add the mean per prompt token, times its weight."""
        if not self.settings.prompt_weight:
            return loss
        import torch

        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        seen = inputs["attention_mask"].bool()
        is_target = seen[:, 1:] & seen[:, :-1]
        is_target[:, -targets.shape[1] :] &= targets < 0  # answers have their own loss
        predicted = model(**inputs, use_cache=False).logits[:, :-1][is_target].float()
        of_prompts = torch.nn.functional.cross_entropy(predicted, inputs["input_ids"][:, 1:][is_target])
        return loss + self.settings.prompt_weight * of_prompts

    # --- writing ------------------------------------------------------------------------------------------------------

    def _written(self, engine: Engine, parent: torch.nn.Module) -> list[Row]:
        """Return rows that passed every filter, in the order they were written."""
        import torch

        from clm_app.data.template import prompt_ids

        tokenizer, knobs = engine.tokenizer, self.settings
        generator = torch.Generator(engine.device).manual_seed(self.seed)
        opening, end = _around_user(tokenizer)
        controls = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        ends = {end, tokenizer.eos_token_id}

        sampled = drawing(knobs.temperature, generator, [i for i in controls if i not in ends])

        found: dict[str, Row] = {}
        self.figures = {"prompts": 0, "unfinished": 0, "short_or_twice": 0, "doubtful": 0}
        while len(found) < knobs.rows and self.figures["prompts"] < TRIES * knobs.rows:
            prompts = []
            for ids, _, is_ended in continued(parent, [opening] * ROWS, ends, knobs.prompt_tokens, sampled, tokenizer):
                self.figures["prompts"] += 1
                text = tokenizer.decode(ids).strip()
                if not is_ended:
                    self.figures["unfinished"] += 1
                elif len(text) < knobs.prompt_characters or text in found or text in prompts:
                    self.figures["short_or_twice"] += 1
                else:
                    prompts.append(text)
            asked = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
            answers = continued(parent, asked, {tokenizer.eos_token_id}, knobs.answer_tokens, likeliest, tokenizer)
            for prompt, (ids, certainty, is_ended) in zip(prompts, answers, strict=True):
                answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
                if not (is_ended and answer):
                    self.figures["unfinished"] += 1
                elif certainty < knobs.least_certainty:
                    self.figures["doubtful"] += 1
                elif len(found) < knobs.rows:
                    found[prompt] = Row(prompt=prompt, response=answer)
        return list(found.values())


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest ids (rows,) of logits (rows, vocabulary)."""
    return logits.argmax(-1)


def drawing(temperature: float, generator: torch.Generator, never: Sequence[int] = ()) -> Callable:
    """Return what draws the next ids (rows,) from logits (rows, vocabulary) at a temperature, and never some of them."""
    import torch

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        logits[:, list(never)] = -torch.inf
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

    return drawn


def _around_user(tokenizer) -> tuple[list[int], int]:
    """Return the ids that open a user's turn, and the token that ends what the user says."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], add_generation_prompt=True, tokenize=False
    )
    before, _, after = text.partition(MARK)
    opening = tokenizer.encode(before, add_special_tokens=False)
    return opening or [tokenizer.bos_token_id or tokenizer.eos_token_id], tokenizer.encode(
        after, add_special_tokens=False
    )[0]


def continued(
    model: torch.nn.Module, starts: list[list[int]], ends: set[int], most: int, choose: Callable, tokenizer
) -> list[tuple[list[int], float, bool]]:
    """Return, for each start, (ids that follow, mean log-probability of them and the end, whether it came to an end).

    choose: takes logits (rows, vocabulary) and returns the next ids (rows,). most: tokens written at most, end included.
    """
    import torch

    if not starts:
        return []
    device, width = next(model.parameters()).device, max(map(len, starts))
    inputs = torch.full((len(starts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(inputs)
    for i, ids in enumerate(starts):
        inputs[i, width - len(ids) :], mask[i, width - len(ids) :] = torch.tensor(ids), 1
    inputs, mask = inputs.to(device), mask.to(device)
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
    written: list[list[int]] = [[] for _ in starts]
    nats, is_ended = [0.0] * len(starts), [False] * len(starts)
    with torch.no_grad():
        for _ in range(most):
            out = model(input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
                        use_cache=True, logits_to_keep=1)  # fmt: skip
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            sure = logits.log_softmax(-1)
            chosen = choose(logits)
            likely = sure.gather(1, chosen[:, None])[:, 0].tolist()
            for i, (token, nat) in enumerate(zip(chosen.tolist(), likely, strict=True)):
                if not is_ended[i]:
                    nats[i] += nat
                    is_ended[i] = token in ends
                    written[i] += [] if is_ended[i] else [token]
            if all(is_ended):
                break
            inputs, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(inputs)], 1)
    return [
        (ids, total / (len(ids) + ended), ended)
        for ids, total, ended in zip(written, nats, is_ended, strict=True)
    ]  # fmt: skip
