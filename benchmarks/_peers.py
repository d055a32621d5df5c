"""Peers' published methods, run from the library that publishes them, on our stream: Avalanche's plugins and loop.

Source: Avalanche 0.6.0 (Carta et al. 2023, JMLR 24, arXiv:2302.01766; github.com/ContinualAI/avalanche). What is theirs:
the training loop, the data loaders, the buffers, the penalties. What is ours: the weights before the first step, the
tokens, the learning rate of each step, AdamW, clipping, hidden prompt tokens, and how exact answers are counted.

Avalanche classifies: a row is x with one y. Here y is the tokens of the answer and the output holds logits for each of
them, (rows, vocabulary, answer), which torch's cross entropy takes as it is; so every plugin that reads only outputs,
losses, gradients and weights works unchanged. Its "classes" balance its buffers: they are labels, or tasks where the
buffer is too small for a row of each label.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks._tasks import Learnable, order
from clm_app.data.rows import Row, load
from clm_app.data.template import load_tokenizer
from clm_app.engine.batches import IGNORED, Encoded
from clm_app.engine.loop import Engine, Meter, share_of_peak
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadInput
from clm_app.events import Trained

PADDING, PROMPT, HIDDEN, ASKED = range(4)  # kinds of a place; ASKED: what stands there is answered by an answer token
# Tried on the first two tasks, where a method has a knob for how firmly it holds. EWC's are this large since the library
# squares the gradient of a batch's mean, which is next to nothing where a task has been learned.
STRENGTHS = {
    "avalanche-ewc": (1e4, 1e6, 1e8), "avalanche-lwf": (0.1, 1.0, 10.0), "avalanche-der": (0.1, 1.0, 10.0),
}  # fmt: skip
NAMES = ("avalanche-naive", *STRENGTHS, "avalanche-replay", "avalanche-agem", "avalanche-gdumb")
REHEARSES = {"avalanche-replay", "avalanche-der", "avalanche-agem", "avalanche-gdumb"}
STATE = "peer.pt"


class Peer(NamedTuple):
    """One peer's method. width: tokens of the stream's longest row; answer: of its longest answer; see `fitted`.

    strength: EWC's lambda, LwF's alpha, the weight of DER's stored logits. rows_per_task: rows it may hold of each task
    learned so far.
    """

    name: str
    width: int
    answer: int
    strength: float = 0.0
    rows_per_task: int = 0


def fitted(name: str, tasks: list[Learnable], base: Path, max_tokens: int, rows_per_task: int = 0) -> Peer:
    """Return a peer whose tensors hold every row of the stream.

    Raises:
        BadInput: there is no peer of that name, or its library is not installed.
    """
    if name not in NAMES:
        raise BadInput(f"There is no peer {name!r}; there are {', '.join(NAMES)}.")
    try:
        import avalanche  # noqa: F401
    except ImportError as err:
        raise BadInput(
            f"{err.name} is missing. Install the peer where this runs: pip install avalanche-lib==0.6.0, with the "
            "torchvision that was built for the torch that is installed."
        ) from err
    encoded = Encoded(load_tokenizer(base), max_tokens)
    sizes = [tuple(map(len, encoded(row))) for task in tasks for row in load(task.file("train"))]
    return Peer(
        name, max(prompt + answer for prompt, answer in sizes), max(answer for _, answer in sizes),
        rows_per_task=rows_per_task if name in REHEARSES else 0,
    )  # fmt: skip


# --- one task --------------------------------------------------------------------------------------------------------


class PeerEngine(Engine):
    """One run like the engine's own, from an order with strategy naive, whose steps are taken by a peer's library.

    `run` leaves weights, outcomes and events as the engine does. The folder `state` holds what the peer remembers, and
    the next task's order names it; figures["strategy"]["kept_bytes"] is what of it a person would have to keep.
    """

    def __init__(self, order, say: Callable, peer: Peer) -> None:
        super().__init__(order, say)
        self.peer = peer

    def train(self, model: torch.nn.Module) -> Trained:
        """Let the library train on this task, and write weights and state."""
        from avalanche.benchmarks import benchmark_from_datasets

        random.seed(self.knobs.seed)  # A-GEM draws from it
        behind = {"tasks": 0, "memory": None}
        if self.order.state is not None:
            behind = torch.load(self.order.state / STATE, weights_only=False)
        learner = Answering(model, self.peer.answer, self.is_bfloat16)
        optimiser = torch.optim.AdamW(
            learner.parameters(), lr=self.peak, weight_decay=self.knobs.weight_decay, fused=True
        )
        steps = self.steps  # also draws the first epoch, which the events below count
        self._start(model, 0, steps)
        meter = Meter(steps, self.device, {})
        common = {
            "model": learner, "optimizer": optimiser, "criterion": torch.nn.CrossEntropyLoss(ignore_index=IGNORED),
            "train_epochs": steps, "train_mb_size": self.knobs.batch_rows, "device": self.device, "evaluator": None,
            "plugins": [made_steps(self, steps, meter)],
        }  # fmt: skip
        held = MAKERS[self.peer.name](common, self.peer, behind, self.knobs.batch_rows)
        held.template.clock.train_exp_counter = behind["tasks"]
        held.template.train(benchmark_from_datasets(train=[self.dataset(behind["tasks"])]).train_stream[0])
        memory, kept_bytes = held.memory()
        self.strategy.figures = {"peer": self.peer._asdict(), "kept_bytes": kept_bytes}
        model.load_state_dict(held.template.model.model.state_dict())  # GDumb trains a copy
        done = self._finish(model, meter)
        self._remember({"tasks": behind["tasks"] + 1, "memory": memory})
        return done

    def _remember(self, behind: dict) -> None:
        folder = self.order.folder / "state"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.save(behind, folder / STATE)

    def dataset(self, task: int):
        """Return this task's rows as the library takes them: x (2, tokens), y (answer,), and the row as a line."""
        from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset, TransformGroups
        from avalanche.benchmarks.utils.data_attribute import TaskLabels

        labels = sorted({row.label for row in self.new})
        is_small = self.peer.rows_per_task < len(labels)
        classes = [task if is_small else 1000 * task + labels.index(row.label) for row in self.new]
        x, y = tensors_of(self.new, self.encoded, self.peer.width, self.peer.answer)
        return TaskAwareSupervisedClassificationDataset(
            [torch.utils.data.TensorDataset(x, y)],
            data_attributes=[
                DataAttribute(classes, "targets"), TaskLabels([0] * len(classes)),
                DataAttribute([row.model_dump_json() for row in self.new], "line"),
            ],
            transform_groups=TransformGroups({"train": (Hide(self.hidden_share), None), "eval": None}),
        )  # fmt: skip


