"""LoRA: train a low-rank adapter over frozen weights; the next run goes on from the parent's adapter.

Source: Hu et al. 2021, arXiv:2106.09685. One persistent adapter per line of versions keeps a version small and its
base untouched, so that a version is always base + one adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.errors import BadSettings
from clm_app.methods._base import Method

if TYPE_CHECKING:
    import torch


class LoraSettings(BaseModel):
    """Size and strength of the adapter."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(32, ge=1, le=1024, description="rank of the adapter's matrices")
    alpha: float = Field(64.0, gt=0, le=4096, description="strength: the adapter is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0.0, lt=1.0, description="share of adapter inputs dropped while training")


class Lora(Method):
    """An adapter on every linear layer but the output."""

    title = "LoRA (small adapter)"
    weights_kind = "adapter"
    Settings = LoraSettings

    def loading(self, device: torch.device) -> dict:
        """Return half precision on a GPU: the base is frozen, so that nothing small is ever added to it."""
        import torch

        return {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}

    def learning_rate(self, hidden_size: int) -> float:
        """Return 3e-4 at width 4096 and more for narrower models (LOG.md, "Training defaults": 4.8e-3 at 256)."""
        return 3e-4 * 4096 / hidden_size

    def epochs(self, hidden_size: int) -> float:
        """Return six passes below width 1024 and three above (LOG.md, "Training defaults")."""
        return 6.0 if hidden_size < 1024 else 3.0

    def prepare(self, base: torch.nn.Module, adapter: Path | None) -> torch.nn.Module:
        """Return the base under a fresh adapter, or under the parent's, which is trained on.

        Raises:
            BadSettings: the parent's adapter has another rank or alpha.
        """
        from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

        from clm_app.engine.dense_lora import make_dense

        if adapter is not None:
            config = PeftConfig.from_pretrained(adapter)
            for knob, found in (("rank", config.r), ("alpha", config.lora_alpha)):
                if found != getattr(self.settings, knob):
                    raise BadSettings(
                        f"{knob} is {getattr(self.settings, knob):g}, but the parent's adapter has {knob} {found:g} and is "
                        f"trained on. Choose {knob} {found:g}, or method full, which merges the adapter first."
                    )
            config.lora_dropout, config.inference_mode = (
                self.settings.dropout,
                False,
            )  # dropout may change from run to run
            model = PeftModel.from_pretrained(base, adapter, config=config, is_trainable=True)
        else:
            model = get_peft_model(
                base,
                LoraConfig(
                    r=self.settings.rank, lora_alpha=self.settings.alpha, lora_dropout=self.settings.dropout,
                    target_modules="all-linear", task_type="CAUSAL_LM",
                ),
            )  # fmt: skip
        make_dense(model)
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the adapter alone; equal weights give equal files, so PEFT's set of layer names is put in order."""
        config = model.peft_config["default"]
        config.target_modules = sorted(config.target_modules)
        model.save_pretrained(folder)
