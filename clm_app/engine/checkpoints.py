"""Checkpoints that are whole or not there: written aside, synced, listed with digests, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from store.objects import file_digest, sync

MANIFEST = "manifest.json"  # written last: a folder without it, or one that differs from it, is no checkpoint


def commit(
    folder: Path, step: int, model: torch.nn.Module, optimiser: torch.optim.Optimizer, kept: int, facts: dict,
    more: dict[str, torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write weights, optimiser and random state after `step` steps, and return the committed folder.

    facts: what the manifest says beside the step. more: tensors of the strategy. Only what is trained is
    written. The newest `kept` checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft, place = folder / f".draft-{step}", folder / f"step-{step:09d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    save_file(trained(model), draft / "weights.safetensors")
    state = {"optimiser": optimiser.state_dict(), "random": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_random"] = torch.cuda.get_rng_state_all()
    torch.save(state, draft / "state.pt")
    if more:
        save_file({name: t.detach().contiguous() for name, t in more.items()}, draft / "strategy.safetensors")
    write_manifest(draft, **facts, step=step)
    shutil.rmtree(place, ignore_errors=True)  # a damaged one of the same step
    os.replace(draft, place)
    sync_folder_entry(folder)
    for old in committed(folder)[:-kept]:
        shutil.rmtree(old)
    return place


def write_manifest(draft: Path, **facts) -> None:
    """Sync every file, then write and sync the manifest with their sizes and digests."""
    files = {p.name: [p.stat().st_size, file_digest(p)] for p in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps(facts | {"files": files}), encoding="utf-8")
    sync(draft)


def sync_folder_entry(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def is_whole(place: Path) -> bool:
    """Say whether a folder holds exactly what its manifest promises."""
    try:
        files = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (place / name).exists() and (place / name).stat().st_size == size and file_digest(place / name) == digest
        for name, (size, digest) in files.items()
    )


def committed(folder: Path) -> list[Path]:
    """Return the renamed checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def resume(
    folder: Path,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    restore: Callable[[dict], None] | None = None,
) -> dict:
    """Load the newest whole checkpoint and return its facts, `step` among them; nothing where there is none.

    restore: is given the strategy's tensors, where there are any.
    """
    for place in reversed(committed(folder)):
        if is_whole(place):
            weights = load_file(place / "weights.safetensors")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(weights[name])
            if restore and (place / "strategy.safetensors").exists():
                restore(load_file(place / "strategy.safetensors"))
            state = torch.load(place / "state.pt", weights_only=True)
            optimiser.load_state_dict(state["optimiser"])
            torch.set_rng_state(state["random"])
            if "cuda_random" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_random"])
            return json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    return {}


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that are trained, by name; tied weights appear once."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
