"""Full tuning: every weight is trained, and a version is a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clm_app.methods._base import Method

if TYPE_CHECKING:
    import torch


class Full(Method):
    """Every weight. A parent's adapter is merged into the base first, in full precision."""

    title = "Full (every weight)"

    def learning_rate(self, hidden_size: int) -> float:
        """Return 1.6e-5 at width 4096 and more for narrower models (LOG.md, "Training defaults": 1e-3 at 256)."""
        return 1.6e-5 * (4096 / hidden_size) ** 1.5

    def prepare(self, base: torch.nn.Module, adapter: Path | None) -> torch.nn.Module:
        """Return the base with the parent's adapter merged in, or the weights that were tuned for a task before."""
        if adapter is None:
            return base
        from peft import PeftModel

        from clm_app.routes import is_whole

        if is_whole(adapter):
            return type(base).from_pretrained(adapter, dtype=base.dtype, local_files_only=True)

        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        return merged.requires_grad_(True)  # PEFT froze the base under its adapter
