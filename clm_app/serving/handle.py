"""The parent's hold on one host child: start it, wait until it listens, talk to it, end it."""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx

from clm_app import events
from clm_app.errors import BadInput, ChildFailed, ClmError, NotThere, OutOfRoom
from clm_app.serving.chat import Ask, Piece
from clm_app.serving.order import Order

READY_S = 120.0  # loading and, the first time, converting a model of some billion parameters
SILENT_S = 30.0  # a host says something every second; one that is silent for so long hangs


class Child(Protocol):
    """What `spawn` returns: a process that ends when its stdin closes."""

    pid: int

    def stop(self) -> None: ...

    def is_alive(self) -> bool: ...


Spawn = Callable[..., Child]


class HostLost(ChildFailed):
    """The host ended or hung while it answered."""


class HostGone(HostLost):
    """The host had ended before it heard the conversation, so that another one may be asked."""


class Handle:
    """One host child. It is started by `start`, once; `wait` may be called by any number of threads."""

    def __init__(self, order: Order, why: str) -> None:
        self.order, self.why = order, why
        self.version = order.version
        self.child: Child | None = None
        self.port = 0
        self.seconds = 0.0
        self.in_flight = 0  # conversations that hold it; the router counts them, under its own lock
        self.used_at = time.monotonic()
        self._failure = ""
        self._last_line = ""
        self._told = threading.Event()

    def start(self, spawn: Spawn, folder: Path) -> None:
        """Write the order into `folder` and start the child."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{self.version}-{secrets.token_hex(4)}.json"
        with open(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(self.order.model_dump_json())
        self.child = spawn(
            [sys.executable, "-m", "clm_app.serving.host", str(self._file)],
            name=f"host-{self.version}", environment={}, on_event=self._on_event, on_text=self._on_text,
        )  # fmt: skip

    def _on_event(self, event: Any) -> None:
        if isinstance(event, events.Ready):
            self.port, self.seconds = event.port, event.seconds
        elif isinstance(event, events.Failed):
            self._failure = event.sentence
        self._told.set()

    def _on_text(self, line: str) -> None:
        self._last_line = line.strip() or self._last_line

    @property
    def is_ready(self) -> bool:
        """Whether it listens and lives."""
        return self.port > 0 and self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether the child has not ended."""
        return self.child is not None and self.child.is_alive()

    def wait(self) -> None:
        """Return when the host listens.

        Raises:
            ChildFailed: it ended or said that it cannot; the message has its own sentence or its last line.
        """
        until = time.monotonic() + READY_S
        while not self._told.wait(0.1):
            if not self.is_alive:
                self._told.wait(0.5)  # its last words may still be on their way
                break
            if time.monotonic() > until:
                self._failure = f"it took more than {READY_S:.0f} s. Close other programs, or choose a smaller model."
                break
        self._file.unlink(missing_ok=True)
        if not self.is_ready:
            raise ChildFailed(f"Version {self.version} could not be loaded: {self.reason}")

    @property
    def reason(self) -> str:
        """Why it ended, in its own words where it had any."""
        return self._failure or self._last_line or "its process ended without a word."

    def stream(self, http: httpx.Client, ask: Ask) -> Iterator[Piece]:
        """Yield the reply's pieces; closing the iterator makes the host stop.

        Raises:
            ClmError: the host refused; the same kind of error as it had.
            HostGone: it never heard of the conversation. HostLost: it ended or hung before the reply was whole.
        """
        has_heard = False  # a host sends the head of its answer at once, before it computes anything
        try:
            with http.stream(
                "POST", f"http://127.0.0.1:{self.port}/chat", json=ask.model_dump(), timeout=httpx.Timeout(SILENT_S),
                headers={"Authorization": f"Bearer {self.order.key}"},
            ) as response:  # fmt: skip
                has_heard = True
                if response.status_code != 200:
                    response.read()
                    raise BadInput(f"The conversation was refused: {response.text[:300]}. Correct it and try again.")
                for line in response.iter_lines():
                    piece = _piece(line, self.version)
                    yield piece
                    if piece.finish_reason:
                        return
        except httpx.TransportError as err:
            is_gone = not has_heard and not isinstance(err, httpx.TimeoutException)
            raise (HostGone if is_gone else HostLost)(self._lost()) from err
        raise HostLost(self._lost())

    def _lost(self) -> str:
        self.child.wait(0.5)  # its last words may still be on their way
        why = self._failure or self._last_line or "it left no word"
        return f"Version {self.version} ended while it answered: {why}. Ask again; it is started anew."

    def stop(self) -> None:
        """End the child; safe to call twice."""
        if self.child is not None:
            self.child.stop()
            self._file.unlink(missing_ok=True)


def _piece(line: str, version: str) -> Piece:
    if not line:
        return Piece(version=version)
    said = json.loads(line)
    if "error" not in said:
        return Piece.model_validate(said)
    kinds: dict[int, type[ClmError]] = {400: BadInput, 404: NotThere, 507: OutOfRoom}
    raise kinds.get(said["status"], ChildFailed)(said["error"])
