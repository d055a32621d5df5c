"""Merging is of whole weight changes and exact, the step back is the largest that holds, and O-LoRA's ranks add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from clm_app.catalog import pick
from clm_app.data.rows import Row, dump, load
from clm_app.data.template import load_tokenizer
from clm_app.engine import merging
from clm_app.engine.batches import Encoded
from clm_app.engine.measure import outcomes
from clm_app.errors import BadSettings
from tests.smallest import TASKS, make_rows

ANIMALS = [Row(**row) for row in make_rows(16, TASKS["Animals"])]
CPU = torch.device("cpu")


def one(*values: float) -> dict[str, torch.Tensor]:
    """Return a change of a single weight."""
    return {"w": torch.tensor(values, dtype=torch.float32)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the rules, by hand ----------------------------------------------------------------------------------------------


def test_linear_is_the_weighted_sum_and_a_missing_weight_has_not_changed():
    assert merging.linear([one(1, 2), one(3, -2)], [0.5, 2])["w"].tolist() == [6.5, -3]
    both = merging.linear([one(1, 2), {"v": torch.tensor([4.0])}], [1, 0.5])
    assert both["w"].tolist() == [1, 2] and both["v"].tolist() == [2]


def test_trimming_keeps_the_largest_share():
    change = torch.tensor([3.0, -1, 0.5, -4])
    kept = {density: merging.trim(change, density).tolist() for density in (0.25, 0.5, 0.6, 1)}
    assert kept == {0.25: [0, 0, 0, -4], 0.5: [3, 0, 0, -4], 0.6: [3, -1, 0, -4], 1: [3, -1, 0.5, -4]}


def test_ties_trims_elects_a_sign_and_averages_those_that_agree():
    a, b = one(3, -1, 0.5, -4), one(-2, 2, 0.25, -1)
    # trimmed to half: [3, 0, 0, -4] and [-2, 2, 0, 0]; elected by the sum [1, 2, 0, -4]
    assert merging.ties([a, b], 0.5)["w"].tolist() == [3, 2, 0, -4]
    # nothing trimmed: sums [1, 1, 0.75, -5]; who agrees: a, b, both, both
    assert merging.ties([a, b], 1)["w"].tolist() == [3, 2, 0.375, -2.5]
    # three times the weight for b turns the first election, and means are weighted: (0.5 + 3 * 0.25) / 4
    assert merging.ties([a, b], 1, [1, 3])["w"].tolist() == [-2, 2, 0.3125, -1.75]
    assert merging.ties([a, b], 1, [1, 0])["w"].tolist() == a["w"].tolist()


def test_dare_drops_by_lot_and_makes_up_for_it():
    change = one(*range(1, 2001))
    thinned = merging.dare([change], [1.0], 0.25, generator())["w"]
    stayed = thinned != 0
    assert torch.equal(thinned[stayed], change["w"][stayed] * 4)
    assert 420 < stayed.sum() < 580, "500 of 2000, four deviations of 19"
    assert torch.equal(thinned, merging.dare([change], [1.0], 0.25, generator())["w"])
    assert not torch.equal(thinned, merging.dare([change], [1.0], 0.25, generator(1))["w"])
    two = [one(1, -2), one(4, 8)]
    draws = generator()
    mean = sum(merging.dare(two, [0.5, 0.25], 0.5, draws)["w"] for _ in range(4000)) / 4000
    assert mean.tolist() == pytest.approx([1.5, 1.0], abs=0.15), "on average, the weighted sum"
    assert merging.dare(two, [0.5, 0.25], 1.0, generator())["w"].tolist() == [1.5, 1.0]


def test_slerp_goes_along_the_arc():
    half, root = merging.slerp(one(1, 0), one(0, 1), 0.5)["w"], 0.5**0.5
    assert half.tolist() == pytest.approx([root, root]), "on the circle, and not inside it"
    third = merging.slerp(one(3, 0), one(0, 1), 1 / 3)["w"]
    assert third.tolist() == pytest.approx([3 * 0.75**0.5, 0.5]), "sin 60 and sin 30 degrees"
    assert [merging.slerp(one(3, 1), one(-1, 2), t)["w"].tolist() for t in (0, 1)] == [[3, 1], [-1, 2]]
    for a, b in ((one(1, 1), one(3, 3)), (one(1, 1), one(-3, -3)), (one(0, 0), one(4, 8))):
        assert merging.slerp(a, b, 0.25)["w"].tolist() == (0.75 * a["w"] + 0.25 * b["w"]).tolist(), "no arc: the line"


def test_the_largest_change_wins_entry_by_entry():
    assert merging.largest([one(1, -5, 2), one(-3, 4, -2)])["w"].tolist() == [-3, -5, 2]


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tiny_model, tmp_path):
    """A PEFT model with two random adapters, and the folder of each."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = lambda rank, alpha: LoraConfig(  # noqa: E731
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config(4, 8), adapter_name="a")
    model.add_adapter("b", config(4, 8))
    model.save_pretrained(tmp_path)
    return model, tmp_path / "a", tmp_path / "b"


