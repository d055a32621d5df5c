"""Ask any OpenAI-compatible address for a reply: only one that a person named, and only on this machine unless said so.

Source: the public API reference of POST /v1/chat/completions.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import time
from typing import NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from clm_app.errors import BadInput, ChildFailed

MOST_BYTES = 4_000_000  # of an answer; a reply of 8,192 tokens has some 40,000


class Reply(NamedTuple):
    """One whole reply, how long it took, and its tokens where the endpoint counts them."""

    text: str
    seconds: float
    tokens: int | None


class Endpoint(BaseModel):
    """An address that answers conversations, and what it is asked for."""

    model_config = ConfigDict(extra="forbid")

    base_url: str = Field(max_length=2000, description="such as http://127.0.0.1:8000/v1; /chat/completions is added")
    model: str = Field(min_length=1, max_length=200, description="name of the model there")
    api_key: SecretStr = Field(SecretStr(""), description="sent as a bearer key where it is given; never kept")
    outside: bool = Field(False, description="the address is not on this machine, and the prompts may leave it")

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            url = httpx.URL(value.strip())  # the parser that will send decides what the host is
        except httpx.InvalidURL as err:
            raise ValueError(f"it is no address ({err})") from err
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError("an address such as http://127.0.0.1:8000/v1 is needed, without a name, a query or a #")
        return str(url).rstrip("/").removesuffix("/chat/completions")

    @model_validator(mode="after")
    def _stays_here_unless_said(self) -> Endpoint:
        host = httpx.URL(self.base_url).host
        if not self.outside and not is_here(host):
            raise ValueError(
                f"{host} is not this machine, and prompts sent there leave it. Set outside to true if that is meant"
            )
        return self

    def ask(self, prompt: str, max_tokens: int, limit_s: float) -> Reply:
        """Return the greedy reply to one prompt. Redirects are not followed, and no proxy is taken from the environment.

        Raises:
            BadInput: the endpoint refuses, or what it says is no reply of this API.
            ChildFailed: it cannot be reached, or the time is over.
        """
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": max_tokens, "stream": False,
        }  # fmt: skip
        key = self.api_key.get_secret_value()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        began = time.monotonic()
        try:
            with httpx.Client(trust_env=False, timeout=limit_s, follow_redirects=False) as client:
                request = client.stream("POST", f"{self.base_url}/chat/completions", json=body, headers=headers)
                with request as answer:
                    content = self._content(answer, began + limit_s)
        except httpx.TimeoutException as err:
            raise self._too_late(limit_s) from err
        except (httpx.HTTPError, httpx.InvalidURL) as err:
            raise ChildFailed(
                f"{self.base_url} cannot be reached: {err}. Look whether it runs and whether the address is right."
            ) from err
        text, tokens = self._read(answer.status_code, content)
        return Reply(text, time.monotonic() - began, tokens)

    def _content(self, answer: httpx.Response, until: float) -> bytes:
        content = b""
        for block in answer.iter_bytes():
            content += block
            if time.monotonic() > until:  # httpx bounds each wait, not their sum
                raise httpx.ReadTimeout("it answers too slowly")
            if len(content) > MOST_BYTES:
                raise BadInput(f"{self.base_url} says more than {MOST_BYTES:,} bytes. Is it an address of this API?")
        return content

    def _too_late(self, limit_s: float) -> ChildFailed:
        return ChildFailed(
            f"{self.base_url} has not answered within {limit_s:g} s. Ask for fewer tokens, or allow more seconds."
        )

    def _read(self, status: int, content: bytes) -> tuple[str, int | None]:
        """Return (text, tokens of the reply) from an answer."""
        said = content[:300].decode("utf-8", "replace")
        if status != 200:
            raise BadInput(f"{self.base_url} refuses with status {status}: {said}. Correct the address, model or key.")
        try:
            told = json.loads(content)
            text = told["choices"][0]["message"]["content"]
            tokens = (told.get("usage") or {}).get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise BadInput(
                f"{self.base_url} gives no reply as this API does, but: {said}. Correct the address."
            ) from err
        if not isinstance(text, str):
            raise BadInput(f"{self.base_url} gives a reply without text. Choose a model that answers in text.")
        return text, tokens if isinstance(tokens, int) else None


def is_here(host: str) -> bool:
    """Say whether a host name is this machine by its own word; a name that has to be looked up is not."""
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