def tensors_of(rows: list[Row], encoded: Encoded, width: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (rows, 2, width): tokens and kinds of places; y (rows, answer): answer tokens. Both padded on the left.

    The last answer token is in y alone: nothing is predicted from it.
    """
    x = torch.zeros(len(rows), 2, width, dtype=torch.long)
    x[:, 0] = encoded.tokenizer.pad_token_id
    y = torch.full((len(rows), answer), IGNORED)
    for i, row in enumerate(rows):
        prompt, said = encoded(row)
        seen = prompt + said[:-1]
        x[i, 0, width - len(seen) :] = torch.tensor(seen)
        x[i, 1, width - len(seen) :] = PROMPT
        x[i, 1, width - len(said) :] = ASKED
        y[i, answer - len(said) :] = torch.tensor(said)
    return x, y


class Hide:
    """Hide a share of the prompt's tokens from every position, as the engine's `tensors` does; the last one stays."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (2, tokens) with kinds drawn anew."""
        if not self.share:
            return x
        kinds = x[1]
        is_hidden = (torch.rand(kinds.shape) < self.share) & (kinds == PROMPT)
        return torch.stack([x[0], kinds.masked_fill(is_hidden, HIDDEN)])


class Answering(torch.nn.Module):
    """A language model as a classifier of answers: x (rows, 2, tokens) to logits (rows, vocabulary, answer).

    Logits are 0 where a row's answer is shorter than the longest, so that no penalty on outputs counts them.
    """

    def __init__(self, model: torch.nn.Module, answer: int, is_bfloat16: bool) -> None:
        super().__init__()
        self.model, self.answer, self.is_bfloat16 = model, answer, is_bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits; columns that are padding in all rows are not computed."""
        first = int((x[:, 1] != PADDING).any(0).int().argmax())
        tokens, kinds = x[:, :, min(first, x.shape[2] - self.answer) :].unbind(1)
        is_there = kinds != PADDING
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_bfloat16):
            logits = self.model(
                input_ids=tokens, attention_mask=(is_there & (kinds != HIDDEN)).long(),
                position_ids=(is_there.cumsum(1) - 1).clamp(min=0), logits_to_keep=self.answer, use_cache=False,
            ).logits  # fmt: skip
        is_asked = (kinds == ASKED)[:, -self.answer :, None]
        return logits.float().masked_fill(~is_asked, 0.0).transpose(1, 2)


def made_steps(engine: PeerEngine, steps: int, meter: Meter):
    """Return the plugin that gives each step the engine's learning rate and clipping, and ends after the last one."""
    from avalanche.training.plugins import SupervisedPlugin

    class Steps(SupervisedPlugin):
        def before_update(self, strategy, **_):
            step = strategy.clock.train_exp_iterations
            self.rate = engine.peak * share_of_peak(step, steps, engine.knobs.warmup_share)
            for group in strategy.optimizer.param_groups:
                group["lr"] = self.rate
            torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), engine.knobs.clip)

        def after_training_iteration(self, strategy, **_):
            step = strategy.clock.train_exp_iterations + 1
            tokens = int((strategy.mb_x[:, 1] != PADDING).sum()) + len(strategy.mb_x)
            if line := meter.add(step, strategy.loss.detach().squeeze(), tokens, self.rate):
                engine.say(line)
            if step == steps:
                strategy.stop_training()

    return Steps()


