"""O-LoRA: each task gets adapter ranks of its own, which are pushed out of the way of all earlier ones.

Source: Wang et al. 2023 (arXiv:2310.14152), equations 6 to 8: the sum of squared entries of A_new A_previous^T, over all
layers (their code sums absolute values). Earlier ranks are frozen and answer along; a version's adapter is all of them
side by side, which is exact. PEFT's "olora" is another method (QR initialisation, arXiv:2406.01775).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.strategies._base import Strategy

if TYPE_CHECKING:
    import torch

    from clm_app.engine.loop import Engine
    from clm_app.engine.order import Order

EARLIER = "earlier"  # the frozen adapter of the version before, beside the one that is trained


class OloraSettings(BaseModel):
    """How firmly new ranks are kept out of the space of earlier ones."""

    model_config = ConfigDict(extra="forbid")

    strength: float = Field(
        0.5, ge=0, le=1e6, description="weight of the overlap with earlier ranks beside the loss in nats"
    )


class Olora(Strategy):
    """Fresh ranks for each task beside frozen earlier ones, orthogonal to them."""

    title = "O-LoRA (orthogonal ranks)"
    purpose = "Protects without old rows while tasks are few; each task learns a little less than it would alone"
    needs = "no old rows; the adapter grows by its rank with each task, and each step takes a little longer"
    methods = ("lora", "qlora")
    Settings = OloraSettings

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer (A trained, A before)

    def refuse(self, order: Order) -> None:
        """Refuse a parent that is a set of adapters, or an adapter that cannot stand beside another one."""
        super().refuse(order)
        if order.adapter is None:
            return
        from clm_app.engine.merging import config_of

        config_of(order.adapter)

    def begin_from(self, order: Order) -> Path | None:
        """Return None: ranks are fresh for each task, over the base and the parent's adapter."""
        return None

    def prepare(self, engine: Engine, model: torch.nn.Module) -> None:
        """Let the parent's adapter answer along, frozen.

        It stays an adapter and is not added into the base: in bfloat16 most of it would be rounded away.
        """
        if engine.order.adapter is None:
            return
        from peft import LoraConfig, set_peft_model_state_dict
        from safetensors.torch import load_file

        from clm_app.engine.merging import DEFAULT

        config = LoraConfig.from_pretrained(engine.order.adapter)
        config.lora_dropout, config.inference_mode = 0.0, True
        model.add_adapter(EARLIER, config)
        weights = load_file(engine.order.adapter / "adapter_model.safetensors")
        set_peft_model_state_dict(model, weights, adapter_name=EARLIER)
        model.base_model.set_adapter([DEFAULT, EARLIER])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{DEFAULT}." in name)
        model.to(engine.device)
        self._pairs = [
            (module.lora_A[DEFAULT].weight, module.lora_A[EARLIER].weight)
            for module in model.modules() if EARLIER in getattr(module, "lora_A", {}) and DEFAULT in module.lora_A
        ]  # fmt: skip

    def loss(self, model, batch: dict, logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Add the overlap with earlier ranks, times its weight."""
        return loss + self.settings.strength * self._overlap() if self._pairs else loss

    def _overlap(self) -> torch.Tensor:
        """Return the sum of squares of A_new A_before^T over all layers, in float32."""
        import torch

        with torch.autocast(self._pairs[0][0].device.type, enabled=False):
            return sum((new @ before.T).square().sum() for new, before in self._pairs)

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Say how much overlap is left."""
        if self._pairs:
            self.figures["overlap"] = self._overlap().item()

    def assemble(self, engine: Engine, weights: Path) -> None:
        """Put the parent's ranks and the new ones into one adapter."""
        from clm_app.engine.merging import cat, read_lora, write_lora

        new = read_lora(weights)
        self.figures["rank"] = new.config["r"]
        if engine.order.adapter is not None:
            shutil.rmtree(weights / EARLIER)
            whole = cat([read_lora(engine.order.adapter), new])
            write_lora(whole, weights)
            self.figures["rank"] = whole.config["r"]
