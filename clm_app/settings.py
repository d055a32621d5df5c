"""The app's own settings, each written once with bound, unit and meaning; environment CLM_… sets them too."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def default_home() -> Path:
    """Return the per-user data folder of this system."""
    return Path(platformdirs.user_data_dir("clm", appauthor=False))


class Settings(BaseSettings):
    """What holds for the whole app. Every field can be set as CLM_<NAME> in the environment."""

    model_config = SettingsConfigDict(env_prefix="CLM_", extra="ignore")

    home: Path = Field(default_factory=default_home, description="workspace folder")
    port: int = Field(7860, ge=0, le=65535, description="port of the page and the API; 0 takes any free one")
    base_model: str = Field(
        "starter", description="starter, or the folder of a Hugging Face model that v0 is made from"
    )
    threads: int = Field(0, ge=0, le=256, description="CPU threads of a training child; 0 takes all cores")
    max_file_mb: int = Field(512, ge=1, le=100_000, description="largest file to read rows from, in MB")
    max_row_kb: int = Field(64, ge=1, le=10_000, description="largest prompt plus response, in kB of UTF-8")
    lease_s: float = Field(
        30.0, ge=1.0, le=3600.0, description="seconds after its last heartbeat that a job may be taken over"
    )
    tick_s: float = Field(1.0, ge=0.05, le=60.0, description="seconds between two looks of the clock at the ledger")
    backend: str = Field("auto", description="auto, llama_cpp or transformers: what serves a version")
    hosts: int = Field(3, ge=1, le=16, description="most models loaded for serving at one time")
    probes: dict[str, dict] = Field(
        default_factory=dict,
        description='knobs of the probes that read every version, such as {"general_text": {"file": "/my/texts.txt"}}',
    )
    parity: dict = Field(
        default_factory=dict,
        description='knobs of the export parity check, such as {"scored_rows": 300}; see ParitySettings',
    )
    max_new_tokens: int = Field(
        256, ge=1, le=8192, description="longest reply, in tokens, unless a request says otherwise"
    )
