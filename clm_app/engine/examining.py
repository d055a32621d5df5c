"""Hear what a version says of a benchmark's items: as it was trained, many at once, or as it is served, one by one.

A right answer is not generated but forced (clm_app/engine/measure.py says why that is enough); only what asks for text is.
An item that does not fit the model's context is kept as too long, and nothing is cut from it: it would be another question.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig

from clm_app.catalog import pick
from clm_app.data.template import load_tokenizer, neutral, prompt_ids
from clm_app.engine import measure, probing
from clm_app.engine.batches import IGNORED, answer_logits, tensors
from clm_app.engine.routed import Routed
from clm_app.errors import BadData, OutOfRoom
from clm_app.events import Examined, Measuring
from clm_app.judging.papers import load, made
from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind
from clm_app.routes import is_routed
from clm_app.serving.chat import ChatOptions, Message
from clm_app.serving.merge import merged
from clm_app.serving.prompt import Prompt

if TYPE_CHECKING:
    from clm_app.engine.examiner import ExaminationSettings, Paper, Sitting

TELL_EVERY_S = 0.5

Ids = tuple[list[int], list[int]]  # of a prompt, and of an answer with its end token


class Found(NamedTuple):
    """What was heard of the item at a place, and what else stands in its line."""

    place: int
    heard: Heard | None  # None: it was not asked, and `beside` says why
    beside: dict


# --- papers -----------------------------------------------------------------------------------------------------------


def sit_all(sitting: Sitting, say: Callable) -> None:
    """Load the version once and sit every paper that is not whole yet; write <key>.jsonl for each and say so.

    Raises:
        BadData: a paper has no item that fits the model.
        OutOfRoom: memory ran out.
    """
    torch.set_num_threads(sitting.threads)
    candidate = (Trained if sitting.on == "trained" else Served)(sitting)
    for paper in sitting.papers:
        if (sitting.folder / f"{paper.key}.jsonl").exists():
            continue
        try:
            sit(paper, candidate, sitting.folder, say)
        except torch.OutOfMemoryError as err:
            raise OutOfRoom(
                f"Memory ran out while {sitting.version} sat {paper.name}. Halve batch_tokens and ask again; what was "
                "heard already is kept."
            ) from err


def sit(paper: Paper, candidate: Trained | Served, folder: Path, say: Callable) -> None:
    """Hear a candidate on every item that the paper's .partial file has not yet, and write the outcomes whole."""
    kind, items = made(paper.kind, paper.settings), {item.key: item for item in load(paper.file)}
    partial = folder / f"{paper.key}.partial"
    known = whole_lines(partial)
    waiting = [item for key, item in items.items() if key not in known]
    told, began = 0.0, time.perf_counter()
    say(Measuring(task=paper.name, split=paper.split, done=len(known), of=len(items)))
    with open(partial, "a", encoding="utf-8") as out:
        for batch in candidate.hear(kind, waiting):
            took, began = time.perf_counter() - began, time.perf_counter()
            lines = [_line(kind, waiting[one.place], one) | {"took_s": round(took / len(batch), 6)} for one in batch]
            out.write("".join(json.dumps(line) + "\n" for line in lines))
            out.flush()
            known |= {line["item"]: line for line in lines}
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                say(Measuring(task=paper.name, split=paper.split, done=len(known), of=len(items)))
    outcomes = [known[key] for key in items]
    _refuse_what_never_fits(paper, outcomes, candidate)
    seconds = sum(line.pop("took_s") for line in outcomes)
    file = folder / f"{paper.key}.jsonl"
    _write_whole(file.with_suffix(".seconds"), f"{seconds:.3f}")
    _write_whole(file, "".join(json.dumps(line) + "\n" for line in outcomes))
    partial.unlink()
    say(
        Examined(
            key=paper.key, task=paper.name, split=paper.split, items=len(items), outcomes=str(file), seconds=seconds
        )
    )