# --- the methods -----------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A strategy of the library ready to train, and what to ask for afterwards: (what to pickle, bytes to count)."""

    template: object
    memory: Callable[[], tuple[object, int]]


def naive(common: dict, peer: Peer, behind: dict, batch_rows: int) -> Held:
    """Return the library's plain fine-tuning: shows that its loop learns as ours does."""
    from avalanche.training.supervised import Naive

    return Held(Naive(**common), lambda: (None, 0))


def ewc(common: dict, peer: Peer, behind: dict, batch_rows: int) -> Held:
    """Return elastic weight consolidation (Kirkpatrick et al. 2017), a penalty for each task learned."""
    from avalanche.training.plugins import EWCPlugin

    plugin = behind["memory"] or EWCPlugin(peer.strength)

    def memory() -> tuple[object, int]:
        each = [
            one for kind in (plugin.saved_params, plugin.importances) for task in kind.values() for one in task.values()
        ]
        return plugin, sum(one.data.numel() * one.data.element_size() for one in each)

    return with_plugin(common, plugin, memory)


def lwf(common: dict, peer: Peer, behind: dict, batch_rows: int) -> Held:
    """Return learning without forgetting (Li, Hoiem 2016). Its teacher is the version before, kept anyway: 0 bytes."""
    from avalanche.training.plugins import LwFPlugin

    plugin = behind["memory"] or LwFPlugin(alpha=peer.strength, temperature=2)
    vocabulary = common["model"].model.config.vocab_size
    plugin.lwf.prev_classes_by_task[0] = set(range(vocabulary))  # a pretrained model's outputs are all in use
    return with_plugin(common, plugin, lambda: (plugin, 0))


def replay(common: dict, peer: Peer, behind: dict, batch_rows: int) -> Held:
    """Return rehearsal, half of each batch, from a buffer balanced over tasks, each filled by reservoir: its default."""
    from avalanche.training.plugins import ReplayPlugin

    size = peer.rows_per_task * (behind["tasks"] + 1)
    plugin = behind["memory"] or ReplayPlugin(size)
    held = with_plugin(common, plugin, lambda: (plugin, line_bytes(plugin.storage_policy.buffer)))
    grow(plugin.storage_policy, held.template, size)
    plugin.mem_size = size
    plugin.batch_size, plugin.batch_size_mem = halves(batch_rows, len(plugin.storage_policy.buffer))
    return held


def der(common: dict, peer: Peer, behind: dict, batch_rows: int) -> Held:
    """Return dark experience replay ++ (Buzzega et al. 2020): rehearsed rows keep their answers and their logits."""
    from avalanche.training.supervised import DER

    template = DER(**common, mem_size=peer.rows_per_task, alpha=peer.strength, beta=0.5)
    template.storage_policy = policy = behind["memory"] or template.storage_policy
    grow(policy, template, peer.rows_per_task * (behind["tasks"] + 1))
    template.train_mb_size, rehearsed = halves(batch_rows, len(policy.buffer))
    template.batch_size_mem = max(1, rehearsed)  # 0 would have it read an empty buffer

    def memory() -> tuple[object, int]:
        logits = sum(one.numel() * one.element_size() for one in policy.buffer.logits)
        return policy, line_bytes(policy.buffer) + logits

    return Held(template, memory)


