"""The OpenAI-compatible API: any client of that API talks to "live" or to a version by its name.

Source: the public API reference of POST /v1/chat/completions and GET /v1/models.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clm_app.errors import BadInput, ChildFailed, ClmError, NotThere, plain
from clm_app.registry import versions
from clm_app.serving.chat import ChatOptions, Message, Piece
from ui.api._base import Api

if TYPE_CHECKING:
    from ui.house import House

# Read and not acted on. They steer sampling in ways not offered here, or concern a provider's billing and storage;
# a reply without them is still the reply that was asked for. Fields that are not listed here are not acted on either.
IGNORED = (
    "frequency_penalty", "logit_bias", "metadata", "parallel_tool_calls", "prediction", "presence_penalty",
    "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store",
    "tool_choice", "top_logprobs", "user", "verbosity", "web_search_options",
)  # fmt: skip
# Refused when set to anything but these, because the reply would have another shape than the client expects.
ONLY = {
    "n": (None, 1), "logprobs": (None, False), "tools": (None, []), "functions": (None, []), "audio": (None,),
    "modalities": (None, ["text"]), "response_format": (None, {"type": "text"}),
}  # fmt: skip
LIMIT = 64  # conversations that may wait for a model at once, each in a thread


class Part(BaseModel):
    """A part of a message's content; only text can be read."""

    type: str
    text: str = ""

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value != "text":
            raise ValueError("these models read text only. Send parts of type 'text'.")
        return value


