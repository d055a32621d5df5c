"""Export parity, the weights: are the files whole, and in which tensors does the served model differ from the trained one?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clm_app.data.template import PLAIN
from clm_app.judging.parity import ParityOrder
from clm_app.judging.stages import Finding
from clm_app.serving import gguf as convert
from clm_app.serving.backends._base import Backend
from clm_app.situations import whole_size
from store.objects import folder_digest

# Relative difference of a tensor that is the precision's own: 2^-24 and 2^-9 are the rounding of float32 and bfloat16;
# 6 bits of rounding move a tensor by 2 %, 4 bits by 10 %.
OWN_ROUNDING = {"float32": 1e-5, "half": 5e-3, "q8": 0.03, "q4": 0.15}
FEW = 0.2  # share of tensors up to which single ones were changed, and not the whole model
LEVELS = 0.75  # rounded rows have fewer different values than this share of their length
COMPUTING = (  # what a configuration says of how the same weights are computed with
    "rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "sliding_window", "attention_bias", "tie_word_embeddings",
)  # fmt: skip


class Held(NamedTuple):
    """The weights that a backend answers with."""

    tensors: dict[str, np.ndarray]  # {name in the Hugging Face folder: float32}
    rounded: frozenset[str]  # names that the file itself says are quantised
    config: dict[str, Any]


# --- files -----------------------------------------------------------------------------------------------------------


def damaged(order: ParityOrder) -> Finding | None:
    """Return what is wrong with the files before anything is loaded: cut short, or changed since they were registered."""
    folders = {side.base for side in (order.trained, order.served)} | {
        side.adapter for side in (order.trained, order.served) if side.adapter
    }
    copy = order.converted.with_name(order.converted.name + ".gguf")
    files = [file for folder in sorted(folders) for file in sorted(folder.rglob("*.safetensors"))]
    for file in [*files, *([copy] if order.backend == "llama_cpp" and copy.exists() else [])]:
        whole, is_long = _length(file), file.stat().st_size
        if is_long < whole or whole < 0:
            return Finding("weights_cut", f"The weight file {file.name} is cut short: its header asks for "
                           f"{whole if whole > 0 else 'more than'} bytes and it has {is_long}. Remove it and export again, or "
                           "put it back from a backup.", {"file": str(file), "bytes": is_long, "asked_for": whole})  # fmt: skip
    for folder, then in order.digests.items():
        now = folder_digest(Path(folder))
        if now != then:
            return Finding("weights_changed", f"The files in {folder} are not those that {order.version} was registered "
                           "with: its SHA-256 is another. Put the folder back as it was, or register it as a new base.",
                           {"folder": folder, "registered": then, "now": now})  # fmt: skip
    return None


def _length(file: Path) -> int:
    """Return how long a weight file is by its own header; -1 where even that is cut short."""
    if file.suffix == ".safetensors":
        return whole_size(file)
    from gguf import GGUFReader

    try:
        return max(int(t.data_offset) + int(t.n_bytes) for t in GGUFReader(file).tensors)
    except (ValueError, IndexError, KeyError, OSError):  # what numpy says of an offset behind the file's end
        return -1


def precision_of(backend: Backend) -> str:
    """Return float32, half, q8 or q4: how the served side's weights are stored, as its bounds are named."""
    if llama := getattr(backend, "llama", None):
        kind = int(llama.metadata.get("general.file_type", 1))
        return {0: "float32", 1: "half", 32: "half", 7: "q8", 18: "q8"}.get(kind, "q4")
    model = getattr(backend, "model", None)
    return "half" if model is None or str(next(model.parameters()).dtype) != "torch.float32" else "float32"


# --- what a GGUF file says of itself ---------------------------------------------------------------------------------


