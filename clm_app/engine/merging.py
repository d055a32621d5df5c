"""Merge what several trainings changed, exactly: on whole weight changes and never on the factors of adapters.

A change (delta) is {name of a weight: what was added to it}, dense. The rules: task arithmetic, Ilharco et al. 2022
(arXiv:2212.04089); TIES, Yadav et al. 2023 (arXiv:2306.01708); DARE, Yu et al. 2023 (arXiv:2311.03099); the largest
change wins, Marczak et al. 2024 (MagMax, arXiv:2407.06322); spherical interpolation, Shoemake 1985. PEFT's
`add_weighted_adapter` adds A and B of adapters apart, so that products of one adapter's A with another's B appear:
its linear, ties and dare are not these rules. TIES and SLERP are taken weight by weight, not over all of them at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clm_app.errors import BadSettings

Delta = dict[str, Tensor]
PREFIX, DEFAULT = "base_model.model.", "default"  # how PEFT names what is under an adapter, and the adapter
NEARLY_PARALLEL = 1e-6  # radians; below, the sphere is flat and its formula divides by zero


# --- rules on whole changes -------------------------------------------------------------------------------------------


def linear(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Return the weighted sum: task arithmetic."""
    return {name: sum(w * d for w, d in zip(weights, found, strict=True)) for name, found in _columns(deltas)}


def ties(deltas: Sequence[Delta], density: float, weights: Sequence[float] | None = None) -> Delta:
    """Return the mean of the changes that agree with the elected sign, of what is left after trimming.

    density: share of each change that is kept, largest first, 0..1. weights: how much each counts in the election and
    in the mean; None: all alike, as in the paper.
    """
    weights = weights or [1.0] * len(deltas)
    merged = {}
    for name, found in _columns(deltas):
        trimmed = torch.stack([w * trim(d, density) for w, d in zip(weights, found, strict=True)])
        elected = trimmed.sum(0).sign()
        agrees = (trimmed.sign() == elected) & (trimmed != 0)
        counted = (agrees * torch.tensor(weights).view(-1, *[1] * elected.dim()).to(trimmed)).sum(0)
        total = (trimmed * agrees).sum(0)
        merged[name] = torch.where(counted > 0, total / counted.clamp(min=1e-12), torch.zeros_like(total))
    return merged


def trim(delta: Tensor, density: float) -> Tensor:
    """Return the change with all but its largest entries set to zero; a tie at the edge is kept whole."""
    kept = math.ceil(density * delta.numel())
    if kept == 0:
        return torch.zeros_like(delta)
    edge = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= edge, delta, torch.zeros_like(delta))


def dare(deltas: Sequence[Delta], weights: Sequence[float], density: float, generator: torch.Generator) -> Delta:
    """Return the weighted sum of changes of which a random share is dropped and the rest made larger to make up.

    density: chance of an entry to stay, 0..1 without 0; what stays is divided by it, so the expected sum is `linear`.
    generator: decides what is dropped; on the CPU.
    """
    thinned = []
    for delta in deltas:
        drawn = {name: torch.rand(delta[name].shape, generator=generator) < density for name in sorted(delta)}
        thinned.append({name: d * drawn[name].to(d.device) / density for name, d in delta.items()})
    return linear(thinned, weights)


def slerp(one: Delta, two: Delta, share: float) -> Delta:
    """Return the point at `share` (0..1) of the way from one change to two along the arc between them.

    Where one of them is zero, or both point the same or the opposite way, there is no arc and the line is taken.
    """
    merged = {}
    for name, (a, b) in _columns([one, two]):
        cosine = (a.flatten() @ b.flatten()) / (a.norm() * b.norm()).clamp(min=1e-30)
        angle = math.acos(max(-1.0, min(1.0, cosine.item())))
        first, second = 1 - share, share
        if a.any() and b.any() and NEARLY_PARALLEL < angle < math.pi - NEARLY_PARALLEL:
            first, second = (math.sin(part * angle) / math.sin(angle) for part in (first, second))
        merged[name] = first * a + second * b
    return merged


def largest(deltas: Sequence[Delta]) -> Delta:
    """Return, entry by entry, the change of the greatest magnitude; of equal ones the first."""
    merged = {}
    for name, found in _columns(deltas):
        stacked = torch.stack(found)
        merged[name] = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    return merged


