"""What export parity promises: a faithful artefact is "same", and a broken one is caught with its cause in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sqlmodel import select
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from clm_app import routes
from clm_app.catalog import shelf
from clm_app.data.ingest import snapshot
from clm_app.data.rows import Row, dump
from clm_app.data.template import rendered
from clm_app.engine.parity import compare
from clm_app.engine.parity_weights import OWN_ROUNDING
from clm_app.errors import BadSettings, ChildFailed
from clm_app.judging import parity
from clm_app.judging.parity import Artefact, ParityOrder, ParitySettings
from clm_app.judging.stages import Score, apart, beyond, scored
from clm_app.registry import versions
from clm_app.routes import Router
from clm_app.serving import gguf as convert
from clm_app.serving.backends.transformers import Transformers
from clm_app.serving.chat import Message
from clm_app.serving.merge import merged
from jobs.supervisor import spawn
from store.objects import folder_digest
from store.tables import AuditEvent
from tests.smallest import TASKS, make_rows
from ui.house import House

FEW = ParitySettings(prompts_per_task=2, scored_rows=12, reply_tokens=3, longest_tokens=64)
WEIGHTS = "model.safetensors"


# --- the two sides ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, and a router with few numbers: solving its ridge regression takes longer than all the tiny model does."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "WIDTH", 64)
        yield


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with larger weights, so that it prefers some tokens clearly, as trained models do."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(11)
    weights = {
        name: tensor if tensor.ndim == 1 else torch.randn_like(tensor) * 0.25
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder


def make_adapter(base: Path, folder: Path, seed: int) -> Path:
    """Write a LoRA adapter that changes every answer."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), seed=4)


@pytest.fixture(scope="module")
def routed(base, adapter, tmp_path_factory) -> Path:
    """Two tasks with an adapter each, and their router."""
    folder, router = tmp_path_factory.mktemp("routed"), Router()
    for n, task in enumerate(("Colours", "Animals")):
        router.folders[task] = f"adapters/000{n}"
        router.learn(task, [Row(**row) for row in make_rows(24, TASKS[task])])
        shutil.copytree(adapter, folder / f"adapters/000{n}") if n else make_adapter(base, folder / "adapters/0000", 7)
    router.save(folder)
    return folder


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    for task in ("Colours", "Animals"):
        dump([Row(**row) for row in make_rows(12, TASKS[task])], folder / f"{task}.jsonl")
    return {task: folder / f"{task}.jsonl" for task in ("Colours", "Animals")}


@pytest.fixture
def look(base, held_out, tmp_path):
    """Return a function that compares the trained side with a served one, both the base where nothing else is said."""

    def do(adapter=None, served_base=None, served_adapter="", backend="transformers", load=None, **changes):
        order = ParityOrder(**{
            "version": "v1", "trained": Artefact(base=base, adapter=adapter), "backend": backend, "held_out": held_out,
            "served": Artefact(base=served_base or base, adapter=adapter if served_adapter == "" else served_adapter),
            "converted": tmp_path / f"copy-{adapter is None}", "settings": FEW,
        } | changes)  # fmt: skip
        made = None if load is None else lambda: load(order.served.base, order.served.adapter, 1, order.converted)
        return compare(order, load_served=made)

    return do


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """A copy of the base's folder that a test may spoil."""
    return shutil.copytree(base, tmp_path / "served")


