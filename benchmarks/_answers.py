"""What weights in a folder answer: measured as the engine measures, or generated token by token and compared by words."""

from __future__ import annotations

import contextlib
from pathlib import Path

from clm_app.data.rows import Row
from clm_app.engine.order import Order
from clm_app.engine.settings import TrainingSettings
from clm_app.judging.wording import token_f1

ROWS = 50  # answers generated at a time
LONGEST = 160  # tokens of a generated answer


def exact_match(model: Path, tasks: dict[str, list[Row]]) -> dict[str, list[int]]:
    """Return {task: 1 for each row that a model without any adapter answers exactly, else 0}."""
    import torch
    from transformers import AutoModelForCausalLM

    from clm_app.data.template import load_tokenizer
    from clm_app.engine.batches import Encoded
    from clm_app.engine.measure import outcomes

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    encoded = Encoded(load_tokenizer(model), TrainingSettings().max_tokens)
    return {
        name: [int(line["exact"]) for line in outcomes(loaded, rows, encoded, torch.device("cpu"))]
        for name, rows in tasks.items()
    }


def mean_f1(order: Order, weights_kind: str, tasks: dict[str, list[Row]]) -> dict[str, float]:
    """Return {task: mean token F1 of the answers that a run's weights generate greedily, 0..1}."""
    from clm_app.engine.loop import Engine
    from clm_app.engine.routed import Routed

    weights = order.folder / "weights"
    place = {"base": weights, "adapter": None} if weights_kind == "full" else {"adapter": weights}
    engine = Engine(order.model_copy(update=place), lambda event: None)
    model, found = engine.parent(), {}
    for name, rows in tasks.items():
        said = [""] * len(rows)
        groups = model.groups([r.prompt for r in rows]) if isinstance(model, Routed) else {"": range(len(rows))}
        for task, places in groups.items():
            with model.using(task) if isinstance(model, Routed) else contextlib.nullcontext(model) as answering:
                texts = generated(engine, answering, [rows[i] for i in places])
            for i, text in zip(places, texts, strict=True):
                said[i] = text
        found[name] = sum(token_f1(text, row.response) for text, row in zip(said, rows, strict=True)) / len(rows)
    return found


def generated(engine, model, rows: list[Row]) -> list[str]:
    """Return the greedy answer of each row, at most LONGEST tokens."""
    import torch

    tokenizer, texts = engine.tokenizer, []
    for start in range(0, len(rows), ROWS):
        prompts = [engine.encoded(row)[0] for row in rows[start : start + ROWS]]
        width = max(map(len, prompts))
        inputs = torch.full((len(prompts), width), tokenizer.pad_token_id)
        for i, ids in enumerate(prompts):
            inputs[i, width - len(ids) :] = torch.tensor(ids)
        mask = torch.arange(width) >= width - torch.tensor([[len(ids)] for ids in prompts])
        with torch.no_grad():
            made = model.generate(
                input_ids=inputs, attention_mask=mask.long(), max_new_tokens=LONGEST, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        texts += tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    return texts
