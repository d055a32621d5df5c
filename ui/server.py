"""Open the port first, then warm the page behind it: the API answers at once, Gradio takes its seconds unseen.

A Gradio page mounted on an app that has started shows, but its buttons hang, because nobody enters its lifespan. So the
page sits on an inner app of its own, and one task enters that app's lifespan, keeps it, and leaves it at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

import clm_app
from clm_app.catalog import shelf
from clm_app.errors import BadSettings, ClmError, OutOfRoom, plain
from ui.house import House

LOG = logging.getLogger("clm.ui")
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
UNSAFE = {"POST", "PUT", "PATCH", "DELETE"}
# Gradio's page compiles its templates in the browser, hence unsafe-eval; the line that matters is that nothing a model
# writes (an image in Markdown, say) can make the browser ask another host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "SAMEORIGIN",
}
STARTING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>CLM is starting</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"><style>
body{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:100vh;margin:0;
background:light-dark(#f5f7f8,#12181d);color:light-dark(#22303a,#dbe4ea)}main{padding:2rem;max-width:30rem}
h1{font-size:1.25rem;font-weight:600;margin:0 0 .5rem}p{margin:0;opacity:.75}
progress{width:100%;height:6px;margin-top:1.25rem;accent-color:#0f766e}</style></head><body><main aria-live="polite">
<h1 id="title">CLM is starting …</h1><p id="text">The API answers already. This page follows in a few seconds.</p>
<progress id="bar" aria-label="starting"></progress></main><script>
async function look(){try{const h=await (await fetch('/api/health')).json();if(h.page){location.reload();return}
if(h.problem){document.getElementById('text').textContent=h.problem}}catch(e){
document.getElementById('text').textContent='CLM does not answer. Start it again, then reload this page.'}
setTimeout(look,300)}look()</script></body></html>"""


def make_app(house: House) -> FastAPI:
    """Return the app: the API's routes, and below them the page, as soon as it is built."""
    # No docs page: Swagger's scripts would come from an outside host.
    app = FastAPI(
        title="CLM", version=clm_app.__version__, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json",
        lifespan=lambda _: _with_page(house),
    )  # fmt: skip
    app.state.house = house
    for api in shelf("ui.api").values():
        app.include_router(api(house).routes())
    app.add_exception_handler(ClmError, _refusal)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _accident)
    app.add_middleware(Door)
    app.mount("/api", _no_such_route)
    app.mount("/", _Front(house))
    return app


class Door:
    """Let in only what comes from this machine's own page or programs.

    A page of another site may resolve its name to 127.0.0.1 (DNS rebinding) or post to our port; the Host and Origin
    headers, which a page cannot forge, tell.
    """

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer 421 to a foreign Host, 403 to a foreign Origin, else pass the request on with our own headers."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal:
            return await refusal(scope, receive, send)

        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in present]
                message = message | {"headers": [*message["headers"], *extra]}
            await send(message)

        return await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: dict, headers: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        if _host_name(host) not in LOOPBACK:
            said = f"The host name {host[:100]!r} is not this machine. Open http://127.0.0.1 with the app's port."
            return JSONResponse({"error": said}, 421)
        changes = scope["type"] == "websocket" or scope["method"] in UNSAFE
        origin = headers.get("origin")
        if changes and origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return JSONResponse(
                {"error": f"A page from {origin[:100]} may not change anything here. Use the app's own page."}, 403
            )
        if changes and origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return JSONResponse({"error": "A page of another site may not change anything here."}, 403)
        return None


