"""What QLoRA promises: its base lies in 4 bits, its gradients are right, and a version answers over the whole base."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from clm_app.data.rows import Row
from clm_app.data.streams import TaskSource
from clm_app.data.template import load_tokenizer
from clm_app.engine import memory
from clm_app.engine.batches import Encoded, answer_logits, tensors
from clm_app.engine.loop import Engine
from clm_app.engine.measure import outcomes
from clm_app.errors import BadSettings
from clm_app.methods import qlora
from clm_app.methods.lora import LoraSettings
from clm_app.methods.qlora import Qlora, QloraSettings
from clm_app.serving.merge import merged
from clm_app.wishes import LearnWish, ask
from tests.smallest import TASKS, make_rows

CPU = torch.device("cpu")
ROWS = [Row(**row) for row in make_rows(16, TASKS["Colours"])]


@pytest.fixture
def rounded(tiny_model):
    """Return a function that gives the tiny model in 4 bits under a fresh adapter without dropout; keywords are knobs."""

    def make(**knobs):
        torch.manual_seed(0)
        method = Qlora(QloraSettings(**{"rank": 4, "alpha": 8, "dropout": 0} | knobs))
        model = method.prepare(AutoModelForCausalLM.from_pretrained(tiny_model, **method.loading(CPU)), None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        return model

    return make


def whole_weights(model) -> None:
    """Put each rounded layer's weights back into a plain layer, as bitsandbytes says they are."""
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.base_layer.weight.data, module.base_layer.weight.quant_state
            )
            module.base_layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
            module.base_layer.requires_grad_(False).weight.data = weight.float()


def gradients(model, tiny_model) -> torch.Tensor:
    """Return the gradient of the answers' loss in every trained parameter, as one vector."""
    model.train()
    batch = tensors(ROWS[:4], Encoded(load_tokenizer(tiny_model), 512), CPU)
    answers, targets = answer_logits(model, batch)
    loss = torch.nn.functional.cross_entropy(answers.flatten(0, 1), targets.flatten(), ignore_index=-100)
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)])


def test_gradients_are_those_of_the_rounded_weights_also_after_the_model_was_measured(rounded, tiny_model):
    model = rounded()
    first = gradients(model, tiny_model)
    outcomes(model, ROWS, Encoded(load_tokenizer(tiny_model), 512), CPU)
    assert torch.equal(gradients(model, tiny_model), first), "a look without gradients repacked the weights"
    whole_weights(model)
    plain = gradients(model, tiny_model)
    assert (first - plain).norm() < 0.05 * plain.norm(), "no more than bfloat16 apart"


def test_the_base_lies_in_four_bits_and_its_narrow_layers_are_left_alone(rounded, tiny_model):
    model = rounded()
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14 and all(m.weight.dtype == torch.uint8 for m in layers)
    assert all(m.weight.numel() * 2 == m.in_features * m.out_features for m in layers), "two weights in a byte"
    assert not any(hasattr(m, "apart") for m in model.modules()), "the dense product is for plain layers"
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    assert not isinstance(model.get_output_embeddings(), Linear4bit)


def test_a_version_is_measured_as_it_is_served_and_not_as_it_was_trained(order_for, train, exam_on, tiny_model):
    exam = exam_on(order_for().rows)
    knobs = {"epochs": 6}
    first = train(order_for("first", method="qlora", before=[exam], after=[exam], training=knobs))
    place = Path(first.trained.folder)
    encoded = Encoded(load_tokenizer(tiny_model), 512)
    loss = lambda model: [line["loss"] for line in outcomes(model, ROWS, encoded, CPU)]  # noqa: E731
    told = [[json.loads(line)["loss"] for line in Path(m.outcomes).read_text().splitlines()] for m in first.measured]
    assert told[0] == pytest.approx(loss(AutoModelForCausalLM.from_pretrained(tiny_model)), abs=1e-4)
    assert told[1] == pytest.approx(loss(merged(tiny_model, place)), abs=1e-3)
    assert told[1] != pytest.approx(loss(first.model), abs=1e-2), "over 4 bits it answers a little otherwise"
    assert first.trained.weights_kind == "adapter" and all(".lora_" in name for name in first.weights)
    second = train(order_for("second", method="qlora", adapter=place, before=[exam]))
    assert second.measured[0].answer_loss == pytest.approx(first.measured[1].answer_loss, abs=1e-4), "its own parent"


def test_lora_goes_on_from_qlora_and_full_merges_it_into_the_whole_base(order_for, train, exam_on, tiny_model):
    exam = exam_on(order_for().rows)
    first = train(order_for("first", method="qlora", after=[exam], training={"epochs": 4}))
    for method in ("lora", "full"):
        seen = train(order_for(method, method=method, adapter=Path(first.trained.folder), before=[exam]))
        assert seen.measured[0].answer_loss == pytest.approx(first.measured[0].answer_loss, abs=1e-4)
        assert all(p.dtype == torch.float32 for p in seen.model.parameters())


