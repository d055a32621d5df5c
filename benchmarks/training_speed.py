"""How fast does the engine train, beside TRL's SFTTrainer, transformers' Trainer and a bare loop over the same model?

All train the same weights on the same rows for the same number of passes, with fused AdamW, the same clipping and the
same precision, taking turns in one process; what is compared is real tokens (no padding) per second. Everything the
engine does counts as its time: tokenising, events, checkpoints, the written weights, measuring the validation part.
The peers only train: their tokenising, packing and loading is done before their clock starts, and they save nothing.

SFTTrainer packs: as many tokens in a step as the engine's batches hold on average, so all take as many steps. "wrapped"
cuts rows at the seams and is its quickest way without flash attention; "bfd", its default, keeps rows whole.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._tasks import Learnable, default_method, learnable, order

# isort: split
import torch

from clm_app.data.rows import Row, dump, load
from clm_app.data.streams import demo_stream, stream_from
from clm_app.engine.batches import IGNORED
from clm_app.engine.loop import Engine
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadInput

OURS, BARE, TRAINER, SFT, SFT_DEFAULT = (
    "CLM engine", "bare loop", "transformers Trainer", "TRL SFTTrainer, wrapped", "TRL SFTTrainer, bfd",
)  # fmt: skip
QUICK = {"rows_per_label": 30, "passes": 2}


class Work(NamedTuple):
    """What each arm does: these rows, so many passes, tuned this way."""

    task: Learnable
    method: str
    passes: int
    seed: int
    folder: Path

    def engine(self, kind: type[Engine] = Engine) -> Engine:
        """Return a new engine over the starter with the product's own knobs."""
        training = TrainingSettings(epochs=self.passes, least_steps=1, seed=self.seed)
        wanted = order(
            self.folder, self.task.file("train"), training, method=self.method, after=(self.task.exam("validation"),)
        )
        return kind(wanted, lambda event: event.model_dump_json())


class Taken(NamedTuple):
    """What an arm took: real tokens seen, wall seconds, CPU seconds of all threads; measuring is part of both."""

    tokens: int
    wall: float
    cpu: float
    measuring_wall: float = 0.0
    measuring_cpu: float = 0.0

    @property
    def training_alone(self) -> Taken:
        """The same without the measuring."""
        return Taken(self.tokens, self.wall - self.measuring_wall, self.cpu - self.measuring_cpu)


class Clock:
    """Wall and CPU seconds between `start` and `stop`, with nothing left running on the GPU."""

    def start(self) -> None:
        """Begin."""
        self._wait()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, tokens: int) -> Taken:
        """End."""
        self._wait()
        return Taken(tokens, time.perf_counter() - self.wall, time.process_time() - self.cpu)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def ours(work: Work) -> Taken:
    """Run the product's engine as it is: its clock starts when the model is loaded, before the rows are tokenised."""
    clock = Clock()

    class Timed(Engine):
        def train(self, model):
            clock.start()
            done = super().train(model)
            self.trained = clock.stop(0)
            return done

    engine = work.engine(Timed)
    shutil.rmtree(work.folder, ignore_errors=True)
    engine.run()
    whole = clock.stop(work.passes * tokens_of(engine))
    return whole._replace(measuring_wall=whole.wall - engine.trained.wall, measuring_cpu=whole.cpu - engine.trained.cpu)


def bare(work: Work) -> Taken:
    """Run the loop that a tutorial shows: padded batches, labels for the model, one fused optimiser."""
    engine, model = work.engine(), fresh(work)
    batches = in_order(engine, work.passes)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    clock = Clock()
    clock.start()
    model.train()
    for rows in batches:
        batch = {name: value.to(engine.device) for name, value in padded(rows, engine).items()}
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.is_bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, engine.knobs.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return clock.stop(work.passes * tokens_of(engine))