def peft_delta(model, adapter: str) -> dict[str, torch.Tensor]:
    """Return what PEFT itself says an adapter adds."""
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules() if adapter in getattr(module, "lora_A", {})
    }  # fmt: skip


def error(found: dict, true: dict) -> float:
    """Return how far a change is from another, as a share of that one's norm, over all weights."""
    assert found.keys() == true.keys()
    lost, whole = (sum(t.square().sum() for t in ts) for ts in ([found[n] - true[n] for n in true], true.values()))
    return float((lost / whole) ** 0.5)


def test_the_change_read_from_a_folder_is_what_peft_adds(adapters):
    model, a, _ = adapters
    assert error(merging.lora_delta(a), peft_delta(model, "a")) < 1e-6


def test_adapters_side_by_side_are_exactly_their_sum_whatever_their_ranks_and_strengths(adapters, tiny_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    _, a, _ = adapters
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    other = get_peft_model(base, LoraConfig(
        r=3, lora_alpha=15, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    ))  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    whole = merging.cat([merging.read_lora(a), merging.read_lora(tmp_path / "other")])
    assert whole.config["r"] == 7 and whole.scale == 5
    true = merging.linear([merging.lora_delta(a), merging.lora_delta(tmp_path / "other")], [1, 1])
    assert error(whole.deltas(), true) < 1e-6
    (tmp_path / "whole").mkdir()
    merging.write_lora(whole, tmp_path / "whole")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "whole", adapter_name="w"
    )
    assert error(peft_delta(loaded, "w"), true) < 1e-6, "PEFT reads it as it was meant"


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear"])
def test_what_peft_calls_merging_is_far_from_merging_the_changes(how, adapters):
    model, a, b = adapters
    changes = [merging.lora_delta(a), merging.lora_delta(b)]
    true = merging.ties(changes, 1.0) if how == "ties" else merging.linear(changes, [0.5, 0.5])
    weights = [1.0, 1.0] if how == "ties" else [0.5, 0.5]
    model.add_weighted_adapter(["a", "b"], weights, "merged", combination_type=how, density=1.0)
    assert error(peft_delta(model, "merged"), true) > 0.5
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "cat", combination_type="cat")
    assert error(peft_delta(model, "cat"), merging.linear(changes, [0.5, 0.5])) < 1e-5, "the measure itself is sound"


@pytest.mark.parametrize("knob", ["use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"])
def test_an_adapter_that_is_not_plain_is_refused_by_name(knob, adapters):
    _, a, _ = adapters
    config = json.loads((a / "adapter_config.json").read_text())
    (a / "adapter_config.json").write_text(json.dumps(config | {knob: True}))
    with pytest.raises(BadSettings, match=f"uses {knob}; .* Start from a version that CLM trained"):
        merging.lora_delta(a)


