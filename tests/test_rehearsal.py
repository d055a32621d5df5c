"""What is rehearsed: budgets hold, herding picks what stands for all, what is forgotten comes more often, and the rest."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import permutations

import pytest
import torch
from transformers import AutoModelForCausalLM

from clm_app.catalog import pick
from clm_app.data.rows import Row, dump, load
from clm_app.data.template import load_tokenizer, prompt_ids
from clm_app.engine.batches import Encoded
from clm_app.engine.measure import outcomes
from clm_app.errors import BadSettings
from clm_app.strategies._combined import made as combined
from clm_app.strategies.forgotten import _counts
from clm_app.strategies.herding import _features, _herd
from clm_app.strategies.replay import bytes_of, in_turn, tokens_of
from clm_app.strategies.synthesised import _around_user
from tests.smallest import TASKS, make_rows

CPU = torch.device("cpu")
NEW = [Row(**row) for row in make_rows(40, TASKS["Colours"])]
OLD = {"3": [Row(**row) for row in make_rows(20, TASKS["Animals"])],
       "11": [Row(**row) for row in make_rows(7, TASKS["Tools"])]}  # fmt: skip
KEEPING = ("replay", "herding", "forgotten")


def made(name: str, seed: int = 0, **settings):
    cls = pick("clm_app.strategies", name)
    return cls(cls.Settings(**settings), seed)


# --- budgets ---------------------------------------------------------------------------------------------------------

UNEQUAL = [Row(prompt="é" * (1 + i * 7 % 50), response="yes" if i % 2 else "no", label="") for i in range(50)]


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("limit", [1, 300, 999, 10**6])
def test_the_file_of_kept_rows_is_never_larger_than_the_budget_and_leaves_no_row_out_that_fits(name, limit, tmp_path):
    kept = made(name, bytes_per_task=limit).keep(UNEQUAL, random.Random(0))
    dump(kept, tmp_path / "kept.jsonl")
    size = (tmp_path / "kept.jsonl").stat().st_size
    assert size <= limit
    assert all(size + bytes_of(row) > limit for row in UNEQUAL if row not in kept)


@pytest.mark.parametrize("name", KEEPING)
def test_the_tokens_of_kept_rows_are_never_more_than_the_budget(name):
    assert [tokens_of(Row(prompt="a" * n, response="b")) for n in (3, 4, 7, 8)] == [1, 2, 2, 3], "rounded up"
    for limit in (1, 20, 120, 10**6):
        kept = made(name, tokens_per_task=limit).keep(UNEQUAL, random.Random(0))
        total = sum(map(tokens_of, kept))
        assert total <= limit and all(total + tokens_of(row) > limit for row in UNEQUAL if row not in kept)


def test_every_budget_holds_at_once_and_labels_stay_balanced():
    kept = made("replay", tokens_per_task=100, bytes_per_task=900, rows_per_task=6).keep(UNEQUAL, random.Random(0))
    assert Counter(row.label for row in kept) == {"yes": 3, "no": 3}
    assert sum(map(tokens_of, kept)) <= 100 and sum(map(bytes_of, kept)) <= 900


def test_groups_take_turns_until_each_is_through():
    a, b, c, d = (Row(prompt=p, response="r") for p in "abcd")
    assert list(in_turn([[a], [b, c, d], []])) == [a, b, c, d] and list(in_turn([[a, b], [c, d]])) == [a, c, b, d]


# --- joint -----------------------------------------------------------------------------------------------------------


def test_joint_trains_every_row_of_every_task_once_a_pass_and_keeps_them_all():
    mix = made("joint").mix(NEW, OLD, random.Random(0))
    assert Counter(mix) == Counter(
        [("new", row) for row in NEW] + [(s, row) for s, rows in OLD.items() for row in rows]
    )
    assert made("joint").keep(NEW, random.Random(0)) == NEW
    assert "ceiling" in pick("clm_app.strategies", "joint").purpose


# --- herding ---------------------------------------------------------------------------------------------------------


def test_herding_picks_as_a_search_of_every_choice_does():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(7, 3))
    mean, picks = features.mean(0), list(_herd(features))
    assert sorted(picks) == list(range(7))
    for count in range(1, 8):
        distance = lambda last: (features[[*picks[: count - 1], last]].mean(0) - mean).norm().item()  # noqa: B023, E731
        assert picks[count - 1] == min(set(range(7)) - set(picks[: count - 1]), key=distance)
    best = min((features[list(some)].mean(0) - mean).norm().item() for some in permutations(range(7), 3))
    worst = max((features[list(some)].mean(0) - mean).norm().item() for some in permutations(range(7), 3))
    found = (features[picks[:3]].mean(0) - mean).norm().item()
    assert found < best + 0.3 * (worst - best), "greedy, and near the best of all triples"


def test_a_row_is_seen_by_its_prompt_alone_whatever_stands_beside_it(tiny_model):
    model, encoded = AutoModelForCausalLM.from_pretrained(tiny_model), Encoded(load_tokenizer(tiny_model), 512)
    rows = [NEW[0], Row(prompt="a far longer prompt than all others " * 3, response="yes")]
    found = _features(model, [*rows, Row(prompt=NEW[0].prompt, response="another and longer answer")], encoded, CPU)
    ids = torch.tensor([encoded(NEW[0])[0]])
    with torch.no_grad():
        mean = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    assert torch.allclose(found[0], mean / mean.norm(), atol=1e-5) and torch.allclose(found[2], found[0], atol=1e-5)
    assert not torch.allclose(found[1], found[0], atol=0.05)


def test_herding_keeps_rows_nearer_to_their_label_than_a_draw_does(order_for, train):
    def kept_by(name: str):
        how = {"strategy": name, "strategy_settings": {"rows_per_task": 8}, "method": "full"}
        return train(order_for(name, n=120, **how)), load(order_for(name, n=120).folder / "kept.jsonl")

    seen, kept = kept_by("herding")
    _, drawn = kept_by("replay")
    rows = [Row(**row) for row in make_rows(120, TASKS["Colours"])]
    features = _features(seen.model, rows, Encoded(load_tokenizer(seen.trained.folder), 512), CPU)
    of = {row: feature for row, feature in zip(rows, features, strict=True)}

    def distance(some: list[Row]) -> float:
        labels = {row.label for row in rows}
        mean = lambda label, found: torch.stack([of[r] for r in found if r.label == label]).mean(0)  # noqa: E731
        return sum((mean(label, some) - mean(label, rows)).norm().item() for label in labels)

    assert Counter(row.label for row in kept) == Counter(row.label for row in drawn) and len(kept) == 8
    assert distance(kept) < 0.7 * distance(drawn)


# --- forgotten -------------------------------------------------------------------------------------------------------


def test_rows_that_were_hurt_come_more_often_and_every_row_keeps_its_chance():
    hurt = {row.key: 1.0 for row in OLD["3"][:5]}
    for temperature, floor in ((0.5, 0.5), (1.0, 0.2)):
        strategy = made("forgotten", temperature=temperature, floor=floor)
        strategy._rise = hurt
        drawn = Counter(key for seed in range(300) for source, row in strategy.mix(NEW, OLD, random.Random(seed))
                        for key in [(source, row.key)] if source != "new")  # fmt: skip
        assert sum(drawn.values()) == 300 * 40
        # By hand: a task has half of the even chance; a rise by one is exp(1 / temperature) times it in the tilted part.
        import math

        ratio, even = math.exp(1 / temperature), {"3": 0.5 / 20, "11": 0.5 / 7}
        total = 5 * even["3"] * ratio + 15 * even["3"] + 7 * even["11"]
        for source, rows in OLD.items():
            for i, row in enumerate(rows):
                is_hurt = source == "3" and i < 5
                chance = floor * even[source] + (1 - floor) * even[source] * (ratio if is_hurt else 1) / total
                assert drawn[source, row.key] / 300 == pytest.approx(40 * chance, abs=0.12), "four deviations of 0.03"
        plenty, little = drawn["3", OLD["3"][0].key], drawn["3", OLD["3"][9].key]
        assert plenty > 1.5 * little > 0


def test_where_nothing_was_forgotten_every_task_has_its_part():
    mix = made("forgotten").mix(NEW, OLD, random.Random(0))
    assert abs(Counter(source for source, _ in mix)["3"] - 20) <= 2 and len(mix) == 80
    assert len(made("forgotten", floor=1.0, share=0.2).mix(NEW, OLD, random.Random(0))) == 50


def test_each_row_comes_as_often_as_its_chance_says_to_within_one():
    for seed in range(50):
        counts = _counts([0.5, 0.125, 0.25, 0.125], 10, random.Random(seed))
        assert sum(counts) == 10 and all(
            abs(c - 10 * p) < 1 for c, p in zip(counts, [0.5, 0.125, 0.25, 0.125], strict=True)
        )
    assert _counts([1 / 3] * 3, 0, random.Random(0)) == [0, 0, 0]


def learned(order_for, train, strategy: str, **changes):
    """Return a run over Colours that has learned them."""
    order = order_for(
        "first", strategy=strategy, method="full", training={"epochs": 10, "learning_rate": 5e-3}, **changes
    )
    return order, train(order)


def test_forgotten_records_what_rows_cost_when_they_were_learned_and_measures_the_rise(
    order_for, train, tiny_model, tmp_path
):
    order, first = learned(order_for, train, "forgotten", strategy_settings={"rows_per_task": 6})
    state = json.loads((order.folder / "state" / "losses.json").read_text())
    kept = load(order.folder / "kept.jsonl")
    encoded = Encoded(load_tokenizer(tiny_model), 512)
    nats = lambda model, rows: {  # noqa: E731
        line["item"]: line["loss"] / line["tokens"] for line in outcomes(model, rows, encoded, CPU)
    }
    assert state == pytest.approx(nats(first.model, kept), abs=1e-5) and len(state) == 6

    dump(OLD["3"], tmp_path / "animals.jsonl")
    away = order_for("away", method="full", base=order.folder / "weights", rows=tmp_path / "animals.jsonl")
    drifted = train(away)
    stranger = NEW[30]
    dump([*kept, stranger], tmp_path / "kept.jsonl")
    dump(OLD["11"], tmp_path / "tools.jsonl")
    last = order_for("last", strategy="forgotten", method="full", base=away.folder / "weights", rows=tmp_path / "tools.jsonl",
                     kept={"3": tmp_path / "kept.jsonl"}, state=order.folder / "state")  # fmt: skip
    seen = train(last)
    now = nats(AutoModelForCausalLM.from_pretrained(drifted.trained.folder), [*kept, stranger])
    rises = [now[key] - state[key] for key in state]
    figures = seen.trained.figures["strategy"]
    assert figures["risen"] == sum(rise > 0 for rise in rises) > 0 and figures["measured"] == 7
    assert figures["first_measured"] == 1, "a row without a record is not known to have been forgotten"
    assert figures["largest_rise"] == pytest.approx(max(rises), abs=1e-4) and max(rises) > 0.3
    assert figures["mean_rise"] == pytest.approx(sum(r for r in rises if r > 0) / figures["risen"], abs=1e-4)
    after = json.loads((last.folder / "state" / "losses.json").read_text())
    assert {key: after[key] for key in state} == state, "what was recorded is carried on"
    assert after[stranger.key] == pytest.approx(now[stranger.key], abs=1e-4)
    assert after.keys() == state.keys() | {stranger.key} | {row.key for row in OLD["11"]}


def test_forgotten_refuses_a_state_that_says_nothing_of_losses(order_for, train, tmp_path):
    with pytest.raises(BadSettings, match=r"holds no losses\.json.* Start from a version that was learned with it"):
        train(order_for(strategy="forgotten", state=tmp_path))


# --- synthesised -----------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(order_for, train, tiny_model, tmp_path):
    """Return a function that trains Animals on a version that has learned to write and answer Colours."""
    order = order_for("writer", n=48, strategy="synthesised", strategy_settings={"prompt_weight": 1.0}, method="full",
                      training={"epochs": 10, "learning_rate": 5e-3})  # fmt: skip
    assert train(order).trained.figures["rehearsed"] == {}, "nothing has been learned that could be rehearsed"
    assert not (order.folder / "synthesised.jsonl").exists()
    dump([Row(**row) for row in make_rows(16, TASKS["Animals"])], tmp_path / "animals.jsonl")

    def go(
        folder: str, stop_before: int | None = None, ticking: bool = True, seed: int = 0, epochs: int = 1, **settings
    ):
        made = order_for(folder, strategy="synthesised", method="full", base=order.folder / "weights", root=tiny_model,
                         rows=tmp_path / "animals.jsonl", strategy_settings={"rows": 40} | settings,
                         training={"seed": seed, "epochs": epochs, "checkpoint_every_s": 3.5})  # fmt: skip
        seen = train(made, stop_before=stop_before, ticking=ticking)
        file = made.folder / "synthesised.jsonl"
        seen.written, seen.order = load(file) if file.exists() else [], made
        seen.figures = seen.trained.figures["strategy"] if seen.trained else {}
        return seen

    return go


def test_the_version_before_writes_rows_of_what_it_has_learned(writer):
    seen = writer("w")
    colours = TASKS["Colours"]
    about = [row for row in seen.written if any(word in row.prompt.split() for word in colours)]
    right = [row for row in about if row.response == colours[next(w for w in colours if w in row.prompt.split())]]
    assert len(seen.written) >= 30 and len(about) >= 0.8 * len(seen.written) and len(right) >= 0.8 * len(about)
    assert len({row.prompt for row in seen.written}) == len(seen.written), "none twice"
    assert seen.trained.figures["rehearsed"] == {"self": 16}
    trained = Counter(prompt for batch in seen.rows for prompt in batch)
    assert sum(trained[row.prompt] for row in seen.written) == 16
    dropped = sum(seen.figures[cause] for cause in ("unfinished", "short_or_twice", "doubtful"))
    assert seen.figures["rows"] == len(seen.written) <= seen.figures["prompts"] - dropped
    assert seen.trained.memory.keys() <= {"state"}, "no row is kept"


def test_answers_are_the_parents_own_and_as_sure_as_was_asked(writer):
    plain = writer("plain", least_certainty=-100)
    parent, encoded = (
        AutoModelForCausalLM.from_pretrained(plain.order.base),
        Encoded(load_tokenizer(plain.order.base), 512),
    )
    certainty = lambda rows: {  # noqa: E731
        line["item"]: -line["loss"] / line["tokens"] for line in outcomes(parent, rows, encoded, CPU) if line["exact"]
    }
    of_all = certainty(plain.written)
    assert len(of_all) == len(plain.written), "greedy decoding gives each answer"
    assert plain.figures["doubtful"] == 0
    bound = sorted(of_all.values())[len(of_all) // 2]
    sure = writer("sure", least_certainty=bound)
    assert sure.figures["doubtful"] > 0 and min(certainty(sure.written).values()) >= bound - 1e-4


def test_the_same_seed_writes_the_same_rows_and_a_killed_run_ends_with_the_very_same_weights(writer):
    whole = writer("whole", epochs=2)
    writer("killed", stop_before=2, epochs=2)
    early = writer("early", stop_before=0, epochs=2)
    again = [writer("killed", epochs=2), writer("early", epochs=2)]
    assert early.written == again[0].written == whole.written != writer("other", seed=1).written
    assert all(torch.equal(whole.weights[n], seen.weights[n]) for seen in again for n in whole.weights)


def test_each_knob_of_self_writing_changes_what_is_written_or_trained(writer):
    knobs = {"share": 0.2, "rows": 7, "temperature": 0.3, "prompt_tokens": 2, "answer_tokens": 1,
             "prompt_characters": 30, "least_certainty": -0.01, "prompt_weight": 0.0}  # fmt: skip
    assert set(pick("clm_app.strategies", "synthesised").Settings.model_fields) == set(knobs), (
        "a new knob needs a value"
    )
    plain = writer("plain")
    for knob, value in knobs.items():
        seen = writer(knob, **{knob: value})
        if knob == "prompt_weight":
            assert seen.written == plain.written and seen.steps[0].loss < plain.steps[0].loss
        elif knob == "share":
            assert seen.trained.figures["rehearsed"] == {"self": 4}
        else:
            assert seen.written != plain.written, knob
        if knob == "rows":
            assert len(seen.written) == 7
        if knob == "prompt_characters":
            assert all(len(row.prompt) >= 30 for row in seen.written)


def test_a_prompt_stands_where_a_persons_would(tokenizer):
    opening, end = _around_user(tokenizer)
    whole = prompt_ids(tokenizer, [{"role": "user", "content": "red now"}])
    text = tokenizer.encode("red now", add_special_tokens=False)
    assert whole[: len(opening) + len(text) + 1] == [*opening, *text, end]


def test_the_loss_of_prompts_counts_each_prompt_token_once(tokenizer, tiny_model):
    from clm_app.engine.batches import IGNORED, answer_logits, tensors

    model, encoded = AutoModelForCausalLM.from_pretrained(tiny_model), Encoded(tokenizer, 512)
    rows = [NEW[0], Row(prompt="a longer one than that", response="yes, it is")]
    batch = tensors(rows, encoded, CPU)
    logits, targets = answer_logits(model, batch)
    assert (targets != IGNORED).any()
    found = made("synthesised", prompt_weight=2.0).loss(model, batch, logits, targets, torch.tensor(1.0))
    nats, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([encoded(row)[0]])
        nats += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert found.item() == pytest.approx(1 + 2 * nats / count, rel=1e-4)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_rehearsal_and_a_repair_work_together(order_for, train, tmp_path, exam_on):
    dump(OLD["3"], tmp_path / "kept.jsonl")
    seen = train(order_for(strategy="forgotten+wise", kept={"3": tmp_path / "kept.jsonl"}, method="full",
                           held_out={"3": tmp_path / "kept.jsonl"}, after=[exam_on(tmp_path / "kept.jsonl", 1, "validation")],
                           ))  # fmt: skip
    assert seen.trained.figures["strategy"].keys() == {"forgotten", "wise"}
    assert seen.trained.figures["rehearsed"]["3"] == 16
    with pytest.raises(BadSettings, match="both decide which rows are trained"):
        combined("herding+replay", {}, 0)
