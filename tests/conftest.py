"""The smallest true things that tests share: a model of two layers, rows that it can learn, a workspace, the real app."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import httpx
import pytest

import launch
from clm_app.engine.order import Exam, Order
from clm_app.engine.settings import TrainingSettings
from clm_app.settings import Settings
from clm_app.workspace import Workspace

ROOT = Path(launch.__file__).parent
WAIT_S = 120

# Three tasks that need one word each: the word in the prompt decides the answer.
TASKS = {
    "Colours": {"red": "stop here", "green": "go on", "blue": "turn left", "gold": "turn right"},
    "Animals": {"cat": "says meow", "dog": "says woof", "cow": "says moo", "owl": "says hoot"},
    "Tools": {"saw": "cuts wood", "axe": "splits logs", "pen": "writes text", "mop": "cleans floors"},
}
WORDS = ("now", "today", "please", "then", "again", "soon", "here", "maybe")
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
        vocab_size=480, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
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


def make_rows(n: int, labels: dict[str, str] | int = 4) -> list[dict[str, str]]:
    """Return n rows with different prompts, labels in turn. labels: {word: answer}, or how many made-up ones."""
    if isinstance(labels, int):
        labels = {f"word{i}": f"answer {i}" for i in range(labels)}
    around = [f"{first} {{}} {second} {third}" for first, second, third in product(WORDS, WORDS, WORDS)]
    words = list(labels)
    found = []
    for i in range(n):
        word = words[i % len(words)]
        found.append({"prompt": around[(i // len(words) * 37) % len(around)].format(word), "response": labels[word]})
    return found


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
        knobs = {"epochs": 1, "batch_rows": 4, "learning_rate": 1e-2, "checkpoint_every_s": 3600} | (training or {})
        fields = {
            "folder": place, "base": tiny_model, "adapter": None, "rows": rows, "kept": {}, "strategy": "naive",
            "strategy_settings": {}, "method": "lora", "method_settings": {}, "training": TrainingSettings(**knobs),
            "before": [], "after": [], "threads": 1,
        }  # fmt: skip
        return Order(**fields | changes)

    return make


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


class App:
    """The real app in a process of its own, over a home that outlives it."""

    def __init__(self, home: Path, base_model: Path, **environment: str) -> None:
        self.home = home
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CLM_")}
        knobs = {"BASE_MODEL": str(base_model), "TICK_S": "0.1", "THREADS": "1", "BACKEND": "transformers"}
        self.environment = clean | {f"CLM_{name}": value for name, value in knobs.items()} | environment
        self.process: subprocess.Popen | None = None

    def start(self) -> App:
        """Start the app and return when its port answers."""
        # The installed command's own entry: launch.py itself would look whether .venv is complete, and mend it.
        command = [sys.executable, "-c", "import launch; raise SystemExit(launch.clm())"]
        with open(self.home.with_suffix(".log"), "a") as log:
            self.process = subprocess.Popen(
                [*command, "--no-browser", "--home", str(self.home), "--port", "0"],
                cwd=ROOT, env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip
        self.client = httpx.Client(base_url=self.until(self._address), timeout=60, trust_env=False)
        self.until(self._answers)
        return self

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.home.with_suffix(".log").read_text()[-2000:]
        try:
            told = json.loads((self.home / "app.json").read_text())
        except (OSError, ValueError):
            return None
        return told["address"] if told["pid"] == self.process.pid else None  # not one that a killed app left behind

    def _answers(self) -> bool:
        try:
            return self.client.get("/api/health").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End the app as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.client.close()

    def stop(self) -> None:
        """End the app as Ctrl-C would."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(WAIT_S)
            self.client.close()

    def get(self, path: str):
        """Return what a route answers."""
        return self.client.get(path).raise_for_status().json()

    def learn(self, **wish) -> dict:
        """Ask for a learn job and return its row."""
        answer = self.client.post("/api/learn", json=wish)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def follow(self, job_id: int) -> dict:
        """Wait until a job has ended and return its story."""
        return self.until(lambda: (job := self.get(f"/api/jobs/{job_id}"))["ended_at"] and job)

    def until(self, found: Callable, limit_s: float = WAIT_S):
        """Return what `found` gives as soon as it is true."""
        end = time.monotonic() + limit_s
        while not (value := found()):
            assert time.monotonic() < end, f"not within {limit_s} s; {self.home.with_suffix('.log').read_text()[-1000:]}"
            time.sleep(0.05)
        return value


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
