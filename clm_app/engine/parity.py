"""Export parity: ask the served artefact and the trained weights the same, and name the first difference and its cause.

One model is in memory at a time, the served one first; it is loaded again only to look for the cause of a difference.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from clm_app.catalog import pick
from clm_app.data.template import load_tokenizer, prompt_ids, rendered
from clm_app.engine.batches import Encoded
from clm_app.engine.parity_sides import (
    Trained,
    distributions,
    facts,
    is_exact,
    reply_of,
    tokens_of_served,
)
from clm_app.engine.parity_weights import cause_in_weights, damaged, gguf_says, held, precision_of, tensors_of
from clm_app.errors import plain
from clm_app.events import Compared
from clm_app.judging.golden import drawn, goldens_of
from clm_app.judging.parity import DIFFERS, SAME, Golden, ParityOrder
from clm_app.judging.stages import (
    Finding,
    Score,
    Scores,
    Seen,
    apart,
    beyond,
    first_place,
    in_tokens,
    is_likeliest,
    scored,
)
from clm_app.routes import BASE, Router, asked, is_routed
from clm_app.serving.backends._base import Backend
from clm_app.serving.gguf import read
from clm_app.serving.prompt import end_ids

ALIKE = 0.1  # a wrong way to answer explains the served side where it leaves so much of the divergence, at most
SINGLES = 4  # prompts of one token: attention has nothing to choose from, so that rotary order plays no part
Tell = Callable[[str, float], object]


class Answers(NamedTuple):
    """What one side answers, beside what is in each Seen."""

    singles: list[np.ndarray]  # distributions after prompts of one token
    right: dict[str, list[bool]]  # {task: is each scored row answered exactly}
    precision: str = "float32"


def compare(order: ParityOrder, tell: Tell = lambda stage, share: None, load_served=None) -> Compared:
    """Compare the two sides of an order and return the verdict.

    tell: told what is done and the share of the work. load_served: returns the served Backend; the shelf's own one where
    it is None.
    """
    return _Comparison(order, tell, load_served or (lambda: from_shelf(order))).verdict()


def from_shelf(order: ParityOrder) -> Backend:
    """Load the served artefact exactly as a host does."""
    kind = pick("clm_app.serving.backends", order.backend)
    return kind(order.served.base, order.served.adapter, order.threads, order.converted)


class _Comparison:
    """One comparison, from the files to the verdict; told in the order of the stages."""

    def __init__(self, order: ParityOrder, tell: Tell, load_served: Callable[[], Backend]) -> None:
        self.order, self.tell, self.load_served, self.settings = order, tell, load_served, order.settings
        self.router: Router | None = None  # of the trained side
        self.figures: dict[str, Any] = {}

    def verdict(self) -> Compared:
        found = self._first_difference()
        if found is None:
            return Compared(verdict=SAME, cause="", sentence=self._same(), evidence=self.figures)
        sentence = f"{self.order.version} does not answer as it was trained. {found.sentence}"
        return Compared(verdict=DIFFERS, cause=found.cause, sentence=sentence, evidence=self.figures | found.evidence)

    def _first_difference(self) -> Finding | None:
        self.tell("reading the files", 0.0)
        if found := damaged(self.order):
            return found
        self.tokenizer = load_tokenizer(self.order.trained.base)
        self.ends = end_ids(self.order.trained.base, self.tokenizer.eos_token_id)
        self.encoded = Encoded(self.tokenizer, self.settings.longest_tokens)
        self.rows = drawn(self.order.held_out, self.settings)
        self.goldens, self.answers = goldens_of(self.tokenizer, self.rows, self._context(), self.settings)
        self.tell("loading the served artefact", 0.05)
        try:
            backend = self.load_served()
        except Exception as error:  # a border: whatever a broken artefact raises is what it is broken by
            return Finding("does_not_load", f"The served artefact cannot be loaded: {plain(error)}", {})
        self.trained = [self._tokens_of_trained(golden) for golden in self.goldens]
        self.served = [tokens_of_served(backend, golden) for golden in self.goldens]
        if found := self._in_tokens(backend):
            return found
        answers = self._ask_served(backend)
        self.bounds = getattr(self.settings, answers.precision)
        self.figures |= {"precision": answers.precision, "golden_prompts": len(self.goldens)}
        del backend
        gc.collect()
        return self._in_answers(answers)

    # --- what goes in -------------------------------------------------------------------------------------------------

    def _context(self) -> int:
        config = read(self.order.trained.base / "config.json")
        longest = min(config.get("max_position_embeddings") or 8192, self.tokenizer.model_max_length)
        return int(min(longest, self.settings.longest_tokens))

    def _tokens_of_trained(self, golden: Golden) -> Seen:
        told = [message.model_dump() for message in golden.messages]
        try:
            return Seen(text=rendered(self.tokenizer, told), ids=prompt_ids(self.tokenizer, told))
        except TemplateError as error:
            return Seen(refusal=str(error))

    def _in_tokens(self, backend: Backend) -> Finding | None:
        """Compare what both sides read: stages 1 to 4."""
        if is_routed(self.order.trained.adapter):
            self.router = Router.load(self.order.trained.adapter)
            for golden, seen in zip(self.goldens, self.trained, strict=True):
                seen.route = self.router.route(asked(golden.messages))
        of_trained = facts(self.tokenizer, self.ends)
        of_served = facts(backend.prompt.tokenizer, backend.prompt.ends)
        if found := in_tokens(self.goldens, self.trained, self.served, of_trained, of_served):
            return found
        if self.order.backend == "llama_cpp":
            return gguf_says(self.order.converted.with_name(self.order.converted.name + ".gguf"), self.tokenizer)
        return None

    # --- what comes out -----------------------------------------------------------------------------------------------

    def _beyond(self, figures: dict[str, float]) -> dict[str, dict]:
        return beyond(figures, self.bounds, len(self._asked), self.settings.alpha)

    @property
    def _asked(self) -> list[int]:
        """Places of the golden prompts that both sides take."""
        return [i for i, seen in enumerate(self.trained) if not seen.refusal]

    def _ask_served(self, backend: Backend) -> Answers:
        for n, i in enumerate(self._asked):
            self.tell(f"asking the served artefact: {self.goldens[i].name}", 0.1 + 0.4 * n / len(self._asked))
            golden, seen = self.goldens[i], self.served[i]
            seen.steps = distributions(backend, golden.messages, seen.ids, self.answers[i])
            seen.reply, seen.reply_text = reply_of(backend, golden.messages, self.settings.reply_tokens)
        first = self.goldens[self._asked[0]]
        singles = [distributions(backend, first.messages, [i], [])[0] for i in self._single_ids()]
        right: dict[str, list[bool]] = {}
        for n, (task, rows) in enumerate(self.rows.items()):
            self.tell(f"scoring the served artefact on {task}", 0.5 + 0.25 * n / len(self.rows))
            right[task] = [is_exact(backend, row, *self.encoded(row)) for row in rows]
        return Answers(singles, right, precision_of(backend))

    def _single_ids(self) -> list[int]:
        return list(dict.fromkeys(self.trained[self._asked[0]].ids))[:SINGLES]

    def _in_answers(self, there: Answers) -> Finding | None:
        """Load the trained weights and compare what both sides answer: stages 5 to 7."""
        self.tell("loading the trained weights", 0.75)
        model = Trained(self.order.trained, self.router)
        places = self._asked
        for n, i in enumerate(places):
            self.tell(f"asking the trained weights: {self.goldens[i].name}", 0.8 + 0.1 * n / len(places))
            self.trained[i].steps = model.distributions(self.trained[i].ids, self.answers[i], self.trained[i].route)
        firsts = [[side[i].steps[0] for i in places] for side in (self.trained, self.served)]
        if firsts[0][0].shape != firsts[1][0].shape:
            return Finding("other_tokenizer", f"The served model tells {firsts[1][0].size} tokens apart and the trained one "
                           f"{firsts[0][0].size}. Export from the version's own folders.", {})  # fmt: skip
        if not all(np.isfinite(first).all() for first in firsts[1]):
            return Finding("not_a_number", "The served model computes infinities or no numbers at all, as weights beyond the "
                           "range of float16 do. Export in bfloat16 or float32.", {})  # fmt: skip
        self.figures |= apart(*firsts)
        if out := self._beyond(self.figures):
            return self._cause(model, there, out, "The first token of a reply is another one: ")
        self.figures |= self._further(model)
        if out := self._beyond(self.figures):
            return self._cause(model, there, out, "The first tokens agree and later ones do not: ")
        if found := self._in_reply_texts():
            return found
        self.tell("scoring the trained weights", 0.92)
        scores = self._scores(model, there)
        if scores.hurt:
            worst = max(scores.hurt, key=lambda one: one.lost - one.gained)
            out = {worst.task: {"rows": worst.rows, "lost": worst.lost, "gained": worst.gained}}
            return self._cause(model, there, out, f"It answers {worst.task} worse: {worst.lost} of {worst.rows} rows are lost "
                               f"and {worst.gained} gained. ")  # fmt: skip
        return None

    def _further(self, model: Trained) -> dict[str, float]:
        """Return how far right answers and greedy replies are apart; see Bounds."""
        apart_nats, tokens, alike = 0.0, 0, []
        for i in self._asked:
            one, other, answer = self.trained[i], self.served[i], self.answers[i]
            if answer:
                place = np.arange(len(answer))
                apart_nats += abs(float((one.steps[place, answer] - other.steps[place, answer]).sum()))
                tokens += len(answer)
            steps = model.distributions(one.ids, other.reply, one.route)  # would training's weights have said the same?
            alike.append(all(is_likeliest(step, token) for step, token in zip(steps, other.reply, strict=True)))
        return {"answer": apart_nats / max(tokens, 1), "replies": float(np.mean(alike))}

    def _in_reply_texts(self) -> Finding | None:
        """Compare the text that people get with what the tokens of the reply spell."""
        for i in self._asked:
            seen = self.served[i]
            said = [token for token in seen.reply if token not in self.ends]
            text = self.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if text != seen.reply_text:
                evidence = {"prompt": self.goldens[i].name, "ids": said, "trained": text, "served": seen.reply_text}
                return Finding("spelled_otherwise", "The right tokens become another text when it is served: characters are "
                               "lost or changed on their way. Decode with the base's own tokenizer.", evidence)  # fmt: skip
        return None

    def _scores(self, model: Trained, there: Answers) -> Scores:
        lines = [
            Score.of(task, model.right(rows, self.encoded), there.right[task])
            for task, rows in self.rows.items() if rows
        ]  # fmt: skip
        self.scores = scored(lines, self.settings)
        self.figures |= {"scores": self.scores.lines, "scored_rows": self.scores.rows, "lost": self.scores.lost,
                         "gained": self.scores.gained}  # fmt: skip
        return self.scores

    # --- why ----------------------------------------------------------------------------------------------------------

    def _cause(self, model: Trained, there: Answers, out: dict, what: str) -> Finding:
        """Look for what explains a difference: a wrong way to use the adapter, then the weights, then how they compute."""
        self.tell("looking for the cause", 0.95)
        evidence = {"out_of_bounds": out, "prompts": self._worst(model)}
        found = self._cause_in_adapter(model) or self._cause_in_weights(model, there)
        if found is None:
            found = self._cause_in_computing(model, there)
        return Finding(found.cause, what + found.sentence, evidence | found.evidence)

    def _worst(self, model: Trained) -> list[dict]:
        """Return the prompts that are furthest apart, with both sides' replies as text."""
        far = {i: apart([self.trained[i].steps[0]], [self.served[i].steps[0]])["divergence"] for i in self._asked}
        shown = []
        for i in sorted(far, key=far.__getitem__, reverse=True)[:3]:
            reply = model.reply(self.trained[i].ids, self.settings.reply_tokens, self.trained[i].route, self.ends)
            shown.append({
                "prompt": self.goldens[i].name, "divergence": round(far[i], 6),
                "trained": self.tokenizer.decode(reply), "served": self.tokenizer.decode(self.served[i].reply),
                "first_difference_at": first_place(reply, self.served[i].reply),
            })  # fmt: skip
        return shown

    def _cause_in_adapter(self, model: Trained) -> Finding | None:
        """Ask the trained weights as a wrong export would use them; the one that the served side agrees with is the cause."""
        places = [i for i in self._asked if self.trained[i].route != BASE]  # no adapter answers there: nothing to learn
        served = [self.served[i].steps[0] for i in places]
        if not places:
            return None
        is_far = apart([self.trained[i].steps[0] for i in places], served)["divergence"]
        for name, sentence in model.mistakes().items():
            said = [model.distributions(self.trained[i].ids, [], self.trained[i].route, name)[0] for i in places]
            if apart(said, served)["divergence"] < ALIKE * is_far:
                return Finding(name.split(":")[0], sentence, {})
        return None

    def _cause_in_weights(self, model: Trained, there: Answers) -> Finding | None:
        backend = self.load_served()
        found = held(backend, self.order)
        del backend
        if found is None:
            return None
        config = read(self.order.trained.base / "config.json")
        return cause_in_weights(tensors_of(model.merged()), config, found, there.precision)

    def _cause_in_computing(self, model: Trained, there: Answers) -> Finding:
        """Tell apart, from answers alone, what is wrong with weights that nobody can see, or that are as they should be."""
        route = self.trained[self._asked[0]].route
        singles = [model.distributions([i], [], route)[0] for i in self._single_ids()]
        figures = apart(singles, there.singles)
        top1 = self.figures["top1"]
        evidence = {"after_one_token": figures}
        if not self._beyond(figures):
            if "answer" in self.figures:
                return Finding("cache", "The prompt is read as in training and what follows is not: the cache of keys "
                               "and values, or positions after the prompt, are wrong. Take another backend.", evidence)  # fmt: skip
            return Finding("rotary_order", "After one token both sides agree and after several they do not, so that attention "
                           "is computed otherwise: the rotary order of queries and keys, positions or the mask. Convert "
                           "again, or serve with another backend.", evidence)  # fmt: skip
        if top1 >= 0.5:
            return Finding("rounding", f"Token ids agree and {100 * top1:.0f} % of the likeliest first tokens do, as after "
                           "rounding to too few bits. Export with more bits, Q8_0 or F16.", evidence)  # fmt: skip
        return Finding("other_base", f"Token ids agree and only {100 * top1:.0f} % of the likeliest first tokens do: other "
                       "weights are served, or they are read in another order. Export again.", evidence)  # fmt: skip

    # --- the sentence -------------------------------------------------------------------------------------------------

    def _same(self) -> str:
        figures, lost = (
            self.figures,
            f"of {self.scores.rows} scored rows {self.scores.lost} are lost and {self.scores.gained} gained",
        )
        margin = self.settings.margin_points
        kept = f"a loss of {margin:g} points is excluded" if self.scores.is_kept else (
            f"too few to exclude a loss of {margin:g} points"
        )  # fmt: skip
        return (
            f"{self.order.version} answers through {self.order.backend} as it was trained: {figures['golden_prompts']} golden "
            f"prompts have the same tokens, their first token differs by at most {figures['log_probability']:.2g} nats"
            + (f", and {lost} ({kept})." if self.scores.rows else ".")
        )
