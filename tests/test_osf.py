"""OSF: what is frozen stays where it was to float tolerance, more of it with each task, and a version is a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from clm_app.catalog import pick
from clm_app.data.rows import Row, dump
from clm_app.data.template import load_tokenizer
from clm_app.engine.batches import Encoded
from clm_app.engine.measure import outcomes
from clm_app.errors import BadSettings
from clm_app.strategies.osf import Osf
from tests.smallest import TASKS, make_rows

ROWS = {task: [Row(**row) for row in make_rows(32, labels)] for task, labels in TASKS.items()}
CPU = torch.device("cpu")
SIDES = (64, 32, 32, 64, 64, 64, 64)  # shorter side of q, k, v, o, gate, up and down, in each of two layers


@pytest.fixture
def stream(order_for, train, tmp_path, tiny_model):
    """Return a function that learns tasks one after the other and returns each run, with what it left for the next."""

    def learn(*tasks: str, strategy: str = "osf", epochs: int = 1, begun: dict | None = None, **settings):
        runs, changes = [], dict(begun or {})
        for task in tasks:
            folder = f"{strategy}-{len(list(tmp_path.iterdir()))}"
            dump(ROWS[task], tmp_path / f"{folder}.jsonl")
            order = order_for(
                folder, rows=tmp_path / f"{folder}.jsonl", task=task, root=tiny_model, strategy=strategy,
                strategy_settings=settings, method="full", training={"epochs": epochs, "learning_rate": 3e-3}, **changes,
            )  # fmt: skip
            done = train(order)
            changes = {"base": Path(done.trained.folder)}
            if "state" in done.trained.memory:
                changes["state"] = Path(done.trained.memory["state"])
            losses = {name: loss_on(done.model, order.base, rows) for name, rows in ROWS.items()}
            figures = done.trained.figures["strategy"]
            runs.append(SimpleNamespace(order=order, losses=losses, figures=figures, changes=changes, **vars(done)))
        return runs

    return learn


def loss_on(model, base: Path, rows: list[Row]) -> float:
    """Return the nats per answer token of some rows."""
    found = outcomes(model, rows, Encoded(load_tokenizer(base), 512), CPU)
    return sum(line["loss"] for line in found) / sum(line["tokens"] for line in found)


def linear(weights: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights that are split: all matrices but the embedding and the output layer."""
    return [name for name, tensor in weights.items() if "_proj" in name and tensor.ndim == 2]


def drift(before: dict, after: dict, share: float) -> tuple[float, float]:
    """Return how far the frozen directions were turned or scaled, and how far all was moved, each over the old norm.

    A direction u, v of strength s stands where W v = s u and u W = s v.
    """
    turned = moved = total = 0.0
    for name in linear(before):
        left, strength, right = torch.linalg.svd(before[name].double(), full_matrices=False)
        k, now = int(share * len(strength)), after[name].double()
        left, strength, right = left[:, :k], strength[:k], right[:k]
        turned += (now @ right.T - left * strength).square().sum() + (
            left.T @ now - strength[:, None] * right
        ).square().sum()
        moved += (now - before[name]).square().sum()
        total += before[name].double().square().sum()
    return (turned / total).sqrt().item(), (moved / total).sqrt().item()


def test_the_strongest_directions_stay_where_they_were_to_float_tolerance(stream, tiny_model, monkeypatch):
    before = load_file(tiny_model / "model.safetensors")
    turned, moved = drift(before, stream("Colours", epochs=4, first_share=0.5)[0].weights, 0.5)
    assert turned < 1e-5 and moved > 0.1
    monkeypatch.setattr(Osf, "after_step", lambda *_: None)
    turned, moved = drift(before, stream("Colours", epochs=4, first_share=0.5)[0].weights, 0.5)
    assert turned > 0.02 and moved > 0.1, "projected gradients alone, as PEFT has them, do not hold under Adam"


