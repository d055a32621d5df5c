"""LoRA on narrow layers, computed as one matrix: W + scaling * B A first, then a single product with the input.

PEFT multiplies the input with W, A and B apart, which saves work where a layer is wide. Where it is narrow, the time goes
into the number of operations: see LOG.md, "Engine". The same function of the same weights, in fewer steps.
"""

from __future__ import annotations

from types import MethodType

import torch
from peft.tuners.lora import Linear

NARROW = 512  # columns of a layer up to which the dense product is taken; measured at 256


def make_dense(model: torch.nn.Module) -> None:
    """Change the forward pass of every narrow LoRA layer of a PEFT model in place."""
    for module in model.modules():
        if (
            isinstance(module, Linear)
            and module.in_features <= NARROW
            and isinstance(module.get_base_layer(), torch.nn.Linear)
        ):
            module.apart, module.forward = module.forward, MethodType(_forward, module)


def _forward(self: Linear, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Return the layer's output (…, out). Dropout takes the same inputs from the adapter for a whole batch."""
    active = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or kwargs or args or len(active) != 1 or active[0] in self.lora_variant:
        return self.apart(x, *args, **kwargs)
    name, base = active[0], self.get_base_layer()
    first, second = self.lora_A[name].weight, self.lora_B[name].weight
    share = getattr(self.lora_dropout[name], "p", 0.0)
    if self.training and share:
        first = first * ((torch.rand(first.shape[1], device=first.device) >= share) / (1 - share))
    return torch.nn.functional.linear(x, base.weight + self.scaling[name] * (second @ first), base.bias)
