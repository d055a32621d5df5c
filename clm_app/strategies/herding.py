"""Herding: keep the rows whose mean comes nearest to the mean of their label, as the trained model sees them.

Source: Welling 2009, "Herding dynamical weights to learn"; as in iCaRL, Rebuffi et al. 2017 (arXiv:1611.07725),
algorithm 4: each pick brings the mean of the picked features nearest to the mean of all. Features are of length one.
"""

from __future__ import annotations

import random
from itertools import islice
from typing import TYPE_CHECKING

from clm_app.data.rows import Row
from clm_app.strategies.replay import Replay, by_label, in_turn, within

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from clm_app.engine.batches import Encoded
    from clm_app.engine.loop import Engine

ROWS = 64  # rows in one forward pass


class Herding(Replay):
    """Replay of typical rows: few of them stand for their label better than as many drawn by lot."""

    title = "Herding (rehearse typical rows)"
    purpose = "Replay for a small budget: the kept rows of each label are those that stand for it best"
    needs = "kept rows of past tasks; the mix grows by share / (1 - share), and one look at all new rows at the end"

    def __init__(self, settings, seed: int) -> None:
        super().__init__(settings, seed)
        self._features: dict[str, torch.Tensor] = {}

    def finish(self, engine: Engine, model: torch.nn.Module) -> None:
        """Look at every new row with the trained model."""
        found = _features(model, engine.new, engine.encoded, engine.device)
        self._features = {row.key: feature for row, feature in zip(engine.new, found, strict=True)}

    def keep(self, new: list[Row], rng: random.Random) -> list[Row]:
        """Return typical rows first, every label as evenly as the labels allow; drawn by lot where none was looked at."""
        if not self._features:
            return super().keep(new, rng)
        import torch

        most, groups = self.settings.rows_per_task, []
        for _, rows in sorted(by_label(new).items()):
            picks = islice(_herd(torch.stack([self._features[row.key] for row in rows])), most)
            groups.append([rows[place] for place in picks])
        return within(in_turn(groups), self.settings)


def _features(
    model: torch.nn.Module, rows: list[Row], encoded: Encoded, device: torch.device
) -> torch.Tensor:  # fmt: skip
    """Return (rows, width) on the CPU: the mean last hidden state over each prompt, scaled to length one."""
    import torch

    from clm_app.engine.batches import tensors

    model.eval()
    found, order = [None] * len(rows), sorted(range(len(rows)), key=lambda i: sum(map(len, encoded(rows[i]))))
    for start in range(0, len(rows), ROWS):
        chosen = order[start : start + ROWS]
        batch = tensors([rows[i] for i in chosen], encoded, device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states[-1]
        is_prompt = inputs["attention_mask"].bool()
        for place, i in enumerate(chosen):
            is_prompt[place, is_prompt.shape[1] - len(encoded(rows[i])[1]) :] = False
        mean = (states.float() * is_prompt[..., None]).sum(1) / is_prompt.sum(1, keepdim=True).clamp(min=1)
        for i, feature in zip(chosen, torch.nn.functional.normalize(mean).cpu(), strict=True):
            found[i] = feature
    return torch.stack(found)


def _herd(features: torch.Tensor) -> Iterator[int]:
    """Yield every place of (rows, width) once: each brings the mean of those yielded nearest to the mean of all."""
    import torch

    mean, total = features.mean(0), torch.zeros_like(features[0])
    is_left = torch.ones(len(features), dtype=torch.bool)
    for count in range(1, len(features) + 1):
        distance = ((total + features) / count - mean).norm(dim=1)
        place = int(distance.masked_fill(~is_left, torch.inf).argmin())
        is_left[place] = False
        total = total + features[place]
        yield place
