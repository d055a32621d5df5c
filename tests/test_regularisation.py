"""Ways against forgetting that hold weights or answers in place: what each promises, against numbers worked by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from clm_app.catalog import pick
from clm_app.data.rows import Row, dump, load
from clm_app.data.template import load_tokenizer
from clm_app.engine.batches import Encoded, answer_logits, tensors
from clm_app.engine.effective import effective, fisher, frozen, shapes, squared_distance, whole
from clm_app.engine.measure import outcomes
from clm_app.errors import BadSettings
from clm_app.strategies import der, lwf
from tests.smallest import TASKS, make_rows

COLOURS = [Row(**row) for row in make_rows(32, TASKS["Colours"])]
ANIMALS = [Row(**row) for row in make_rows(32, TASKS["Animals"])]
RATES = {"full": 3e-3, "lora": 4e-3}
OURS = ("ewc", "l2sp", "si", "ema", "lwf", "der")
CPU = torch.device("cpu")


def made(name: str, seed: int = 0, **settings):
    cls = pick("clm_app.strategies", name)
    return cls(cls.Settings(**settings), seed)


def loss_on(model, base: Path, rows: list[Row]) -> float:
    """Return the nats per answer token of some rows."""
    found = outcomes(model, rows, Encoded(load_tokenizer(base), 512), CPU)
    return sum(line["loss"] for line in found) / sum(line["tokens"] for line in found)


@pytest.fixture
def stream(order_for, train, tmp_path):
    """Return a function that learns colours, then animals, and says what became of the colours (nats per token).

    methods: one way to tune for both, or one for each; begun: what an earlier stream's first run left, to go on from.
    """

    def learn(strategy: str, methods="full", epochs: int = 12, **settings) -> SimpleNamespace:
        runs, changes = [], {}
        methods = (methods, methods) if isinstance(methods, str) else methods
        for i, (method, new) in enumerate(zip(methods, (COLOURS, ANIMALS), strict=True)):
            folder = f"{strategy}-{len(list(tmp_path.iterdir()))}"
            dump(new, tmp_path / f"{folder}.jsonl")
            order = order_for(
                folder, rows=tmp_path / f"{folder}.jsonl", strategy=strategy, strategy_settings=settings, method=method,
                training={"epochs": epochs, "learning_rate": RATES[method]}, **changes,
            )  # fmt: skip
            done = train(order)
            colours, animals = (loss_on(done.model, order.base, rows) for rows in (COLOURS, ANIMALS))
            runs.append(SimpleNamespace(order=order, colours=colours, animals=animals, **vars(done)))
            weights, memory = Path(done.trained.folder), done.trained.memory
            changes |= {"base": weights, "adapter": None} if method == "full" else {"adapter": weights}
            if "state" in memory:
                changes["state"] = Path(memory["state"])
            if "new" in memory:
                changes["kept"] = changes.get("kept", {}) | {str(i): Path(memory["new"])}
        first, second = runs
        return SimpleNamespace(
            first=first, second=second, changes=changes, forgotten=second.colours - first.colours,
            learned=1 - second.animals / first.animals, figures=second.trained.figures["strategy"],
        )  # fmt: skip

    return learn


# --- effective weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def under_lora(tiny_model):
    """Return a function that gives the tiny model under an adapter that changes it; keywords go to LoraConfig."""
    from peft import LoraConfig, get_peft_model

    def make(**more):
        torch.manual_seed(5)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **more)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
        return model.eval()

    return make


@pytest.mark.parametrize("is_rank_stabilised", [False, True])
def test_the_effective_weights_of_an_adapter_are_what_merging_it_adds(under_lora, tiny_model, is_rank_stabilised):
    model = under_lora(use_rslora=is_rank_stabilised)
    changes, complete = {n: t.detach() for n, t in effective(model).items()}, whole(model)
    merged = under_lora(use_rslora=is_rank_stabilised).merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert len(changes) == 14 and "lm_head.weight" not in changes
    for name, change in changes.items():
        assert change.abs().max() > 1e-3
        assert torch.allclose(plain[name] + change, merged[name], atol=1e-6)
        assert torch.allclose(complete[name], merged[name], atol=1e-6)


def test_the_effective_weights_of_a_fully_tuned_model_are_its_parameters(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert all(weight is dict(model.named_parameters())[name] for name, weight in effective(model).items())
    assert effective(model).keys() == shapes(tiny_model).keys() and frozen(model) == {}


def test_an_adapter_that_is_more_than_a_product_of_two_factors_is_refused(under_lora):
    with pytest.raises(BadSettings, match=r"adapter is a Dora\w+, .* Choose plain LoRA or method full"):
        effective(under_lora(use_dora=True))


def test_the_pull_on_the_factors_is_the_pull_on_their_product(under_lora):
    """With P = sum F (s B A - D)^2: dP/dB = 2 s (F gap) A^T and dP/dA = 2 s B^T (F gap), worked by hand."""
    model = under_lora()
    torch.manual_seed(1)
    then = {name: torch.randn_like(w) * 0.1 for name, w in effective(model).items()}
    importance = {name: torch.rand_like(w) for name, w in then.items()}
    squared_distance(effective(model), then, importance).backward()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    name = "model.layers.1.mlp.up_proj.weight"
    pull = importance[name] * (3 * b @ a - then[name])
    assert torch.allclose(b.grad, 2 * 3 * pull @ a.T, rtol=1e-4, atol=1e-6)
    assert torch.allclose(a.grad, 2 * 3 * b.T @ pull, rtol=1e-4, atol=1e-6)


# --- the Fisher information ------------------------------------------------------------------------------------------


@pytest.fixture
def two_weights():
    """A model with the weights (1, 2) and no more."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    return model