def test_the_nearest_adapter_of_a_rank_says_what_it_lost():
    delta = torch.diag(torch.tensor([4.0, 3.0, 0.0]))
    a, b, residual = merging.as_lora(delta, 1)
    assert (a.shape, b.shape, residual) == ((1, 3), (3, 1), pytest.approx(0.6)), "3 of sqrt(3² + 4²)"
    assert torch.allclose(b @ a, torch.diag(torch.tensor([4.0, 0, 0])), atol=1e-6)
    for rank in (2, 5):
        a, b, residual = merging.as_lora(delta, rank)
        assert a.shape[0] == rank and residual < 1e-6 and torch.allclose(b @ a, delta, atol=1e-5)
    assert merging.as_lora(torch.zeros(3, 2), 1)[2] == 0
    torch.manual_seed(0)
    a, b = torch.randn(6, 20), torch.randn(30, 6)
    thin, dense = merging.as_lower_rank(a, b, 3), merging.as_lora(b @ a, 3)
    assert torch.allclose(thin[1] @ thin[0], dense[1] @ dense[0], atol=1e-4) and thin[2] == pytest.approx(dense[2])


# --- a stream of two tasks -------------------------------------------------------------------------------------------


@pytest.fixture
def second(order_for, train, tiny_model, tmp_path, exam_on):
    """Return a function that trains Animals on a version that has learned Colours, and returns what was seen."""
    dump(ANIMALS, tmp_path / "animals.jsonl")
    parents = {}

    def parent(method: str) -> Path:
        if method not in parents:
            more = {"method_settings": {"rank": 4, "alpha": 8}} if method == "lora" else {}
            order = order_for(f"parent-{method}", method=method, training={"epochs": 12, "learning_rate": 5e-3}, **more)
            train(order)
            parents[method] = order.folder / "weights"
        return parents[method]

    def order(folder: str, strategy: str, method: str = "full", training: dict | None = None, **changes):
        place = parent(method)
        colours = tmp_path / f"parent-{method}" / "rows.jsonl"
        here = {"base": place, "adapter": None} if method == "full" else {
            "base": tiny_model, "adapter": place, "method_settings": {"rank": 4, "alpha": 8}
        }  # fmt: skip
        return order_for(folder, strategy=strategy, method=method, **here | {
            "root": tiny_model, "rows": tmp_path / "animals.jsonl", "held_out": {"3": colours}, "task": "animals",
            "training": {"epochs": 4, "learning_rate": 3e-3, "seed": 1} | (training or {}),
            "after": [exam_on(tmp_path / "animals.jsonl", 7, "validation"), exam_on(colours, 3)],
        } | changes)  # fmt: skip

    def go(folder: str, strategy: str, method: str = "full", stop_before: int | None = None, **changes):
        made = order(folder, strategy, method, **changes)
        seen = train(made, stop_before=stop_before, ticking=True)
        seen.order = made
        seen.parent = {n: t for f in parent(method).glob("*.safetensors") for n, t in load_file(f).items()}
        seen.figures = seen.trained.figures["strategy"] if seen.trained else {}
        return seen

    go.order = order
    return go


def changes_of(seen, base: Path) -> tuple[dict, dict]:
    """Return the changes since the base of (version before, trained), dense."""
    if seen.order.method == "lora":
        return merging.lora_delta(seen.order.adapter), merging.lora_delta(seen.order.folder / "weights")
    root = load_file(base / "model.safetensors")
    return tuple({n: t - root[n] for n, t in found.items()} for found in (seen.parent, seen.weights))


# --- merge -----------------------------------------------------------------------------------------------------------

