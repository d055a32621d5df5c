"""Write a model folder as one GGUF file, the format that llama.cpp reads.

The names and the metadata follow llama.cpp's own convert_hf_to_gguf.py (commit 0c1e57098), which is on no package index
and refuses every self-trained tokenizer. Known here: llama, mistral, qwen2 and qwen3 with byte-level BPE and plain
rotary positions. What is not known is refused, because a wrong guess still answers, only worse.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clm_app.errors import BadModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type: GGUF architecture
FORMAT = 1  # grows when the same weights would be written otherwise, so that no older copy is read
SMALL = 50_000_000  # parameters; below it a file in float32 costs little and answers exactly as transformers does
OTHERWISE = "Serve this model with CLM_BACKEND=transformers."
KEPT = 8  # converted files kept in the cache folder; the longest unused go first
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_CONTRACTIONS + r"\p{N}" + _REST: "qwen2", _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe"}


def supports(base: Path) -> str | None:
    """Return None where this folder can be converted, else the reason."""
    try:
        _architecture(read(base / "config.json"))
        _splitting(read(base / "tokenizer.json"))
    except BadModel as err:
        return str(err)
    return None


def is_small(base: Path) -> bool:
    """Say whether this model is served in float32 throughout."""
    from clm_app.registry.versions import count_parameters

    return count_parameters(base) < SMALL


def cached(base: Path, adapter: Path | None, converted: Path) -> Path:
    """Return `converted` with the ending .gguf, made from the merged weights if it is not there yet."""
    file = converted.with_name(converted.name + ".gguf")
    if not file.exists():
        from clm_app.serving.merge import merged

        file.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.numpy() for name, tensor in merged(base, adapter).state_dict().items()}
        write(base, weights, file, is_f32=is_small(base))
    os.utime(file)
    _forget_unused(file.parent)
    return file


def write(base: Path, weights: dict[str, np.ndarray], file: Path, *, is_f32: bool) -> None:
    """Write merged float32 weights with the configuration and tokenizer of `base`; the file appears whole or not.

    A file that llama.cpp has mapped must never be written over (the reader dies of SIGBUS), hence the rename.

    Raises:
        BadModel: something in the folder is not known here; the message names it.
    """
    import gguf

    config, tokenizer = read(base / "config.json"), read(base / "tokenizer.json")
    family = _architecture(config)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, family)
    try:
        _add_shape(writer, config, is_f32)
        _add_tokenizer(writer, config, tokenizer, base)
        _add_tensors(writer, config, weights, family, is_f32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from Hugging Face's rotary halves to llama.cpp's rotary pairs.

    weights: (heads * head_dim, hidden) or a bias (heads * head_dim,); the same shape is returned.
    """
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def read(file: Path) -> dict[str, Any]:
    """Return a JSON file's object, or an empty one where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# --- shape -----------------------------------------------------------------------------------------------------------


def _architecture(config: dict) -> str:
    kind, rope = config.get("model_type"), _rope(config)
    window = config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None
    unknown = {
        f"model type {kind!r}": kind not in FAMILIES,
        f"rotary scaling {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        f"activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        f"a sliding window of {window}": window is not None,
        "biases in the feed-forward layers": bool(config.get("mlp_bias")),
        "quantised weights": "quantization_config" in config,
    }
    for what, is_so in unknown.items():
        if is_so:
            raise BadModel(f"The converter to GGUF does not know {what}. {OTHERWISE}")
    return FAMILIES[kind]


def _rope(config: dict) -> dict:
    """Return the rotary settings, from transformers 5's rope_parameters or the older two fields."""
    older = config.get("rope_scaling") or {}
    found = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_type": older.get("rope_type", older.get("type", "default")),
    }
    return found


def _head_size(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _key_value_heads(config: dict) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _add_shape(writer: GGUFWriter, config: dict, is_f32: bool) -> None:
    import gguf

    size = _head_size(config)
    writer.add_name(config.get("_name_or_path") or config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(_key_value_heads(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if is_f32 else gguf.LlamaFileType.MOSTLY_F16)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _add_tensors(writer: GGUFWriter, config: dict, weights: dict[str, np.ndarray], family: str, is_f32: bool) -> None:
    import gguf

    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q": config["num_attention_heads"], "k": _key_value_heads(config)}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # llama.cpp reads the embedding again
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise BadModel(f"The converter to GGUF does not know the weight {name}. {OTHERWISE}")
        rotary = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
        if rotary and family == "llama":  # qwen keeps Hugging Face's order
            tensor = permute(tensor, heads[rotary[1]])
        writer.add_tensor(known, _stored(name, tensor, is_f32))


def _stored(name: str, tensor: np.ndarray, is_f32: bool) -> np.ndarray:
    """Return the tensor as it is stored: norms and biases always in float32, as llama.cpp expects."""
    if is_f32 or tensor.ndim == 1:
        return np.ascontiguousarray(tensor, dtype=np.float32)
    with np.errstate(over="ignore"):
        small = tensor.astype(np.float16)
    if not np.isfinite(small).all():
        raise BadModel(f"{name} holds values beyond 65504, the largest float16. {OTHERWISE}")
    return small


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _splitting(tokenizer: dict) -> str:
    """Return llama.cpp's name for how text is split before the merges."""
    model, normal = tokenizer.get("model", {}), tokenizer.get("normalizer") or {"type": "NFC"}
    parts = tokenizer.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    kinds = [part.get("type") for part in parts]
    found = None
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        found = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        found = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        found = SPLITS.get(parts[0].get("pattern", {}).get("Regex"))
    is_plain = model.get("type") == "BPE" and not model.get("byte_fallback") and normal["type"] == "NFC"
    if found is None or not is_plain or parts[-1].get("add_prefix_space"):
        raise BadModel(
            f"The converter to GGUF does not know this tokenizer ({model.get('type')} after "
            f"{'+'.join(map(str, kinds))}). {OTHERWISE}"
        )
    return found


def _add_tokenizer(writer: GGUFWriter, config: dict, tokenizer: dict, base: Path) -> None:
    from tokenizers import Tokenizer

    settings = read(base / "tokenizer_config.json")
    tokens, kinds = _vocabulary(tokenizer, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    ids = {token: number for number, token in enumerate(tokens)}
    special = {n: ids.get(_text(settings.get(f"{n}_token"))) for n in ("bos", "eos", "pad", "unk")}
    for name, number in special.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    around = Tokenizer.from_file(str(base / "tokenizer.json")).encode("x").ids
    writer.add_add_bos_token(special["bos"] is not None and around[0] == special["bos"])
    writer.add_add_eos_token(special["eos"] is not None and around[-1] == special["eos"])
    file = base / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    if template:
        writer.add_chat_template(template)


def _vocabulary(tokenizer: dict, size: int) -> tuple[list[str], list[int]]:
    """Return every token's text and kind by id; ids that the model has and the tokenizer has not are [PAD…]."""
    from gguf import TokenType

    found = {number: (text, TokenType.NORMAL) for text, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found) >= size:
        raise BadModel(
            f"The tokenizer counts to {max(found)}, the model to {size - 1}. Use the tokenizer it was made with."
        )
    rows = [found.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    return [text for text, _ in rows], [int(kind) for _, kind in rows]


def _text(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _forget_unused(folder: Path) -> None:
    files = sorted(folder.glob("*.gguf"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files[KEPT:]:
        try:
            file.unlink()
        except OSError:
            pass  # Windows keeps a file that a host has mapped; the next start tries again