def _host_name(host: str) -> str:
    """Return the name in a Host header in lower case, without its port; empty where it cannot be read."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


class _Front:
    """Whatever no route took: the page where it is built, until then a light page that waits for it."""

    def __init__(self, house: House) -> None:
        self.house = house

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if self.house.page is not None:
            await self.house.page(scope, receive, send)
        elif scope["type"] == "http":
            is_root = scope["path"] in ("", "/")
            answer = HTMLResponse(STARTING, 200 if is_root else 503, {"retry-after": "2", "cache-control": "no-store"})
            await answer(scope, receive, send)


async def _no_such_route(scope: dict, receive: Callable, send: Callable) -> None:
    path = scope["path"]
    await JSONResponse({"error": f"There is no route {path}. GET /api/openapi.json lists them."}, 404)(
        scope, receive, send
    )


@contextlib.asynccontextmanager
async def _with_page(house: House) -> AsyncIterator[None]:
    is_over = asyncio.Event()
    keeper = asyncio.create_task(_keep_page(house, is_over))
    yield
    is_over.set()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait([keeper], timeout=5)


async def _keep_page(house: House, is_over: asyncio.Event) -> None:
    """Build the page in a thread and stay in its lifespan; one task, since a lifespan is left where it was entered."""
    try:
        inner = await asyncio.to_thread(_build_page, house)
        async with inner.router.lifespan_context(inner):
            house.page = inner
            await is_over.wait()
    except Exception as err:  # the border of the page: the API goes on without it, and health says so
        house.page_problem = f"The page could not be built, the API answers. {plain(err)}"
        LOG.exception("the page could not be built")


def _build_page(house: House) -> FastAPI:
    """Import Gradio, which takes seconds, and return an app with the page at its root."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(house.workspace.uploads / "page")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from ui import page

    return page.mounted(house)


async def _refusal(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, error.status)


async def _bad_request(_request: Request, error: Exception) -> JSONResponse:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "the request's body"
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else given[:77] + "…"
    return JSONResponse({"error": f"{name} is {given}: {first['msg']}. Correct it and try again."}, 422)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error.detail)}, error.status_code, getattr(error, "headers", None))


async def _accident(_request: Request, error: Exception) -> JSONResponse:
    LOG.error("a request failed", exc_info=error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return JSONResponse({"error": plain(error)}, OutOfRoom.status)
    return JSONResponse({"error": "Something went wrong inside the app. Its log has the details."}, 500)


class _Server(uvicorn.Server):
    """Uvicorn, ended by the first Ctrl-C or SIGTERM and then returned from, so that the caller can put things away."""

    def __init__(self, config: uvicorn.Config, house: House, open_browser: bool) -> None:
        super().__init__(config)
        self.house, self.open_browser = house, open_browser

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.open_browser and self.started:
            threading.Thread(target=webbrowser.open, args=[self.house.address], daemon=True).start()

    def handle_exit(self, sig: int, frame: object) -> None:
        self.house.is_stopping = True  # streams that go on for ever look at this
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hold the signals while serving. Uvicorn raises them again afterwards, which would skip `on_stop`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ("SIGINT", "SIGTERM", "SIGBREAK")
        before = {getattr(signal, n): None for n in names if hasattr(signal, n)}
        before = {sig: signal.signal(sig, self.handle_exit) for sig in before}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def open_port(port: int) -> socket.socket:
    """Return a socket that is bound to this port of this machine alone; 0 takes any free one.

    Raises:
        BadSettings: another program has the port.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # On Windows SO_REUSEADDR would let a second program take a port that is in use; elsewhere it only skips a wait.
    exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if exclusive is None else exclusive, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(2048)  # who asks before the server accepts waits instead of being refused
    except OSError as err:
        listener.close()
        raise BadSettings(
            f"Port {port} of this machine cannot be opened ({err.strerror or err}). Close the program that uses it, "
            f"or start with --port {port + 1 if port < 65535 else 0}; --port 0 takes any free one."
        ) from err
    return listener


def serve(
    house: House, *, port: int, open_browser: bool = False, on_stop: Callable[[], None] | None = None,
    on_open: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve on 127.0.0.1 until Ctrl-C or SIGTERM, then call `on_stop` and return.

    on_open: called with the address once the port is bound; port 0 is known only then.

    Raises:
        BadSettings: the port is taken; `on_stop` is called in this case too.
    """
    try:
        listener = open_port(port)
        house.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            make_app(house), log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False,
            lifespan="on",
        )  # fmt: skip
        with listener:
            if on_open:
                on_open(house.address)
            _Server(config, house, open_browser).run(sockets=[listener])
    finally:
        house.is_stopping = True
        if on_stop:
            on_stop()
