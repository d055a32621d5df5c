"""The router: send each conversation to the host of its version, and move "live" from one to the next unnoticed.

Blue-green: when another version is deployed, requests for "live" go on to the old host until the new one has loaded;
then they go to the new one, and the old one finishes what it has begun and stays as a standby until room is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from pydantic import ValidationError

from clm_app.errors import BadInput, ChildFailed, ClmError, plain
from clm_app.serving.chat import Ask, ChatOptions, Piece
from clm_app.serving.choice import choose
from clm_app.serving.gguf import FORMAT
from clm_app.serving.handle import Handle, HostGone, HostLost, Spawn
from clm_app.serving.order import Order
from clm_app.workspace import Workspace
from store.tables import Version

log = logging.getLogger(__name__)
AGAIN_S = 30.0  # pause before a live version that could not be loaded is tried again in the background
BUSY_S = 60.0  # how long a request waits for one of the loaded models to become free


class Router:
    """All hosts of this app. Every method may be called from any thread."""

    def __init__(self, workspace: Workspace, spawn: Spawn) -> None:
        self.workspace, self.spawn = workspace, spawn
        self._hosts: dict[str, Handle] = {}
        self._change = threading.Condition()  # guards everything below and the counts in the handles
        self._pointed: str | None = None  # the version that requests for "live" go to
        self._failed: dict[str, tuple[float, str]] = {}  # version: when it could not be loaded, and why
        self._warming: set[str] = set()
        self._is_closed = False
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a kept one could meet a dead host
        self._http = httpx.Client(trust_env=False, limits=limits)

    def chat(self, version: str, messages: list[dict], options: ChatOptions) -> Iterator[Piece]:
        """Yield the reply of a version, or of "live"; closing the iterator stops the computation.

        A piece without text and finish_reason comes about once a second while the reply is waited for.

        Raises:
            NotThere: no such version. BadInput: the conversation does not fit. ChildFailed: its host ended.
        """
        ask = self._checked(messages, options)
        for attempt in (1, 2):
            handle = self._borrow(self._resolve(version))
            try:
                with contextlib.closing(handle.stream(self._http, ask)) as pieces:
                    yield from pieces
                return
            except HostLost as err:
                self._drop(handle)
                if attempt == 2 or not isinstance(err, HostGone):
                    raise
            finally:
                self._give_back(handle)

    def warm(self, version: str) -> None:
        """Load a version, or the deployed one for "live", and return when it is ready."""
        name = self._deployed() if version == "live" else version
        self._give_back(self._borrow(name))
        with self._change:
            if version == "live" and self._pointed is None:
                self._pointed = name

    def switch(self) -> None:
        """Load the deployed version, then send "live" there; call it after each deployment.

        Raises:
            ChildFailed: it could not be loaded; "live" stays where it was.
        """
        name = self._deployed()
        try:
            self.warm(name)
        except ClmError as err:
            self._remember(name, err)
            raise
        with self._change:
            self._pointed = name
            self._trim()

    def status(self) -> list[dict]:
        """Return one row per loaded or loading version, and per live version that could not be loaded."""
        with self._change:
            rows = [self._row(handle) for handle in self._hosts.values()]
            gone = [(n, why) for n, (_, why) in self._failed.items() if n not in self._hosts]
        return rows + [{"version": n, "state": "failed", "why": why, "backend": "", "in_flight": 0} for n, why in gone]

    def close(self) -> None:
        """End every host."""
        with self._change:
            self._is_closed = True
            handles, self._hosts = list(self._hosts.values()), {}
            self._change.notify_all()
        for handle in handles:
            handle.stop()
        self._http.close()

    def _checked(self, messages: list[dict], options: ChatOptions) -> Ask:
        longest = options.max_tokens or self.workspace.settings.max_new_tokens
        try:
            return Ask(messages=messages, options=options.model_copy(update={"max_tokens": longest}))
        except ValidationError as err:
            raise BadInput(plain(err)) from err

    # --- which version ---------------------------------------------------------------------------------------------

    def _deployed(self) -> str:
        from clm_app.registry import versions

        return versions.live(self.workspace).name

    def _resolve(self, version: str) -> str:
        """Return the name to ask. "live" is where the newest deployment points, or the one before while that loads."""
        if version != "live":
            return version
        wanted = self._deployed()
        with self._change:
            old = self._hosts.get(self._pointed or "")
            new = self._hosts.get(wanted)
            if wanted == self._pointed or (new and new.is_ready) or not (old and old.is_ready):
                self._pointed = wanted
                return wanted
            when, _ = self._failed.get(wanted, (-AGAIN_S, ""))
            if wanted not in self._warming and time.monotonic() - when >= AGAIN_S:
                self._warming.add(wanted)
                threading.Thread(target=self._warm_behind, args=(wanted,), daemon=True).start()
            return old.version

    def _warm_behind(self, name: str) -> None:
        try:
            self.warm(name)
        except Exception as err:  # a border: requests go on to the old version, status() and the log tell why
            log.warning("The live version %s could not be loaded: %s", name, err)
            self._remember(name, err)
        finally:
            with self._change:
                self._warming.discard(name)

    def _remember(self, name: str, err: Exception) -> None:
        with self._change:
            self._failed[name] = (time.monotonic(), plain(err))

    # --- hosts -----------------------------------------------------------------------------------------------------

    def _borrow(self, name: str) -> Handle:
        """Return the ready host of a version, counted as in use; start it where it is not running."""
        from clm_app.registry import versions

        version = versions.by_name(self.workspace, name)
        with self._change:
            handle = self._hosts.get(name)
            if handle is None or not handle.is_alive:
                self._hosts.pop(name, None)
                self._make_room(name)
                handle = self._hosts.get(name) or self._start(version)
            handle.in_flight += 1
        try:
            handle.wait()
        except BaseException:
            self._drop(handle)
            self._give_back(handle)
            raise
        with self._change:
            self._failed.pop(name, None)
        return handle

    def _start(self, version: Version) -> Handle:
        from clm_app.registry import versions

        if self._is_closed:
            raise ChildFailed("The app is closing. Start it again and ask once more.")
        base, adapter = versions.weights(self.workspace, version)
        backend, why = choose(self.workspace.settings.backend, base, adapter)
        order = Order(
            version=version.name, base=base, adapter=adapter, backend=backend, threads=host_threads(),
            key=secrets.token_urlsafe(32), converted=converted_copy(self.workspace, version),
        )  # fmt: skip
        handle = Handle(order, why)
        handle.start(self.spawn, self.workspace.home / "cache" / "orders")
        self._hosts[version.name] = handle
        return handle

    def _make_room(self, name: str) -> None:
        """End the longest unused idle host if the limit is reached; wait for one if all are in use.

        A newly deployed version does not wait, nor displace the one it replaces: it may be one too many for a while.
        """
        until = time.monotonic() + BUSY_S
        replaces_live = self._pointed in self._hosts and name == self._deployed() != self._pointed
        while name not in self._hosts and len(self._hosts) >= self.workspace.settings.hosts:
            if self._evict(spares_live=replaces_live) or replaces_live:
                return
            if not self._change.wait(until - time.monotonic()):
                count = len(self._hosts)
                raise ChildFailed(f"All {count} loaded models are answering. Try again soon, or raise CLM_HOSTS.")

    def _evict(self, *, spares_live: bool) -> bool:
        """End the idle host that was unused for longest, the live one last; return whether there was one."""
        spared = self._pointed if spares_live else None
        idle = [h for h in self._hosts.values() if h.in_flight == 0 and h.version != spared]
        if not idle:
            return False
        victim = min(idle, key=lambda h: (h.version == self._pointed, h.used_at))
        self._remove(victim)
        return True

    def _trim(self) -> None:
        while len(self._hosts) > self.workspace.settings.hosts and self._evict(spares_live=True):
            pass

    def _give_back(self, handle: Handle) -> None:
        with self._change:
            handle.in_flight -= 1
            handle.used_at = time.monotonic()
            self._trim()
            self._change.notify_all()

    def _drop(self, handle: Handle) -> None:
        with self._change:
            self._remove(handle)

    def _remove(self, handle: Handle) -> None:
        if self._hosts.get(handle.version) is handle:
            del self._hosts[handle.version]
        threading.Thread(target=handle.stop, daemon=True).start()  # an end may take seconds; nobody waits for it

    def _row(self, handle: Handle) -> dict:
        is_live, state = handle.version == self._pointed, "standby"
        if not handle.is_ready:
            state = "loading" if handle.is_alive else "ended"
        elif is_live:
            state = "live"
        elif handle.in_flight:
            state = "answering"
        return {
            "version": handle.version, "state": state, "backend": handle.order.backend, "why": handle.why,
            "in_flight": handle.in_flight, "idle_s": round(time.monotonic() - handle.used_at, 1),
            "pid": handle.child.pid if handle.child else None, "load_s": handle.seconds,
        }  # fmt: skip


def host_threads() -> int:
    """Return half of the cores: a training child may want the others, and crowded threads slow both down."""
    return max(1, (os.cpu_count() or 2) // 2)


def converted_copy(workspace: Workspace, version: Version) -> Path:
    """Return the path, without an ending, of a copy in another format: equal weights and converter, equal path."""
    name = hashlib.sha256(f"{FORMAT}/{version.base_digest}/{version.object}".encode()).hexdigest()
    return workspace.home / "cache" / "gguf" / name