def test_importance_is_squared_one_example_at_a_time(two_weights):
    """Gradients of half the squared error: (1, 0), (-1, 0), (0, 2). The batch mean would give (0, 4/9)."""
    examples = [((1.0, 0.0), 0.0), ((1.0, 0.0), 2.0), ((0.0, 1.0), 0.0)]
    losses = [lambda x=x, y=y: (two_weights(torch.tensor(x)) - y).square().sum() / 2 for x, y in examples]
    assert torch.allclose(fisher(two_weights, losses)["weight"], torch.tensor([[2 / 3, 4 / 3]]))
    together = fisher(two_weights, [lambda: sum(loss() for loss in losses) / 3])
    assert torch.allclose(together["weight"], torch.tensor([[0.0, 4 / 9]])), "the first weight would not matter at all"


def test_importance_under_lora_is_that_of_the_merged_weights(under_lora, tiny_model):
    encoded = Encoded(load_tokenizer(tiny_model), 512)

    def losses(model):
        for row in COLOURS[:3]:
            yield lambda row=row: torch.nn.functional.cross_entropy(
                *(t.flatten(0, t.dim() - 2) if t.dim() > 2 else t.flatten()
                  for t in answer_logits(model, tensors([row], encoded, CPU))), reduction="sum"
            )  # fmt: skip

    model = under_lora()
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    found = fisher(model, losses(model))
    assert learned == {name: p.requires_grad for name, p in model.named_parameters()}, "what is frozen is frozen again"
    assert all(p.grad is None for p in model.parameters())
    expected = fisher((merged := under_lora().merge_and_unload().requires_grad_(True)), losses(merged))
    assert len(found) == 14 and found.keys() < expected.keys()
    assert all(torch.allclose(found[n], expected[n], rtol=1e-3, atol=1e-9) for n in found)


# --- numbers worked by hand ------------------------------------------------------------------------------------------


def step_of(way, model) -> torch.Tensor:
    """Return what a strategy adds to a loss of zero."""
    return way.loss(model, {"rows": []}, torch.zeros(0, 1, 2), torch.zeros(0, 1), torch.zeros(()))


def test_ewc_pulls_each_weight_as_hard_as_it_mattered(two_weights):
    way = made("ewc", strength=3.0)
    way.then, way.importance = {"weight": torch.tensor([[0.0, 1.0]])}, {"weight": torch.tensor([[2.0, 6.0]])}
    pull = step_of(way, two_weights)
    assert pull.item() == 3 / 2 * (2 * 1 + 6 * 1)
    pull.backward()
    assert two_weights.weight.grad.tolist() == [[6.0, 18.0]]


def test_l2sp_pulls_each_weight_alike(two_weights):
    way = made("l2sp", strength=3.0)
    way.prepare(None, two_weights)
    assert step_of(way, two_weights).item() == 0
    two_weights.weight.data += torch.tensor([[1.0, -2.0]])
    pull = step_of(way, two_weights)
    assert pull.item() == 3 / 2 * (1 + 4)
    pull.backward()
    assert two_weights.weight.grad.tolist() == [[3.0, -6.0]]


