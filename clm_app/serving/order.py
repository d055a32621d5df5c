"""What a host child is told: which weights to load, with which backend, and the key its caller must show."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Order(BaseModel):
    """One host's order; written to a file that only its owner can read, and removed once the host has read it."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field(description="name of the version; every piece of a reply carries it")
    base: Path = Field(description="folder of the full-precision base")
    adapter: Path | None = Field(description="folder of the adapter over it, or None")
    backend: str = Field(description="a name on the shelf clm_app.serving.backends")
    threads: int = Field(ge=1, description="CPU threads to compute with")
    key: str = Field(min_length=32, description="bearer key that every request must carry")
    converted: Path = Field(
        description="path without an ending, named after the digest of the weights: where a backend that needs "
        "another file format keeps its copy"
    )