def whole_lines(partial: Path) -> dict[str, dict]:
    """Return {item's key: its line} of a file that a child may have been killed over, after cutting off a torn end."""
    if not partial.exists():
        return {}
    text = partial.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with open(partial, "rb+") as file:
            file.truncate(len(whole))
    return {line["item"]: line for line in map(json.loads, whole.splitlines())}


def _line(kind: Kind, item: BenchmarkItem, one: Found) -> dict:
    """Return what is kept of an item: what the kind makes of it, beside what was said and how likely it was."""
    if one.heard is None:
        return {"item": item.key} | one.beside
    said = {"text": one.heard.text} if kind.asks == "text" else {}
    if one.heard.tokens:
        said |= {"loss": round(one.heard.nats, 6), "tokens": one.heard.tokens}
    return said | one.beside | kind.outcome(item, one.heard)


def _refuse_what_never_fits(paper: Paper, outcomes: Sequence[dict], candidate: Trained | Served) -> None:
    if all("too_long" in line for line in outcomes):
        shortest = min(line["too_long"] for line in outcomes)
        raise BadData(
            f"No item of {paper.name} fits: the shortest needs {shortest:,} tokens, and this model reads "
            f"{candidate.prompt.context:,}. Make a benchmark of shorter items, or examine a model that reads more."
        )


def _write_whole(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}")
    with open(draft, "w", encoding="utf-8", newline="\n") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(draft, file)


# --- as it was trained ------------------------------------------------------------------------------------------------