def engine(state: Path | None = None) -> SimpleNamespace:
    return SimpleNamespace(order=SimpleNamespace(state=state), device=CPU, steps=2)


def test_si_counts_the_work_of_each_weight_and_not_its_own_pull(two_weights):
    """Two steps: gradients (2, 0) and (1, 1), moves (-0.5, 0) and (-0.25, 0.5); counts (1.25, -0.5)."""
    way = made("si", strength=2.0, damping=0.4375)
    way.prepare(engine(), two_weights)
    way.importance, way.anchor = {"weight": torch.tensor([[3.0, 0.0]])}, {"weight": torch.tensor([[0.0, 0.0]])}
    weight = two_weights.weight
    for gradient, move, pulled in ((2, 0), (-0.5, 0), 2 + 2 * 2 * 3 * 1.0), ((1, 1), (-0.25, 0.5), 1 + 2 * 2 * 3 * 0.5):
        weight.grad = torch.tensor([gradient], dtype=torch.float32)
        way.after_backward(two_weights)
        assert weight.grad.tolist() == [[pulled, gradient[1]]]
        weight.data += torch.tensor([move])
        way.after_step(two_weights, 0)
    assert way.path["weight"].tolist() == [[1.25, -0.5]]
    way.finish(engine(), two_weights)
    assert way.importance["weight"].tolist() == [[3 + 1.25 / (0.75**2 + 0.4375), 0.0]], "work undone is no importance"
    assert way.anchor["weight"].tolist() == [[0.25, 2.5]]


def test_what_all_weights_claim_in_si_adds_up_to_the_fall_of_the_loss(two_weights):
    way, goal = made("si"), torch.tensor([[-1.0, 4.0]])
    way.prepare(engine(), two_weights)
    loss = lambda: (torch.tensor([1.0, 5.0]) * (two_weights.weight - goal).square()).sum()  # noqa: E731
    before = loss().item()
    for step in range(200):
        two_weights.zero_grad()
        loss().backward()
        way.after_backward(two_weights)
        two_weights.weight.data -= 1e-3 * two_weights.weight.grad
        way.after_step(two_weights, step)
    assert sum(t.sum().item() for t in way.path.values()) == pytest.approx(before - loss().item(), rel=0.01)


def test_ema_writes_the_average_from_the_old_weights_on(two_weights):
    way = made("ema", decay=0.5)
    way.prepare(engine(), two_weights)
    for step, value in enumerate(([3.0, 2.0], [5.0, 0.0])):
        two_weights.weight.data = torch.tensor([value])
        way.after_step(two_weights, step)
    way.finish(engine(), two_weights)
    assert two_weights.weight.tolist() == [[0.25 * 1 + 0.25 * 3 + 0.5 * 5, 0.25 * 2 + 0.25 * 2 + 0.5 * 0]]
    assert way.figures == {"old_share": 0.25}


def test_lwf_is_the_divergence_from_the_softened_teacher():
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert lwf.divergence(teacher, student, 1.0).item() == pytest.approx(by_hand, rel=1e-5)
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.nn.functional.kl_div(
        (student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean"
    )
    assert lwf.divergence(teacher, student, 3.0).item() == pytest.approx(9 * expected.item(), rel=1e-5)


def test_der_takes_all_tokens_that_were_not_stored_as_one():
    stored, ids = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[2, 0]])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert der.divergence(stored, ids, torch.zeros(1, 4)).item() == pytest.approx(by_hand, rel=1e-4)
    same = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    assert der.divergence(stored, ids, same).item() == pytest.approx(0, abs=1e-5)
    filled = torch.cat([stored, torch.full((1, 3), der.NOTHING)], 1), torch.cat([ids, torch.zeros(1, 3).long()], 1)
    logits = torch.zeros(1, 4, requires_grad=True)
    assert der.divergence(*filled, logits).item() == pytest.approx(by_hand, rel=1e-4)
    der.divergence(*filled, logits).backward()
    now = torch.tensor([0.25, 0.25, 0.25, 0.25])
    expected = now - torch.tensor([0.3, 0.2 / 2, 0.5, 0.2 / 2])  # what is left over is pulled evenly where it is even
    assert torch.allclose(logits.grad[0], expected, atol=1e-4)


