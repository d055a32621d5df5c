"""A checkpoint is whole or not there, and a run that goes on from one ends with the very same weights."""

from __future__ import annotations

import json

import pytest
import torch

from clm_app.engine import checkpoints
from tests.smallest import Stopped

FACTS = {"tokens": 7}


@pytest.fixture
def small():
    """Return a function that gives a two-weight model with an optimiser that has taken `steps` steps."""

    def make(steps: int):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(steps):
            (model(torch.rand(4, 2)) ** 2).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        return model, optimiser

    return make


def values(model) -> list[float]:
    return [value for parameter in model.parameters() for value in parameter.flatten().tolist()]


def moments(optimiser) -> list:
    return [{k: v.tolist() for k, v in state.items()} for state in optimiser.state_dict()["state"].values()]


# Everything that commit does to the disk; a kill can fall before and after each.
TOUCHES = (
    (checkpoints, "save_file"), (checkpoints.torch, "save"), (checkpoints, "file_digest"), (checkpoints, "sync"),
    (checkpoints.os, "replace"), (checkpoints, "sync_folder_entry"), (checkpoints.shutil, "rmtree"),
)  # fmt: skip


def commit_killed_at(moment: int, monkeypatch, *arguments) -> bool:
    """Commit and be killed at this moment; return whether the commit ended before."""
    passed = iter(range(10**6))

    def look():
        if next(passed) == moment:
            raise Stopped

    def around(real):
        def call(*a, **k):
            look()
            found = real(*a, **k)
            look()
            return found

        return call

    with monkeypatch.context() as patch:
        for module, name in TOUCHES:
            patch.setattr(module, name, around(getattr(module, name)))
        try:
            checkpoints.commit(*arguments)
        except Stopped:
            return False
    return True


def test_a_commit_killed_at_any_moment_leaves_the_old_checkpoint_or_the_new_one_whole(small, tmp_path, monkeypatch):
    first, second = small(1), small(2)
    moment, seen = 0, set()
    while True:
        folder = tmp_path / str(moment)
        checkpoints.commit(folder, 1, *first, 1, FACTS)
        is_done = commit_killed_at(moment, monkeypatch, folder, 2, *second, 1, FACTS)
        assert all(checkpoints.is_whole(place) for place in checkpoints.committed(folder)), moment
        model, optimiser = small(0)
        step = checkpoints.resume(folder, model, optimiser)["step"]
        seen.add(step)
        expected = first if step == 1 else second
        assert values(model) == values(expected[0]) and moments(optimiser) == moments(expected[1])
        checkpoints.commit(folder, 2, *second, 1, FACTS)  # what was left behind is in nobody's way
        assert [p.name for p in folder.iterdir()] == ["step-000000002"]
        if is_done:
            break
        moment += 1
    assert moment > 15 and seen == {1, 2}


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", checkpoints.MANIFEST])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "one bit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(small, tmp_path, name, damage):
    checkpoints.commit(tmp_path, 1, *small(1), 9, FACTS)
    newest = checkpoints.commit(tmp_path, 2, *small(2), 9, FACTS) / name
    content = bytearray(newest.read_bytes())
    if damage == "gone":
        newest.unlink()
    elif damage == "one bit":
        content[len(content) // 2] ^= 0x80
        newest.write_bytes(content)
    else:
        newest.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    model, optimiser = small(0)
    assert checkpoints.resume(tmp_path, model, optimiser)["step"] == 1
    assert values(model) == values(small(1)[0])
    checkpoints.commit(tmp_path, 2, *small(2), 9, FACTS)
    assert checkpoints.resume(tmp_path, *small(0))["step"] == 2, "the damaged one is replaced"


def test_where_every_checkpoint_is_damaged_nothing_is_loaded(small, tmp_path):
    (checkpoints.commit(tmp_path, 1, *small(1), 9, FACTS) / "state.pt").unlink()
    model, optimiser = small(0)
    assert (
        checkpoints.resume(tmp_path, model, optimiser) == {} == checkpoints.resume(tmp_path / "none", model, optimiser)
    )
    assert values(model) == values(small(0)[0])


def test_the_newest_so_many_are_kept_and_each_says_what_it_was_told(small, tmp_path):
    for step in (1, 2, 10, 11):
        place = checkpoints.commit(tmp_path, step, *small(1), 3, FACTS | {"step_seconds": step})
    assert [int(p.name[5:]) for p in checkpoints.committed(tmp_path)] == [2, 10, 11]
    manifest = json.loads((place / checkpoints.MANIFEST).read_text())
    assert (manifest["step"], manifest["tokens"], manifest["step_seconds"]) == (11, 7, 11)
    assert set(manifest["files"]) == {"weights.safetensors", "state.pt"}


def test_random_numbers_go_on_where_they_were(small, tmp_path):
    torch.manual_seed(5)
    torch.rand(3)
    checkpoints.commit(tmp_path, 1, *small(0), 1, FACTS)
    torch.manual_seed(5)
    checkpoints.commit(tmp_path, 1, *small(0), 1, FACTS)
    expected = torch.rand(4)
    torch.manual_seed(6)
    checkpoints.resume(tmp_path, *small(0))
    assert torch.equal(torch.rand(4), expected)


RANDOM = {"epochs": 3, "prompt_dropout": 0.3, "weight_decay": 0.1, "checkpoint_every_s": 3.5, "checkpoints_kept": 2}


@pytest.mark.parametrize("method, settings", [("lora", {"dropout": 0.2}), ("full", {})])
def test_a_run_that_was_killed_twice_ends_with_the_very_same_weights(order_for, train, method, settings):
    how = {"method": method, "method_settings": settings, "training": RANDOM}
    whole = train(order_for("whole", **how), ticking=True)
    order = order_for("killed", **how)
    seen = [
        train(order, stop_before=5, ticking=True),
        train(order, stop_before=9, ticking=True),
        train(order, ticking=True),
    ]
    started = [next(e for e in s.events if e.kind == "started").step for s in seen]
    assert started[0] == 0 < started[1] <= 5 and started[1] < started[2] <= 9, "each attempt goes on from a checkpoint"
    assert len(whole.steps) == 12 and sum(len(s.steps) for s in seen) < 2 * 12
    assert whole.weights.keys() == seen[-1].weights.keys() and whole.weights
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, seen[-1].weights[name]), name
    expected = {step.number: step.loss for step in whole.steps}
    assert all(step.loss == expected[step.number] for s in seen for step in s.steps)


def test_a_run_killed_while_it_wrote_its_weights_only_writes_them_again(order_for, train):
    order = order_for()
    first = train(order)
    (order.folder / "weights" / "adapter_model.safetensors").write_bytes(b"half")
    (order.folder / ".weights").mkdir()
    again = train(order)
    assert len(first.steps) == 4 and again.steps == [], "every step was in the last checkpoint"
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
