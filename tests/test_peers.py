"""Peers from their library: they train on our rows, hold what they say they hold, and their loss is our loss."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from benchmarks._tasks import Learnable
from clm_app.data.rows import Row, dump
from clm_app.engine.batches import IGNORED, answer_logits, tensors
from clm_app.engine.loop import Engine
from clm_app.errors import BadInput
from tests.smallest import TASKS, make_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("avalanche", reason="avalanche-lib is not installed here", exc_type=ImportError)

from benchmarks import _peers
from benchmarks._peers import ASKED, HIDDEN, NAMES, PROMPT, PeerEngine

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = {"epochs": 1, "least_steps": 24, "batch_rows": 8}


@pytest.fixture
def tasks(tmp_path) -> list[Learnable]:
    """Two tasks of sixteen rows, four labels each; trained and validated on the same rows."""
    found = []
    for number, name in enumerate(("Colours", "Animals"), 1):
        found.append(Learnable(number, name, tmp_path / name))
        for part in ("train", "validation"):
            dump([Row(**row) for row in make_rows(16, TASKS[name])], found[-1].file(part))
    return found


@pytest.fixture
def learn(order_for, tiny_model, tasks):
    """Return a function that learns the tasks in turn with a peer: one (order, trained, measured) for each."""

    def do(name: str, training: dict | None = None, **fields) -> list[tuple]:
        peer = _peers.fitted(name, tasks, tiny_model, 512, rows_per_task=4)._replace(**fields)
        weights, state, found = tiny_model, None, []
        for task in tasks:
            asked = order_for(f"{name}/{task.name}", method="full", training=TRAINING | (training or {})).model_copy(
                update={"rows": task.file("train"), "base": weights, "root": tiny_model, "state": state,
                        "after": [one.exam("validation") for one in tasks]}
            )  # fmt: skip

            trained, measured = PeerEngine(asked, lambda event: None, peer).run()
            found.append((asked, trained, measured))
            weights, state = asked.folder / "weights", asked.folder / "state"
        return found

    return do


def weights_of(run: tuple) -> torch.Tensor:
    found = load_file(run[0].folder / "weights" / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


def nats(run: tuple) -> list[float]:
    return [one.answer_loss for one in run[2]]


def untrained(order_for, tasks) -> list[float]:
    asked = order_for("untrained", method="full").model_copy(
        update={"before": [task.exam("validation") for task in tasks]}
    )
    return [one.answer_loss for one in Engine(asked, lambda event: None).run()[1]]


@pytest.mark.parametrize("name", NAMES)
def test_every_peer_learns_both_tasks_and_its_answers_are_measured_as_ours_are(name, learn, order_for, tasks):
    before = untrained(order_for, tasks)
    first, second = learn(name, strength=0.1)
    assert nats(first)[0] < 0.5 * before[0], "the loss falls"
    assert nats(second)[1] < 0.5 * before[1]
    assert first[1].figures["steps"] == 24 and first[1].weights_kind == "full"
    assert (first[0].folder / "after" / "1-validation.jsonl").read_text().count("\n") == 16


@pytest.mark.parametrize("name", ["avalanche-replay", "avalanche-gdumb"])
def test_rows_kept_hold_the_first_task(name, learn):
    lost = {of: (lambda a, b: nats(b)[0] - nats(a)[0])(*learn(of)) for of in (name, "avalanche-naive")}
    assert lost[name] < 0.5 * lost["avalanche-naive"], lost


def test_an_immense_strength_of_ewc_keeps_the_weights_where_they_were(learn):
    moved = {}
    for strength in (0.0, 1e12):
        first, second = learn("avalanche-ewc", strength=strength)
        moved[strength] = (weights_of(second) - weights_of(first)).norm()
        first[0].folder.rename(first[0].folder.with_name(f"done-{strength}"))
    assert moved[1e12] < 0.5 * moved[0.0], moved


def test_what_is_kept_is_counted_as_it_would_be_written(learn, tiny_model):
    kept = lambda name: [run[1].figures["strategy"]["kept_bytes"] for run in learn(name)]  # noqa: E731
    longest = max(len(Row(**row).model_dump_json()) + 1 for task in TASKS.values() for row in make_rows(16, task))
    first, second = kept("avalanche-replay")
    assert 0.5 * 4 * longest < first <= 4 * longest, "four rows of the first task"
    assert 0.5 * 8 * longest < second <= 8 * longest, "four of each"
    copy = sum(one.numel() * 4 for one in load_file(tiny_model / "model.safetensors").values())
    assert kept("avalanche-ewc") == [2 * copy, 4 * copy], "weights and importance, for each task"
    assert kept("avalanche-lwf") == kept("avalanche-naive") == [0, 0]


@pytest.fixture
def engine(order_for, tiny_model, tasks) -> PeerEngine:
    peer = _peers.fitted("avalanche-naive", tasks, tiny_model, 512)
    asked = order_for("same", n=16, method="full").model_copy(update={"rows": tasks[1].file("train")})
    return PeerEngine(asked, lambda event: None, peer)


def test_the_loss_of_a_batch_is_the_engines_loss_of_it(engine):
    model = engine.load_base().eval()
    rows = [*engine.new[:6], Row(prompt="red", response="a much longer answer")]
    rows.append(Row(prompt="a much longer prompt than any other of these rows", response="a"))
    logits, targets = answer_logits(model, tensors(rows, engine.encoded, torch.device("cpu")))
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    answer = max(len(engine.encoded(row)[1]) for row in rows) + 2
    x, y = _peers.tensors_of(rows, engine.encoded, 70, answer)
    made = _peers.Answering(model, answer, is_bfloat16=False)(x)
    assert made.shape == (8, model.config.vocab_size, answer)
    theirs = torch.nn.functional.cross_entropy(made, y, ignore_index=IGNORED)
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-5)
    assert (made[(y == IGNORED)[:, None].expand_as(made)] == 0).all(), "no penalty on outputs sees what is not asked"


def test_prompt_tokens_are_hidden_as_often_as_was_asked_and_what_opens_the_answer_never(engine):
    x, _ = _peers.tensors_of(engine.new, engine.encoded, 60, 12)
    torch.manual_seed(0)
    kinds = torch.stack([_peers.Hide(0.25)(one)[1] for one in x.repeat(50, 1, 1)])
    was = x[:, 1].repeat(50, 1)
    assert (kinds[was == PROMPT] == HIDDEN).float().mean() == pytest.approx(0.25, abs=0.02)
    assert (kinds[was != PROMPT] == was[was != PROMPT]).all() and (was == ASKED).any()


def test_a_hidden_token_is_not_seen(engine):
    model = _peers.Answering(engine.load_base().eval(), 12, is_bfloat16=False)
    x, _ = _peers.tensors_of(engine.new[:1], engine.encoded, 60, 12)
    at = int((x[0, 1] == PROMPT).nonzero()[2])
    other = x.clone()
    other[0, 0, at] = 20
    assert not torch.equal(model(x), model(other))
    x[0, 1, at] = other[0, 1, at] = HIDDEN
    assert torch.allclose(model(x), model(other), atol=1e-6)


def test_the_strength_that_serves_both_first_tasks_best_is_taken_and_remembered(
    tasks, tiny_model, tmp_path, monkeypatch
):
    tried = []

    def after_two(peer, first_two, *_):
        tried.append((peer.strength, [task.name for task in first_two]))
        return 1 - abs(peer.strength - 1.0)

    monkeypatch.setattr(_peers, "after_two", after_two)
    peer = _peers.fitted("avalanche-lwf", tasks, tiny_model, 512)
    for _ in range(2):
        assert _peers.tuned(peer, tasks, None, tiny_model, tmp_path).strength == 1.0
    assert tried == [(strength, ["Colours", "Animals"]) for strength in _peers.STRENGTHS["avalanche-lwf"]]
    naive = peer._replace(name="avalanche-naive")
    assert _peers.tuned(naive, tasks, None, tiny_model, tmp_path) == naive


def test_a_peer_that_is_not_there_is_refused_with_those_that_are(tasks, tiny_model):
    with pytest.raises(BadInput, match="'avalanche-magic'; there are avalanche-naive, avalanche-ewc"):
        _peers.fitted("avalanche-magic", tasks, tiny_model, 512)