# --- what each is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_l2sp_stays_twice_as_near_to_the_version_before(method, stream):
    """Under LoRA this is what it can promise: a third of the colours' loss is saved by it, not half."""
    little, much = (stream("l2sp", method, strength=strength) for strength in (1e-6, 1.0))
    assert much.figures["distance"] < 0.5 * little.figures["distance"] and much.learned > 0.5
    assert much.forgotten < 0.7 * little.forgotten


@pytest.mark.parametrize("method", ["full", "lora"])
def test_lwf_stays_twice_as_near_to_the_version_before_on_the_new_prompts(method, stream):
    """It sees new prompts alone, so this is what it can promise; colours are forgotten less only on top of it."""
    apart, forgotten = [], []
    for weight in (1e-6, 3.0):
        seen = stream("lwf", method, weight=weight)
        batch = tensors(ANIMALS, Encoded(load_tokenizer(seen.second.order.base), 512), CPU)
        here = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            old, now = (answer_logits(run.model.eval(), batch)[0][here] for run in (seen.first, seen.second))
        apart.append(lwf.divergence(old, now, 1.0).item())
        forgotten.append(seen.forgotten)
        assert seen.learned > 0.5
    assert apart[1] < 0.5 * apart[0] and forgotten[1] < forgotten[0]


def test_lwf_holds_the_new_rows_alone_and_begins_at_the_base(order_for, train, tmp_path):
    dump(ANIMALS, tmp_path / "kept.jsonl")
    plain = train(order_for("plain", strategy="naive"))
    distilled = train(order_for("distilled", strategy="lwf"))
    assert distilled.steps[0].loss == pytest.approx(plain.steps[0].loss, rel=1e-4), "it begins as its own teacher"
    assert distilled.steps[-1].loss > plain.steps[-1].loss
    way = made("lwf")
    way.teacher = None  # asked nothing where no row is new
    rows = {"rows": [("3", row) for row in ANIMALS[:2]]}
    assert way.loss(None, rows, torch.zeros(2, 1, 5), torch.zeros(2, 1), torch.ones(())) == 1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ema_moves_less_far_from_the_version_before(method, stream):
    """With decay 0.99 over 96 steps nearly half of the way is saved; most of the colours are lost all the same."""
    gone = {}
    for name, settings in (("naive", {}), ("ema", {"decay": 0.99})):
        seen = stream(name, method, **settings)
        gone[name] = held(seen)
        assert seen.learned > 0.5
    assert seen.figures["old_share"] == 0.99 ** len(seen.second.steps)
    assert gone["ema"] < 0.7 * gone["naive"], gone


# --- what is remembered from run to run ------------------------------------------------------------------------------


def test_ewc_adds_up_importances_that_fade_and_holds_the_newest_weights(stream):
    seen = stream("ewc", epochs=4, gamma=0.25)
    old, new = (load_file(Path(run.trained.memory["state"]) / "ewc.safetensors") for run in (seen.first, seen.second))
    importance = lambda state: {n: t for n, t in state.items() if n.startswith("fisher/")}  # noqa: E731
    mean = lambda parts: sum(t.sum().item() for t in parts) / sum(t.numel() for t in parts)  # noqa: E731
    assert mean(importance(old).values()) == pytest.approx(1, rel=1e-3), "each task counts alike"
    added = {n: t - 0.25 * old[n] for n, t in importance(new).items()}
    assert mean(added.values()) == pytest.approx(1, rel=1e-3) and min(t.min() for t in added.values()) > -1e-5
    assert all(torch.equal(new[f"anchor/{n}"], t) for n, t in seen.second.weights.items())


def test_ewc_goes_on_from_an_adapter_when_every_weight_is_tuned_and_back(stream):
    seen = stream("ewc", ("lora", "full"), epochs=4)
    assert seen.figures["held_tensors"] == 14
    states = [load_file(Path(run.trained.memory["state"]) / "ewc.safetensors") for run in (seen.first, seen.second)]
    assert len(states[0]) == 28 and len(states[1]) == 2 * 21
    merged = seen.first.model.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(states[0][f"anchor/{name}"], merged[name], atol=1e-6)
    back = stream("ewc", ("full", "lora"), epochs=4)
    assert back.figures["held_tensors"] == 14
    found = load_file(Path(back.second.trained.memory["state"]) / "ewc.safetensors")
    assert len(found) == 2 * 21, "what this run did not tune is not forgotten to matter"


