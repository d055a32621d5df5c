"""The weights a model computes with, whichever way it is tuned: what holds weights in place has to look at these.

Under LoRA the same change of a layer has endless pairs of factors, so a distance or an importance of one factor says
little of what the layer does. Each adapted layer is seen as its dense change, strength * B @ A, instead.

Source: EWC-LoRA, arXiv:2602.17559, for the dense change; Kirkpatrick et al. 2017, arXiv:1612.00796, for the Fisher
information, one example at a time: squaring the gradient of a batch mean gives almost none near an optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from clm_app.errors import BadSettings

ADAPTER = "default"  # PEFT's name of the one adapter that is trained
WRAPPER = "base_model.model."  # what PEFT puts before the name of each module


def adapted(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return {name of the weight in the base: its LoRA layer}; empty where no adapter is trained.

    Raises:
        BadSettings: the adapter is of a kind (DoRA and others) whose layers compute more than W + strength * B @ A.
    """
    found = {}
    for name, module in model.named_modules():
        if ADAPTER in getattr(module, "lora_A", {}):
            if ADAPTER in module.lora_variant:
                raise BadSettings(
                    f"The adapter is a {type(module.lora_variant[ADAPTER]).__name__}, whose change of a weight is not "
                    "one product of two factors. Choose plain LoRA or method full, or strategy replay."
                )
            found[name.removeprefix(WRAPPER) + ".weight"] = module
    return found


def effective(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return {name of the weight in the base: what is tuned of it}, differentiable.

    A fully tuned model gives its trained parameters; one under LoRA the dense change of each adapted layer, in the
    layer's own shape and float32, whatever precision a step is computed in.
    """
    layers = adapted(model)
    if not layers:
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return {name: layer.get_delta_weight(ADAPTER).float() for name, layer in layers.items()}


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: the frozen weight under an adapted layer}; empty for a fully tuned model."""
    return {name: layer.get_base_layer().weight for name, layer in adapted(model).items()}


@torch.no_grad()
def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: the weight with its change}, float32 copies on the CPU: the same for an adapter and its merge."""
    under = frozen(model)
    changes = effective(model).items()
    return {name: (w.float() + under[name] if name in under else w.float()).cpu().clone() for name, w in changes}


def squared_distance(
    now: dict[str, torch.Tensor], then: dict[str, torch.Tensor], importance: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the sum over the weights of `then` of importance * (now - then)^2; importance is 1 where none is given."""
    total = torch.zeros((), device=next(iter(then.values())).device) if then else torch.zeros(())
    for name, old in then.items():
        square = (now[name].float() - old).square()
        total = total + (square if importance is None else importance[name] * square).sum()
    return total


def fisher(model: torch.nn.Module, losses: Iterable[Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the diagonal of the Fisher information of each effective weight: the mean over examples of g^2.

    losses: for each example a function that computes its negative log-likelihood, a scalar. Under LoRA the gradient of
    the dense change is that of the frozen weight under it, which learns for as long as this takes.
    """
    weights = frozen(model) or effective(model)
    learned = {name: weight.requires_grad for name, weight in weights.items()}
    total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for count, loss in enumerate(losses, start=1):  # noqa: B007
            found = torch.autograd.grad(loss(), list(weights.values()), materialize_grads=True)
            for square, gradient in zip(total.values(), found, strict=True):
                square += gradient.float().square()
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(learned[name])
    return {name: square / max(count, 1) for name, square in total.items()}


def shapes(base: Path, adapter: Path | None = None) -> dict[str, torch.Size]:
    """Return {name: shape} of the weights of a model folder, or of an adapter's factors, without loading either."""
    if adapter is not None:
        from safetensors import safe_open

        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def refuse_other_shapes(found: dict[str, torch.Size], here: dict[str, torch.Size]) -> None:
    """Raise where what an earlier run remembered is of weights that are not here, or have another shape here.

    Raises:
        BadSettings: with the first weight that differs.
    """
    for name, shape in found.items():
        if here.get(name) != shape:
            is_now = f"is {' x '.join(map(str, here[name]))} here" if name in here else "is not here"
            raise BadSettings(
                f"What was remembered of earlier tasks has a weight {name} of {' x '.join(map(str, shape))}, which "
                f"{is_now}: the tokenizer, the base or the way to tune changed since. Start from a version of the same "
                "kind, or choose strategy replay."
            )
