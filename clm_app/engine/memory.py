"""Will it fit? Memory and disk that a run needs, estimated before it starts, so that it is refused and not killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil

from clm_app.errors import BadModel, OutOfRoom
from clm_app.hardware import gpus

GB = 1e9
OVERHEAD_GB = 0.6  # interpreter, torch and libraries; a starter run was seen to peak at 0.9 GB in all


def needed_gb(parameters: int, folder: Path, method_kind: str, batch_rows: int, max_tokens: int, on_gpu: bool) -> float:
    """Return the memory of a run in GB: weights, gradients, AdamW's two moments and activations.

    Activations: about 34 bytes per token, layer and hidden unit in mixed precision (Korthikanti et al. 2022,
    arXiv:2205.05198, with flash or memory-saving attention); a quarter of that with gradient checkpointing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, layers = config.get("hidden_size", 1024), config.get("num_hidden_layers", 24)
    per_weight = 16 if method_kind == "full" else (2 if on_gpu else 4) + 0.5
    tokens = batch_rows * min(max_tokens, config.get("max_position_embeddings", max_tokens))
    activations = tokens * hidden * layers * 34 * (0.25 if parameters > 1e9 else 1.0)
    return (parameters * per_weight + activations * 0.25) / GB + OVERHEAD_GB  # most rows are shorter than max_tokens


def refuse_what_does_not_fit(
    parameters: int, folder: Path, method_kind: str, batch_rows: int, max_tokens: int, home: Path
) -> None:
    """Raise before anything is started, if memory or disk will not do.

    Raises:
        BadModel: more memory is needed than is free.
        OutOfRoom: more disk is needed for checkpoints and weights than is free.
    """
    cards = gpus()
    free = max((c["memory_gb"] - c["memory_used_gb"] for c in cards), default=psutil.virtual_memory().available / 2**30)
    free *= 2**30 / GB
    needed = needed_gb(parameters, folder, method_kind, batch_rows, max_tokens, bool(cards))
    if needed > free:
        way = "Choose method lora" if method_kind == "full" else "Halve batch_rows or max_tokens"
        raise BadModel(
            f"A model of {parameters / 1e6:,.0f} M parameters needs about {needed:.1f} GB to be trained this way; "
            f"{free:.1f} GB {'of the GPU ' if cards else ''}are free. {way}, take a smaller model, or close other programs."
        )
    disk, wanted = shutil.disk_usage(home).free / GB, parameters * (48 if method_kind == "full" else 2) / GB + 0.2
    if wanted > disk:
        raise OutOfRoom(
            f"The run needs about {wanted:.1f} GB on disk for checkpoints and weights; {disk:.1f} GB are free in {home}. "
            "Free some space, or choose another folder with --home."
        )