def _columns(deltas: Sequence[Delta]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each weight's name with its change in every delta; a delta that does not name it has changed nothing."""
    for name in dict.fromkeys(name for delta in deltas for name in delta):
        like = next(delta[name] for delta in deltas if name in delta)
        yield name, [delta[name] if name in delta else torch.zeros_like(like) for delta in deltas]


# --- adapters ---------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """A LoRA adapter as it lies in a folder: its change to a weight is scale · B A."""

    config: dict
    pairs: dict[str, tuple[Tensor, Tensor]]  # {weight of the base: (A (rank, in), B (out, rank))}, float32

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.config["lora_alpha"] / self.config["r"]

    def deltas(self) -> Delta:
        """Return the dense change of each weight."""
        return {name: self.scale * (b @ a) for name, (a, b) in self.pairs.items()}


def config_of(folder: Path) -> dict:
    """Return the settings of an adapter folder.

    Raises:
        BadSettings: its change is not scale · B A for each weight, so that it cannot be merged exactly.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    odd = [knob for knob in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
                             "modules_to_save") if config.get(knob)]  # fmt: skip
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type {config.get('peft_type')}")
    if odd:
        raise BadSettings(
            f"The adapter in {folder} uses {', '.join(odd)}; merging is exact for plain LoRA alone. "
            "Start from a version that CLM trained, or choose method full, which merges the adapter into the base."
        )
    return config


def read_lora(folder: Path) -> Adapter:
    """Return the adapter in a folder.

    Raises:
        BadSettings: see `config_of`, or it holds more than A and B of linear layers.
    """
    config, pairs = config_of(folder), {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in sorted(tensors):
        layer, _, factor = name.removeprefix(PREFIX).rpartition(".lora_")
        if not layer or factor not in ("A.weight", "B.weight"):
            raise BadSettings(
                f"The adapter in {folder} holds {name}; merging knows A and B of linear layers alone. "
                "Start from a version that CLM trained, or choose method full."
            )
        pairs.setdefault(f"{layer}.weight", {})[factor[0]] = tensors[name].float()
    return Adapter(config, {name: (found["A"], found["B"]) for name, found in pairs.items()})


def write_lora(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as PEFT reads it, over what the folder holds of an adapter."""
    named = {f"{PREFIX}{name.removesuffix('weight')}lora_{factor}.weight": tensor.contiguous()
             for name, pair in adapter.pairs.items() for factor, tensor in zip("AB", pair, strict=True)}  # fmt: skip
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(adapter.config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def lora_delta(folder: Path) -> Delta:
    """Return the dense change that an adapter folder makes; raises as `read_lora` does."""
    return read_lora(folder).deltas()


def cat(adapters: Sequence[Adapter]) -> Adapter:
    """Return one adapter whose change is exactly the sum of theirs; their ranks add, alpha / rank is the last one's.

    Exact because the factors stand side by side, [B1 B2] [A1; A2] = B1 A1 + B2 A2, and nothing is crossed.
    """
    config = dict(adapters[-1].config)
    scale, rank = adapters[-1].scale, sum(adapter.config["r"] for adapter in adapters)
    config |= {"r": rank, "lora_alpha": scale * rank}
    pairs = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        like_a, like_b = next(adapter.pairs[name] for adapter in adapters if name in adapter.pairs)
        a_parts, b_parts = [], []
        for adapter in adapters:
            r = adapter.config["r"]
            a, b = adapter.pairs.get(name, (like_a.new_zeros(r, like_a.shape[1]), like_b.new_zeros(like_b.shape[0], r)))
            a_parts.append(a)
            b_parts.append(b * (adapter.scale / scale))
        pairs[name] = torch.cat(a_parts, 0), torch.cat(b_parts, 1)
    config["target_modules"] = sorted({layer for adapter in adapters for layer in adapter.config["target_modules"]})
    return Adapter(config, pairs)


def as_lora(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return (A (rank, in), B (out, rank), residual): B A is the nearest product of that rank to the change.

    residual: norm of what is lost as a share of the norm of the change, 0..1 (Eckart and Young 1936).
    """
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    return _halved(u, s, v, rank)


def as_lower_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return what `as_lora` would for B A, without ever making the dense product: the SVD is of its thin core."""
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _halved(q_b @ u, s, v @ q_a.T, rank)


def _halved(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    total, lost = s.norm().item(), s[rank:].norm().item()
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    if (missing := rank - len(root)) > 0:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
    return a.contiguous(), b.contiguous(), lost / total if total else 0.0


# --- adapters of a loaded model ---------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The trained factors of one layer of a loaded PEFT model; writing into them changes the model."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float


def lora_layers(model: torch.nn.Module) -> dict[str, Layer]:
    """Return {weight of the base: its trained factors}; empty for a model that is tuned in full."""
    return {
        f"{name.removeprefix(PREFIX)}.weight": Layer(
            module.lora_A[DEFAULT].weight, module.lora_B[DEFAULT].weight, module.scaling[DEFAULT]
        )
        for name, module in model.named_modules()
        if DEFAULT in getattr(module, "lora_A", {})
    }


def factors(values: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {weight of the base: (A, B)} out of {name of a trained parameter in a PEFT model: its value}."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        layer, _, factor = name.removeprefix(PREFIX).partition(".lora_")
        found.setdefault(f"{layer}.weight", {})[factor[0]] = value
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}
