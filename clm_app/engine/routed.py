"""A model with one adapter per task: each prompt is answered through the adapter that the router names.

An adapter is a LoRA adapter over the shared base or, of a small model, every weight as it was tuned for the task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from clm_app.routes import Router, is_whole


class Routed(torch.nn.Module):
    """One base, loaded once, and every task's adapter over it or beside it."""

    def __init__(self, base: torch.nn.Module, weights: Path) -> None:
        """base: the model under the adapters; weights: folder with routes.json and the adapters' folders."""
        super().__init__()
        self.router, self.model = Router.load(weights), base
        self.names = {task: f"task{i}" for i, task in enumerate(self.router.tasks)}  # PEFT takes no dots in a name
        self.whole = torch.nn.ModuleDict()
        read: dict[str, torch.nn.Module] = {}  # tasks that share a folder share what is read from it
        for task, folder in self.router.folders.items():
            if is_whole(weights / folder):
                if folder not in read:
                    read[folder] = type(base).from_pretrained(weights / folder, dtype=base.dtype, local_files_only=True)
                self.whole[self.names[task]] = read[folder]
        self._load_adapters(weights, [task for task in self.router.tasks if self.names[task] not in self.whole])
        self.requires_grad_(False).eval()

    def _load_adapters(self, weights: Path, tasks: list[str]) -> None:
        from peft import PeftModel

        for task in tasks:
            folder, name = weights / self.router.folders[task], self.names[task]
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)

    def groups(self, prompts: list[str]) -> dict[str, list[int]]:
        """Return {task: places of the prompts that go to its adapter}; BASE is a task too."""
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            found.setdefault(self.router.route(prompt), []).append(i)
        return found

    @contextlib.contextmanager
    def using(self, task: str) -> Iterator[torch.nn.Module]:
        """Yield the model that answers for one task; for BASE the bare base."""
        name = self.names.get(task)
        if name in self.whole:
            yield self.whole[name]
        elif name is not None:
            self.model.set_adapter(name)
            yield self.model
        else:
            with getattr(self.model, "disable_adapter", contextlib.nullcontext)():
                yield self.model
