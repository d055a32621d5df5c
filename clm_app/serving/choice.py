"""Which backend serves a model folder, and why."""

from __future__ import annotations

from pathlib import Path

from clm_app.catalog import pick
from clm_app.errors import BadSettings

SHELF = "clm_app.serving.backends"


def choose(wanted: str, base: Path, adapter: Path | None = None) -> tuple[str, str]:
    """Return (name of a backend, why it was taken). wanted: "auto" or a name on the shelf.

    Raises:
        BadSettings: a name was asked for that is unknown, is not installed or cannot load this folder.
    """
    if wanted != "auto":
        backend = pick(SHELF, wanted)
        if reason := backend.is_available() or backend.supports(base, adapter):
            raise BadSettings(f"CLM_BACKEND is {wanted}. {reason}")
        return wanted, "chosen in the settings"
    fast = pick(SHELF, "llama_cpp")
    if reason := fast.is_available() or fast.supports(base, adapter):
        return "transformers", reason
    return "llama_cpp", "installed, and it knows this kind of model"
