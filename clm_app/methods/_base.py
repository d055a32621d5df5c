"""The contract of a method: which weights are trained, and what is written at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch


class NoSettings(BaseModel):
    """A method without a knob."""

    model_config = ConfigDict(extra="forbid")


class Method:
    """One way to tune. The engine calls `prepare` before the first step and `save` after the last."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""
    weights_kind: ClassVar[str] = "full"  # adapter or full: what `save` writes
    base_bits: ClassVar[int] = 0  # bits that linear layers of the base are rounded to in training; 0: they are not
    Settings: ClassVar[type[BaseModel]] = NoSettings

    def __init__(self, settings: BaseModel) -> None:
        self.settings = settings

    @classmethod
    def refuse(cls) -> None:
        """Raise, without importing anything slow, where what is installed here cannot tune in this way."""

    def loading(self, device: torch.device) -> dict:
        """Return the arguments of `from_pretrained` for the base that is trained on."""
        import torch

        return {"dtype": torch.float32}

    def answering(self, device: torch.device) -> dict:
        """Return the same for the base that a version answers on; it differs where training rounds its weights."""
        return self.loading(device)

    def learning_rate(self, hidden_size: int) -> float:
        """Return the peak learning rate for a model of this width where the person sets none."""
        return 1e-4

    def epochs(self, hidden_size: int) -> float:
        """Return the passes over the new rows for a model of this width where the person sets none."""
        return 3.0

    def prepare(self, base: torch.nn.Module, adapter: Path | None) -> torch.nn.Module:
        """Return the model to train. adapter: folder of the parent's adapter over this base, or None."""
        return base

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the trained weights to `folder`, in full precision."""
        model.save_pretrained(folder)


CONTRACT = Method
