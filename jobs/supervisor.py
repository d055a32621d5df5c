"""Start children, hear their lines, end them: the only place in the house that starts a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from clm_app.events import AnyEvent, heard

ROOT = Path(__file__).parent.parent
LAST_LINES = 40
QUIET = {  # nothing is fetched at run time, and nothing draws its own progress bars
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1", "GGML_NO_BACKTRACE": "1", "PYTHONIOENCODING": "utf-8",
}  # fmt: skip


class Child:
    """A process that speaks events on stdout and ends when its stdin closes."""

    def __init__(
        self,
        command: list[str],
        *,
        name: str,
        on_event: Callable[[AnyEvent], None],
        on_text: Callable[[str], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self.on_event, self.on_text = name, on_event, on_text
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | QUIET | {"PYTHONPATH": path} | (environment or {}), text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        self.pid = self._process.pid
        self._ear = threading.Thread(target=self._listen, daemon=True, name=f"ear-{name}")
        self._ear.start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            try:
                event = heard(line)
            except ValueError:
                event = None  # a line torn by a kill: it is kept as text
            if event is not None:
                self.on_event(event)
            elif line.strip():
                self.last.append(line.rstrip())
                if self.on_text:
                    self.on_text(line)

    def is_alive(self) -> bool:
        """Say whether the process runs."""
        return self._process.poll() is None

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Return the exit status once the process has ended and its last line was heard, or None at the time limit."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._ear.join(5)
        return status

    def stop(self, patience_s: float = 5.0) -> None:
        """Close the child's stdin, which ends it; kill it if it has not ended after `patience_s`."""
        try:
            self._process.stdin.close()
        except OSError:
            self.last.append("its input was closed already")
        if self.wait(patience_s) is None:
            self._process.kill()
            self.wait(patience_s)


def spawn(command: list[str], *, name: str, on_event, on_text=None, environment: dict[str, str] | None = None) -> Child:
    """Start a child; a command that begins with "python" runs under this interpreter."""
    if command[0] == "python":
        command = [sys.executable, *command[1:]]
    return Child(command, name=name, on_event=on_event, on_text=on_text, environment=environment)
