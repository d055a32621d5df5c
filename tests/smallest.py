"""The smallest true things that tests share: rows of three tasks that two layers can learn, and the real app."""

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

import launch

ROOT = Path(launch.__file__).parent
WAIT_S = 600  # never reached on a quiet machine; a busy one may take twenty seconds to import torch

# Three tasks that need one word each: the word in the prompt decides the answer.
TASKS = {
    "Colours": {"red": "stop here", "green": "go on", "blue": "turn left", "gold": "turn right"},
    "Animals": {"cat": "says meow", "dog": "says woof", "cow": "says moo", "owl": "says hoot"},
    "Tools": {"saw": "cuts wood", "axe": "splits logs", "pen": "writes text", "mop": "cleans floors"},
}
WORDS = ("now", "today", "please", "then", "again", "soon", "here", "maybe")


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


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


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
        """Ask for a learn job and return its row; what is served is compared in the tests of that alone."""
        answer = self.client.post("/api/learn", json={"check_served": False} | wish)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def follow(self, job_id: int) -> dict:
        """Wait until a job has ended and return its story."""
        return self.until(lambda: (job := self.get(f"/api/jobs/{job_id}"))["ended_at"] and job)

    def until(self, found: Callable, limit_s: float = WAIT_S):
        """Return what `found` gives as soon as it is true."""
        end = time.monotonic() + limit_s
        while not (value := found()):
            assert time.monotonic() < end, (
                f"not within {limit_s} s; {self.home.with_suffix('.log').read_text()[-1000:]}"
            )
            time.sleep(0.05)
        return value