def test_a_version_is_a_plain_model_that_answers_as_the_split_one_did(stream, tiny_model, monkeypatch):
    ids, seen = torch.arange(6, 70).view(2, 32), {}
    merge = Osf.finish

    @torch.no_grad()
    def look_and_merge(self, engine, model):
        seen["split"] = model.eval()(ids).logits
        seen["layers"] = sum("osf" in type(module).__module__ for module in model.modules())
        merge(self, engine, model)

    monkeypatch.setattr(Osf, "finish", look_and_merge)
    run = stream("Colours", epochs=4, first_share=0.5)[0]
    assert seen["layers"] == 14 and run.trained.weights_kind == "full"
    assert run.weights.keys() == load_file(tiny_model / "model.safetensors").keys()
    assert not list(Path(run.trained.folder).glob("adapter_*")) and not hasattr(run.model, "peft_config")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(run.trained.folder).eval()(ids).logits
        before = AutoModelForCausalLM.from_pretrained(tiny_model).eval()(ids).logits
    assert (plain - seen["split"]).abs().max() < 5e-5 and (plain - before).abs().max() > 1


def test_a_split_model_tunes_its_linear_layers_alone_and_an_unsplit_one_every_weight(stream, tiny_model):
    before = load_file(tiny_model / "model.safetensors")
    split, plain = (stream("Colours", first_share=share)[0] for share in (0.25, 0.0))
    changed = lambda run: {name for name in before if not torch.equal(before[name], run.weights[name])}  # noqa: E731
    assert changed(split) == set(linear(before)) and changed(plain) == set(before)
    assert split.trained.figures["trained_parameters"] == sum(before[name].numel() for name in linear(before))
    assert split.trained.figures["parameters"] == sum(tensor.numel() for tensor in before.values())
    naive = stream("Colours", strategy="naive")[0]
    assert all(torch.equal(naive.weights[name], plain.weights[name]) for name in before), "nothing is frozen yet"


def test_what_is_frozen_grows_with_the_tasks_learned_up_to_its_bound(stream):
    runs = stream(*TASKS, "Animals", first_share=0.125, share_per_task=0.25, most_share=0.5)
    assert [run.figures["learned_tasks"] for run in runs] == [0, 1, 2, 3]
    shares = [0.125, 0.375, 0.5, 0.5]
    assert [run.figures["frozen_share"] for run in runs] == shares
    assert [run.figures["frozen_directions"] for run in runs] == [2 * sum(int(n * s) for n in SIDES) for s in shares]
    for before, run, share in zip(runs, runs[1:], shares[1:], strict=False):
        assert drift(before.weights, run.weights, share)[0] < 1e-5, "taken anew from what was learned last"
    state = json.loads((Path(runs[-1].trained.memory["state"]) / "osf.json").read_text())
    assert state == {"tasks": sorted(TASKS)}, "a task that came twice is counted once"


def test_tasks_that_another_strategy_learned_are_counted_too(stream):
    naive = stream("Colours", strategy="naive")[0]
    assert stream("Animals", begun=naive.changes)[0].figures["learned_tasks"] == 1, "something was learned"
    known = naive.changes | {"learned": ["Colours", "Tools"]}
    run = stream("Animals", begun=known)[0]
    assert run.figures["learned_tasks"] == 2
    assert json.loads((run.changes["state"] / "osf.json").read_text())["tasks"] == ["Animals", "Colours", "Tools"]


def test_it_halves_forgetting_where_the_share_per_task_is_one_part_of_the_tasks(stream):
    """Two tasks, so 1/n is a half. Measured: naive 3.0 nats, OSF 2.4 at a tenth frozen and 1.1 at a half."""
    lost, left = {}, {}
    for name, settings in (("naive", {}), ("osf", {"share_per_task": 0.5}), ("little", {"share_per_task": 0.1})):
        strategy = "naive" if name == "naive" else "osf"
        first, second = stream("Colours", "Animals", strategy=strategy, epochs=12, **settings)
        lost[name] = second.losses["Colours"] - first.losses["Colours"]
        left[name] = second.losses["Animals"] / first.losses["Animals"]
    assert lost["naive"] > 2 and lost["osf"] < 0.5 * lost["naive"] and lost["osf"] < 0.7 * lost["little"], lost
    assert left["osf"] < 0.1, "it still learns"