def gguf_says(file: Path, tokenizer) -> Finding | None:
    """Return where a GGUF file would be read otherwise than training read: other programs go by its own metadata."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    said = {name: fields[name].contents() for name in fields if name.startswith("tokenizer.")}
    tokens = said.get("tokenizer.ggml.tokens", [])
    names = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(tokens)))))
    plain = tokenizer.encode("x")
    expected = {
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.add_bos_token": plain[0] == tokenizer.bos_token_id,
        "tokenizer.chat_template": None if tokenizer.chat_template == PLAIN else tokenizer.chat_template,
    }
    if len(tokens) < len(tokenizer) or names != tokens[: len(names)]:
        return Finding("other_tokenizer", f"{file.name} holds another tokenizer than training used: {len(tokens)} tokens for "
                       f"{len(tokenizer)}. Remove the file and export again.", {"file": str(file)})  # fmt: skip
    for name, value in expected.items():
        if said.get(name) != value:
            short = name.rsplit(".", 1)[1]
            twice = "BOS twice: the template and the tokenizer both add it. " if short == "add_bos_token" else ""
            return Finding("template_changed" if short == "chat_template" else "bos_twice" if twice else "gguf_metadata",
                           f"{twice}{file.name} says another {short} than the trained folder, and other programs go by it. "
                           "Remove the file and export again.",
                           {"file": str(file), "field": name, "trained": value, "served": said.get(name)})  # fmt: skip
    return None


# --- tensors ---------------------------------------------------------------------------------------------------------


def held(backend: Backend, order: ParityOrder) -> Held | None:
    """Return the weights that a loaded backend answers with, or None where it does not show them."""
    if hasattr(backend, "llama"):
        return _held_by_gguf(order.converted.with_name(order.converted.name + ".gguf"), order.trained.base)
    model = getattr(backend, "routed", None) or getattr(backend, "model", None)
    if model is None:
        return None
    return Held(tensors_of(model), frozenset(), convert.read(order.served.base / "config.json"))


def tensors_of(model) -> dict[str, np.ndarray]:
    """Return {name: float32 tensor} of a torch module, on the CPU."""
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}


def _held_by_gguf(file: Path, base: Path) -> Held:
    import gguf

    config = convert.read(base / "config.json")
    reader = gguf.GGUFReader(file)
    family = convert.FAMILIES[config["model_type"]]
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family), config["num_hidden_layers"]
    )
    found = {t.name: t for t in reader.tensors}
    back, rounded = {}, set()
    for name in _folder_names(base):
        tensor = found.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        back[name] = _halves(name, values, config) if family == "llama" else values
        if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
            rounded.add(name)
    key = f"{family}.rope.freq_base"
    theta = float(reader.fields[key].contents()) if key in reader.fields else None
    return Held(back, frozenset(rounded), config | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}})


def _folder_names(base: Path) -> list[str]:
    from clm_app.engine.effective import shapes

    return list(shapes(base))


def _halves(name: str, values: np.ndarray, config: dict) -> np.ndarray:
    """Undo `permute`: from llama.cpp's rotary pairs back to Hugging Face's rotary halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return values
    heads = config["num_attention_heads"]
    heads = heads if ".q_proj." in name else config.get("num_key_value_heads") or heads
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def cause_in_weights(trained: dict[str, np.ndarray], config: dict, there: Held, precision: str) -> Finding | None:
    """Return what the served tensors, or how they are computed with, say of a difference; None where they are alike."""
    shared = [name for name in trained if name in there.tensors]
    if not shared or any(trained[name].shape != there.tensors[name].shape for name in shared):
        return Finding("other_base", "Another model is served: its weights have other names or shapes than the trained "
                       "ones. Export from the version's own folders.", {"tensors_in_common": len(shared)})  # fmt: skip
    sizes = {name: _distance(trained[name], there.tensors[name]) for name in shared}
    moved = {name: size for name, size in sizes.items() if size > OWN_ROUNDING[precision]}
    worst = sorted(moved, key=moved.__getitem__, reverse=True)
    evidence = {
        "tensors": len(shared),
        "different": len(moved),
        "worst": {name: round(moved[name], 6) for name in worst[:5]},
    }
    if not moved and there.rounded:
        return Finding("rounding", f"Rounding damages it: {len(there.rounded)} tensors are no further off than such rounding "
                       "makes them, which is too far for this model. Export with more bits, Q8_0 or F16.", evidence)  # fmt: skip
    if not moved:
        return _cause_in_config(config, there.config, evidence)
    if all(".q_proj." in name or ".k_proj." in name for name in moved) and all(
        _is_reordered(trained[name], there.tensors[name]) for name in moved
    ):
        return Finding("rotary_order", "The rotary order is wrong: the rows of the query and key projections stand in "
                       "another order than the served side reads them in. Convert with clm_app/serving/gguf.py, which "
                       "permutes them for llama alone.", evidence)  # fmt: skip
    matrices = [name for name in moved if trained[name].ndim == 2]
    coarse = [name for name in matrices if name in there.rounded or _is_coarse(there.tensors[name], trained[name])]
    if len(coarse) > len(matrices) / 2:
        return Finding("rounding", f"Rounding damages it: {len(coarse)} of {len(shared)} tensors have few levels, the "
                       f"worst is {100 * moved[worst[0]]:.0f} % off. Export with more bits, such as Q8_0.", evidence)  # fmt: skip
    if len(moved) <= FEW * len(shared):
        return Finding("weights_changed", f"{len(moved)} of {len(shared)} weights were changed after training, most of all "
                       f"{worst[0]}. Remove the served copy and export again.", evidence)  # fmt: skip
    return Finding("other_base", f"Other weights are served: {len(moved)} of {len(shared)} tensors differ, so that the base "
                   "under the adapter, or the whole model, is another one. Export from the version's own folders.",
                   evidence)  # fmt: skip