RULES = {
    "linear": lambda p, t: merging.linear([p, t], [0.75, 0.25]),
    "ties": lambda p, t: merging.ties([p, t], 0.3, [0.75, 0.25]),
    "slerp": lambda p, t: merging.slerp(p, t, 0.25),
    "max": lambda p, t: merging.largest([p, t]),
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("how", RULES)
def test_merge_leaves_the_merged_change_of_what_training_alone_would_leave(how, method, second, tiny_model):
    alone = second("alone", "naive", method)
    parent, trained = changes_of(alone, tiny_model)
    settings = {"how": how, "weight": 0.25, "density": 0.3}
    seen = second("merged", "merge", method, strategy_settings=settings)
    found, wanted = changes_of(seen, tiny_model)[1], RULES[how](parent, trained)
    assert seen.figures["merged"] and error(trained, wanted) > 0.05, "merging has changed something"
    if method == "full":
        assert error(found, wanted) < 1e-4
    else:
        assert error(found, wanted) == pytest.approx(seen.figures["residual_share"], abs=1e-4)
        assert 0.001 < seen.figures["residual_share"] < 0.7, "rank 4 cannot hold all of it"


def test_each_knob_of_merge_changes_the_weights(second):
    assert set(pick("clm_app.strategies", "merge").Settings.model_fields) == {"how", "weight", "density"}
    plain = {"how": "dare", "weight": 0.5, "density": 0.5}
    runs = [second(str(i), "merge", strategy_settings=plain | turn)
            for i, turn in enumerate([{}, {"weight": 0.9}, {"density": 0.9}, {"how": "ties"}, {}])]  # fmt: skip
    first = [seen.weights["model.norm.weight"] for seen in runs]
    assert all(not torch.equal(first[0], other) for other in first[1:4])
    assert torch.equal(first[0], first[4]), "what dare drops is decided by the seed"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_merge_and_wise_leave_a_first_task_as_it_was_trained(method, order_for, train, tiny_model):
    plain, merged, wise = (
        train(order_for(name, strategy=name, method=method, root=tiny_model)) for name in ("naive", "merge", "wise")
    )
    for seen in (merged, wise):
        assert all(torch.equal(plain.weights[name], seen.weights[name]) for name in plain.weights)


def test_merging_an_adapter_takes_its_base_as_root(second, order_for, train, tiny_model):
    """A fresh adapter over a base that has learned has nothing before it to merge with."""
    seen = second("over-full", "merge", "full", method_settings={}, strategy_settings={})
    assert seen.figures == {"merged": True}
    order = order_for("fresh", strategy="merge", method="lora", base=second.order("x", "naive").base, root=tiny_model)
    assert train(order).trained.figures["strategy"] == {"merged": False}


# --- wise ------------------------------------------------------------------------------------------------------------


def loss_at(tiny_model, weights: dict, rows: list[Row]) -> float:
    """Return nats per answer token of a model with these weights, made from nothing."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.load_state_dict(weights)
    found = outcomes(model, rows, Encoded(load_tokenizer(tiny_model), 512), CPU)
    return sum(line["loss"] for line in found) / sum(line["tokens"] for line in found)


@pytest.fixture
def on_the_line(second, tiny_model, tmp_path):
    """Return, for full weights, {step: (loss of the past task, loss of the new one)} from 0 to 10, by brute force."""
    alone = second("alone", "naive")
    colours = load(tmp_path / "parent-full" / "rows.jsonl")
    found = {}
    for step in range(11):
        between = {n: alone.parent[n] + step / 10 * (alone.weights[n] - alone.parent[n]) for n in alone.weights}
        found[step] = loss_at(tiny_model, between, colours), loss_at(tiny_model, between, ANIMALS)
    return found


def test_wise_takes_the_largest_step_that_holds_every_bound_as_a_brute_force_search_does(second, on_the_line):
    past, new = ({step: pair[i] for step, pair in on_the_line.items()} for i in (0, 1))
    rises = sorted(past[step] - past[0] for step in range(1, 11))
    assert rises[-1] > 1.0 and new[0] - new[10] > 1.0, "the past is forgotten and the new is learned"
    found = []
    for i, tolerance in enumerate([0.0, (rises[3] + rises[4]) / 2, (rises[6] + rises[7]) / 2, 100.0]):
        best = max(s for s in range(11) if past[s] - past[0] <= tolerance)
        settings = {"tolerance": tolerance, "least_gain": 0.0}
        seen = second(f"w{i}", "wise", strategy_settings=settings)
        assert seen.figures["alpha"] == [best / 10] and seen.figures["within_tolerance"]
        assert seen.figures["losses"]["3"]["repaired"] == pytest.approx(past[best], abs=1e-3)
        assert seen.figures["losses"]["new"]["repaired"] == pytest.approx(new[best], abs=1e-3)
        assert seen.figures["rows"] == {"3": 16, "new": 16}
        for name, tensor in seen.weights.items():
            assert torch.allclose(tensor, torch.lerp(seen.parent[name], alone_weights(second)[name], best / 10))
        found.append(best)
    assert found[0] == 0 and 0 < found[1] < found[2] < 10 and found[3] == 10


def alone_weights(second) -> dict:
    """Return the weights that training alone left."""
    if not hasattr(second, "alone"):
        second.alone = second("alone-again", "naive").weights
    return second.alone


def test_wise_that_cannot_hold_both_bounds_keeps_the_least_that_was_to_be_learned(second, on_the_line):
    new = {step: pair[1] for step, pair in on_the_line.items()}
    least = min(s for s in range(11) if new[0] - new[s] >= 0.8 * (new[0] - new[10]))
    seen = second("both", "wise", strategy_settings={"tolerance": 0.0, "least_gain": 0.8})
    assert seen.figures["alpha"] == [least / 10] and not seen.figures["within_tolerance"] and 0 < least


def test_wise_by_depth_steps_no_less_than_as_a_whole_and_holds_the_bounds(second, on_the_line):
    rises = sorted(pair[0] - on_the_line[0][0] for pair in on_the_line.values())
    settings = {"tolerance": (rises[5] + rises[6]) / 2, "least_gain": 0.0}
    whole, deep = (second(f"g{g}", "wise", strategy_settings=settings | {"groups": g}) for g in (1, 2))
    (alpha,), alphas = whole.figures["alpha"], deep.figures["alpha"]
    assert len(alphas) == 2 and min(alphas) >= alpha
    lost = deep.figures["losses"]["3"]
    assert lost["repaired"] - lost["before"] <= settings["tolerance"] < lost["trained"] - lost["before"]
    trained = alone_weights(second)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.allclose(deep.weights[name], torch.lerp(deep.parent[name], trained[name], alphas[0]))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.allclose(deep.weights[name], torch.lerp(deep.parent[name], trained[name], alphas[1]))


def test_wise_on_an_adapter_goes_the_line_of_whole_changes_to_the_ends_exactly(second, tiny_model):
    alone = second("alone", "naive", "lora")
    parent, trained = changes_of(alone, tiny_model)
    ends = {}
    for tolerance in (0.0, 100.0):
        seen = second(f"t{tolerance}", "wise", "lora", strategy_settings={"tolerance": tolerance, "least_gain": 0.0})
        ends[seen.figures["alpha"][0]] = seen.weights
    assert all(torch.equal(ends[0.0][n], alone.parent[n]) for n in alone.parent)
    assert all(torch.equal(ends[1.0][n], alone.weights[n]) for n in alone.weights)
    seen = second("half", "wise", "lora", strategy_settings={"tolerance": 0.0, "least_gain": 0.5, "steps": 4})
    (alpha,) = seen.figures["alpha"]
    assert 0 < alpha < 1
    wanted = merging.linear([parent, trained], [1 - alpha, alpha])
    assert error(changes_of(seen, tiny_model)[1], wanted) == pytest.approx(seen.figures["rank_residual"], abs=1e-4)


def test_wise_on_a_fresh_adapter_scales_it_exactly(second, order_for, train, tiny_model):
    over = {"base": second.order("x", "naive").base, "adapter": None, "method_settings": {"rank": 4, "alpha": 8}}
    like = second.order("like", "wise", "lora", **over, strategy_settings={"tolerance": 0.0, "least_gain": 0.5})
    seen = train(like)
    alone = train(second.order("alone", "naive", "lora", **over))
    (alpha,) = seen.trained.figures["strategy"]["alpha"]
    assert 0 < alpha < 1 and seen.trained.figures["strategy"]["rank_residual"] == 0
    for name, tensor in alone.weights.items():
        assert torch.allclose(seen.weights[name], tensor * (alpha if "lora_B" in name else 1), atol=1e-7)


def test_each_knob_of_wise_changes_the_search(second):
    assert set(pick("clm_app.strategies", "wise").Settings.model_fields) == {
        "tolerance", "least_gain", "steps", "groups", "rows",
    }, "tolerance, least_gain and groups are turned above"  # fmt: skip
    coarse = {"rows": 5, "steps": 3, "tolerance": 0.0, "least_gain": 0.5}
    few = second("few", "wise", strategy_settings=coarse)
    assert few.figures["rows"] == {"3": 5, "new": 5}
    assert few.figures["alpha"][0] in (1 / 3, 2 / 3), "a third is a step that tenths have not"
    with pytest.raises(ValidationError):
        pick("clm_app.strategies", "wise").Settings(groups=4)


def test_wise_refuses_to_search_without_rows_to_measure(second, exam_on, tmp_path):
    with pytest.raises(BadSettings, match=r"no held-out rows of them .* Add validation rows of past tasks"):
        second("blind", "wise", held_out={})
    with pytest.raises(BadSettings, match=r"No validation rows of the new task"):
        second("deaf", "wise", after=[exam_on(tmp_path / "animals.jsonl")])
    again = [exam_on(tmp_path / "animals.jsonl", 7, "validation")]
    seen = second("again", "wise", held_out={}, after=again, task="task 7")
    assert seen.figures == {"alpha": [1.0], "searched": False}, "a task learned again has nothing beside it to protect"


# --- olora -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(6, 70).view(2, 32)).logits


def written(tiny_model, folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)


def test_the_adapter_of_olora_answers_as_the_model_that_was_trained_and_measured(second, tiny_model):
    seen = second("o", "olora", "lora", method_settings={"rank": 3, "alpha": 12})
    place = seen.order.folder / "weights"
    assert torch.allclose(logits(written(tiny_model, place)), logits(seen.model), atol=1e-5)
    assert (logits(written(tiny_model, place)) - logits(written(tiny_model, seen.order.adapter))).abs().max() > 1e-2
    assert sorted(file.name for file in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((place / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], seen.figures["rank"]) == (7, 28, 7), "4 + 3, at 12 / 3"


def test_olora_leaves_earlier_ranks_as_they_are_bit_by_bit_and_a_third_task_adds_its_own(second):
    seen = second("o", "olora", "lora")
    for name, tensor in seen.parent.items():
        earlier = seen.weights[name][:4] if "lora_A" in name else seen.weights[name][:, :4]
        assert torch.equal(earlier, tensor)
    third = second("third", "olora", "lora", adapter=seen.order.folder / "weights")
    assert third.figures["rank"] == 12
    assert all(torch.equal(third.weights[n][:8], t) for n, t in seen.weights.items() if "lora_A" in n)


def test_olora_keeps_new_ranks_out_of_the_way_of_earlier_ones(second):
    overlaps = {}
    for strength in (0.0, 1.0):
        seen = second(f"s{strength}", "olora", "lora", strategy_settings={"strength": strength},
                      training={"epochs": 12, "learning_rate": 1e-2})  # fmt: skip
        parts = [(t[:4], t[4:]) for n, t in seen.weights.items() if "lora_A" in n]
        overlaps[strength] = sum((new @ old.T).square().sum().item() for old, new in parts)
        assert seen.figures["overlap"] == pytest.approx(overlaps[strength], rel=1e-4)
        assert seen.steps[-1].loss < seen.steps[0].loss
    assert overlaps[1.0] < 0.1 * overlaps[0.0]
    assert set(pick("clm_app.strategies", "olora").Settings.model_fields) == {"strength"}


def test_olora_begins_where_its_parent_answers_and_on_a_bare_base_is_plain_lora(second, order_for, train):
    first = second("o", "olora", "lora", strategy_settings={"strength": 0.0}, stop_before=1)
    plain = second("n", "naive", "lora", stop_before=1)
    assert [s.loss for s in first.steps] == pytest.approx([s.loss for s in plain.steps], rel=1e-2), "dropout differs"
    bare, naive = (train(order_for(name, strategy=name)) for name in ("olora", "naive"))
    assert all(torch.equal(bare.weights[n], naive.weights[n]) for n in naive.weights)


@pytest.mark.parametrize(
    "name", ["merge", "wise", "olora", "synthesised", "naive", "replay", "ewc", "der", "replay+l2sp"]
)
def test_a_set_of_task_adapters_is_refused_with_the_way_to_go_on(name, order_for, train, tmp_path):
    from clm_app.routes import Router

    Router().save(tmp_path)
    with pytest.raises(BadSettings, match="Go on with strategy adapters, or start from v0"):
        train(order_for(strategy=name, adapter=tmp_path))