class Trained:
    """The weights in full precision, asked in batches of similar length."""

    def __init__(self, sitting: Sitting) -> None:
        self.run, self.prompt = sitting.run, Prompt(sitting.base)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = merged(sitting.base, None if is_routed(sitting.adapter) else sitting.adapter)
        if is_routed(sitting.adapter):
            model = Routed(model, sitting.adapter)
        self.model = model.to(self.device).eval()
        self.tokenizer = load_tokenizer(sitting.base)
        self.asking = {"answer": self._answers, "choices": self._choices, "text": self._texts, "texts": self._running}

    def hear(self, kind: Kind, items: Sequence[BenchmarkItem]) -> Iterator[list[Found]]:
        """Yield what was heard of the items, batch by batch, in an order of its own.

        A version with one adapter per task answers each item through the adapter that its router names.
        """
        prompts = [kind.asked(item) for item in items]
        for route, places, model in self._routes(prompts):
            beside = {} if route is None else {"route": route}
            chosen, asked = [items[i] for i in places], [prompts[i] for i in places]
            for batch in self.asking[kind.asks](model, kind, asked, chosen):
                yield [one._replace(place=places[one.place], beside=beside | one.beside) for one in batch]

    def _routes(self, prompts: Sequence[str]) -> Iterator[tuple[str | None, list[int], torch.nn.Module]]:
        if not isinstance(self.model, Routed):
            yield None, list(range(len(prompts))), self.model
            return
        for task, places in self.model.groups(prompts).items():
            with self.model.using(task) as answering:
                yield task, places, answering

    def _answers(self, model, kind: Kind, prompts: list[str], items: list[BenchmarkItem]) -> Iterator[list[Found]]:
        """Hear the first right answer of each item, forced: one forward pass for a batch."""
        pairs = list(zip(self._prompts(prompts), self._replied([item.answers[0] for item in items]), strict=True))
        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        yield from _too_long(lengths, self.prompt.context)
        for places in batches(lengths, self.prompt.context, self.run.batch_tokens, measure.ROWS):
            found, took = _timed(lambda p=places: self._forced(model, [pairs[i] for i in p]))
            share = took / len(places)
            yield [Found(i, Heard("", *one, seconds=share), {}) for i, one in zip(places, found, strict=True)]

    def _choices(self, model, kind: Kind, prompts: list[str], items: list[BenchmarkItem]) -> Iterator[list[Found]]:
        """Hear how likely each choice of an item is, its end token counted: "go" would else be part of "go on"."""
        replied = iter(self._replied([choice for item in items for choice in item.choices]))
        asked = zip(self._prompts(prompts), items, strict=True)
        pairs = [[(prompt, next(replied)) for _ in item.choices] for prompt, item in asked]
        lengths = [max(len(prompt) + len(choice) for prompt, choice in each) for each in pairs]
        sizes = [len(each) * length for each, length in zip(pairs, lengths, strict=True)]
        yield from _too_long(lengths, self.prompt.context)
        for places in batches(lengths, self.prompt.context, self.run.batch_tokens, measure.ROWS, sizes):
            flat = [pair for i in places for pair in pairs[i]]
            found, took = _timed(lambda f=flat: [one for p in self._passes(f) for one in self._forced(model, p)])
            lines, share = iter(found), took / len(places)
            each = {i: [next(lines) for _ in pairs[i]] for i in places}
            yield [
                Found(
                    i,
                    Heard(choices=tuple(o[1] for o in o_s), choice_tokens=tuple(o[2] for o in o_s), seconds=share),
                    {},
                )
                for i, o_s in each.items()
            ]

    def _running(self, model, kind: Kind, prompts: list[str], items: list[BenchmarkItem]) -> Iterator[list[Found]]:
        """Hear how likely each whole text is, read in pieces as the probes read it."""
        window = kind.settings.window_tokens
        lengths = [len(prompt) for prompt in prompts]  # letters: alike enough to batch by, and nothing is too long
        for places in batches(lengths, max(lengths, default=0), 4 * self.run.batch_tokens, measure.ROWS):
            texts = [prompts[i] for i in places]
            found, took = _timed(lambda t=texts: probing.likelihoods(model, t, self.tokenizer, window))
            share = took / len(places)
            yield [
                Found(i, Heard(nats=n, tokens=t, seconds=share), {}) for i, (n, t) in zip(places, found, strict=True)
            ]

    def _texts(self, model, kind: Kind, prompts: list[str], items: list[BenchmarkItem]) -> Iterator[list[Found]]:
        """Hear greedy replies. An item that has less room than the longest reply is asked alone, so that others keep theirs."""
        ids = self._prompts(prompts)
        longest, context = self.run.max_new_tokens, self.prompt.context
        lengths = [len(one) for one in ids]
        yield from _too_long([length + 1 for length in lengths], context)  # a reply has one token at least
        roomy = min(context - longest, context - 1)
        sizes = [length + longest for length in lengths]
        together = list(batches(lengths, roomy, 4 * self.run.batch_tokens, measure.ROWS, sizes))
        alone = [[i] for i, length in enumerate(lengths) if max(roomy, 0) < length < context]
        for places in [*together, *alone]:
            room = min(longest, context - max(lengths[i] for i in places))
            replies, took = _timed(lambda p=places, r=room: self._replies(model, [ids[i] for i in p], r))
            share = took / len(places)
            yield [
                Found(i, Heard(text=text, completion_tokens=count, seconds=share), {})
                for i, (text, count) in zip(places, replies, strict=True)
            ]

    def _prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return `prompt_ids` of each message, all at once: half the time of one by one."""
        turns = [[{"role": "user", "content": neutral(self.tokenizer, prompt)}] for prompt in prompts]
        told = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) if turns else []
        return self.tokenizer(told, add_special_tokens=False)["input_ids"] if told else []

    def _replied(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the ids of each answer with its end token, as `row_ids` does."""
        told = [neutral(self.tokenizer, answer) for answer in answers]
        found = self.tokenizer(told, add_special_tokens=False)["input_ids"] if told else []
        return [[*ids, self.tokenizer.eos_token_id] for ids in found]

    def _passes(self, pairs: list[Ids]) -> list[list[Ids]]:
        """Return what is given to one forward pass each: an item's choices may be more than fit."""
        rows = max(1, self.run.batch_tokens // max(len(prompt) + len(answer) for prompt, answer in pairs))
        return [pairs[start : start + rows] for start in range(0, len(pairs), rows)]

    @torch.no_grad()
    def _forced(self, model, pairs: list[Ids]) -> list[tuple[bool, float, int]]:
        """Return (greedy decoding gives exactly this answer, its nats, its tokens) for each (prompt ids, answer ids)."""
        logits, targets = answer_logits(model, tensors(pairs, _AsTheyAre(self.tokenizer), self.device))
        is_asked = targets != IGNORED  # (rows, kept - 1); only these are looked at, which is most of what this costs
        asked, gold, row = logits[is_asked], targets[is_asked], is_asked.nonzero()[:, 0]
        wrong, nats = (torch.zeros(len(pairs), device=self.device) for _ in range(2))
        wrong.index_add_(0, row, (asked.argmax(-1) != gold).float())
        nats.index_add_(0, row, asked.logsumexp(-1) - asked.gather(1, gold[:, None])[:, 0])
        return list(zip((wrong == 0).tolist(), nats.tolist(), map(len, (answer for _, answer in pairs)), strict=True))

    @torch.no_grad()
    def _replies(self, model, ids: list[list[int]], room: int) -> list[tuple[str, int]]:
        """Return (text, tokens made) of each conversation. Padding stands on the left, so that all go on together."""
        width, pad = max(map(len, ids)), self.tokenizer.pad_token_id
        inputs, mask = torch.full((len(ids), width), pad), torch.zeros((len(ids), width), dtype=torch.long)
        for i, one in enumerate(ids):
            inputs[i, width - len(one) :], mask[i, width - len(one) :] = torch.tensor(one), 1
        greedy = GenerationConfig(
            max_new_tokens=room, do_sample=False, eos_token_id=sorted(self.prompt.ends), pad_token_id=pad
        )
        model.generation_config = greedy  # the folder's own would fill what is not said here, such as a penalty
        made_ids = model.generate(
            input_ids=inputs.to(self.device), attention_mask=mask.to(self.device), generation_config=greedy
        )
        return [self._reply(one) for one in made_ids[:, width:].tolist()]

    def _reply(self, ids: list[int]) -> tuple[str, int]:
        """Return the text up to the first end token, and how many tokens were made, the end token counted."""
        end = next((i for i, token in enumerate(ids) if token in self.prompt.ends), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text, min(end + 1, len(ids))


class _AsTheyAre:
    """What `tensors` asks for ids, where there are ids already."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, ids: Ids) -> Ids:
        return ids


def batches(
    lengths: Sequence[int], most: int, tokens: int, rows: int, sizes: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Yield places of similar length together: at most `rows`, and `tokens` with padding, but at least one.

    most: longer ones are left out. sizes: tokens that an item takes where that is more than its length.
    """
    sizes, batch, widest = sizes or lengths, [], 0
    for place in sorted((i for i, length in enumerate(lengths) if length <= most), key=lambda i: sizes[i]):
        widest = max(widest, sizes[place])
        if batch and (len(batch) == rows or widest * (len(batch) + 1) > tokens):
            yield batch
            batch, widest = [], sizes[place]
        batch.append(place)
    if batch:
        yield batch


def _too_long(lengths: Sequence[int], context: int) -> Iterator[list[Found]]:
    found = [Found(i, None, {"too_long": length}) for i, length in enumerate(lengths) if length > context]
    if found:
        yield found


def _timed(work: Callable):
    began = time.perf_counter()
    return work(), time.perf_counter() - began


# --- as it is served --------------------------------------------------------------------------------------------------


class Served:
    """The version as its host loads it: the same backend, template and precision; one item at a time."""

    def __init__(self, sitting: Sitting) -> None:
        kind = pick("clm_app.serving.backends", sitting.backend)
        self.backend = kind(sitting.base, sitting.adapter, sitting.threads, sitting.converted)
        self.run: ExaminationSettings = sitting.run
        self.prompt, self.tokenizer = self.backend.prompt, self.backend.prompt.tokenizer
        self.asking = {"answer": self._answer, "choices": self._choices, "text": self._text, "texts": self._running}

    def hear(self, kind: Kind, items: Sequence[BenchmarkItem]) -> Iterator[list[Found]]:
        """Yield what was heard of each item, in order, each as a batch of its own."""
        for place, item in enumerate(items):
            prompt = kind.asked(item)
            messages = [Message(role="user", content=prompt)]
            with contextlib.ExitStack() as stack:
                if kind.asks != "text":  # `stream` opens it itself
                    stack.enter_context(self.backend.answering(messages))
                found, took = _timed(lambda m=messages, i=item: self.asking[kind.asks](kind, m, i))
            if isinstance(found, int):
                yield [Found(place, None, {"too_long": found})]
            else:
                yield [Found(place, found._replace(seconds=took), {})]

    def _text(self, kind: Kind, messages: list[Message], item: BenchmarkItem) -> Heard | int:
        """Return the reply as a person would get it, or how long a conversation is that leaves no room for one."""
        ids = prompt_ids(self.tokenizer, [m.model_dump() for m in messages])
        if len(ids) >= self.prompt.context:
            return len(ids) + 1
        text, first_s, tokens, began = "", 0.0, 0, time.perf_counter()
        options = ChatOptions(max_tokens=self.run.max_new_tokens)
        for piece in self.backend.stream(messages, options, lambda: False):
            first_s = first_s or time.perf_counter() - began
            text, tokens = text + piece.text, piece.completion_tokens
        return Heard(text=text, first_s=first_s, completion_tokens=tokens)

    def _answer(self, kind: Kind, messages: list[Message], item: BenchmarkItem) -> Heard | int:
        """Return whether the backend would give the first right answer, and how likely it is."""
        found = self._forced(messages, item.answers[0])
        return found if isinstance(found, int) else Heard(exact=found[0], nats=found[1], tokens=found[2])

    def _choices(self, kind: Kind, messages: list[Message], item: BenchmarkItem) -> Heard | int:
        """Return how likely each choice is, its end token counted."""
        found = [self._forced(messages, choice) for choice in item.choices]
        if lengths := [one for one in found if isinstance(one, int)]:
            return max(lengths)
        return Heard(choices=tuple(one[1] for one in found), choice_tokens=tuple(one[2] for one in found))

    def _running(self, kind: Kind, messages: list[Message], item: BenchmarkItem) -> Heard:
        """Return how likely the whole text is, in the same pieces as `probing.likelihoods` reads."""
        tokenizer, window = self.tokenizer, min(kind.settings.window_tokens, self.prompt.context)
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = tokenizer.encode(neutral(tokenizer, messages[0].content), add_special_tokens=False)
        pieces = [ids[first : first + window - 1] for first in range(0, len(ids), window - 1)]
        return Heard(nats=sum(self._force([start], piece)[1] for piece in pieces), tokens=len(ids))

    def _forced(self, messages: list[Message], answer: str) -> tuple[bool, float, int] | int:
        """Return (is what the backend would say, nats, tokens) of an answer, or the tokens that do not fit."""
        ids = prompt_ids(self.tokenizer, [m.model_dump() for m in messages])
        gold = self.tokenizer.encode(neutral(self.tokenizer, answer), add_special_tokens=False)
        length = len(ids) + len(gold) + 1
        return length if length > self.prompt.context else self._force(ids, [*gold, self.tokenizer.eos_token_id])

    def _force(self, ids: list[int], gold: list[int]) -> tuple[bool, float, int]:
        """Make the backend say `gold` and read from its logits what it thought of that: (its own choice, nats, tokens)."""
        exact, nats, place = True, 0.0, 0

        def choose(logits: np.ndarray) -> int:
            nonlocal exact, nats, place
            token, logits = gold[place], logits.astype(np.float64)
            best, place = int(logits.argmax()), place + 1
            # Any end token ends a served reply, whichever the tokenizer calls its own.
            exact &= best == token or (place == len(gold) and {best, token} <= self.prompt.ends)
            highest = logits[best]
            nats += highest + float(np.log(np.exp(logits - highest).sum())) - float(logits[token])
            return token

        with contextlib.closing(self.backend.tokens(ids, choose)) as tokens:
            for _ in zip(gold, tokens, strict=False):
                pass
        return exact, nats, len(gold)
