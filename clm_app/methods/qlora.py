"""QLoRA: LoRA over a base whose linear layers are held in 4 bits, for models that would not fit in memory otherwise.

Source: Dettmers et al. 2023, arXiv:2305.14314; layers from bitsandbytes, computed in bfloat16. Nothing is ever merged
into 4 bits: what is saved is a plain adapter, which is served and measured over the base in full precision (LOG.md,
"QLoRA", says how far the two differ).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from clm_app.errors import BadSettings
from clm_app.methods.lora import Lora, LoraSettings

if TYPE_CHECKING:
    import torch


class QloraSettings(LoraSettings):
    """The adapter's size and strength, and how the base under it is rounded."""

    quantisation: Literal["nf4", "fp4"] = Field(
        "nf4", description="the 16 values a weight is rounded to: nf4, spaced as normally distributed weights are, or "
        "fp4, spaced as floating point numbers are",
    )  # fmt: skip
    double_quantisation: bool = Field(
        True, description="whether the scale of each block of 64 weights is rounded too, to 8 bits: about 0.13 instead "
        "of 0.5 bits per weight",
    )  # fmt: skip


class Qlora(Lora):
    """An adapter on every linear layer but the output, each over its weights in 4 bits."""

    title = "QLoRA (adapter over a 4-bit base)"
    base_bits = 4
    Settings = QloraSettings

    @classmethod
    def refuse(cls) -> None:
        """Raise where bitsandbytes is not installed.

        Raises:
            BadSettings: with what to do.
        """
        if find_spec("bitsandbytes") is None:
            raise BadSettings(
                "Method qlora needs the package bitsandbytes, which is not installed here. Install it, or choose method "
                "lora."
            )

    def loading(self, device: torch.device) -> dict:
        """Return the arguments that round the base while it is read.

        Raises:
            BadSettings: bitsandbytes is missing, or cannot compute in 4 bits on this device.
        """
        import torch

        self.refuse()
        try:
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit
            from transformers import BitsAndBytesConfig

            rounded = quantize_4bit(torch.ones(64, 64, device=device), quant_type=self.settings.quantisation)
            dequantize_4bit(*rounded)
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as err:
            raise BadSettings(
                f"bitsandbytes cannot hold weights in 4 bits on {device}: {err}. Choose method lora."
            ) from err
        return super().loading(device) | {
            "device_map": {"": device},
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_quant_type=self.settings.quantisation,
                bnb_4bit_use_double_quant=self.settings.double_quantisation,
            ),
        }  # fmt: skip

    def answering(self, device: torch.device) -> dict:
        """Return the arguments of lora: a version answers over the base in full precision."""
        return super().loading(device)

    def prepare(self, base: torch.nn.Module, adapter: Path | None) -> torch.nn.Module:
        """Return the 4-bit base under a fresh adapter, or under the parent's, which is trained on."""
        from bitsandbytes.nn import Linear4bit

        for module in base.modules():
            if isinstance(module, Linear4bit):
                # On the CPU the first look without gradients would repack the weights for a kernel that has no backward
                # pass: gradients are then wrong by 96 % and nothing says so (bitsandbytes 0.50.2).
                module.support_avx512bf16_for_cpu = False
        return super().prepare(base, adapter)