def trainer(work: Work) -> Taken:
    """Run transformers' Trainer over the same batches, one ready batch as one item."""
    from transformers import Trainer, TrainingArguments

    engine, model = work.engine(), fresh(work)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder, quiet():
        made = InOrder(
            model, TrainingArguments(**common(engine, folder), num_train_epochs=1, per_device_train_batch_size=1,
                                     remove_unused_columns=False),
            train_dataset=in_order(engine, work.passes), data_collator=lambda items: padded(items[0], engine),
        )  # fmt: skip
        return timed(made, work.passes * tokens_of(engine))


def sft(work: Work, packing: str = "wrapped") -> Taken:
    """Run TRL's SFTTrainer with packing, at as many tokens in a step as the engine has on average."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    engine, model = work.engine(), fresh(work)
    rows = datasets.Dataset.from_list([
        {"prompt": [{"role": "user", "content": row.prompt}], "completion": [{"role": "assistant", "content": row.response}]}
        for row in engine.new
    ])  # fmt: skip
    in_step = math.ceil(tokens_of(engine) / engine.steps_per_epoch)
    with tempfile.TemporaryDirectory() as folder, quiet():
        made = SFTTrainer(
            model, SFTConfig(**common(engine, folder), num_train_epochs=work.passes, per_device_train_batch_size=1,
                             packing=True, packing_strategy=packing, max_length=in_step),
            train_dataset=rows, processing_class=engine.tokenizer,
        )  # fmt: skip
        return timed(made, work.passes * sum(len(ids) for ids in made.train_dataset["input_ids"]))


def sft_default(work: Work) -> Taken:
    """Run SFTTrainer with the packing it has by default."""
    return sft(work, "bfd")


ARMS: dict[str, Callable[[Work], Taken]] = {
    OURS: ours, BARE: bare, TRAINER: trainer, SFT: sft, SFT_DEFAULT: sft_default,
}  # fmt: skip


def fresh(work: Work) -> torch.nn.Module:
    """Return the model as the engine prepares it, so that all train the same parameters in the same precision."""
    engine = work.engine()
    torch.manual_seed(work.seed)
    return engine.method.prepare(engine._load(), None).to(engine.device)


def in_order(engine: Engine, passes: int) -> list[list[Row]]:
    """Return the engine's own batches of all passes; their rows are tokenised by now."""
    return [batch for number in range(passes) for batch in engine.epoch(number)]


def tokens_of(engine: Engine) -> int:
    """Return the real tokens of one pass."""
    return sum(len(prompt) + len(answer) for prompt, answer in map(engine.encoded, engine.new))


def padded(rows: list[Row], engine: Engine) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels (rows, tokens) with the prompts ignored."""
    ids = [engine.encoded(row) for row in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in ids)
    inputs = torch.full((len(rows), width), engine.tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(inputs), torch.full_like(inputs, IGNORED)
    for i, (prompt, answer) in enumerate(ids):
        inputs[i, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        mask[i, width - len(prompt) - len(answer) :] = 1
        labels[i, width - len(answer) :] = torch.tensor(answer)
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def common(engine: Engine, folder: str) -> dict:
    """Return the arguments that both trainers get: the engine's precision, optimiser and clipping, and no extras."""
    return {
        "output_dir": folder, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": engine.device.type == "cpu", "bf16": engine.is_bfloat16, "gradient_checkpointing": False,
        "optim": "adamw_torch_fused", "max_grad_norm": engine.knobs.clip, "learning_rate": 2e-4, "weight_decay": 0.0,
        "lr_scheduler_type": "cosine", "seed": engine.knobs.seed,
    }  # fmt: skip


def timed(made, tokens: int) -> Taken:
    """Run a trainer between two looks at the clock."""
    clock = Clock()
    clock.start()
    made.train()
    return clock.stop(tokens)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the peers print: their logs are part of their time and not of our table."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def section(method: str, arms: list[str], options, task: Learnable, folder: Path) -> dict[str, list[Taken]]:
    """Let the arms take turns, once for each seed, after a short turn of each that is not counted."""
    taken: dict[str, list[Taken]] = {arm: [] for arm in arms}
    short = task._replace(folder=folder / "short")
    for part in ("train", "validation"):
        dump(load(task.file(part))[:64], short.file(part))
    for arm in arms:
        ARMS[arm](Work(short, method, 1, 0, folder / "run"))
    for seed in options.seeds:
        for arm in arms:
            taken[arm].append(ARMS[arm](Work(task, method, options.passes, seed, folder / "run")))
            one = taken[arm][-1]
            report.console.print(
                f"{method}, repeat {seed}, {arm:<24} {one.tokens:7d} tokens in {one.wall:6.1f} s, {one.cpu:6.1f} CPU s"
            )
    return taken