def test_der_stores_what_the_model_says_when_a_row_is_learned_and_passes_it_on(stream):
    seen = stream("der", epochs=4, rows_per_task=8, top=5)
    first, second = (der.read(Path(run.trained.memory["state"]) / der.FILE) for run in (seen.first, seen.second))
    kept = load(Path(seen.first.trained.memory["new"]))
    assert set(first) == {row.key for row in kept} and len(first) == 8
    row, order = kept[0], seen.first.order
    encoded = Encoded(load_tokenizer(order.base), 512)
    with torch.no_grad():
        logits, _ = answer_logits(seen.first.model.eval(), tensors([row], encoded, CPU))
    best = logits[0].log_softmax(-1).topk(5)
    assert first[row.key].values.shape == (len(encoded(row)[1]), 5) and first[row.key].values.dtype == torch.float16
    assert torch.equal(first[row.key].ids.long(), best.indices)
    assert torch.allclose(first[row.key].values.float(), best.values, rtol=2e-3, atol=2e-3)
    for key, stored in first.items():
        assert torch.equal(second[key].values, stored.values) and torch.equal(second[key].ids, stored.ids)
    assert len(second) == 16 == seen.figures["stored_rows"] and seen.figures["rows_with_answers"] == 8
    file = Path(seen.second.trained.memory["state"]) / der.FILE
    tokens = sum(len(stored.values) for stored in second.values())
    assert file.stat().st_size == seen.figures["stored_bytes"] and 0 < file.stat().st_size - tokens * 30 < 1000


def test_der_forgets_the_answers_of_a_row_that_is_no_longer_kept(stream, train, order_for, tmp_path):
    seen = stream("der", epochs=1, rows_per_task=8)
    kept = seen.changes["kept"]["0"]
    gone, *left = load(kept)
    dump(left, kept)
    dump([Row(**row) for row in make_rows(16, TASKS["Tools"])], tmp_path / "tools.jsonl")
    changes = seen.changes | {"kept": {"0": kept}, "rows": tmp_path / "tools.jsonl"}
    state = der.read(
        Path(train(order_for("next", strategy="der", method="full", **changes)).trained.memory["state"]) / der.FILE
    )
    assert gone.key not in state and load(kept)[0].key in state and len(state) == 7 + 16


def test_der_pulls_rehearsed_rows_towards_their_stored_answers(order_for, train, tmp_path):
    """Stored answers that name quite another token are taken over, as far as they weigh."""
    dump(ANIMALS[:8], tmp_path / "kept.jsonl")
    state, told = tmp_path / "state", 77
    state.mkdir()
    encoded = Encoded(tokenizer := load_tokenizer(order_for().base), 512)
    stored = {}
    for row in ANIMALS[:8]:
        length = len(encoded(row)[1])
        stored[row.key] = der.Stored(
            torch.full((length, 1), math.log(0.9)).half(), torch.full((length, 1), told, dtype=torch.int32)
        )
    save_file(der.packed(stored), state / der.FILE, {"vocabulary": der.vocabulary(tokenizer)})
    said = {}
    for weight in (0.01, 5.0):
        order = order_for(f"weight-{weight}", strategy="der", strategy_settings={"weight": weight}, method="full",
                          kept={"3": tmp_path / "kept.jsonl"}, state=state,
                          training={"epochs": 6, "learning_rate": 3e-3})  # fmt: skip
        model = train(order).model.eval()
        with torch.no_grad():
            logits, _ = answer_logits(model, tensors(ANIMALS[:8], encoded, CPU))
        said[weight] = logits.softmax(-1)[..., told].mean().item()
    assert said[0.01] < 0.1 and said[5.0] > 0.5


# --- several in one run ----------------------------------------------------------------------------------------------


def test_joined_to_replay_each_finds_its_own_memory(stream):
    seen = stream("replay+ewc", epochs=2)
    assert seen.figures["ewc"]["held_tensors"] == 21
    assert [p.name for p in Path(seen.changes["state"]).iterdir()] == ["ewc"]
    assert seen.second.trained.figures["rehearsed"] == {"0": 32}
    both = stream("ewc+der", epochs=2)
    assert both.figures["ewc"]["held_tensors"] == 21 and both.figures["der"]["stored_rows"] == 64
    assert both.figures["der"]["rows_with_answers"] == 32


