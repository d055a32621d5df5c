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


def needed_gb(
    parameters: int, folder: Path, method_kind: str, batch_rows: int, max_tokens: int, on_gpu: bool, base_bits: int = 0,
    needs_parent: bool = False,
) -> float:  # fmt: skip
    """Return the memory of a run in GB: weights, gradients, AdamW's two moments and activations.

    needs_parent: a second model that is not trained lies beside the one that is, as frozen weights.
    base_bits: bits that the base's linear layers are rounded to; 0: they are not. Where they are, the version is
    measured over a second base in full precision: beside it on the CPU; on a GPU only where that has room for it.

    Activations: about 34 bytes per token, layer and hidden unit in mixed precision (Korthikanti et al. 2022,
    arXiv:2205.05198, with flash or memory-saving attention); a quarter of that with gradient checkpointing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, layers = config.get("hidden_size", 1024), config.get("num_hidden_layers", 24)
    frozen = plain = 2 if on_gpu else 4
    if base_bits:
        embeddings = config.get("vocab_size", 0) * hidden * (1 if config.get("tie_word_embeddings") else 2)
        rounded = max(parameters - embeddings, 0) / parameters
        frozen = rounded * (base_bits / 8 + 4 / 64) + (1 - rounded) * plain  # a float32 scale for each 64 weights
        frozen += 0 if on_gpu else plain
    per_weight = 16 if method_kind == "full" else frozen + 0.5
    per_weight += (4 if method_kind == "full" else plain) if needs_parent else 0
    tokens = batch_rows * min(max_tokens, config.get("max_position_embeddings", max_tokens))
    activations = tokens * hidden * layers * 34 * (0.25 if parameters > 1e9 else 1.0)
    return (parameters * per_weight + activations * 0.25) / GB + OVERHEAD_GB  # most rows are shorter than max_tokens


def disk_gb(parameters: int, method_kind: str) -> float:
    """Return the GB on disk that a run needs for checkpoints and weights."""
    return parameters * (48 if method_kind == "full" else 2) / GB + 0.2


def free_gb() -> tuple[float, list[dict]]:
    """Return the free memory in GB, of the GPU that has most of it where there is one, and the GPUs."""
    cards = gpus()
    free = max((c["memory_gb"] - c["memory_used_gb"] for c in cards), default=psutil.virtual_memory().available / 2**30)
    return free * 2**30 / GB, cards


def refuse_what_does_not_fit(
    parameters: int, folder: Path, method_kind: str, batch_rows: int, max_tokens: int, home: Path, base_bits: int = 0,
    needs_parent: bool = False,
) -> None:  # fmt: skip
    """Raise before anything is started, if memory or disk will not do.

    Raises:
        BadModel: more memory is needed than is free.
        OutOfRoom: more disk is needed for checkpoints and weights than is free.
    """
    free, cards = free_gb()
    needed = needed_gb(
        parameters, folder, method_kind, batch_rows, max_tokens, bool(cards), base_bits, needs_parent
    )  # fmt: skip
    if needed > free:
        way = "Choose method lora" if method_kind == "full" else "Halve batch_rows or max_tokens"
        if method_kind != "full" and cards and not base_bits:
            way = f"Choose method qlora. {way}"
        second = " with a second model beside it" if needs_parent else ""
        way += ", take a strategy that needs no second model, such as replay" if needs_parent else ""
        raise BadModel(
            f"A model of {parameters / 1e6:,.0f} M parameters{second} needs about {needed:.1f} GB to be trained this way; "
            f"{free:.1f} GB {'of the GPU ' if cards else ''}are free. {way}, take a smaller model, or close other programs."
        )
    disk, wanted = shutil.disk_usage(home).free / GB, disk_gb(parameters, method_kind)
    if wanted > disk:
        raise OutOfRoom(
            f"The run needs about {wanted:.1f} GB on disk for checkpoints and weights; {disk:.1f} GB are free in {home}. "
            "Free some space, or choose another folder with --home."
        )
