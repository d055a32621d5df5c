"""What is said to a model and what comes back: messages, options and the pieces of a reply."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=1_000_000)


class ChatOptions(BaseModel):
    """How a reply is made. Greedy unless asked otherwise: these models are trained to answer exactly, not variously."""

    model_config = ConfigDict(extra="forbid")

    max_tokens: int | None = Field(
        None, ge=1, le=8192, description="longest reply, in tokens; empty takes the app's max_new_tokens"
    )
    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the likeliest token each time; higher varies more")
    top_p: float = Field(1.0, ge=0, le=1, description="draw from the likeliest tokens that hold this share together")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="the same seed draws the same reply; empty draws anew"
    )
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        default_factory=list, max_length=4, description="texts that end the reply; they are not part of it"
    )


class Piece(BaseModel):
    """The next part of a reply. An empty text without a finish_reason only says that the reply is still coming."""

    model_config = ConfigDict(frozen=True)

    text: str = ""
    finish_reason: Literal["stop", "length", "cancelled"] | None = Field(
        None, description="set on the last piece: its own end or a stop text, the room, or the reader who left"
    )
    prompt_tokens: int = 0
    completion_tokens: int = Field(0, description="tokens made so far, an end token included")
    version: str = Field("", description="name of the version that answers; set by its host")


class Ask(BaseModel):
    """What a host is asked: a whole conversation, and how to go on with it."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    options: ChatOptions = Field(default_factory=ChatOptions)
