"""What every way against forgetting and every way to tune promises, and that no knob of training is dead."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from clm_app.catalog import pick, shelf
from clm_app.data.rows import Row, dump, load
from clm_app.data.template import load_tokenizer
from clm_app.engine import checkpoints
from clm_app.engine.batches import Encoded, batches, tensors
from clm_app.engine.loop import Meter, share_of_peak
from clm_app.engine.measure import outcomes
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadModel, BadSettings
from tests.smallest import TASKS, make_rows

STRATEGIES, METHODS = sorted(shelf("clm_app.strategies")), sorted(shelf("clm_app.methods"))
NEW = [Row(**row) for row in make_rows(40, TASKS["Colours"])]
OLD = {"3": [Row(**row) for row in make_rows(20, TASKS["Animals"])],
       "11": [Row(**row) for row in make_rows(7, TASKS["Tools"])]}  # fmt: skip


def made(name: str, seed: int = 0, **settings):
    cls = pick("clm_app.strategies", name)
    return cls(cls.Settings(**settings), seed)


# --- every strategy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
class TestEveryStrategy:
    """What a new file on the shelf has to hold."""

    def test_the_same_seed_gives_the_same_mix_and_another_one_another(self, name):
        mixes = [made(name).mix(NEW, OLD, random.Random(seed)) for seed in (1, 1, 2)]
        assert mixes[0] == mixes[1] != mixes[2]

    def test_every_new_row_is_trained_once_in_a_pass(self, name):
        for kept in (OLD, {}, {"3": []}):
            mix = made(name).mix(NEW, kept, random.Random(0))
            assert Counter(row.key for source, row in mix if source == "new") == Counter(row.key for row in NEW)

    def test_a_rehearsed_row_was_kept_of_the_task_it_is_counted_to(self, name):
        for source, row in made(name).mix(NEW, OLD, random.Random(0)):
            assert source == "self" or row in (NEW if source == "new" else OLD[source])

    def test_what_is_given_is_not_changed(self, name):
        new, kept = list(NEW), {source: list(rows) for source, rows in OLD.items()}
        made(name).mix(new, kept, random.Random(0))
        made(name).keep(new, random.Random(0))
        assert new == NEW and kept == OLD

    def test_kept_rows_are_new_rows_each_once_and_the_same_for_the_same_seed(self, name):
        kept = made(name).keep(NEW, random.Random(5))
        assert len(set(kept)) == len(kept) and set(kept) <= set(NEW)
        assert kept == made(name).keep(NEW, random.Random(5))

    def test_it_says_what_it_is_and_what_it_needs_and_takes_no_unknown_knob(self, name):
        cls = pick("clm_app.strategies", name)
        assert cls.title and cls.needs and cls.__doc__
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            cls.Settings(abacus=1)
        assert all(field.description for field in cls.Settings.model_fields.values())

    def test_its_loss_can_be_descended(self, name, order_for, train, tmp_path):
        dump(OLD["3"], tmp_path / "kept.jsonl")
        methods = pick("clm_app.strategies", name).methods
        how = {"method": "lora" if "lora" in methods else methods[0], "training": {"epochs": 4}}
        seen = train(order_for(strategy=name, kept={"3": tmp_path / "kept.jsonl"}, **how))
        assert seen.steps[-1].loss < seen.steps[0].loss
        assert seen.trained.figures["rehearsed"].keys() == {"3"}


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
def test_replay_makes_its_share_of_the_final_mix_to_within_a_row_spread_evenly(share):
    mix = made("replay", share=share).mix(NEW, OLD, random.Random(0))
    count = Counter(source for source, _ in mix)
    assert abs(len(mix) - count["new"] - share * len(mix)) <= 1
    assert abs(count["3"] - count["11"]) <= 1


def test_replay_uses_each_kept_row_before_any_twice():
    mix = made("replay", share=0.5).mix(NEW, OLD, random.Random(0))
    uses = Counter(row.key for source, row in mix if source == "11")
    assert len(uses) == 7 and set(uses.values()) == {2, 3}


def test_replay_gives_every_task_its_part_where_one_kept_nothing():
    mix = made("replay", share=0.5).mix(NEW, {"3": OLD["3"], "4": []}, random.Random(0))
    rehearsed = sum(source != "new" for source, _ in mix)
    assert abs(rehearsed - 0.5 * len(mix)) <= 1, "the share is that of the whole mix"


def test_replay_keeps_every_label_as_evenly_as_there_are_rows():
    many = [Row(prompt=f"ask {i}", response="a") for i in range(50)]
    some = [Row(prompt=f"tell {i}", response="b") for i in range(20)]
    few = [Row(prompt=f"say {i}", response="c") for i in range(3)]
    kept = made("replay", rows_per_task=23).keep([*many, *some, *few], random.Random(0))
    assert Counter(row.label for row in kept) == {"a": 10, "b": 10, "c": 3}
    others = made("replay", rows_per_task=23).keep([*many, *some, *few], random.Random(1))
    assert set(kept) != set(others), "which ones is drawn"


def test_replay_draws_what_it_keeps_without_favour():
    rows = [Row(prompt=f"ask {i}", response="a") for i in range(10)]
    drawn = Counter(row.prompt for seed in range(600)
                    for row in made("replay", rows_per_task=3).keep(rows, random.Random(seed)))  # fmt: skip
    assert len(drawn) == 10 and all(130 < count < 230 for count in drawn.values()), "180 each, four deviations of 11"


def test_each_knob_of_replay_changes_what_it_does():
    lengths = [len(made("replay", share=share).mix(NEW, OLD, random.Random(0))) for share in (0.0, 0.3, 0.6)]
    assert lengths == [40, 57, 100]
    assert [len(made("replay", rows_per_task=n).keep(NEW, random.Random(0))) for n in (1, 8, 999)] == [1, 8, 40]
    budgets = {"tokens_per_task", "bytes_per_task"}  # turned in tests/test_rehearsal.py
    assert set(pick("clm_app.strategies", "replay").Settings.model_fields) == {"share", "rows_per_task"} | budgets, (
        "a new knob needs its test here"
    )


def test_replay_over_real_steps_counts_what_it_rehearsed(order_for, train, tmp_path):
    kept = {}
    for source, rows in OLD.items():
        dump(rows, tmp_path / f"{source}.jsonl")
        kept[source] = tmp_path / f"{source}.jsonl"
    how = {"strategy": "replay", "strategy_settings": {"share": 0.5, "rows_per_task": 6}, "kept": kept}
    seen = train(order_for(**how))
    prompts = [prompt for batch in seen.rows for prompt in batch]
    old = {source: {row.prompt for row in rows} for source, rows in OLD.items()}
    counted = {source: sum(prompt in known for prompt in prompts) for source, known in old.items()}
    assert seen.trained.figures["rehearsed"] == counted == {"3": 8, "11": 8} and len(prompts) == 32
    assert len(load(Path(seen.trained.memory["new"]))) == 6


# --- every method ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent_adapter(tiny_model, tmp_path_factory) -> Path:
    """An adapter of the default rank over the tiny model that changes its answers, as a parent version has one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    knobs = pick("clm_app.methods", "lora").Settings()
    config = LoraConfig(
        r=knobs.rank, lora_alpha=knobs.alpha, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )  # fmt: skip
    out = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, config).save_pretrained(out)
    return out


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(6, 70).view(2, 32)).logits


