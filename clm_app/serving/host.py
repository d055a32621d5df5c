"""The host child: load one version and answer on a port of this machine, until the parent's end of stdin closes.

`python -m clm_app.serving.host ORDER.json`. POST /chat gives JSON lines, one Piece each; a line with `error` and
`status` instead ends a reply that failed, and an empty line about once a second says that the reply is still coming.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from clm_app import events
from clm_app.catalog import pick
from clm_app.errors import ClmError, plain
from clm_app.serving.backends._base import Backend
from clm_app.serving.chat import Ask, Piece
from clm_app.serving.order import Order

BEAT_S = 1.0  # how long the reader waits without a sign of life
MOST_WAITING = 64  # conversations in one host, the one being answered included


class Host:
    """One loaded version behind a port."""

    def __init__(self, order: Order, backend: Backend) -> None:
        self.order, self.backend = order, backend
        self.in_flight = 0

    def app(self) -> FastAPI:
        """Return the web app; every route asks for the order's key."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(self.check_key)])
        app.get("/health")(self.health)
        app.post("/chat")(self.chat)
        return app

    async def check_key(self, request: Request) -> None:
        """Refuse a request that does not carry the order's key."""
        shown = request.headers.get("authorization", "")
        if not hmac.compare_digest(shown.encode(), f"Bearer {self.order.key}".encode()):
            raise HTTPException(401, "This port belongs to the CLM app; ask the app's own API instead.")

    async def health(self) -> dict:
        """Say what is loaded and how many conversations are in flight."""
        return {"version": self.order.version, "backend": self.order.backend, "in_flight": self.in_flight}

    async def chat(self, ask: Ask) -> StreamingResponse:
        """Answer a conversation, piece by piece."""
        return StreamingResponse(self.lines(ask), media_type="application/x-ndjson")

    async def lines(self, ask: Ask) -> AsyncIterator[str]:
        """Yield the reply's lines. When the reader leaves, the computing thread is told and stops at its next token."""
        if self.in_flight >= MOST_WAITING:
            yield _failure(f"{MOST_WAITING} conversations wait for this model already. Try again in a moment.", 503)
            return
        said: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        has_left = threading.Event()
        self.in_flight += 1
        told = (ask, said, has_left, asyncio.get_running_loop())
        threading.Thread(target=self._answer, args=told, daemon=True).start()
        try:
            while True:
                try:
                    item = await asyncio.wait_for(said.get(), BEAT_S)
                except TimeoutError:
                    yield "\n"
                    continue
                yield self._line(item)
                if isinstance(item, Exception) or item.finish_reason:
                    return
        finally:
            has_left.set()

    def _answer(
        self, ask: Ask, said: asyncio.Queue, has_left: threading.Event, loop: asyncio.AbstractEventLoop
    ) -> None:
        try:
            for piece in self.backend.stream(ask.messages, ask.options, has_left.is_set):
                loop.call_soon_threadsafe(said.put_nowait, piece)
        except Exception as err:  # a border: the reader gets the sentence, the log the trace
            traceback.print_exc()
            loop.call_soon_threadsafe(said.put_nowait, err)
        finally:
            loop.call_soon_threadsafe(self._one_less)

    def _one_less(self) -> None:
        self.in_flight -= 1

    def _line(self, item: Piece | Exception) -> str:
        if isinstance(item, Exception):
            return _failure(plain(item), item.status if isinstance(item, ClmError) else 500)
        return item.model_copy(update={"version": self.order.version}).model_dump_json() + "\n"


def _failure(sentence: str, status: int) -> str:
    return json.dumps({"error": sentence, "status": status}) + "\n"


def end_with_parent() -> None:
    """End this process when stdin ends: it does however the parent dies."""
    while os.read(0, 4096):  # not sys.stdin: a thread that waits in it aborts the interpreter's own way out
        pass
    os._exit(0)


def prepare_environment(threads: int) -> None:
    """Set what the heavy libraries read when they are imported: no network, few threads that sleep while they wait."""
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS=str(threads),
        # Spinning threads make a model beside a training run three to ten times slower (measured at 25.7 M parameters).
        OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0",
        GGML_NO_BACKTRACE="1",  # else an abort of llama.cpp starts a debugger, which can hang
    )  # fmt: skip


def main() -> None:
    """Read the order, load, say Ready and serve."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    started = time.monotonic()
    try:
        order = Order.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
        prepare_environment(order.threads)
        kind = pick("clm_app.serving.backends", order.backend)
        backend = kind(order.base, order.adapter, order.threads, order.converted)
        listener = socket.create_server(("127.0.0.1", 0))
    except Exception as err:  # a border: the parent gets the sentence and the trace
        events.say(events.Failed(sentence=plain(err), detail=traceback.format_exc()))
        sys.exit(1)
    import uvicorn

    seconds = time.monotonic() - started
    events.say(events.Ready(port=listener.getsockname()[1], backend=order.backend, seconds=round(seconds, 2)))
    config = uvicorn.Config(Host(order, backend).app(), log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
