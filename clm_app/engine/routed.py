"""A model with one adapter per task: each prompt is answered through the adapter that the router names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from clm_app.routes import BASE, Router


class Routed(torch.nn.Module):
    """One base, loaded once, and every task's adapter over it."""

    def __init__(self, base: torch.nn.Module, weights: Path) -> None:
        """base: the model under the adapters; weights: folder with routes.json and the adapters' folders."""
        from peft import PeftModel

        super().__init__()
        self.router = Router.load(weights)
        self.names = {task: f"task{i}" for i, task in enumerate(self.router.tasks)}  # PEFT takes no dots in a name
        first, *others = self.router.tasks
        self.model = PeftModel.from_pretrained(
            base, weights / self.router.folders[first], adapter_name=self.names[first]
        )
        for task in others:
            self.model.load_adapter(weights / self.router.folders[task], adapter_name=self.names[task])
        self.requires_grad_(False).eval()

    def groups(self, prompts: list[str]) -> dict[str, list[int]]:
        """Return {task: places of the prompts that go to its adapter}; BASE is a task too."""
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            found.setdefault(self.router.route(prompt), []).append(i)
        return found

    @contextlib.contextmanager
    def using(self, task: str) -> Iterator[torch.nn.Module]:
        """Answer through one task's adapter, or through the bare base for BASE."""
        if task == BASE:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(self.names[task])
            yield self.model
