"""The training loop: the moments of a run in the order they happen.

A plain loop and not transformers' Trainer: it starts seconds sooner, computes logits for answers alone, and owns the
commit of its checkpoints (LOG.md, "Engine", has the figures).
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import psutil
import torch

from clm_app.catalog import pick
from clm_app.data.rows import Row, dump, load
from clm_app.data.template import load_tokenizer
from clm_app.data.vocabulary import template, vocabulary
from clm_app.engine import checkpoints
from clm_app.engine.batches import IGNORED, Encoded, answer_logits, batches, tensors
from clm_app.engine.measure import noise, sit
from clm_app.engine.order import Order
from clm_app.engine.probing import reading
from clm_app.engine.repairing import repaired
from clm_app.engine.routed import Routed
from clm_app.engine.settings import SMALL_MODEL
from clm_app.errors import BadData, BadModel, OutOfRoom
from clm_app.events import Checkpointed, Event, Measured, Measuring, Probed, Progress, Started, Trained
from clm_app.probes._base import made as made_probes
from clm_app.routes import is_routed
from clm_app.strategies._combined import made

SAY_EVERY_S = 0.5
NARROW_HEAD = 16  # numbers; below, attention in bfloat16 takes twice as long as in float32 on a CPU (LOG.md, "Engine")


class Engine:
    """One run, from an order to trained weights and measurements."""

    def __init__(self, order: Order, say: Callable[[Event], None]) -> None:
        self.order, self.say, self.knobs = order, say, order.training
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.strategy = made(order.strategy, order.strategy_settings, self.knobs.seed)
        self.strategy.refuse(order)
        method = pick("clm_app.methods", order.method)
        self.method = method(method.Settings(**order.method_settings))
        self.tokenizer = load_tokenizer(order.base)
        self.encoded = Encoded(self.tokenizer, self.knobs.max_tokens)
        self.new = load(order.rows)
        self.kept = {source: load(file) for source, file in order.kept.items()}
        self._epochs: dict[int, list] = {}
        self.probed: list[Probed] = []
        self.noise: dict[str, float] | None = None  # the trained weights measured twice
        self.repaired: dict | None = None  # what came of the repair, where one was needed

    def run(self) -> tuple[Trained, list[Measured]]:
        """Do the whole order and return what was trained and measured."""
        at_root = self.measured_at_root()
        torch.manual_seed(self.knobs.seed)
        start = self.strategy.begin_from(self.order)
        model = self.method.prepare(self.load_base(self.method.loading(self.device)), start).to(self.device)
        self.hidden_size = model.get_input_embeddings().weight.shape[1]
        self.hidden_share = self.knobs.prompt_dropout
        if self.hidden_share is None:
            self.hidden_share = 0.1 if sizes(model)["parameters"] < SMALL_MODEL else 0.0
        is_parent = (start == self.order.adapter and not self.method.base_bits) or not (
            self.order.before or self.order.probes_before
        )
        measured = self._exams(model if is_parent else self.parent(self.spare), self.order.before, "before")
        done = self.train(model)
        tested = self.answering(model, Path(done.folder))
        measured += self._exams(tested, self.order.after, "after")
        self.noise = self._noise(tested)
        self.repaired = repaired(self, tested, done)
        return done, at_root + measured

    def _noise(self, model: torch.nn.Module) -> dict[str, float] | None:
        """Return how far the trained weights differ from themselves on the new task's test items; None without these."""
        exams = [exam for exam in self.order.after if exam.task == self.order.task and exam.split == "test"]
        if not exams:
            return None
        file = self.order.folder / "after" / f"{exams[-1].snapshot_id}-test.jsonl"
        return noise(model, exams[-1], self.encoded, next(model.parameters()).device, file)

    def measured_at_root(self) -> list[Measured]:
        """Measure what the base knew before anything was learned, in a model that is gone before the next is loaded."""
        if not self.order.at_root:
            return []
        return self._exams(self.load_base(folder=self.order.root).to(self.spare), self.order.at_root, "root")

    def parent(self, device: torch.device | None = None) -> torch.nn.Module:
        """Return the version before, in a model of its own that is not trained, beside the one that is."""
        if self.order.adapter is not None and is_routed(self.order.adapter):
            return Routed(self.load_base(), self.order.adapter).to(device or self.device)
        from clm_app.methods.full import Full

        return (
            Full(Full.Settings())
            .prepare(self.load_base(), self.order.adapter)
            .to(device or self.device)
            .requires_grad_(False)
            .eval()
        )

    def answering(self, model: torch.nn.Module, weights: Path) -> torch.nn.Module:
        """Return what answers as a version of the written weights does.

        It is the trained model, unless the strategy made more of it or the base under it was rounded to be trained on.
        """
        if is_routed(weights):
            return Routed(self.load_base(), weights).to(self.spare)
        if not self.method.base_bits:
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(self.load_base(), weights).to(self.spare)

    @property
    def spare(self) -> torch.device:
        """Where the base that versions answer on is put: where it is trained, or on the CPU where a GPU has no room."""
        if self.device.type == "cpu" or not self.method.base_bits:
            return self.device
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        weights = sum(file.stat().st_size for file in self.order.base.glob("*.safetensors"))
        return self.device if 1.2 * weights < free else torch.device("cpu")  # 1.2: activations beside the weights

    def load_base(self, how: dict | None = None, folder: Path | None = None) -> torch.nn.Module:
        """Return a fresh copy of the base that the order names, or of the model in another folder.

        how: arguments of `from_pretrained`; None: as versions of this method answer on it.
        """
        from transformers import AutoModelForCausalLM

        how, folder = how or self.method.answering(self.device), folder or self.order.base
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **how, local_files_only=True)
        except (OSError, ValueError, KeyError) as err:
            raise BadModel(f"{folder} cannot be loaded as a language model: {err}. Check the folder.") from err
        if model.num_parameters() > 1e9:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    def train(self, model: torch.nn.Module) -> Trained:
        """Take every step from the newest checkpoint on, then write the weights."""
        self.strategy.prepare(self, model)  # first: it may put other layers over the model's own
        optimiser = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=self.peak,
            weight_decay=self.knobs.weight_decay,
            fused=True,
        )
        folder = self.order.folder / "checkpoints"
        behind, steps = checkpoints.resume(folder, model, optimiser, self.strategy.restore), self.steps
        first = behind.get("step", 0)
        self._start(model, first, steps)
        meter, saved = Meter(steps, self.device, behind), time.monotonic()
        model.train()
        for step in range(first, steps):
            loss, tokens, rate = self.step(model, optimiser, step)
            self.strategy.after_step(model, step)
            if line := meter.add(step + 1, loss, tokens, rate):
                self.say(line)
            if time.monotonic() - saved > self.knobs.checkpoint_every_s or step + 1 == steps:
                place = checkpoints.commit(
                    folder,
                    step + 1,
                    model,
                    optimiser,
                    self.knobs.checkpoints_kept,
                    meter.figures(),
                    self.strategy.tensors(),
                )
                self.say(Checkpointed(step=step + 1, folder=str(place)))
                saved = time.monotonic()
        self.strategy.finish(self, model)
        return self._finish(model, meter)

    def step(
        self, model: torch.nn.Module, optimiser: torch.optim.Optimizer, step: int
    ) -> tuple[torch.Tensor, int, float]:
        """Take one step; return its loss (nats per answer token), the tokens it read and its learning rate."""
        rate = self.peak * share_of_peak(step, self.steps, self.knobs.warmup_share)
        for group in optimiser.param_groups:
            group["lr"] = rate
        sourced = self.batch(step)
        rows = [row for _, row in sourced]
        batch = tensors(rows, self.encoded, self.device, self.hidden_share) | {"rows": sourced}
        if step == 0 and not (batch["labels"][:, 1:] != IGNORED).any():  # the first column is predicted by nobody
            raise BadData(
                f"No answer token is learned from: the mask of all {len(rows)} rows of the first step is empty, so that "
                "training would teach nothing. Look whether the answers are empty once they are token ids."
            )
        tokens = sum(len(prompt) + len(answer) for prompt, answer in map(self.encoded, rows))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bfloat16):
            logits, targets = answer_logits(model, batch)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            loss = self.strategy.loss(model, batch, logits, targets, loss)
        loss.backward()
        self.strategy.after_backward(model)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], self.knobs.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach(), tokens, rate

    # --- what is trained on -------------------------------------------------------------------------------------------

    def epoch(self, number: int) -> list[list[tuple[str, object]]]:
        """Return the batches of one pass; drawn from the seed and the number alone, so a resumed run sees the same."""
        if number not in self._epochs:
            rng = random.Random(f"{self.knobs.seed}/{number}")
            mixed = [(s, self.strategy.retarget(s, row)) for s, row in self.strategy.mix(self.new, self.kept, rng)]
            self._rehearsed = {s: sum(1 for source, _ in mixed if source == s) for s in self.kept}
            self._rehearsed |= Counter(source for source, _ in mixed if source == "self")
            self._epochs = {number: batches(mixed, self.encoded, self.knobs.batch_rows, rng)}
        return self._epochs[number]

    def batch(self, step: int) -> list[tuple[str, Row]]:
        """Return the (source, row) pairs of a step."""
        return self.epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass; every pass has as many."""
        if not hasattr(self, "_steps_per_epoch"):
            self._steps_per_epoch = len(self.epoch(0))
        return self._steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        epochs = self.knobs.epochs or self.method.epochs(self.hidden_size)
        is_known = self.order.task in self.order.learned
        least = self.knobs.least_steps_again if is_known else self.knobs.least_steps
        return max(least, math.ceil(epochs * self.steps_per_epoch))

    @property
    def peak(self) -> float:
        """The peak learning rate: as set, or the method's own."""
        return self.knobs.learning_rate or self.method.learning_rate(self.hidden_size)

    @property
    def is_bfloat16(self) -> bool:
        """Say whether steps are computed in bfloat16 (weights stay float32): where the processor is quicker at it."""
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported()
        return torch.cpu._is_avx512_bf16_supported() and self.head_size >= NARROW_HEAD

    @cached_property
    def head_size(self) -> int:
        """Numbers in one attention head of the base."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.order.base, local_files_only=True)
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    # --- what is said and written -------------------------------------------------------------------------------------

    def _start(self, model: torch.nn.Module, first: int, steps: int) -> None:
        rows = sum(len(batch) for batch in self.epoch(0))
        self.say(Started(
            step=first, of=steps, rows=rows, rehearsed=self._rehearsed, device=str(self.device),
            **sizes(model),
        ))  # fmt: skip

    def _finish(self, model: torch.nn.Module, meter: Meter) -> Trained:
        draft, place = self.order.folder / ".weights", self.order.folder / "weights"
        self.method.save(model, draft)
        if self.method.weights_kind == "full" and self.strategy.weights_kind != "routed":
            self.tokenizer.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)
        self.strategy.assemble(self, draft)
        checkpoints.sync(draft)
        shutil.rmtree(place, ignore_errors=True)  # of an attempt that ended between here and its measurements
        draft.rename(place)
        memory = {}
        if kept := self.strategy.keep(self.new, random.Random(f"{self.knobs.seed}/keep")):
            dump(kept, self.order.folder / "kept.jsonl")
            memory["new"] = str(self.order.folder / "kept.jsonl")
        state = self.order.folder / "state"
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()
        self.strategy.save(state)
        if any(state.iterdir()):
            memory["state"] = str(state)
        figures = meter.figures() | sizes(model) | {
            "cut_rows": self.encoded.cut_rows, "rehearsed": self._rehearsed, "bfloat16": self.is_bfloat16,
            "vocabulary": vocabulary(place) or vocabulary(self.order.base),
            "template": template(place) or template(self.order.base),
            "learning_rate": self.peak, "usual_rate": self.method.learning_rate(self.hidden_size),
            "strategy": self.strategy.figures,
        }  # fmt: skip
        kind = self.strategy.weights_kind or self.method.weights_kind
        done = Trained(folder=str(place), weights_kind=kind, memory=memory, figures=figures)
        self.say(done)
        return done

    def _exams(self, model: torch.nn.Module, exams: list, when: str) -> list[Measured]:
        """Sit every exam, then read the probes that are ordered for this moment into `probed`."""
        found, asked = [], {"before": self.order.probes_before, "after": self.order.probes}.get(when, ())
        chosen = [probe for probe in made_probes(self.order.probes) if probe.name in asked]
        for index, exam in enumerate(exams):
            self.say(Measuring(task=exam.task, split=exam.split, done=index, of=len(exams) + len(chosen)))
            file = self.order.folder / when / f"{exam.snapshot_id}-{exam.split}.jsonl"
            found.append(sit(model, exam, self.encoded, next(model.parameters()).device, file, self.say))
        for index, probe in enumerate(chosen, len(exams)):
            self.say(Measuring(task=probe.title.lower(), split="probe", done=index, of=len(exams) + len(chosen)))
            file = self.order.folder / when / f"{probe.name}.jsonl"
            self.probed.append(reading(model, probe, self.tokenizer, file))
            self.say(self.probed[-1])
        return found


class Meter:
    """Speed, loss and memory of a run, said at most twice a second."""

    def __init__(self, steps: int, device: torch.device, behind: dict) -> None:
        self.steps, self.device, self.step = steps, device, behind.get("step", 0)
        self.began = self.said = time.monotonic()
        self.seconds, self.tokens = behind.get("seconds", 0.0), behind.get("tokens", 0)  # of earlier attempts
        self.tokens_since = self.steps_taken = 0
        self.losses: list[torch.Tensor] = []
        self.loss, self.memory_mb = behind.get("loss", 0.0), behind.get("peak_memory_mb", 0.0)
        self.first_loss = behind.get("first_loss")
        self._process = psutil.Process()

    def add(self, step: int, loss: torch.Tensor, tokens: int, rate: float) -> Progress | None:
        """Count a step; return the event to say, or None where the last one is too recent."""
        self.step, self.tokens, self.tokens_since = step, self.tokens + tokens, self.tokens_since + tokens
        self.steps_taken += 1
        self.losses.append(loss)
        now = time.monotonic()
        if now - self.said < SAY_EVERY_S and step < self.steps:
            return None
        self.first_loss = self.losses[0].item() if self.first_loss is None else self.first_loss
        self.loss, self.losses = torch.stack(self.losses).mean().item(), []
        if not math.isfinite(self.loss):
            raise BadModel(
                f"The loss became {self.loss} after {step} of {self.steps} steps, at a learning rate of {rate:g}, "
                "which is too high for this model. Try a tenth of it."
            )
        speed, self.said, self.tokens_since = self.tokens_since / max(now - self.said, 1e-6), now, 0
        memory = torch.cuda.memory_allocated() if self.device.type == "cuda" else self._process.memory_info().rss
        self.memory_mb = max(self.memory_mb, memory / 1e6)
        eta = (now - self.began) / self.steps_taken * (self.steps - step)
        return Progress(step=step, of=self.steps, loss=self.loss, learning_rate=rate, tokens_per_s=speed, eta_s=eta,
                        memory_mb=memory / 1e6, at=time.time())  # fmt: skip

    def figures(self) -> dict:
        """Return what the run's row keeps, over all attempts: steps, seconds, tokens/s, peak memory, first and last loss."""
        seconds = self.seconds + time.monotonic() - self.began
        return {
            "steps": self.steps, "seconds": round(seconds, 2), "tokens": self.tokens,
            "loss": self.loss, "first_loss": self.first_loss,
            "tokens_per_s": round(self.tokens / max(seconds, 1e-6)), "peak_memory_mb": round(self.memory_mb),
        }  # fmt: skip


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Return how many parameters a model has, and how many of them are trained; in 4 bits two lie in one byte."""
    return {
        "parameters": sum(p.numel() * (2 if hasattr(p, "quant_state") else 1) for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def share_of_peak(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then a cosine to zero."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def explain(error: BaseException) -> BaseException:
    """Return the error with a remedy where memory ran out; torch says it in two ways."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OutOfRoom(
            "Memory ran out in training. Halve batch_rows or max_tokens, or choose method lora, and start again."
        )
    return error