def test_each_knob_of_its_own_changes_what_is_trained_on_and_lora_has_the_others(order_for, train, rounded):
    own = set(QloraSettings.model_fields) - set(LoraSettings.model_fields)
    assert own == {"quantisation", "double_quantisation"}, "a new knob needs its value here"
    plain = train(order_for("plain", method="qlora"))
    for knob, value in (("quantisation", "fp4"), ("double_quantisation", False), ("rank", 2), ("dropout", 0.5)):
        seen = train(order_for(knob, method="qlora", method_settings={knob: value}))
        assert (seen.steps[0].loss != plain.steps[0].loss) == (knob in own), "the base itself is another"
        assert seen.steps[-1].loss != plain.steps[-1].loss, knob
    states = [
        next(m for m in rounded(double_quantisation=twice).modules() if isinstance(m, Linear4bit)).weight.quant_state
        for twice in (True, False)
    ]
    assert states[0].absmax.dtype == torch.uint8 and states[1].absmax.dtype == torch.float32
    with pytest.raises(ValidationError, match="nf4"):
        QloraSettings(quantisation="int8")


def test_the_parameters_of_a_rounded_model_are_counted_as_they_are(order_for, train):
    counts = {}
    for method in ("lora", "qlora"):
        started = next(e for e in train(order_for(method, method=method)).events if e.kind == "started")
        counts[method] = started.parameters, started.trained_parameters
    assert counts["lora"] == counts["qlora"]


# --- where it cannot run ---------------------------------------------------------------------------------------------


def test_without_bitsandbytes_it_is_refused_before_anything_starts(workspace, rows_file, monkeypatch, order_for, train):
    monkeypatch.setattr(qlora, "find_spec", lambda _: None)
    wish = LearnWish(stream=[TaskSource(name="one", path=str(rows_file(40)))], method="qlora", strategy="replay")
    for run in (lambda: ask(workspace, wish, "local"), lambda: train(order_for(method="qlora"))):
        with pytest.raises(BadSettings, match=r"needs the package bitsandbytes, .* Install it, or choose method lora"):
            run()


def test_a_device_that_cannot_round_is_refused_by_name(monkeypatch, order_for, train):
    def fails(*_, **__):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    with pytest.raises(BadSettings, match=r"cannot hold weights in 4 bits on cpu: no kernel\. Choose method lora"):
        train(order_for(method="qlora"))


# --- room ------------------------------------------------------------------------------------------------------------

LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256, "tie_word_embeddings": False}


def test_memory_for_a_base_of_eight_billion_weights_is_as_worked_by_hand(tmp_path):
    """6.98 of 8.03 billion weights lie in linear layers, at half a byte and a sixteenth; the others at two bytes."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    need = lambda on_gpu, **more: memory.needed_gb(8_030_000_000, tmp_path, "adapter", 1, 1, on_gpu, **more)  # noqa: E731
    embeddings = 2 * 128256 * 4096
    by_hand = ((8.03e9 - embeddings) * 0.5625 + embeddings * 2 + 8.03e9 * 0.5) / 1e9
    assert need(True, base_bits=4) == pytest.approx(by_hand + memory.OVERHEAD_GB, abs=0.01)
    assert need(True) == pytest.approx(8.03 * 2.5 + memory.OVERHEAD_GB, abs=0.01) and by_hand < 10.1
    beside = (8.03e9 - embeddings) * 0.5625 + embeddings * 4 + 8.03e9 * (4 + 0.5)
    assert need(False, base_bits=4) == pytest.approx(beside / 1e9 + memory.OVERHEAD_GB, abs=0.01)


def test_a_card_too_small_for_lora_is_told_of_qlora(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.setattr(memory, "gpus", lambda: [{"memory_gb": 12, "memory_used_gb": 1}])
    with pytest.raises(Exception, match=r"of the GPU are free\. Choose method qlora\. Halve batch_rows"):
        memory.refuse_what_does_not_fit(8_030_000_000, tmp_path, "adapter", 1, 256, tmp_path)


@pytest.mark.parametrize("free, place", [(10**9, "cuda"), (10**4, "cpu")])
def test_what_answers_in_full_is_put_on_the_cpu_where_a_card_has_no_room_for_it(free, place, monkeypatch, tiny_model):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2000)
    card = SimpleNamespace(device=torch.device("cuda"), method=Qlora, order=SimpleNamespace(base=tiny_model))
    assert Engine.spare.fget(card).type == place
    card.method = SimpleNamespace(base_bits=0)
    assert Engine.spare.fget(card).type == "cuda", "what is trained unrounded answers for itself"