def show(method: str, taken: dict[str, list[Taken]], judged: bool) -> list[report.Figure]:
    """Print one section and return its figures; ratios are taken within each turn, then their median."""
    on_gpu, figures, rows = torch.cuda.is_available(), [], []
    alone = f"{OURS}, training alone"
    turns = {OURS: taken[OURS], alone: [one.training_alone for one in taken[OURS]]} | taken
    speeds = {arm: [one.tokens / one.wall for one in found] for arm, found in turns.items()}
    thrift = {arm: [one.tokens / one.cpu for one in found] for arm, found in turns.items()}

    def ratio(of: dict, arm: str, ours: str = OURS) -> float:
        return statistics.median(a / b for a, b in zip(of[ours], of[arm], strict=True))

    bounds = {SFT: 1.0 if on_gpu else 1.6, BARE: None if on_gpu else 0.97}
    for arm in turns:
        rows.append([
            arm, f"{statistics.median(speeds[arm]):,.0f}", f"{statistics.median(thrift[arm]):,.0f}",
            f"{ratio(speeds, arm):.2f}", f"{ratio(thrift, arm):.2f}",
        ])  # fmt: skip
        figures.append(report.figure(f"{method}: {arm}, tokens/s", statistics.median(speeds[arm])))
        if arm not in (OURS, alone):
            name = f"{method}: ours over {arm}"
            figures.append(report.figure(name, ratio(speeds, arm), at_least=bounds.get(arm), judged=judged))
            figures.append(report.figure(f"{name}, by CPU time", ratio(thrift, arm)))
            figures.append(report.figure(f"{name}, training alone", ratio(speeds, arm, alone)))
    report.table(
        f"{method}: real tokens per second, median of {len(taken[OURS])} turns",
        ["", "tokens/s", "tokens/CPU s", "ours is × as fast", "by CPU time"], rows,
    )  # fmt: skip
    return figures


def main() -> None:
    """Read the command line, let the arms take turns, show both sections."""
    parser = report.arguments(__doc__)
    parser.add_argument(
        "--data", type=Path, default=report.CLINC150, help="folder of CLINC150; absent: the demo's rows"
    )
    parser.add_argument(
        "--passes", type=int, default=round(TrainingSettings().epochs), help="passes over the rows in each turn"
    )
    parser.add_argument("--methods", nargs="+", help="sections; full and lora, or --quick: the default")
    options = parser.parse_args()
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as err:
        raise BadInput(f"{err.name} is missing. Install the peers: python launch.py setup --bench.") from err
    if options.quick:
        options.passes, options.seeds = QUICK["passes"], options.seeds[:1]
    options.methods = options.methods or ([default_method()] if options.quick else ["full", "lora"])
    cache = report.WORK / "rows"
    is_there = (options.data / "domains.json").exists()
    sources = stream_from(options.data, 1, cache) if is_there else demo_stream()[:1]
    task = learnable(sources, cache, QUICK["rows_per_label"] if options.quick else None)[0]
    arms = [arm for arm in ARMS if arm != SFT_DEFAULT or not options.quick]
    report.console.print(
        f"{report.machine()}; {len(load(task.file('train')))} rows of {task.name}, {options.passes} passes"
    )
    figures, raw = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            raw[method] = section(method, arms, options, task, Path(folder))
            figures += show(method, raw[method], judged=not options.quick)
    report.verdicts(figures)
    report.write(options.json, figures, report.chosen(options), {
        method: {arm: [one._asdict() for one in turns] for arm, turns in found.items()} for method, found in raw.items()
    })  # fmt: skip


if __name__ == "__main__":
    report.run(main)