def test_beside_replay_a_killed_run_ends_with_the_very_same_weights(order_for, train, stream, tmp_path):
    base = stream("Colours")[0].changes["base"]
    dump(ROWS["Animals"], tmp_path / "animals.jsonl")
    dump(ROWS["Colours"][:8], tmp_path / "kept.jsonl")
    how = {
        "strategy": "replay+osf", "strategy_settings": {"osf": {"share_per_task": 0.5}}, "method": "full", "base": base,
        "rows": tmp_path / "animals.jsonl", "task": "Animals", "learned": ["Colours"], "kept_tasks": {"1": "Colours"},
        "kept": {"1": tmp_path / "kept.jsonl"}, "training": {"epochs": 2, "checkpoint_every_s": 3.5},
    }  # fmt: skip
    whole = train(order_for("whole", **how), ticking=True)
    killed = order_for("killed", **how)
    train(killed, stop_before=19, ticking=True)
    again = train(killed, ticking=True)
    assert 0 < len(again.steps) < len(whole.steps) == 32
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)
    assert drift(load_file(base / "model.safetensors"), again.weights, 0.5)[0] < 1e-5
    figures = [seen.trained.figures["strategy"] for seen in (whole, again)]
    assert figures[0] == figures[1] and figures[0]["osf"]["frozen_share"] == 0.5
    assert again.trained.figures["rehearsed"] == {"1": 32}
    state = json.loads((Path(again.trained.memory["state"]) / "osf" / "osf.json").read_text())
    assert state == {"tasks": ["Animals", "Colours"]}


def test_every_knob_has_its_turn_here_and_its_bounds():
    assert set(Osf.Settings.model_fields) == {"first_share", "share_per_task", "most_share"}, (
        "a new knob needs its test"
    )
    for knob in Osf.Settings.model_fields:
        with pytest.raises(ValueError, match="less than 1"):
            Osf.Settings(**{knob: 1.0})
    assert Osf.Settings().share_per_task == 0.1 and pick("clm_app.strategies", "osf").methods == ("full",)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_it_refuses_an_adapter(order_for, train):
    with pytest.raises(BadSettings, match=r"method lora freezes them\. Choose method full, or strategy olora"):
        train(order_for(strategy="osf", method="lora"))


def test_it_refuses_quantised_weights_before_anything_is_loaded(order_for, train, tmp_path, tiny_model):
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "small").mkdir()
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "small")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadSettings, match=r"quantised \(bitsandbytes\), .* Choose the same model in full precision"):
        train(order_for(strategy="osf", method="full", base=tmp_path / "small"))


@pytest.mark.parametrize("partner", ["ewc", "l2sp", "si", "ema"])
def test_it_refuses_a_partner_that_looks_at_plain_weights(partner, order_for, train):
    with pytest.raises(BadSettings, match=rf"{partner} looks at the plain weights .* such as replay\+osf"):
        train(order_for(strategy=f"osf+{partner}", method="full"))


def test_it_refuses_a_state_without_a_count(order_for, train, tmp_path):
    with pytest.raises(BadSettings, match=r"holds no osf\.json, .* Start from a version that was learned with it"):
        train(order_for(strategy="osf", method="full", state=tmp_path))


def test_it_refuses_a_share_that_freezes_nothing(order_for, train):
    with pytest.raises(BadSettings, match=r"A share of 0\.01 freezes no direction .* Choose a larger share_per_task"):
        train(order_for(strategy="osf", method="full", strategy_settings={"first_share": 0.01}))
