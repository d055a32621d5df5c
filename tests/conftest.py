"""What every test may ask for: a model of two layers, rows that it can learn, a run in this process, the real app."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from clm_app.engine.order import Exam, Order
from clm_app.engine.settings import TrainingSettings
from clm_app.settings import Settings
from clm_app.workspace import Workspace
from tests.smallest import TASKS, WORDS, App, Stopped, make_rows

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# --- the smallest true model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer that has a token for each word of the tasks, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [" ".join([*task, *task.values(), *WORDS]) for task in TASKS.values()]
    bpe.train_from_iterator(text * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        extra_special_tokens=SPECIALS[3:], model_max_length=512,
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """A random Llama of two layers with that tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    out = tmp_path_factory.mktemp("tiny_model")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path) -> Callable[..., Path]:
    """Write n rows over some labels as JSONL and return the file; see make_rows."""

    def write(n: int, labels: dict[str, str] | int = 4, name: str = "rows.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(n, labels)), encoding="utf-8")
        return file

    return write


@pytest.fixture
def order_for(tiny_model, tmp_path) -> Callable[..., Order]:
    """Return a training order over made-up rows; keywords replace its fields, `training` its knobs."""

    def make(folder: str = "run", n: int = 16, training: dict | None = None, **changes) -> Order:
        place = tmp_path / folder
        place.mkdir(parents=True, exist_ok=True)
        rows = place / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(n, TASKS["Colours"])), encoding="utf-8")
        knobs = {"epochs": 1, "least_steps": 1, "batch_rows": 4, "learning_rate": 1e-2, "prompt_dropout": 0.0,
                 "checkpoint_every_s": 3600} | (training or {})  # fmt: skip
        fields = {
            "folder": place, "base": tiny_model, "adapter": None, "rows": rows, "kept": {}, "strategy": "naive",
            "strategy_settings": {}, "method": "lora", "method_settings": {}, "training": TrainingSettings(**knobs),
            "before": [], "after": [], "threads": 1,
        }  # fmt: skip
        return Order(**fields | changes)

    return make


@pytest.fixture
def train(monkeypatch) -> Callable[..., SimpleNamespace]:
    """Return a function that does an order in this process and returns what was seen of it.

    stop_before: the step at which the run is killed. ticking: the clock goes on by one second with each look at it, so
    that a step takes as many seconds in every run, however busy the machine is.
    """
    import torch
    from safetensors.torch import load

    from clm_app.engine import loop

    torch.set_num_threads(1)

    def do(order: Order, stop_before: int | None = None, ticking: bool = False) -> SimpleNamespace:
        seen = SimpleNamespace(events=[], steps=[], rows=[], model=None, trained=None, measured=None, weights=None)

        class Watched(loop.Engine):
            def step(self, model, optimiser, step):
                if step == stop_before:
                    raise Stopped
                loss, tokens, rate = super().step(model, optimiser, step)
                seen.steps.append(SimpleNamespace(number=step, loss=loss.item(), tokens=tokens, rate=rate))
                seen.rows.append([row.prompt for _, row in self.batch(step)])
                seen.model = model
                return loss, tokens, rate

        with monkeypatch.context() as patch:
            if ticking:
                patch.setattr(loop, "time", SimpleNamespace(monotonic=count().__next__, time=time.time))
            try:
                seen.trained, seen.measured = Watched(order, seen.events.append).run()
            except Stopped:
                return seen
        files = sorted((order.folder / "weights").glob("*.safetensors"))
        seen.weights = {name: tensor for file in files for name, tensor in load(file.read_bytes()).items()}
        return seen

    return do


@pytest.fixture
def exam_on() -> Callable[..., Exam]:
    """Return an exam over a file of rows."""
    return lambda file, snapshot_id=1, split="test": Exam(
        snapshot_id=snapshot_id, task=f"task {snapshot_id}", split=split, file=file
    )


# --- the workspace and the app ---------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path, tiny_model):
    """A fresh home over the tiny model."""
    made = Workspace(Settings(home=tmp_path / "home", base_model=str(tiny_model), tick_s=0.05))
    yield made
    made.close()


@pytest.fixture(scope="module")
def open_app(tmp_path_factory, tiny_model):
    """Return a function that starts the app over a fresh home; all are ended with the module."""
    started: list[App] = []

    def start(name: str = "home", **environment: str) -> App:
        started.append(App(tmp_path_factory.mktemp("app") / name, tiny_model, **environment).start())
        return started[-1]

    yield start
    for app in started:
        app.stop()


@pytest.fixture
def browser():
    """Chromium, or the reason why it is not here; CLM_REQUIRE_BROWSER=1 turns a missing one into a failure."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        missing = pytest.fail if os.environ.get("CLM_REQUIRE_BROWSER") == "1" else pytest.skip
        missing("no chromium with playwright here; apt install chromium, pip install playwright")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield chromium
        chromium.close()
