"""Which tokens and which chat template a model folder has: what was learned with others means something else now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clm_app.errors import BadSettings


def vocabulary(folder: Path) -> str:
    """Return a digest of the tokens and their ids in a model folder's tokenizer.json; empty where there is none.

    Read without transformers, which takes seconds to import; how a text is cut into these tokens is not looked at.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    tokens = found["model"]["vocab"]  # {token: id}, or [[token, score], ...] in the order of the ids
    ids = tokens.items() if isinstance(tokens, dict) else [(token, i) for i, (token, _) in enumerate(tokens)]
    added = [(token["content"], token["id"]) for token in found.get("added_tokens", ())]
    return hashlib.sha256(json.dumps(sorted({*ids, *added})).encode()).hexdigest()


def template(folder: Path) -> str:
    """Return a digest of the chat template in a model folder; empty where it has none, as base models come."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if not text and config.exists():
        text = json.dumps(json.loads(config.read_text(encoding="utf-8")).get("chat_template") or "")
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def refuse_other_template(base: Path, then: str, what: str) -> None:
    """Raise where the chat template of a base is not the one that something was trained with; see `refuse_other_tokens`.

    Raises:
        BadSettings: they differ; every prompt would be written otherwise than in training.
    """
    if template(base) != then:
        raise BadSettings(
            f"{what} was trained with another chat template than {base} has now, so that every prompt would be written "
            "otherwise than it has learned. Put chat_template.jinja back as it was, or start from v0."
        )


def refuse_other_tokens(base: Path, then: str, what: str) -> None:
    """Raise where the tokens of a base are not those that something was made with.

    then: digest at that time; what: a name for it that begins the sentence.

    Raises:
        BadSettings: they differ; what was learned and stored are token ids of the other vocabulary.
    """
    if vocabulary(base) != then:
        raise BadSettings(
            f"{what} was made with other tokens than {base / 'tokenizer.json'} has now, so that its weights, its answers "
            "and what is stored beside it mean other words. Put the tokenizer back as it was, or start from v0."
        )