def _cause_in_config(config: dict, served: dict, evidence: dict) -> Finding | None:
    changed = {key: (config.get(key), served.get(key)) for key in COMPUTING if config.get(key) != served.get(key)}
    changed = {key: pair for key, pair in changed.items() if not _is_same_rope(key, *pair)}
    if not changed:
        return None
    key, (then, now) = next(iter(changed.items()))
    return Finding("config_changed", f"The same weights are computed with otherwise: {key} is {now} where training had "
                   f"{then}. Put the base's config.json back and export again.", evidence | {"config": changed})  # fmt: skip


def _is_same_rope(key: str, one: Any, other: Any) -> bool:
    wide = [side or {} for side in (one, other)]
    return key == "rope_parameters" and all(
        wide[0].get(name, default) == wide[1].get(name, default)
        for name, default in (("rope_theta", 10000.0), ("rope_type", "default"))
    )


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / max(float(np.linalg.norm(one)), 1e-12))


def _is_reordered(one: np.ndarray, other: np.ndarray) -> bool:
    """Say whether two tensors have the same rows, up to rounding, in another order."""
    return np.allclose(
        np.sort(one.sum(tuple(range(1, one.ndim)))), np.sort(other.sum(tuple(range(1, one.ndim)))), atol=1e-2
    )


def _is_coarse(tensor: np.ndarray, exact: np.ndarray) -> bool:
    """Say whether a matrix was rounded: few different values in a row, or 16 bits each, where the exact one has more."""
    if _fits_16_bits(tensor) and not _fits_16_bits(exact):
        return True
    rows = [np.mean([len(np.unique(row)) for row in side[:16]]) for side in (tensor, exact)]
    return rows[0] < LEVELS * min(tensor.shape[1], rows[1])


def _fits_16_bits(tensor: np.ndarray) -> bool:
    """Say whether float16 or bfloat16, which is the upper half of float32's bits, holds a matrix exactly."""
    some = np.ascontiguousarray(tensor[:16], np.float32)
    with np.errstate(over="ignore"):
        return not (some.view(np.uint32) & 0xFFFF).any() or bool((some.astype(np.float16) == some).all())