def agem(common: dict, peer: Peer, behind: dict, batch_rows: int) -> Held:
    """Return averaged gradient episodic memory (Chaudhry et al. 2019): a second batch, of rows kept, in each step."""
    from avalanche.training.plugins import AGEMPlugin

    plugin = AGEMPlugin(peer.rows_per_task, batch_rows)
    for rows in behind["memory"] or []:
        plugin.update_memory(rows)
    return with_plugin(common, plugin, lambda: (plugin.buffers, sum(map(line_bytes, plugin.buffers))))


def gdumb(common: dict, peer: Peer, behind: dict, batch_rows: int) -> Held:
    """Return GDumb (Prabhu et al. 2020): from the first weights again, on the buffer alone, this task's rows in it."""
    from avalanche.training.plugins import GDumbPlugin

    size = peer.rows_per_task * (behind["tasks"] + 1)
    plugin = behind["memory"] or GDumbPlugin(size)
    held = with_plugin(common, plugin, lambda: (plugin, line_bytes(plugin.storage_policy.buffer)))
    grow(plugin.storage_policy, held.template, size)
    return held


MAKERS = dict(zip(NAMES, (naive, ewc, lwf, der, replay, agem, gdumb), strict=True))


def with_plugin(common: dict, plugin, memory: Callable) -> Held:
    """Return plain fine-tuning with one plugin; it comes before ours, which clips what it made of the gradients."""
    from avalanche.training.supervised import Naive

    return Held(Naive(**common | {"plugins": [plugin, *common["plugins"]]}), memory)


def grow(policy, template, size: int) -> None:
    """Let a buffer hold `size` rows from now on; an empty one cannot be resized."""
    if policy.buffer_groups:
        policy.resize(template, size)
    policy.max_size = size


def halves(batch_rows: int, kept: int) -> tuple[int, int]:
    """Return the new and the rehearsed rows of a batch: half and half, as far as rows are kept."""
    rehearsed = min(batch_rows // 2, kept)
    return batch_rows - rehearsed, rehearsed


def line_bytes(rows) -> int:
    """Return the bytes of rows kept, written as the app writes them."""
    return sum(len(line.encode()) + 1 for line in rows.line) if len(rows) else 0


# --- strength --------------------------------------------------------------------------------------------------------


def tuned(peer: Peer, tasks: list[Learnable], training: TrainingSettings, base: Path, folder: Path) -> Peer:
    """Return the peer with the strength that serves it best on the first two tasks; itself where it has none.

    Best by the mean exact match on the VALIDATION part of both, after the second is learned. What was tried is written
    to `folder`, and read from there the next time.
    """
    if peer.name not in STRENGTHS:
        return peer
    file = folder / f"{peer.name}-{peer.rows_per_task}.json"
    if not file.exists():
        tried = {
            strength: after_two(peer._replace(strength=strength), tasks[:2], training, base, folder / "trial")
            for strength in STRENGTHS[peer.name]
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tried), encoding="utf-8")
    tried = json.loads(file.read_text(encoding="utf-8"))
    return peer._replace(strength=float(max(tried, key=tried.get)))


def after_two(peer: Peer, tasks: list[Learnable], training: TrainingSettings, base: Path, folder: Path) -> float:
    """Learn the tasks in turn; return the mean exact match on their VALIDATION parts at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    weights, state = base, None
    for position, task in enumerate(tasks):
        is_last = position == len(tasks) - 1
        asked = order(
            folder / str(position), task.file("train"), training, method="full",
            after=[one.exam("validation") for one in tasks] if is_last else (),
        ).model_copy(update={"base": weights, "root": base, "state": state})  # fmt: skip
        _, measured = PeerEngine(asked, lambda event: None, peer).run()
        weights, state = asked.folder / "weights", asked.folder / "state"
    shutil.rmtree(folder)
    return sum(one.exact_match for one in measured) / len(measured)