# --- no knob is dead -------------------------------------------------------------------------------------------------


def turned(stream, name: str, knob: str, low, high, **more) -> list:
    return [stream(name, epochs=4, **{knob: value} | more) for value in (low, high)]


def held(seen) -> float:
    """Return how far the second run moved the weights."""
    moves = ((t - seen.first.weights[n]).square().sum() for n, t in seen.second.weights.items())
    return sum(moves).sqrt().item()


def turn_ewc_strength(stream):
    weak, strong = turned(stream, "ewc", "strength", 1e-3, 100.0)
    assert held(strong) < 0.9 * held(weak) and strong.forgotten < 0.5 * weak.forgotten


def turn_ewc_gamma(stream):
    gone, whole_ = turned(stream, "ewc", "gamma", 0.0, 1.0)
    total = lambda seen: sum(  # noqa: E731
        t.sum().item() / t.numel() for n, t in load_file(seen.changes["state"] / "ewc.safetensors").items()
        if n.startswith("fisher/")
    )  # fmt: skip
    assert total(whole_) > 1.2 * total(gone)


def turn_ewc_rows(stream):
    few, many = turned(stream, "ewc", "rows", 3, 1000)
    assert (few.figures["fisher_rows"], many.figures["fisher_rows"]) == (3, 32)


def turn_l2sp_strength(stream):
    weak, strong = turned(stream, "l2sp", "strength", 1e-3, 10.0)
    assert held(strong) < 0.5 * held(weak)
    assert strong.figures["distance"] == pytest.approx(held(strong), rel=1e-3)


def turn_si_strength(stream):
    weak, strong = turned(stream, "si", "strength", 1e-3, 10.0)
    assert held(strong) < 0.9 * held(weak) and strong.forgotten < 0.5 * weak.forgotten


def turn_si_damping(stream):
    little, much = turned(stream, "si", "damping", 1e-4, 1.0)
    largest = lambda seen: max(  # noqa: E731
        t.max().item() for n, t in load_file(seen.changes["state"] / "si.safetensors").items()
        if n.startswith("importance/")
    )  # fmt: skip
    assert largest(little) > 10 * largest(much)


def turn_ema_decay(stream):
    quick, slow = turned(stream, "ema", "decay", 0.0, 0.95)
    assert held(slow) < 0.9 * held(quick)
    last = stream("naive", epochs=4)
    assert all(torch.equal(t, last.second.weights[n]) for n, t in quick.second.weights.items()), "nothing is averaged"


def turn_lwf_weight(stream):
    light, heavy = turned(stream, "lwf", "weight", 0.01, 10.0)
    assert heavy.learned < light.learned and held(heavy) < held(light)


def turn_lwf_temperature(stream):
    cold, warm = turned(stream, "lwf", "temperature", 1.0, 5.0)
    assert cold.first.steps[-1].loss != warm.first.steps[-1].loss
    assert any(not torch.equal(t, warm.first.weights[n]) for n, t in cold.first.weights.items())


def turn_der_weight(stream):
    light, heavy = turned(stream, "der", "weight", 0.01, 10.0)
    assert heavy.second.steps[-1].loss != light.second.steps[-1].loss
    assert all(torch.equal(t, heavy.first.weights[n]) for n, t in light.first.weights.items()), "nothing is stored yet"
    assert any(not torch.equal(t, heavy.second.weights[n]) for n, t in light.second.weights.items())


def turn_der_top(stream):
    few, many = turned(stream, "der", "top", 2, 50)
    assert many.figures["stored_bytes"] > 10 * few.figures["stored_bytes"]


@pytest.mark.parametrize(
    "name, knob", [(name, knob) for name in OURS for knob in pick("clm_app.strategies", name).Settings.__annotations__]
)
def test_no_knob_is_dead(name, knob, stream):
    turn = globals().get(f"turn_{name}_{knob}")
    assert turn, f"nothing here turns the knob {knob!r} of {name}; write turn_{name}_{knob}"
    turn(stream)