class Turn(BaseModel):
    """A message as this API writes it."""

    role: str
    content: str | list[Part] | None = None

    def message(self) -> Message:
        """Return it in our own words; "developer" is the newer name of "system"."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(BaseModel):
    """What a stream carries besides its chunks."""

    include_usage: bool = False


class Completion(BaseModel):
    """A request. A field that is null is as good as absent."""

    model_config = ConfigDict(extra="ignore")

    model: str = "live"
    messages: list[Turn] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    def options(self) -> ChatOptions:
        """Return how the reply is to be made."""
        return ChatOptions(
            max_tokens=self.max_completion_tokens or self.max_tokens, temperature=self.temperature, top_p=self.top_p,
            seed=self.seed, stop=[self.stop] if isinstance(self.stop, str) else self.stop,
        )  # fmt: skip


class OpenAi(Api):
    """Chat completions, streamed or whole, and the list of versions."""

    def __init__(self, house: House) -> None:
        super().__init__(house)
        self.waiting = anyio.CapacityLimiter(LIMIT)  # its own, so that conversations never use up the page's threads

    def routes(self) -> APIRouter:
        """Return the routes under /v1."""
        router = APIRouter(prefix="/v1", tags=["openai"])
        router.post("/chat/completions")(self._complete)
        router.get("/models")(self._models)
        router.get("/models/{name}")(self._model)
        return router

    async def _models(self) -> dict:
        """List "live" and every version that may go live."""
        found = await run_in_threadpool(self._listed)
        return {"object": "list", "data": found}

    async def _model(self, name: str) -> Response:
        """Describe one version."""
        try:
            version = await run_in_threadpool(versions.by_name, self.house.workspace, name)
        except ClmError as err:
            return failure(err)
        return JSONResponse(_listing(name, version))

    def _listed(self) -> list[dict]:
        live, every = versions.live(self.house.workspace), versions.everything(self.house.workspace)
        return [_listing("live", live)] + [_listing(v.name, v) for v in every if v.state in ("base", "accepted")]

    async def _complete(self, request: Request) -> Response:
        """Answer a conversation with "live" or a version."""
        try:
            asked = await _read(request)
            messages, options = [t.message().model_dump() for t in asked.messages], asked.options()
            if self.house.router is None:
                raise ChildFailed("No model can be served yet. Try again in a moment.")
            pieces = _walk(self.house.router.chat(asked.model, messages, options), self.waiting)
            first = await _first(pieces, request)
        except (ClmError, ValidationError) as err:
            return failure(err)
        if first is None:
            return Response(status_code=499)  # nobody is there to read it
        answer = Answer(asked, first)
        if asked.stream:
            body = answer.events(pieces)
            return StreamingResponse(body, media_type="text/event-stream", headers=answer.headers)
        try:
            return await answer.whole(pieces, request)
        except ClmError as err:
            return failure(err)


class Answer:
    """One reply on its way out, as chunks or as a whole; every part of it says which version answers."""

    def __init__(self, asked: Completion, first: Piece) -> None:
        self.asked, self.first = asked, first
        self.headers = {"X-CLM-Version": first.version, "Cache-Control": "no-cache"}
        self.frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model,
            "clm": {"version": first.version},
        }  # fmt: skip

    async def whole(self, pieces: AsyncIterator[Piece], request: Request) -> Response:
        """Return the reply when it is complete; stop computing it if the reader leaves."""
        text, last = self.first.text, self.first
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                text, last = text + piece.text, piece
                if await request.is_disconnected():
                    return Response(status_code=499)
        choice = {
            "index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None,
            "finish_reason": last.finish_reason,
        }  # fmt: skip
        body = self.frame | {"object": "chat.completion", "choices": [choice], "usage": usage(last)}
        return JSONResponse(body, headers=self.headers)

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """Yield server-sent events: the role, the text, the finish_reason, the usage if asked for, and [DONE]."""
        last = self.first
        yield self._chunk({"role": "assistant", "content": ""})
        async with contextlib.aclosing(pieces):
            try:
                if last.text:
                    yield self._chunk({"content": last.text})
                async for piece in pieces:
                    last = piece if piece.finish_reason else last
                    yield self._chunk({"content": piece.text}) if piece.text else ": still coming\n\n"
            except ClmError as err:  # the status is sent already; clients raise on an event with `error`
                yield _event({"error": shape(err)})
                return
        yield self._chunk({}, finish_reason=last.finish_reason)
        if self.asked.stream_options.include_usage:
            yield _event(self.frame | {"object": "chat.completion.chunk", "choices": [], "usage": usage(last)})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        rest = {"usage": None} if self.asked.stream_options.include_usage else {}
        return _event(self.frame | {"object": "chat.completion.chunk", "choices": [choice]} | rest)


async def _read(request: Request) -> Completion:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a page elsewhere in the browser may send other types here without asking first
        raise BadInput(f"The content type is {kind!r}; it must be application/json. Set that header.")
    try:
        body = json.loads(await request.body())
    except ValueError as err:
        raise BadInput(f"The body is no JSON: {err}. Correct it and try again.") from err
    for name, allowed in ONLY.items():
        if isinstance(body, dict) and body.get(name) not in allowed:
            raise BadInput(f"{name} is {body[name]!r}, which is not offered here. Leave {name} out.")
    return Completion.model_validate(body)


async def _walk(pieces: Iterator[Piece], limiter: anyio.CapacityLimiter) -> AsyncIterator[Piece]:
    """Walk a blocking iterator in threads, and close it whatever happens."""
    try:
        while (piece := await anyio.to_thread.run_sync(next, pieces, None, limiter=limiter)) is not None:
            yield piece
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(pieces.close, limiter=limiter)


async def _first(pieces: AsyncIterator[Piece], request: Request) -> Piece | None:
    """Return the first piece that says something, or None where the reader has left."""
    async for piece in pieces:
        if piece.text or piece.finish_reason:
            return piece
        if await request.is_disconnected():
            break
    await pieces.aclose()
    return None


def usage(last: Piece) -> dict:
    """Return the token counts of a whole reply."""
    total = last.prompt_tokens + last.completion_tokens
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens, "total_tokens": total}


def shape(err: Exception) -> dict:
    """Return an error as this API's clients read it."""
    status = err.status if isinstance(err, ClmError) else 400
    param = str(err.errors()[0]["loc"][0]) if isinstance(err, ValidationError) and err.errors()[0]["loc"] else None
    is_unknown = isinstance(err, NotThere)
    return {
        "message": plain(err), "type": "invalid_request_error" if status < 500 else "server_error",
        "param": "model" if is_unknown else param, "code": "model_not_found" if is_unknown else None,
    }  # fmt: skip


def failure(err: Exception) -> JSONResponse:
    """Return an error response."""
    return JSONResponse({"error": shape(err)}, status_code=err.status if isinstance(err, ClmError) else 400)


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _listing(name: str, version: Any) -> dict:
    return {
        "id": name, "object": "model", "created": int(version.created_at.timestamp()), "owned_by": "clm",
        "clm": {"version": version.name, "state": version.state},
    }  # fmt: skip
