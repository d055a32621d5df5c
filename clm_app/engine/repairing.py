"""Repair before refusal: a candidate that learned its task and hurt an old one climbs a ladder, cheapest rung first.

It happens in the training child, with the model still in memory: to load it again would cost more than the search. A rung
searches on validation rows (see clm_app/repairs/_base.py); what it finds is judged once on TEST by the gate, which shares
its alpha among the candidate and every repaired set of weights that it may have to judge. Cost is counted in operations
and not in seconds, so that a run that was killed climbs again to the same bits. The trained weights are never changed on
disk.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clm_app.catalog import pick
from clm_app.data.rows import Row, load
from clm_app.engine.batches import IGNORED, answer_logits, tensors
from clm_app.engine.bounds import BEFORE, CHUNK, TRAINED, Answers, HeldOut, Pairs
from clm_app.engine.line import Line, adapter_before, depth
from clm_app.engine.measure import outcomes, written
from clm_app.engine.merging import Adapter, config_of, lora_layers, read_lora, write_lora
from clm_app.engine.order import Exam, Order
from clm_app.engine.probing import reading
from clm_app.engine.routed import Routed
from clm_app.errors import BadSettings
from clm_app.events import Measured, Repairing, Trained
from clm_app.judging.gate import GateSettings, Verdict, judge, pair
from clm_app.probes._base import made as made_probes
from clm_app.repairs._base import SHELF, RepairSettings, Rung
from store.objects import sync

if TYPE_CHECKING:
    from clm_app.engine.loop import Engine

TRAINING_PASSES = 1.6  # what a token costs in training, in forward passes: 3 by operations, but a step is in bfloat16
FOR_A_ROUTER = 0.7  # of the budget is left to one that is still to come: it takes 9 % of a training, and that is not counted
SVD_PASSES = 10  # of a weight, in forward passes of a token for each of its columns: about 20 m n min(m, n) operations
LEAST_ROWS = 30  # of a task, however small the budget: fewer bound nothing
ROUNDS = 3  # searches after one another, where the place that the worst task allows breaks another task's bound
CHECKED = 8  # items of an exam that are asked of a written folder once more
SAME = 0.01  # nats: how far the same weights' answer may lie from itself, in batches of other rows


class OutOfBudget(Exception):
    """The search has computed what it may."""


def repaired(engine: Engine, model: torch.nn.Module, done: Trained) -> dict | None:
    """Climb the ladder where the gate asks for it, and return what came of it; None where it does not ask.

    model: what answers as the candidate does; its weights are others afterwards. Returns tried: what came of each rung;
    passed; and where one has passed, rung, weights_kind, folder, certificate, and measured, as the run's own result.
    """
    order = engine.order
    settings = RepairSettings(**order.repair) if order.repair is not None else None
    if settings is None or not settings.enabled or not order.search:
        return None
    first = verdict(order, "after")
    if first is None or first.verdict != "repair":
        return None
    return Climb(engine, model, done, settings, first).go()


def verdict(order: Order, when: str, looks: int = 1) -> Verdict | None:
    """Return what the gate says of the TEST outcomes in a folder of the run; None where the new task has none.

    The parent process judges again, from the same files; this decides only whether to climb on.
    """
    new, old = None, []
    for exam in order.after:
        if exam.split == "test" and (exam.task == order.task or exam.task in order.learned):
            file = order.folder / when / f"{exam.snapshot_id}-test.jsonl"
            found = pair(exam.task, outcomes_before(order, exam), file)
            if exam.task == order.task:
                new = found
            else:
                old.append(found)
    return judge(new, old, GateSettings(**order.gate), looks=looks) if new else None


def outcomes_before(order: Order, exam: Exam) -> Path | None:
    """Return the file of what the version before made of an exam; None where it was never measured."""
    here = order.folder / "before" / f"{exam.snapshot_id}-{exam.split}.jsonl"
    if here.exists():
        return here
    return order.live_outcomes.get(str(exam.snapshot_id)) if exam.split == "test" else None


class Climb:
    """One ladder for one candidate."""

    def __init__(
        self, engine: Engine, model: torch.nn.Module, done: Trained, settings: RepairSettings, first: Verdict
    ) -> None:
        self.engine, self.model, self.done, self.settings = engine, model, done, settings
        self.order, self.task, self.is_routed = engine.order, engine.order.task, isinstance(model, Routed)
        found, gate = first.evidence["old"], GateSettings(**self.order.gate)
        self.hurt = [line["task"] for line in found if line["status"] == "hurt"]
        self.whole = self._validation_rows()  # {task: rows}
        self.past = [line["task"] for line in sorted(found, key=lambda line: line["change_points"])]  # the worst first
        tolerance = gate.loss_margin if settings.tolerance is None else settings.tolerance
        self.held_out = HeldOut(self._sample(), self.task, tolerance, gate.margin_points / 100, gate.alpha)
        self.answers = Answers(engine, model, lambda: self._line)
        self.more_tokens = 0.0  # computed beside the answers, as forward passes of a token
        self.tokens_of_looks = 0.0  # of all that was computed, what judging on TEST took
        self.looks, self.tried = 0, []
        self._know()

    def go(self) -> dict:
        """Try every rung in turn and return the result of the first that passes, or of none."""
        for place, name in enumerate(self.settings.rungs):
            self.engine.say(Repairing(rung=name, done=place, of=len(self.settings.rungs)))
            rung = pick(SHELF, name)(self)
            if measured := self._attempt(rung):
                return self._result(rung, measured)
        return {"tried": self.tried, "passed": False, "rung": "", "weights_kind": "", "folder": "", "certificate": {},
                "measured": []}  # fmt: skip

    # --- one rung -----------------------------------------------------------------------------------------------------

    def _attempt(self, rung: Rung) -> list[Measured]:
        """Search with one rung and judge what it finds; return the measurements of what has passed, else nothing."""
        told = {"rung": rung.name}
        self.tried.append(told)
        with self._metered(told):
            found = self._searched(rung, told)
        if found is None:
            return []
        told |= {
            "coefficients": found, "gain_left": self.held_out.left, "residual": self._residual(rung),
            "bounds": {task: bound._asdict() for task, bound in self.held_out.bounds.items()},
        }  # fmt: skip
        told["test"] = {"look": self.looks + 1, "looks": 1 + self.settings.most_test_looks}
        with self._metered(told["test"]):
            return self._judged(rung, told)

    def _searched(self, rung: Rung, told: dict) -> dict | None:
        """Return what a rung finds; None with the reason in `told`."""
        self.held_out.bounds, self.held_out.left = {}, 0.0
        try:
            self._refuse(rung)
            if rung.is_in_weights:
                self._read_sample()
            if (found := rung.search()) is not None:
                return found
            told |= {"outcome": "no place", "reason": "No step keeps every past task within its bound, and enough of "
                     "what was learned."}  # fmt: skip
        except BadSettings as err:
            told |= {"outcome": "refused", "reason": str(err)}
        except OutOfBudget:
            told |= {"outcome": "out of budget", "reason": f"A search in the weights may compute {self.budget:.0%} of what "
                     "the training did, and has."}  # fmt: skip
        return None

    def _refuse(self, rung: Rung) -> None:
        """Raise where a rung may not be tried now.

        Raises:
            BadSettings: what it works on is not there, or the looks at TEST are for another one.
            OutOfBudget: nothing is left to compute with.
        """
        if missing := [task for task in [*self.past, self.task] if not self.whole.get(task)]:
            raise BadSettings(
                f"There are no validation rows of {', '.join(missing)} to search on. Give their rows again."
            )
        ahead = self.settings.rungs[self.settings.rungs.index(rung.name) + 1 :]
        is_one_kept = self.settings.most_test_looks > 1 and any(pick(SHELF, name).is_last_resort for name in ahead)
        if self.looks + is_one_kept >= self.settings.most_test_looks:
            kept = ", and the one that is left is kept for a router" if is_one_kept else ""
            raise BadSettings(f"{self.looks} of {self.settings.most_test_looks} looks at TEST are taken{kept}.")
        if rung.is_in_weights:
            self._afford()
            if self.is_routed:
                raise BadSettings(
                    "The version has weights of its own for each task, and this changes one set of weights."
                )
            if self._line is None:
                raise BadSettings(self._no_line)
        rung.refuse()

    def _read_sample(self) -> None:
        """Read what both versions make of the sample: now, and not amid a search, which it would lead to their places."""
        for rows in self.held_out.rows.values():
            self.answers.of(BEFORE, rows)
        self.answers.of(TRAINED, self.held_out.rows[self.task])
        self._afford()

    def _judged(self, rung: Rung, told: dict) -> list[Measured]:
        """Sit the exams with what was found, ask the gate, and write what passes."""
        self.looks += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        measured = [
            written(exam, rung.answer(load(exam.file)), self._outcomes(exam), self.engine.say)
            for exam in self.order.after
        ]
        found = verdict(self.order, self.folder.name, told["test"]["looks"])
        told["test"] |= {"verdict": found.verdict, "sentence": found.sentence, "alpha": found.evidence["alpha"]}
        if found.verdict != "promote":
            told |= {"outcome": "failed", "reason": found.sentence}
            return []
        self._write(rung)
        if rung.is_in_weights:
            self._probe(self.model)
        else:
            answering = Routed(self.engine.load_base(), self.folder / "weights").to(self.engine.spare)
            if reason := self._differs(answering):
                told |= {"outcome": "failed", "reason": reason}
                return []
            self._probe(answering)
        told["outcome"] = "passed"
        return measured

    def _write(self, rung: Rung) -> None:
        """Write the weights aside, sync them, and give them their name."""
        draft = self.order.folder / ".repaired"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        rung.write(draft)
        sync(draft)
        draft.rename(self.folder / "weights")

    def _differs(self, model: Routed) -> str:
        """Ask a few items of each exam of the written folder; return a sentence where the answers are others, else ''."""
        for exam in self.order.after:
            rows = random.Random(exam.snapshot_id).sample(found := load(exam.file), min(CHECKED, len(found)))
            told = {line["item"]: line for line in map(json.loads, self._outcomes(exam).read_text().splitlines())}
            for line in outcomes(model, rows, self.engine.encoded, next(model.parameters()).device):
                if (
                    abs(line["loss"] - told[line["item"]]["loss"]) > SAME
                    or line["route"] != told[line["item"]]["route"]
                ):
                    return f"The written weights answer item {line['item']} of {exam.task} otherwise than was measured."
        return ""

    def _probe(self, model: torch.nn.Module) -> None:
        """Read the probes of the trained weights on the repaired ones, which are what the result speaks of from now on."""
        names = {probed.probe for probed in self.engine.probed if probed.when == "after"}
        kept = [probed for probed in self.engine.probed if probed.when != "after"]
        chosen = [probe for probe in made_probes(self.order.probes) if probe.name in names]
        files = [self.folder / f"{probe.name}.jsonl" for probe in chosen]
        self.engine.probed = kept + [
            reading(model, probe, self.engine.tokenizer, file) for probe, file in zip(chosen, files, strict=True)
        ]

    def _result(self, rung: Rung, measured: list[Measured]) -> dict:
        told = self.tried[-1]
        certificate = {name: told[name] for name in ("coefficients", "bounds", "gain_left", "residual", "test")} | {
            "sentence": self._sentence(rung, told["coefficients"]), "test_looks": self.settings.most_test_looks,
            "tolerance": self.held_out.tolerance, "alpha": self.held_out.alpha, "least_gain": self.settings.least_gain,
            **{unit: round(sum(one[unit] for one in self.tried), 3) for unit in ("seconds", "cpu_seconds", "cost_share")},
            "seconds_of_training": self.done.figures["seconds"],
        }  # fmt: skip
        return {
            "tried": self.tried, "passed": True, "rung": rung.name, "weights_kind": rung.weights_kind,
            "folder": str(self.folder / "weights"), "certificate": certificate,
            "measured": [one.model_dump() for one in measured],
        }  # fmt: skip

    def _sentence(self, rung: Rung, coefficients: dict) -> str:
        """Return what was done, in words."""
        said = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in coefficients.items())
        rows = min(bound.items for bound in self.held_out.bounds.values())
        return (
            f"{rung.title} ({said}): on {rows} validation rows of each past task its loss rises by no more than "
            f"{self.held_out.tolerance:g} nats per token, and {self.held_out.left:.0%} of what was learned is left."
        )

    # --- what rungs search with ---------------------------------------------------------------------------------------

    def largest(self, go: Callable[[float], None]) -> float | None:
        """Return the largest step below 1 that keeps every past task within its bound and enough of the learning.

        go: sets the model to a step 0..1, of which a larger one keeps less of the past and learns more; the model is left
        at the step returned. None: there is no such step. Halving looks at the worst task alone; the place it leads to is
        measured on every task, and where that breaks another bound, that task leads on.
        """
        worst, ceiling = self.past[0], 1.0
        for _ in range(ROUNDS):
            low = self._halved(go, worst, ceiling)
            if not low:
                return None
            go(low)
            if not self.is_learned():
                return None
            broken = self.first_broken()
            if broken is None:
                return low
            worst, ceiling = broken, low
        return None

    def _halved(self, go: Callable[[float], None], task: str, ceiling: float) -> float:
        """Return the largest step found below a ceiling at which one task's bound holds; 0 where none is worth taking."""
        low, high = 0.0, ceiling
        for _ in range(self.settings.halvings):
            middle = (low + high) / 2
            go(middle)
            if self.held_out.first_broken(self._pairs, [task], self.held_out.rows) is None:
                low = middle
                continue
            high = middle
            if not self.is_learned(most_rows=CHUNK):  # what keeps more of the past has learned still less
                break
        return low

    def first_broken(self, pairs: Pairs | None = None, rows: dict[str, list[Row]] | None = None) -> str | None:
        """Return the first past task whose bound does not hold where the model is; None where all hold.

        pairs: of a place that is not the model's own; rows: {task: those to measure on}, instead of the sample.
        """
        return self.held_out.first_broken(pairs or self._pairs, self.past, rows or self.held_out.rows)

    def is_learned(self, pairs: Pairs | None = None, most_rows: int | None = None) -> bool:
        """Say whether enough of what was learned is left. most_rows: of the new task, for a first look."""
        trained = lambda rows: self.answers.pairs(rows, [TRAINED] * len(rows))  # noqa: E731
        return self.held_out.gain_left(pairs or self._pairs, trained, most_rows) >= self.settings.least_gain

    def _pairs(self, rows: list[Row]) -> list[tuple[dict, dict]]:
        """Return what was and what is with the model's weights of this moment, of rows of the sample."""
        return list(zip(self.answers.of(BEFORE, rows), self.answers.now(rows), strict=True))

    def along(self, alphas: list[float]) -> None:
        """Set the model to a place of the line, one coefficient for each layer.

        Raises:
            OutOfBudget: nothing is left to compute with.
        """
        self._afford()
        if self.line.layers and self.order.adapter is not None:
            self.pay_for_svd(0.1)  # of a thin core
        self.line.go(alphas)

    def put(self, steps: dict[str, torch.Tensor]) -> None:
        """Set each weight to that of the version before and a step; raises as `along` does."""
        self._afford()
        if self.line.layers:
            self.pay_for_svd(1)
        self.line.put(steps)

    def pay_for_svd(self, times: float) -> None:
        """Count so many decompositions of every weight."""
        self.more_tokens += times * SVD_PASSES * self.engine.hidden_size

    def retrain(self, batches: list[list[Row]]) -> None:
        """Take a step of plain training on each batch, from where the model is, at half the rate."""
        from clm_app.engine.loop import share_of_peak

        engine, model = self.engine, self.model
        torch.manual_seed(engine.knobs.seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=engine.peak / 2, weight_decay=engine.knobs.weight_decay, fused=True)
        model.train()
        for step, rows in enumerate(batches):
            optimiser.param_groups[0]["lr"] = (
                engine.peak / 2 * share_of_peak(step, len(batches), engine.knobs.warmup_share)
            )
            batch = tensors(rows, engine.encoded, engine.device, engine.hidden_share)
            with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.is_bfloat16):
                logits, targets = answer_logits(model, batch)
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
                ).backward()
            torch.nn.utils.clip_grad_norm_(trained, engine.knobs.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self.more_tokens += TRAINING_PASSES * sum(len(p) + len(a) for p, a in map(engine.encoded, rows))
        self.line.at = []

    def save(self, folder: Path) -> None:
        """Write the weights that the model has now, as the method writes them."""
        self.engine.method.save(self.model, folder)
        if self.done.weights_kind == "full":
            self.engine.tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)

    def save_before(self, folder: Path) -> None:
        """Write what the version before holds over the run's base: its adapter, one that adds nothing, or every weight."""
        if self.order.adapter is not None:
            shutil.copytree(self.order.adapter, folder, copy_function=shutil.copyfile)
        elif self.done.weights_kind == "full":
            self.engine.parent(torch.device("cpu")).save_pretrained(folder)
        else:
            like = read_lora(Path(self.done.folder))
            folder.mkdir()
            write_lora(Adapter(like.config, {n: (a, torch.zeros_like(b)) for n, (a, b) in like.pairs.items()}), folder)

    # --- the weights --------------------------------------------------------------------------------------------------

    @property
    def line(self) -> Line:
        """The line through both versions; only where `_refuse` let a rung pass that is in the weights."""
        assert self._line is not None
        return self._line

    @cached_property
    def _line(self) -> Line | None:
        self._no_line = ""
        if self.is_routed:
            return None
        try:
            before = self._weights_before()
        except BadSettings as err:
            self._no_line = str(err)
            return None
        found = Line(self.model, before, 1)
        found.divide(depth(found.names))
        return found

    def _weights_before(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters as the version before has them.

        Raises:
            BadSettings: an adapter is of a kind whose change is not one product, or a strategy trained other layers.
        """
        if self.done.weights_kind == "adapter":
            config_of(Path(self.done.folder))
            pairs = None if self.order.adapter is None else read_lora(self.order.adapter).pairs
            return adapter_before(lora_layers(self.model), pairs)
        known = dict(self.engine.parent(torch.device("cpu")).named_parameters())
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if unknown := [name for name in names if name not in known]:
            raise BadSettings(f"The strategy trained {unknown[0]}, which the version before does not have.")
        return {name: known[name].detach() for name in names}

    @property
    def layers(self) -> int:
        """How many layers the line has coefficients for."""
        return self.line.groups

    @property
    def matrices(self) -> list[str]:
        """Names of the weights that are products with an input; tables of tokens are not."""
        tables = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        return [name for name in self.line.names if self.line.layers or (
            self.line.parameters[name].dim() == 2 and id(self.line.parameters[name]) not in tables
        )]  # fmt: skip

    def learned_since_root(self) -> dict[str, torch.Tensor]:
        """Return {weight: what the version before had changed of it since the root}; empty where nothing is known of it."""
        if self.line.layers:
            return {name: self.line.learned_before(name) for name in self.line.names} if self.order.adapter else {}
        if self.order.root is None or not self.order.has_learned:
            return {}
        root = dict(self.engine.load_base(folder=self.order.root).named_parameters())
        return {name: before - root[name] for name, before in self.line.before.items() if name in root}

    # --- rows and cost ------------------------------------------------------------------------------------------------

    def _validation_rows(self) -> dict[str, list[Row]]:
        names = {str(exam.snapshot_id): exam.task for exam in self.order.after}
        found: dict[str, list[Row]] = {}
        for snapshot, file in sorted(self.order.search.items()):
            if names.get(snapshot) in {*self.order.learned, self.task}:
                found.setdefault(names[snapshot], []).extend(load(file))
        return found

    def _sample(self) -> dict[str, list[Row]]:
        """Return as many rows of each task as the setting says and the budget bears: all of them are read about twice."""
        trained, knobs = self.done.figures, self.engine.knobs
        a_row = max(1.0, trained["tokens"] / (trained["steps"] * knobs.batch_rows))
        count = int(self.budget * self.tokens_of_training / (a_row * 2 * (len(self.whole) + self.settings.halvings)))
        count = min(self.settings.val_rows, max(LEAST_ROWS, count))
        rng = random.Random(f"{knobs.seed}/repair")
        return {task: rng.sample(rows, min(count, len(rows))) for task, rows in self.whole.items()}

    def _know(self) -> None:
        """Take every outcome that the run has measured already."""
        for exam in self.order.after:
            after = self.order.folder / "after" / f"{exam.snapshot_id}-{exam.split}.jsonl"
            for file, is_before in ((outcomes_before(self.order, exam), True), (after, False)):
                if file is not None and file.exists():
                    self.answers.know(map(json.loads, file.read_text(encoding="utf-8").splitlines()), is_before)

    @property
    def folder(self) -> Path:
        """Where outcomes of repaired weights go, and the weights that pass."""
        return self.order.folder / "repaired"

    def _outcomes(self, exam: Exam) -> Path:
        return self.folder / f"{exam.snapshot_id}-{exam.split}.jsonl"

    def _residual(self, rung: Rung) -> float:
        return self.line.residual if rung.is_in_weights else 0.0

    @property
    def tokens(self) -> float:
        """What was computed so far, as forward passes of a token."""
        return self.answers.tokens + self.more_tokens

    @property
    def tokens_of_training(self) -> float:
        """The same of the training."""
        return TRAINING_PASSES * max(1, self.done.figures["tokens"])

    @property
    def budget(self) -> float:
        """Most that rungs in the weights may compute, as a share of the training."""
        is_router_tried = any(pick(SHELF, name).is_last_resort for name in self.settings.rungs)
        return self.settings.most_share_of_training * (1 - FOR_A_ROUTER * is_router_tried)

    @property
    def budget_left(self) -> float:
        """What is left of it; 0 or less: nothing."""
        return self.budget - (self.tokens - self.tokens_of_looks) / self.tokens_of_training

    def _afford(self) -> None:
        if self.budget_left <= 0:
            raise OutOfBudget

    @contextlib.contextmanager
    def _metered(self, told: dict) -> Iterator[None]:
        """Add to `told` how long what follows took, and its cost as a share of the training's."""
        wall, cpu, tokens = time.monotonic(), time.process_time(), self.tokens
        try:
            yield
        finally:
            told["seconds"] = round(time.monotonic() - wall, 3)
            told["cpu_seconds"] = round(time.process_time() - cpu, 3)
            told["cost_share"] = round((self.tokens - tokens) / self.tokens_of_training, 4)
            if "look" in told:
                self.tokens_of_looks += self.tokens - tokens