@pytest.mark.parametrize("name, knob, bad", [
    ("ewc", "strength", 0), ("ewc", "gamma", 1.1), ("ewc", "rows", 0), ("l2sp", "strength", -1), ("si", "damping", 0),
    ("ema", "decay", 1), ("lwf", "temperature", 0), ("der", "top", 0), ("der", "share", 0.95),
])  # fmt: skip
def test_every_knob_has_its_bounds(name, knob, bad):
    with pytest.raises(ValidationError, match=knob):
        made(name, **{knob: bad})


def test_der_takes_the_knobs_of_replay_and_keeps_and_mixes_by_them():
    kept = {"3": ANIMALS[:8]}
    for settings in ({"share": 0.0}, {"share": 0.25}, {"rows_per_task": 4}):
        ours, replays = made("der", **settings), made("replay", **settings)
        assert ours.keep(COLOURS, random.Random(1)) == replays.keep(COLOURS, random.Random(1))
        assert ours.mix(COLOURS, kept, random.Random(1)) == replays.mix(COLOURS, kept, random.Random(1))
    assert set(pick("clm_app.strategies", "replay").Settings.model_fields) < set(made("der").settings.model_dump())


def test_each_says_what_it_is_for_and_what_it_costs():
    for name in OURS:
        cls = pick("clm_app.strategies", name)
        assert cls.purpose and "row" in cls.needs and ("memory" in cls.needs or "disk" in cls.needs)
    assert pick("clm_app.strategies", "lwf").needs_parent and pick("clm_app.strategies", "der").needs_old_rows


# --- what is refused -------------------------------------------------------------------------------------------------


def state_of(folder: Path, file: str, found: dict, **metadata: str) -> Path:
    folder.mkdir()
    save_file(found, folder / file, metadata or None)
    return folder


@pytest.mark.parametrize("name, part", [("ewc", "fisher"), ("si", "anchor")])
def test_importances_of_other_weights_are_refused_before_anything_is_loaded(name, part, order_for, train, tmp_path):
    wide = {f"{part}/model.embed_tokens.weight": torch.ones(500, 64)}
    order = order_for(strategy=name, method="full", state=state_of(tmp_path / "wide", f"{name}.safetensors", wide))
    with pytest.raises(
        BadSettings, match=r"model\.embed_tokens\.weight of 500 x 64, which is \d+ x 64 here: the tokeni"
    ):
        train(order)
    other = {f"{part}/model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}
    order = order_for(strategy=name, method="full", state=state_of(tmp_path / "other", f"{name}.safetensors", other))
    with pytest.raises(BadSettings, match=r"of 2 x 2, which is not here: .* Start from a version of the same kind, or"):
        train(order)


def test_si_refuses_importances_of_an_adapter_that_is_not_trained_on(stream, order_for, train):
    seen = stream("si", "lora", epochs=1)
    order = order_for("fresh", strategy="si", method="lora", state=seen.changes["state"])
    with pytest.raises(BadSettings, match=r"lora_A\.weight of 32 x \d+, which is not here"):
        train(order)
    with pytest.raises(BadSettings, match=r"lora_A\.weight of 32 x \d+, which is not here"):
        train(order.model_copy(update={"method": "full", "adapter": seen.changes["adapter"]}))


def test_der_refuses_stored_answers_of_another_vocabulary(order_for, train, tmp_path):
    stored = {COLOURS[0].key: der.Stored(torch.zeros(2, 1).half(), torch.zeros(2, 1, dtype=torch.int32))}
    state = state_of(tmp_path / "state", der.FILE, der.packed(stored), vocabulary="another")
    with pytest.raises(BadSettings, match=r"token ids of another vocabulary.* or choose strategy replay\."):
        train(order_for(strategy="der", state=state))


def test_what_was_packed_is_read_again_by_row():
    torch.manual_seed(0)
    some = {f"{i:012x}": der.Stored(torch.randn(i + 1, 2 + i).half(), torch.randint(9, (i + 1, 2 + i)).int())
            for i in range(3)}  # fmt: skip
    packed = der.packed(some)
    assert packed["values"].shape == (1 + 2 + 3, 4)
    for key, stored in some.items():
        place = list(some).index(key)
        start = sum(range(1, place + 1))
        values = packed["values"][start : start + place + 1]
        assert torch.equal(values[:, : stored.values.shape[1]], stored.values)
        assert (values[:, stored.values.shape[1] :] == der.NOTHING).all()