def base_for(name: str, folder: Path):
    """Return a model folder's weights as a method loads them to train on."""
    cls = pick("clm_app.methods", name)
    base = AutoModelForCausalLM.from_pretrained(folder, **cls(cls.Settings()).loading(torch.device("cpu")))
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # see clm_app/methods/qlora.py
    return base


def reloaded(name: str, base: Path, folder: Path):
    """Return what a method has written, over the base that it was trained on."""
    if pick("clm_app.methods", name).weights_kind == "full":
        return AutoModelForCausalLM.from_pretrained(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(base_for(name, base), folder)


@pytest.mark.parametrize("has_parent", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_saves_answers_as_what_it_trained(name, has_parent, order_for, train, tiny_model, parent_adapter):
    adapter = parent_adapter if has_parent else None
    seen = train(order_for(method=name, adapter=adapter))
    kind = pick("clm_app.methods", name).weights_kind
    after = logits(reloaded(name, tiny_model, Path(seen.trained.folder)))
    assert torch.allclose(after, logits(seen.model), atol=1e-5)
    over = name if kind == "adapter" else "lora"
    before = reloaded(over, tiny_model, parent_adapter) if has_parent else base_for(name, tiny_model)
    assert (after - logits(before)).abs().max() > 1e-3, "the training has changed something"
    assert seen.trained.weights_kind == kind and not (Path(seen.trained.folder) / "README.md").exists()
    if kind == "full":
        assert load_tokenizer(seen.trained.folder).chat_template == load_tokenizer(tiny_model).chat_template


@pytest.mark.parametrize("name", METHODS)
def test_a_method_begins_where_its_parent_ended(name, tiny_model, parent_adapter):
    cls = pick("clm_app.methods", name)
    begun = cls(cls.Settings()).prepare(base_for(name, tiny_model), parent_adapter)
    parent = reloaded(name if cls.weights_kind == "adapter" else "lora", tiny_model, parent_adapter)
    assert torch.allclose(logits(begun), logits(parent), atol=1e-4)
    fresh = cls(cls.Settings()).prepare(base_for(name, tiny_model), None)
    assert torch.allclose(logits(fresh), logits(base_for(name, tiny_model)), atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is_and_takes_no_unknown_knob(name):
    cls = pick("clm_app.methods", name)
    assert cls.title and cls.__doc__ and cls.weights_kind in ("adapter", "full")
    assert 0 < cls(cls.Settings()).learning_rate(4096) <= cls(cls.Settings()).learning_rate(64) < 0.1
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        cls.Settings(abacus=1)


def test_lora_trains_the_adapter_alone(order_for, train, tiny_model):
    seen = train(order_for(method="lora"))
    assert seen.weights and all(".lora_" in name for name in seen.weights)
    learning = [name for name, p in seen.model.named_parameters() if p.requires_grad]
    assert learning and all(".lora_" in name for name in learning)
    started = next(e for e in seen.events if e.kind == "started")
    assert 0 < started.trained_parameters < started.parameters / 2
    base = load_file(tiny_model / "model.safetensors")
    for name, tensor in seen.model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert ".lora_" in name or torch.equal(tensor, base[plain]), f"{name} of the frozen base has moved"


def test_full_trains_every_weight_and_leaves_no_adapter(order_for, train, tiny_model, parent_adapter):
    seen = train(order_for(method="full", adapter=parent_adapter))
    base = load_file(tiny_model / "model.safetensors")
    assert seen.weights.keys() == base.keys() and not any(torch.equal(seen.weights[n], base[n]) for n in base)
    started = next(e for e in seen.events if e.kind == "started")
    assert started.trained_parameters == started.parameters == sum(t.numel() for t in base.values())


def test_lora_refuses_a_strength_that_its_parent_has_not(order_for, train, parent_adapter):
    with pytest.raises(BadSettings, match=r"alpha is 3, but the parent's adapter has alpha (\d+) .* Choose alpha \1"):
        train(order_for(method="lora", adapter=parent_adapter, method_settings={"alpha": 3}))


def test_lora_refuses_a_rank_that_its_parent_has_not(order_for, train, parent_adapter):
    with pytest.raises(
        BadSettings, match=r"rank is 3, but the parent's adapter has rank (\d+) .* Choose rank \1, or method full"
    ):
        train(order_for(method="lora", adapter=parent_adapter, method_settings={"rank": 3}))


def test_each_knob_of_lora_changes_what_is_trained(order_for, train):
    knobs = set(pick("clm_app.methods", "lora").Settings.model_fields)
    assert knobs == {"rank", "alpha", "dropout"}, "a new knob needs its value here"
    plain = train(order_for("plain", method_settings={"rank": 4, "alpha": 8}))
    for knob, value in (("rank", 2), ("alpha", 64), ("dropout", 0.5)):
        seen = train(order_for(knob, method_settings={"rank": 4, "alpha": 8, knob: value}))
        assert seen.steps[-1].loss != plain.steps[-1].loss, knob
        if knob == "rank":
            assert next(iter(seen.weights.values())).shape != next(iter(plain.weights.values())).shape


# --- many kinds of model ---------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KINDS = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Mistral": {"sliding_window": None}, "Gemma": {"head_dim": 8},
    "Phi": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def model_of(tokenizer, tmp_path_factory):
    """Return a function that writes a random tiny model of a kind, with the tokenizer, and returns its folder."""
    import transformers

    def make(kind: str) -> Path:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **SHAPE | KINDS[kind])
        out = tmp_path_factory.mktemp(kind)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_many_kinds_take_a_step_with_every_method(kind, model_of, order_for, train):
    folder = model_of(kind)
    for name in METHODS:
        seen = train(order_for(f"{kind}-{name}", n=4, method=name, base=folder))
        assert len(seen.steps) == 1 and 0 < seen.steps[0].loss < 20
        after = reloaded(name, folder, Path(seen.trained.folder))
        assert (logits(after) - logits(base_for(name, folder))).abs().max() > 1e-5
        assert torch.allclose(logits(after), logits(seen.model), atol=1e-4)


def test_a_folder_that_holds_no_language_model_is_refused(order_for, train, tokenizer, tmp_path):
    with pytest.raises(BadModel, match=r"has no tokenizer that can be read .* Copy the model's tokenizer files"):
        train(order_for(base=tmp_path / "nowhere"))
    tokenizer.save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(BadModel, match=r"empty (cannot be loaded|has no tokenizer)"):
        train(order_for(base=tmp_path / "empty"))


# --- no knob of training is dead -------------------------------------------------------------------------------------


def turned(train, order_for, field, low, high, **more):
    """Return what two runs saw that differ in one knob alone."""
    return [train(order_for(f"{field}-{value}", training=more | {field: value}), ticking=True) for value in (low, high)]


def moved(seen) -> float:
    """Return the largest weight of the adapter's second factor, which starts at zero."""
    return max(t.abs().max().item() for name, t in seen.weights.items() if "lora_B" in name)


def turn_epochs(*tools):
    few, more = turned(*tools, "epochs", 0.5, 2.5)
    assert (len(few.steps), len(more.steps)) == (2, 10)


def turn_least_steps(*tools):
    few, more = turned(*tools, "least_steps", 1, 7)
    assert (len(few.steps), len(more.steps)) == (4, 7)


def turn_least_steps_again(train, order_for):
    again = [
        train(
            order_for(
                f"again-{least}", training={"least_steps": 9, "least_steps_again": least}, task="A", learned=["A"]
            )
        )
        for least in (1, 7)
    ]
    fresh = train(order_for("fresh", training={"least_steps": 9, "least_steps_again": 1}, task="B", learned=["A"]))
    assert [len(seen.steps) for seen in (*again, fresh)] == [4, 7, 9]


def turn_batch_rows(*tools):
    small, large = turned(*tools, "batch_rows", 2, 8)
    assert {len(rows) for rows in small.rows} == {2} and {len(rows) for rows in large.rows} == {8}


def turn_learning_rate(*tools):
    slow, fast = turned(*tools, "learning_rate", 1e-4, 1e-2)
    assert max(s.rate for s in slow.steps) == 1e-4 and max(s.rate for s in fast.steps) == 1e-2
    assert moved(fast) > 10 * moved(slow)
    own, _ = turned(*tools, "learning_rate", None, 1e-3)
    lora = pick("clm_app.methods", "lora")
    assert max(s.rate for s in own.steps) == lora(lora.Settings()).learning_rate(64)


def turn_warmup_share(*tools):
    short, long = turned(*tools, "warmup_share", 0.0, 0.5, epochs=2)
    rates = [s.rate / 1e-2 for s in long.steps]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and short.steps[0].rate == 1e-2
    assert rates == pytest.approx([share_of_peak(step, 8, 0.5) for step in range(8)]) and rates[-1] < 0.2


def turn_weight_decay(*tools):
    none, much = turned(*tools, "weight_decay", 0.0, 1.0, epochs=4)
    norm = lambda seen: sum(t.norm().item() for name, t in seen.weights.items() if "lora_A" in name)  # noqa: E731
    assert norm(much) < 0.99 * norm(none)


def turn_clip(*tools):
    tight, loose = turned(*tools, "clip", 1e-9, 1.0)
    assert moved(tight) < 0.1 * moved(loose), "a gradient far below AdamW's epsilon moves nothing"


def turn_prompt_dropout(*tools):
    none, much = turned(*tools, "prompt_dropout", 0.0, 0.5)
    own, little = turned(*tools, "prompt_dropout", None, 0.1)
    first = [seen.steps[0].loss for seen in (none, much, own, little)]
    assert len(set(first[:3])) == 3 and first[2] == first[3], "a model this small hides a tenth by itself"


def turn_max_tokens(*tools):
    short, long = turned(*tools, "max_tokens", 10, 512, batch_rows=1)
    assert max(s.tokens for s in short.steps) == 10 < max(s.tokens for s in long.steps)
    assert short.trained.figures["cut_rows"] == 16 and long.trained.figures["cut_rows"] == 0


def turn_checkpoint_every_s(*tools):
    often, never = turned(*tools, "checkpoint_every_s", 0.1, 9999.0, checkpoints_kept=9)
    count = lambda seen: sum(event.kind == "checkpointed" for event in seen.events)  # noqa: E731
    assert (count(often), count(never)) == (4, 1), "the last step is always kept"


def turn_checkpoints_kept(train, order_for):
    for kept in (1, 3):
        order = order_for(f"kept-{kept}", training={"checkpoints_kept": kept, "checkpoint_every_s": 0.1})
        train(order, ticking=True)
        assert len(checkpoints.committed(order.folder / "checkpoints")) == kept


def turn_seed(train, order_for):
    one, two = turned(train, order_for, "seed", 1, 2)
    again = train(order_for("again", training={"seed": 1}))
    assert one.rows == again.rows != two.rows
    assert all(torch.equal(one.weights[n], again.weights[n]) for n in one.weights)
    first = train(order_for("first", training={"seed": 2}), stop_before=1)
    assert first.steps[0].loss != one.steps[0].loss


@pytest.mark.parametrize("field", TrainingSettings.model_fields)
def test_no_training_knob_is_dead(field, train, order_for):
    turn = globals().get(f"turn_{field}")
    assert turn, f"nothing here turns the knob {field!r}; write turn_{field}"
    turn(train, order_for)
    assert TrainingSettings.model_fields[field].description


def test_every_knob_has_its_bounds():
    for field, bad in {
        "epochs": 0,
        "batch_rows": 0,
        "learning_rate": 2,
        "warmup_share": 1,
        "seed": -1,
        "clip": 0,
    }.items():
        with pytest.raises(ValidationError):
            TrainingSettings(**{field: bad})
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainingSettings(epoch=1)


def test_a_loss_that_is_no_number_ends_the_run_with_the_rate_to_try():
    meter = Meter(steps=4, device=torch.device("cpu"), behind={})
    with pytest.raises(
        BadModel, match=r"became nan after 4 of 4 steps, at a learning rate of 0\.3, .* Try a tenth of it"
    ):
        meter.add(4, torch.tensor(float("nan")), 10, 0.3)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_pass_has_every_row_once_in_batches_of_like_length(tokenizer):
    rng = random.Random(0)
    rows = [Row(prompt="word " * rng.randrange(1, 60) + str(i), response="yes") for i in range(200)]
    encoded = Encoded(tokenizer, 512)
    pairs = [("new", row) for row in rows]
    found = [[row for _, row in batch] for batch in batches(pairs, encoded, 8, random.Random(1))]
    assert Counter(row for batch in found for row in batch) == Counter(rows) and {len(b) for b in found} == {8}
    length = lambda row: sum(map(len, encoded(row)))  # noqa: E731
    spread = [max(map(length, b)) - min(map(length, b)) for b in found]
    assert sum(spread) / len(spread) < 12, "padding stays small"
    first, again, other = (batches(pairs, encoded, 8, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_hidden_prompt_tokens_are_a_share_of_the_prompts_and_never_of_the_answers(tokenizer):
    rows, encoded = [Row(prompt="word " * n, response="stop here") for n in (20, 40, 60)], Encoded(tokenizer, 512)
    whole, hidden = (tensors(rows, encoded, torch.device("cpu"), share) for share in (0.0, 0.3))
    answer = len(encoded(rows[0])[1])
    assert torch.equal(whole["attention_mask"][:, -answer - 1 :], hidden["attention_mask"][:, -answer - 1 :])
    assert (hidden["attention_mask"] <= whole["attention_mask"]).all()
    prompts = whole["attention_mask"][:, : -answer - 1].sum()
    assert 0.2 < 1 - hidden["attention_mask"][:, : -answer - 1].sum() / prompts < 0.4
    assert all(torch.equal(whole[name], hidden[name]) for name in ("input_ids", "position_ids", "labels"))


def test_a_row_that_is_too_long_loses_the_start_of_its_prompt_and_keeps_its_answer(tokenizer):
    row = Row(prompt="first " * 200 + "last", response="yes")
    prompt, answer = Encoded(tokenizer, 32)(row)
    whole_prompt, whole_answer = Encoded(tokenizer, 4096)(row)
    assert len(prompt) + len(answer) == 32 and answer == whole_answer and prompt == whole_prompt[-len(prompt) :]
    prompt, answer = Encoded(tokenizer, 8)(Row(prompt="ask", response="word " * 50))
    assert len(prompt) == 1 and len(answer) == 7


# --- a real model ----------------------------------------------------------------------------------------------------

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K"


def convert_llama2c(source: Path, out: Path) -> None:
    """Write a llama2.c checkpoint (legacy layout) with its SentencePiece tokenizer as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = (source / "checkpoint_legacy.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", raw[:28])
    values, at = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = torch.Size(shape).numel()
        at += size
        return values[at - size : at].view(*shape).clone()

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        """Reorder rotary pairs, as llama2.c has them, to Hugging Face's rotary halves."""
        return weight.view(count, -1, 2, dim).transpose(1, 2).reshape(-1, dim)

    kv = dim // heads * kv_heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    for name, shape in {
        "input_layernorm": (dim,), "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (kv, dim), "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim), "post_attention_layernorm": (dim,), "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden), "mlp.up_proj": (hidden, dim),
    }.items():  # fmt: skip
        for layer, weight in enumerate(take(layers, *shape)):
            turn = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            state[f"model.layers.{layer}.{name}.weight"] = halves(weight, turn) if turn else weight
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # a positive vocabulary size: one matrix for both
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, rms_norm_eps=1e-5,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.save_pretrained(out)

    raw, at, tokens = (source / "tokenizer.bin").read_bytes(), 4, []
    for _ in range(vocabulary):
        _score, size = struct.unpack("fi", raw[at : at + 8])
        tokens.append(
            raw[at + 8 : at + 8 + size].decode().strip("\n")
            if len(tokens) < 3
            else raw[at + 8 : at + 8 + size].decode()
        )
        at += 8 + size
    tokens = ["<unk>", "<s>", "</s>", *(t.replace(" ", "▁") for t in tokens[3:])]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [(t[:i], t[i:]) for t in tokens[259:] for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids]
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=length
    ).save_pretrained(out)


@pytest.mark.real_data
def test_a_real_model_knows_stories_and_learns_new_ones_without_a_random_models_loss(tmp_path, order_for, train):
    if not STORIES.exists():
        pytest.skip("the stories260K files are not beside the project")
    convert_llama2c(STORIES, tmp_path / "real")
    real = AutoModelForCausalLM.from_pretrained(tmp_path / "real").eval()
    assert real.num_parameters() == 260_032
    torch.manual_seed(0)
    blank = AutoModelForCausalLM.from_config(real.config).eval()
    encoded = Encoded(load_tokenizer(tmp_path / "real"), 512)
    story = Row(
        prompt="Once upon a time, there was a little girl named Lily.",
        response="She loved to play outside in the park. One day, she saw a big dog. The dog was very happy.",
    )
    loss = {}
    for name, model in (("real", real), ("blank", blank)):
        line = outcomes(model, [story], encoded, torch.device("cpu"))[0]
        loss[name] = line["loss"] / line["tokens"]
    assert loss["real"] < 2.5 < 5 < loss["blank"], loss
    seen = train(order_for(method="lora", base=tmp_path / "real", training={"learning_rate": 5e-3, "epochs": 3}))
    assert seen.steps[-1].loss < 0.8 * seen.steps[0].loss
    assert json.loads((Path(seen.trained.folder) / "adapter_config.json").read_text())["peft_type"] == "LORA"
