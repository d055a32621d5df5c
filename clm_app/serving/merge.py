"""Load a version's weights in full precision, with its adapter merged in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clm_app.errors import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merged(base: Path, adapter: Path | None) -> PreTrainedModel:
    """Return the model in float32 on the CPU, ready to answer; the adapter, if there is one, is part of its weights.

    Merging in full precision loses nothing; merging into rounded weights would.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as err:
        where = f"{base} with adapter {adapter}" if adapter else str(base)
        raise BadModel(f"The weights in {where} cannot be loaded: {err}. Restore them from a backup.") from err
    return model.eval()