def change_weights(folder: Path, change) -> None:
    """Write each tensor anew as change(name, tensor) gives it."""
    weights = {name: change(name, tensor).contiguous() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def caught(found, cause: str, says: str) -> None:
    """Hold that a difference was found, with this cause and a sentence that says it and has a next step."""
    assert (found.verdict, found.cause) == ("differs", cause), found.sentence
    assert says in found.sentence and found.sentence.startswith("v1 does not answer as it was trained. ")
    assert found.sentence.count(". ") >= 2 and found.evidence is not None


def rounded_to(bits: int):
    """Return a change that rounds each row of a matrix to the nearest of its 2^bits levels."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 1:
            return tensor
        step = tensor.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        return (tensor / step).round() * step

    return change


def swapped_halves(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Order the rows of queries and keys as llama.cpp does, which transformers does not."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return torch.from_numpy(convert.permute(tensor.numpy(), 4 if ".q_proj." in name else 2))


# --- clean artefacts -------------------------------------------------------------------------------------------------


def test_every_kind_of_version_is_served_as_it_was_trained(look, adapter, routed, copy, base):
    for kind, weights in {"base": None, "adapter": adapter, "routed": routed}.items():
        found = look(weights)
        assert (found.verdict, found.cause) == ("same", ""), f"{kind}: {found.sentence}"
        figures = found.evidence
        assert figures["golden_prompts"] == 11 and figures["scored_rows"] == 12, "two prompts a task and seven odd ones"
        assert figures["log_probability"] < 1e-3 and figures["top1"] == figures["replies"] == 1.0
    merged(base, adapter).save_pretrained(copy)
    found = look(adapter, served_base=copy, served_adapter=None)
    assert found.verdict == "same", f"merged beforehand: {found.sentence}"


def test_a_large_difference_is_needed_for_a_low_precision_and_a_small_one_for_a_high_one(look, copy):
    change_weights(copy, lambda name, tensor: tensor.bfloat16().float())
    caught(look(served_base=copy), "rounding", "few levels")
    half = look(served_base=copy, load=type("Half", (Transformers,), {"__init__": in_bfloat16}))
    assert half.verdict == "same" and half.evidence["precision"] == "half", half.sentence


def in_bfloat16(self, *arguments):
    Transformers.__init__(self, *arguments)
    self.model = self.model.bfloat16()


# --- what goes in is broken ------------------------------------------------------------------------------------------


def prompts(**methods):
    """Return a backend whose prompt is spoilt after loading: spoil(prompt, ids of the unspoilt one) -> how ids are made."""

    class Spoilt(Transformers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            right = self.prompt.ids
            for name, made in methods.items():
                setattr(self.prompt, name, made(self.prompt, right))

    return Spoilt


def test_a_missing_template_is_named(look, copy):
    (copy / "chat_template.jinja").unlink()
    found = look(served_base=copy)
    caught(found, "template_missing", "The chat template is missing")
    assert found.evidence["prompts"][0]["trained"] != found.evidence["prompts"][0]["served"]


def test_a_changed_template_is_named(look, copy):
    file = copy / "chat_template.jinja"
    file.write_text(file.read_text().replace("m['content']", "m['content'] | trim"))
    found = look(served_base=copy)
    caught(found, "template_changed", "writes 1 of 11 golden prompts otherwise")
    shown = found.evidence["prompts"][0]
    assert shown["prompt"] == "blank" and "<|user|> <|end|>" in shown["trained"], "only spaces at an end show it"


def test_bos_twice_is_named_where_template_and_tokenizer_both_add_it(look):
    def both(prompt, right):
        tokenizer = prompt.tokenizer
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
        return lambda messages: tokenizer(rendered(tokenizer, [m.model_dump() for m in messages]))["input_ids"]

    found = look(load=prompts(ids=both))
    caught(found, "bos_twice", "BOS twice: the template and the tokenizer both add it")
    assert found.evidence["prompts"][0]["first_difference_at"] == 1
    assert found.evidence["tokens"]["served"][:2] == ["<|bos|>", "<|bos|>"]


@pytest.mark.parametrize(
    ("cause", "says", "spoil"),
    [
        ("bos_missing", "BOS missing", lambda p, right: lambda m: right(m)[1:]),
        ("eos_missing", "EOS missing", lambda p, right: lambda m: [i for i in right(m) if i != 2]),
        ("eos_added", "EOS added", lambda p, right: lambda m: [*right(m), 2]),
        ("prompt_cut", "is cut to 9 of", lambda p, right: lambda m: right(m)[-9:]),
        ("cut_otherwise", "cuts the same text into other tokens", lambda p, right: lambda m: [*right(m)[:-1], 300, right(m)[-1]]),
        (
            "control_typed", "a conversation can forge turns",
            lambda p, right: lambda m: p.tokenizer.apply_chat_template(
                [one.model_dump() for one in m], add_generation_prompt=True)["input_ids"],
        ),
    ],
)  # fmt: skip
def test_other_token_ids_are_named_by_what_is_wrong_with_them(look, cause, says, spoil):
    caught(look(load=prompts(ids=spoil)), cause, says)


def test_a_served_side_that_never_stops_or_stops_early_is_named(look):
    caught(look(load=prompts(ends=lambda p, right: frozenset())), "eos_missing", "does not stop there")
    caught(look(load=prompts(ends=lambda p, right: frozenset({2, 77}))), "eos_added", "stops at token 77 too")


def test_a_shorter_context_is_named(look, copy):
    change_json(copy / "config.json", max_position_embeddings=60)
    caught(look(served_base=copy), "refused", "this model reads 60")


def test_another_tokenizer_is_named_by_its_vocabulary(look, copy):
    file = copy / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(told))
    caught(look(served_base=copy), "other_tokenizer", "2 tokens have other ids")


def test_a_prompt_that_goes_to_another_adapter_is_named(look, routed, tmp_path):
    served = shutil.copytree(routed, tmp_path / "routed")
    table = json.loads((served / "routes.json").read_text())
    swap = {"Colours": "Animals", "Animals": "Colours"}
    table["counts"] = {
        view: {feature: {swap[task]: n for task, n in by_task.items()} for feature, by_task in features.items()}
        for view, features in table["counts"].items()
    }
    (served / "routes.json").write_text(json.dumps(table))
    sums = dict(np.load(served / "routes.npz"))
    np.savez(served / "routes.npz", gram=sums["gram"], sums=sums["sums"][::-1])
    caught(look(routed, served_adapter=served), "routed_otherwise", "Colours 1 to Animals and not to Colours")
    caught(look(routed, served_adapter=routed / "adapters/0000"), "no_router", "The router is missing")


# --- what comes out is broken ----------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_applied_is_named(look, adapter, routed):
    caught(look(adapter, served_adapter=None), "adapter_missing", "The adapter is not applied")

    class Bare(Transformers):
        def answering(self, messages):
            from contextlib import contextmanager

            @contextmanager
            def bare():
                with self.routed.using("") as self.model:
                    yield

            return bare()

    caught(look(routed, load=Bare), "adapter_missing", "exactly as the bare base")


def test_an_adapter_that_is_applied_twice_is_named(look, adapter, copy, base):
    merged(base, adapter).save_pretrained(copy)
    found = look(adapter, served_base=copy)
    caught(found, "adapter_twice", "The adapter is applied twice")
    shown = found.evidence["prompts"][0]
    assert shown["trained"] != shown["served"] and found.evidence["out_of_bounds"]["divergence"]["is"] > 0.1


def test_an_adapter_that_answers_for_every_task_is_named(look, routed):
    class Stuck(Transformers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.routed.names = dict.fromkeys(self.routed.names, self.routed.names["Animals"])

    caught(look(routed, load=Stuck), "other_adapter", "The adapter of Animals answers every task")


def test_a_wrong_base_under_the_adapter_is_named(look, adapter, copy):
    torch.manual_seed(99)
    change_weights(copy, lambda name, tensor: tensor if tensor.ndim == 1 else torch.randn_like(tensor) * 0.25)
    caught(look(adapter, served_base=copy), "other_base", "the base under the adapter")


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_damage_is_named_with_how_many_tensors_it_hit(look, copy, bits):
    change_weights(copy, rounded_to(bits))
    found = look(served_base=copy)
    caught(found, "rounding", "Rounding damages it: 16 of 21 tensors have few levels")
    assert found.evidence["worst"] and "top1" in found.evidence


def test_a_single_changed_weight_is_named(look, copy):
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(copy, lambda found, tensor: tensor * (1.3 if found == name else 1))
    caught(look(served_base=copy), "weights_changed", f"most of all {name}")


def test_a_wrong_rotary_order_is_named_with_and_without_a_look_at_the_weights(look, copy):
    change_weights(copy, swapped_halves)
    caught(look(served_base=copy), "rotary_order", "the rows of the query and key projections")

    class Closed(Transformers):
        """A backend that shows no weights."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.hidden, self.model = self.model, None

        def _forward(self, ids, cache):
            self.model = self.hidden
            try:
                return super()._forward(ids, cache)
            finally:
                self.model = None

    found = look(served_base=copy, load=Closed)
    caught(found, "rotary_order", "After one token both sides agree")


def test_another_rotary_base_is_named(look, copy):
    change_json(copy / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    caught(look(served_base=copy), "config_changed", "rope_parameters is {")


def test_a_broken_cache_is_named(look):
    class Forgetful(Transformers):
        def _forward(self, ids, cache):
            return super()._forward(ids, None)

    caught(look(load=Forgetful), "cache", "what follows is not: the cache of keys and values")


def test_a_reply_that_loses_characters_is_named(look, monkeypatch):
    from clm_app.serving.reply import Reply

    kept = Reply.push
    monkeypatch.setattr(Reply, "push", lambda self, token: kept(self, token)[1:])
    caught(look(), "spelled_otherwise", "become another text")


def test_a_model_that_overflows_is_named(look, copy):
    change_weights(copy, lambda name, tensor: tensor * (float("inf") if name == "lm_head.weight" else 1))
    caught(look(served_base=copy), "not_a_number", "infinities")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_weight_file_that_is_cut_short_is_named_before_it_is_loaded(look, copy):
    file = copy / WEIGHTS
    whole = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.truncate(whole - 1000)
    caught(look(served_base=copy), "weights_cut", f"asks for {whole} bytes and it has {whole - 1000}")
    with open(file, "r+b") as handle:
        handle.truncate(20)
    caught(look(served_base=copy), "weights_cut", "cut short")


def test_a_folder_that_was_changed_since_it_was_registered_is_named(look, base):
    assert look(digests={str(base): folder_digest(base)}).verdict == "same"
    caught(look(digests={str(base): "0" * 64}), "weights_changed", "not those that v1 was registered with")


def test_an_artefact_that_cannot_be_loaded_says_why(look, copy):
    change_json(copy / "config.json", hidden_size=48)
    caught(look(served_base=copy), "does_not_load", "cannot be loaded")


# --- llama.cpp, where it is installed --------------------------------------------------------------------------------


@pytest.fixture
def through_llama(look, base, tmp_path):
    """Return a function that compares through llama.cpp, after a GGUF file was written and perhaps spoilt."""
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed; it compiles for minutes")

    def do(adapter=None, written_with="same", spoil=lambda file: None):
        written = adapter if written_with == "same" else written_with
        spoil(convert.cached(base, written, tmp_path / "gguf"))
        return look(adapter, backend="llama_cpp", converted=tmp_path / "gguf")

    return do


@pytest.mark.parametrize("with_adapter", [False, True])
def test_llama_cpp_serves_what_was_trained(through_llama, adapter, with_adapter):
    found = through_llama(adapter if with_adapter else None)
    assert found.verdict == "same" and found.evidence["log_probability"] < 1e-3, found.sentence
    assert found.evidence["precision"] == "float32"


def test_a_gguf_file_of_the_bare_base_is_named(through_llama, adapter):
    caught(through_llama(adapter, written_with=None), "adapter_missing", "The adapter is not applied")


def test_a_gguf_file_in_the_wrong_rotary_order_is_named(through_llama, monkeypatch):
    monkeypatch.setattr(convert, "permute", lambda weights, heads: weights)
    caught(through_llama(), "rotary_order", "the rows of the query and key projections")


def test_a_gguf_file_that_is_cut_short_is_named(through_llama):
    def cut(file: Path) -> None:
        with open(file, "r+b") as handle:
            handle.truncate(file.stat().st_size - 4000)

    caught(through_llama(spoil=cut), "weights_cut", "cut short")


def test_a_gguf_file_that_adds_bos_to_a_template_that_has_it_is_named(through_llama):
    from gguf import GGUFReader

    def turn_on(file: Path) -> None:
        field = GGUFReader(file, "r+").fields["tokenizer.ggml.add_bos_token"]
        field.parts[field.data[0]][0] = True

    caught(through_llama(spoil=turn_on), "bos_twice", "BOS twice: the template and the tokenizer both add it")


@pytest.mark.parametrize(("kind", "cause"), [("Q8_0", ""), ("Q4_0", "rounding")])
def test_a_quantised_gguf_file_is_held_to_its_own_bounds(through_llama, kind, cause):
    def quantise(file: Path) -> None:
        import ctypes

        import llama_cpp

        plan = llama_cpp.llama_model_quantize_default_params()
        plan.ftype, plan.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
        small = file.with_suffix(".small")
        assert llama_cpp.llama_model_quantize(str(file).encode(), str(small).encode(), ctypes.byref(plan)) == 0
        small.replace(file)

    found = through_llama(spoil=quantise)
    assert found.evidence["precision"] == {"Q8_0": "q8", "Q4_0": "q4"}[kind]
    assert found.cause == cause, (found.sentence, found.evidence)


# --- thresholds, scores, settings ------------------------------------------------------------------------------------


def test_each_bound_is_turned_and_seen():
    one = np.log(np.full(8, 1 / 8))
    other = np.log(np.array([0.3, *[0.1] * 7]))
    figures = apart([one], [other]) | {"answer": 0.1, "replies": 0.5}
    assert figures["log_probability"] == pytest.approx(np.log(0.3 * 8)) and figures["top1"] == 1.0
    wide = {"log_probability": 9, "divergence": 9, "top1": 0, "top5": 0, "answer": 9, "replies": 0}
    tight = {"log_probability": 0, "divergence": 0, "top1": 1, "top5": 1, "answer": 0, "replies": 1}
    out = lambda found, **changes: set(beyond(found, parity.Bounds(**wide | changes), 40, 0.05))  # noqa: E731
    assert out(figures) == set()
    for name in set(wide) - {"top1", "top5"}:
        assert out(figures, **{name: tight[name]}) == {name}
    other_way = apart([other], [other[::-1]])
    assert other_way["top1"] == 0.0 and out(other_way, top1=0.5) == {"top1"}
    assert apart([np.log(np.arange(1, 9) / 36)], [np.log(np.arange(8, 0, -1) / 36)])["top5"] == pytest.approx(0.4)
    assert out({"top5": 0.8}, top5=0.81) == {"top5"}
    assert out({"log_probability": float("nan")}) == {"log_probability"}, "no number is out of any bound"
    assert set(OWN_ROUNDING) == {"float32", "half", "q8", "q4"} <= set(ParitySettings.model_fields)


def test_one_prompt_of_ten_is_no_proof_and_fifteen_of_a_hundred_are():
    bounds = ParitySettings().q8
    assert bounds.top1 == 0.93 and beyond({"top1": 0.9}, bounds, 10, 0.05) == {}
    assert beyond({"top1": 0.85}, bounds, 100, 0.05) == {"top1": {"is": 0.85, "bound": 0.93}}
    assert beyond({"replies": 0.3}, bounds, 10, 0.05) == {"replies": {"is": 0.3, "bound": 0.75}}


def test_scores_block_what_is_hurt_and_let_pass_what_is_too_few_to_tell():
    right, wrong = [True] * 40, [False] * 40
    hurt = scored([Score.of("Colours", right, [*wrong[:8], *right[8:]])], FEW)
    assert [one.task for one in hurt.hurt] == ["Colours"] and hurt.lost == 8 and not hurt.is_kept
    few = scored([Score.of("Colours", right, [*wrong[:2], *right[2:]])], FEW)
    assert few.hurt == [] and not few.is_kept, "two of forty may be chance, and exclude nothing"
    many = scored([Score.of(task, right * 2, right * 2) for task in ("Colours", "Animals")], FEW)
    assert many.hurt == [] and many.is_kept
    lost = [Score.of("Colours", right, [*wrong[:8], *right[8:]])]
    assert scored(lost, FEW.model_copy(update={"margin_points": 25.0})).hurt == [], "within the margin"
    assert scored(lost, FEW.model_copy(update={"alpha": 0.001})).hurt == [], "eight flips may be chance at that level"
    spread = [Score.of(f"task {n}", right, [*wrong[:3], *right[3:]]) for n in range(5)]
    assert [one.task for one in scored(spread, FEW).hurt] == ["all tasks"], (
        "each alone may be chance, together they are not"
    )


def test_a_loss_on_the_scored_rows_alone_is_caught_too(look, monkeypatch):
    from clm_app.engine import parity as comparison

    monkeypatch.setattr(comparison.Trained, "right", lambda self, rows, encoded: [True] * len(rows))
    caught(look(), "cache", "It answers all tasks worse: 12 of 12 rows are lost and 0 gained.")


def test_golden_prompts_are_drawn_by_the_seed_and_bounded_by_the_settings(held_out, tokenizer):
    from clm_app.judging.golden import drawn, goldens_of

    made = lambda **knobs: goldens_of(  # noqa: E731
        tokenizer, drawn(held_out, FEW.model_copy(update=knobs)), 128, FEW.model_copy(update=knobs)
    )
    goldens, answers = made()
    assert [one.name for one in goldens[:4]] == ["Colours 1", "Colours 2", "Animals 1", "Animals 2"]
    assert all(answers[:4]) and not any(answers[4:]) and answers[0][-1] == 2, "an answer ends with the end token"
    assert made()[0] == goldens and made(seed=1)[0] != goldens and len(made(prompts_per_task=4)[0]) == len(goldens) + 4
    longest = Message.model_validate(goldens[-1].messages[0].model_dump()).content
    size = len(tokenizer.encode(longest))
    assert 60 <= size <= 128
    length = lambda **knobs: len(tokenizer.encode(goldens_of(  # noqa: E731
        tokenizer, {}, knobs.pop("context", 128), FEW.model_copy(update=knobs))[0][-1].messages[0].content))  # fmt: skip
    assert length(context=64) < length() and length(reply_tokens=60) < length(), "room for the reply is left"
    rows = lambda **knobs: sum(map(len, drawn(held_out, FEW.model_copy(update=knobs)).values()))  # noqa: E731
    assert (rows(), rows(scored_rows=20), rows(scored_rows=0)) == (12, 20, 4), "golden prompts are drawn all the same"
    with pytest.raises(ValidationError):
        ParitySettings(prompts=3)


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_a_check_is_written_down_once_and_read_back_over_the_api(workspace, base):
    workspace.settings.parity = {"reply_tokens": 2, "longest_tokens": 64}
    workspace.settings.backend, workspace.settings.base_model = "transformers", str(base)
    version, heard = versions.base_version(workspace), []
    reading = parity.check(workspace, spawn, version, lambda stage, share: heard.append((stage, share)))
    assert (reading.verdict, reading.backend) == ("same", "transformers"), reading.sentence
    assert heard and all(0 <= share <= 1 for _, share in heard) and reading.seconds > 0
    assert not list((workspace.home / "cache" / "orders").iterdir()), "no order is left behind"
    assert parity.check(workspace, None, version).id == reading.id, "what was read is not read again"
    app = FastAPI()
    app.include_router(shelf("ui.api")["parity"](House(workspace)).routes())
    with TestClient(app) as client:
        assert [row["sentence"] for row in client.get("/api/versions/v0/parity").json()] == [reading.sentence]
    with workspace.read() as session:
        event = session.exec(select(AuditEvent).where(AuditEvent.action == "version.parity_same")).one()
    assert event.subject == f"version:{version.id}" and event.detail["reading"] == reading.id


def test_a_reading_holds_for_its_weights_backend_and_settings_alone(workspace, rows_file):
    workspace.settings.backend = "transformers"
    version = versions.base_version(workspace)
    order = parity.order_for(workspace, version)
    key = parity.key_of(version, order)
    assert parity.key_of(version, order) == key
    for other in (order.model_copy(update={"backend": "llama_cpp"}),
                  order.model_copy(update={"settings": ParitySettings(seed=1)})):  # fmt: skip
        assert parity.key_of(version, other) != key
    assert parity.key_of(version.model_copy(update={"object": "other"}), order) != key
    assert order.digests == {str(order.served.base): version.base_digest} and order.served == order.trained
    for name in ("One", "Two", "Three"):
        snapshot(workspace, name, rows_file(20, name=f"{name}.jsonl"), "test")
    assert list(parity.order_for(workspace, version).held_out) == ["Three", "Two", "One"]
    workspace.settings.parity = {"most_tasks": 2}
    assert list(parity.order_for(workspace, version).held_out) == ["Three", "Two"], "the newest ones"
    workspace.settings.parity = {"prompts": 1}
    with pytest.raises(BadSettings, match="prompts"):
        parity.check(workspace, spawn, version)


def test_a_child_that_dies_leaves_no_verdict(workspace):
    version = versions.base_version(workspace)

    def dies(command, **rest):
        return spawn(["python", "-c", "print('out of memory')"], **rest)

    with pytest.raises(ChildFailed, match="ended while starting: out of memory"):
        parity.check(workspace, dies, version)
    assert parity.readings(workspace, version) == []
