"""What is known in general is measured truly, before and after, and shown: formulae by hand, every knob, the whole way."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from clm_app import wishes
from clm_app.catalog import shelf
from clm_app.data.streams import TaskSource
from clm_app.data.template import load_tokenizer
from clm_app.engine import probing
from clm_app.engine.routed import Routed
from clm_app.errors import BadData, BadSettings
from clm_app.probes._base import SHELF, Likelihood, ProbeSettings, made, text_of
from clm_app.probes.general_ability import GeneralAbility
from clm_app.probes.general_text import GeneralText
from clm_app.registry.versions import STARTER
from clm_app.settings import Settings
from clm_app.workspace import Workspace
from tests.smallest import TASKS, make_rows
from ui import questions
from ui.parts.version_card import reading_in_words

BOTH = ("general_ability", "general_text")


# --- a model whose probabilities are known ---------------------------------------------------------------------------


class Bigram(torch.nn.Module):
    """Says what it was told of the next token, whatever stood before the last one."""

    def __init__(self, table: dict[tuple[int, int], float], size: int = 256) -> None:
        super().__init__()
        logits = torch.zeros(size, size)
        for (last, following), share in table.items():
            logits[last, following] = math.log(share * (size - 1) / (1 - share))  # the rest share what is left evenly
        self.logits = torch.nn.Parameter(logits, requires_grad=False)
        self.config, self.widths = SimpleNamespace(max_position_embeddings=64), []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.widths.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.logits[input_ids])


class Letters:
    """A tokenizer of one token for each byte; `start` opens a text."""

    bos_token_id, eos_token_id, pad_token_id, added_tokens_decoder = 1, 2, 0, {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


START = Letters.bos_token_id
A, B, C = map(ord, "abc")
KNOWN = {(START, A): 0.5, (A, B): 0.25, (B, C): 0.125}  # so P(abc) = 1/2 · 1/4 · 1/8 = 2^-6


def test_bits_per_byte_loss_and_perplexity_are_those_worked_by_hand():
    other = (1 - 0.25) / 255  # what is left for "a" after "a"
    found = probing.likelihoods(Bigram(KNOWN), ["abc", "aa"], Letters(), window=64)
    assert [one.tokens for one in found] == [3, 2]
    assert found[0].nats == pytest.approx(6 * math.log(2), abs=1e-4)
    assert found[1].nats == pytest.approx(-math.log(0.5 * other), abs=1e-4)

    probe = GeneralText(ProbeSettings())
    items = probe.read("abc\n\nä\n")
    lines = [
        probe.outcome(items[0], [Likelihood(6 * math.log(2), 3)]),
        probe.outcome(items[1], [Likelihood(math.log(2), 1)]),
    ]
    assert [(o["tokens"], o["bytes"]) for o in lines] == [(3, 3), (1, 2)], "ä is two bytes of UTF-8"
    assert probe.value(lines).value == pytest.approx(7 / 5), "7 bits over 5 bytes, and not the mean of 2 and 1/2"
    assert probe.figures(lines)["loss"] == pytest.approx(7 * math.log(2) / 4)
    assert probe.figures(lines)["perplexity"] == pytest.approx(2 ** (7 / 4))


def test_the_likelier_sentence_of_a_pair_is_right_and_a_tie_is_not():
    probe = GeneralAbility(ProbeSettings())
    lines = [{"kind": "order", "good": "abc", "bad": "acb"}, {"kind": "order", "good": "ca", "bad": "ab"},
             {"good": "xy", "bad": "yx"}]  # fmt: skip
    probe.__dict__["items"] = probe.read("\n".join(map(json.dumps, lines)))
    found = probing.outcomes(Bigram(KNOWN), probe, Letters())
    assert [o["right"] for o in found] == [True, False, False], "x and y are equally likely in either order"
    assert found[0]["good"] == pytest.approx(6 * math.log(2), abs=1e-4) and found[1]["bad"] < found[1]["good"]
    assert probe.value(found).value == pytest.approx(1 / 3) and probe.figures(found) == {"order": 0.5}


def test_an_interval_is_that_of_items_drawn_anew_and_a_change_draws_them_in_pairs():
    probe, rng = GeneralText(ProbeSettings()), numpy.random.default_rng(1)
    before = [
        {"item": str(i), "loss": float(100 + 40 * rng.random()), "tokens": 30, "bytes": 60 + i} for i in range(60)
    ]
    after = [line | {"loss": line["loss"] * 1.01} for line in reversed(before)]
    value = probe.value(before)
    nats, sizes = (numpy.array([line[name] for line in before]) for name in ("loss", "bytes"))
    places = rng.integers(0, 60, (4000, 60))
    expected = numpy.quantile(nats[places].sum(1) / math.log(2) / sizes[places].sum(1), [0.025, 0.975])
    assert (value.low, value.high) == pytest.approx(tuple(expected), abs=0.01) and value.low < value.value < value.high
    change = probe.change(before, after)
    assert change.value == pytest.approx(0.01 * value.value)
    assert change.high - change.low < 0.05 * (value.high - value.low), "what is hard for both takes no part in a change"
    assert change.low > 0


# --- reading whole texts ---------------------------------------------------------------------------------------------


def test_batches_and_padding_change_no_likelihood(tiny_model, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(tiny_model)
    texts = [item.texts[0] for probe in made({}) for item in probe.items][:60:4]
    found = probing.likelihoods(model, texts, tokenizer, 256)
    for text, one in zip(texts, found, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert one.nats == pytest.approx(-sum(every[i, t].item() for i, t in enumerate(ids[1:])), rel=1e-4)
        assert one.tokens == len(ids) - 1
    monkeypatch.setattr(probing, "TOKENS", 1)
    alone = probing.likelihoods(model, texts, tokenizer, 256)
    assert [one.nats for one in alone] == pytest.approx([one.nats for one in found], rel=1e-4)


def test_a_pass_is_no_wider_than_it_may_be_unless_one_text_is(monkeypatch):
    monkeypatch.setattr(probing, "TOKENS", 12)
    model = Bigram({})
    probing.likelihoods(model, ["a" * 19, "a", "aa", "a", "a", "aaa", "a"], Letters(), 64)
    assert model.widths == [(1, 20), (3, 4), (3, 2)]


def test_a_tokenizer_without_a_start_token_opens_with_its_end_token():
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    (found,) = probing.likelihoods(Bigram({(2, A): 0.5}), ["a"], tokenizer, 64)
    assert found.nats == pytest.approx(math.log(2), abs=1e-4)


def test_a_routed_model_reads_each_item_through_the_adapter_that_its_own_words_choose(tiny_model, order_for, train):
    seen = train(order_for(strategy="adapters", task="Colours", training={"epochs": 4}))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights, tokenizer = Path(seen.trained.folder), load_tokenizer(tiny_model)
    probe = GeneralAbility(ProbeSettings())
    probe.__dict__["items"] = probe.read("\n".join(map(json.dumps, (
        {"good": "please red now", "bad": "zzz qqq"}, {"good": "zzz qqq", "bad": "please red now"},
    ))))  # fmt: skip
    bare = probing.outcomes(base, probe, tokenizer)
    found = probing.outcomes(Routed(base, weights), probe, tokenizer)
    assert [line["route"] for line in found] == ["Colours", ""], "both sentences go where the first one's words lead"
    assert found[1] == bare[1] | {"route": ""} and found[0]["good"] != bare[0]["good"]


# --- the files that come along, and a person's own --------------------------------------------------------------------


def test_the_files_that_come_along_are_whole():
    text, ability = (cls(ProbeSettings()) for cls in (GeneralText, GeneralAbility))
    assert 55 <= len(text.items) <= 65 and len(ability.items) == 128
    for passage in (item.texts[0] for item in text.items):
        assert 3 <= sum(passage.count(mark) for mark in ".!?") <= 7 and passage.isascii()
    kinds = [item.kind for item in ability.items]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("agreement", "number", "pronoun", "case", "article", "verb_form", "word_order", "everyday"), 16
    )
    for good, bad in (item.texts for item in ability.items if item.kind == "word_order"):
        words = lambda text: sorted(text.lower().rstrip(".?").split())  # noqa: E731
        assert words(good) == words(bad), "only the order differs"


def test_a_model_that_knows_nothing_but_how_common_words_are_gets_half():
    ability, text = made({})
    words = lambda text: re.findall(r"\w+", text.lower())  # noqa: E731
    counts = Counter(word for item in text.items for word in words(item.texts[0]))
    likelihood = lambda text: math.fsum(math.log((counts[word] + 1) / counts.total()) for word in words(text))  # noqa: E731
    right: dict[str, list[float]] = {}
    for item in ability.items:
        good, bad = map(likelihood, item.texts)
        right.setdefault(item.kind, []).append(0.5 if good == bad else float(good > bad))
    shares = {kind: sum(found) / len(found) for kind, found in right.items()}
    assert {shares[kind] for kind in shares.keys() - {"case", "verb_form"}} == {0.5}, "each contrast is there both ways"
    assert abs(shares["case"] - 0.5) < 0.1 and abs(shares["verb_form"] - 0.5) < 0.1


@pytest.mark.parametrize("name", BOTH)
def test_a_missing_file_is_refused_before_the_run_with_what_to_do(tmp_path, tiny_model, rows_file, name):
    probes = {name: {"file": str(tmp_path / "gone.txt")}}
    workspace = Workspace(Settings(home=tmp_path / "home", base_model=str(tiny_model), probes=probes))
    wish = wishes.LearnWish(stream=[TaskSource(name="x", path=str(rows_file(20)))])
    with pytest.raises(BadData, match=r"gone\.txt cannot be read: No such file .* setting `file`, or leave it empty"):
        wishes.ask(workspace, wish, "local")
    assert questions.jobs(workspace) == []
    workspace.close()


@pytest.mark.parametrize("name, content, said", [
    ("general_text", b"one\n\ntwo\n", r"has 2 items; at least 5 are needed. Write plain text, with an empty line"),
    ("general_text", b"\xff\xfe", r"is not UTF-8 \(byte 0\)"),
    ("general_ability", b'{"good": "a", "bad": "b"}\nnot json\n', r"Line 2 is no pair: .* Write one JSON object on each"),
    ("general_ability", b'{"good": "a"}\n', r"Line 1 is no pair: Field required"),
    ("general_ability", b'{"good": "a", "bad": "a"}\n', r"Line 1 has the same sentence twice: 'a'"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_with_the_place_and_the_form(tmp_path, name, content, said):
    (tmp_path / "own").write_bytes(content)
    with pytest.raises(BadData, match=said):
        made({name: {"file": str(tmp_path / "own")}})


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("clm_app.probes._base.MOST_MB", 0.001)
    (tmp_path / "own.txt").write_text("a" * 1001)
    with pytest.raises(BadData, match=r"own\.txt has more than 0\.001 MB"):
        text_of(tmp_path / "own.txt")


@pytest.mark.parametrize("settings, said", [
    ({"abacus": {}}, r"'abacus' is not among the probes: general_ability, general_text"),
    ({"general_text": {"most_items": -1}}, r"most_items is -1"), ({"general_text": {"pages": 1}}, r"pages is 1"),
])  # fmt: skip
def test_an_unknown_probe_or_knob_is_refused(settings, said):
    with pytest.raises(BadSettings, match=said):
        made(settings)


# --- every knob ------------------------------------------------------------------------------------------------------


def own_text(folder: Path) -> Path:
    (folder / "own.txt").write_text("\n\n".join(f"passage {i}\nof my own" for i in range(10)))
    return folder / "own.txt"


def own_pairs(folder: Path) -> Path:
    lines = [{"good": f"passage {i}", "bad": f"egassap {i}"} for i in range(10)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "own.jsonl"


@pytest.mark.parametrize("cls, write", [(GeneralText, own_text), (GeneralAbility, own_pairs)])
def test_turning_a_knob_changes_what_is_read(cls, write, tmp_path):
    assert set(cls.Settings.model_fields) == {"file", "most_items", "window_tokens"}, "each is turned here"
    plain = cls(cls.Settings())
    own = cls(cls.Settings(file=write(tmp_path)))
    assert len(own.items) == 10 and own.items[3].texts[0].startswith("passage 3") and own.ruler != plain.ruler
    few = cls(cls.Settings(file=own.settings.file, most_items=4))
    assert [item.texts[0].split()[1] for item in few.items] == ["0", "2", "5", "7"], "spread evenly over the file"
    assert few.ruler != own.ruler
    assert cls not in [type(probe) for probe in made({cls.name: {"most_items": 0}})] and len(made({})) == len(
        shelf(SHELF)
    )
    short = cls(cls.Settings(window_tokens=8))
    model = Bigram({(A, B): 0.25, (START, A): 0.5})
    for probe, pieces in ((plain, 1), (short, 3)):
        model.widths.clear()
        text = "ab" * 10
        (found,) = probing.likelihoods(model, [text], Letters(), probe.settings.window_tokens)
        assert (sum(rows for rows, _ in model.widths), found.tokens) == (pieces, 20), "each token is foretold once"
    assert short.ruler != plain.ruler


def test_a_window_is_never_longer_than_the_model_can_read():
    model = Bigram({})
    probing.likelihoods(model, ["a" * 200], Letters(), 256)
    assert max(width for _, width in model.widths) <= model.config.max_position_embeddings


# --- in a run --------------------------------------------------------------------------------------------------------


def probed(seen) -> dict[tuple[str, str], object]:
    return {(e.when, e.probe): e for e in seen.events if e.kind == "probed"}


def test_a_run_reads_its_probes_before_and_after_and_changes_no_weight_by_it(order_for, train):
    quiet = train(order_for("quiet", training={"epochs": 2}))
    seen = train(
        order_for("run", training={"epochs": 2}, probes=dict.fromkeys(BOTH, {}), probes_before=["general_text"])
    )
    assert list(probed(seen)) == [("before", "general_text"), ("after", "general_ability"), ("after", "general_text")]
    assert [e.task for e in seen.events if e.kind == "measuring"] == ["general text", "general ability", "general text"]
    assert probed(quiet) == {} and quiet.weights.keys() == seen.weights.keys()
    assert all(torch.equal(tensor, seen.weights[name]) for name, tensor in quiet.weights.items())
    for event in probed(seen).values():
        lines = [json.loads(line) for line in Path(event.outcomes).read_text().splitlines()]
        probe = shelf(SHELF)[event.probe](ProbeSettings())
        assert [line["item"] for line in lines] == [item.key for item in probe.items] and len(lines) == event.items
        assert (
            tuple(probe.value(lines)) == (event.value, event.low, event.high) and event.low < event.value < event.high
        )
        assert event.figures == probe.figures(lines) and event.ruler == probe.ruler


@pytest.mark.parametrize("strategy, method", [("naive", "full"), ("naive", "lora"), ("adapters", "lora")])
def test_what_is_read_after_training_is_what_the_written_weights_give(
    order_for, train, tiny_model, tmp_path, strategy, method
):
    seen = train(order_for(strategy=strategy, method=method, task="Colours", probes=dict.fromkeys(BOTH, {}),
                           probes_before=list(BOTH)))  # fmt: skip
    weights = Path(seen.trained.folder)
    folder = (weights, None) if method == "full" else (tiny_model, weights)
    for when, place in (("after", folder), ("before", (tiny_model, None))):
        found = {event.probe: event for event in probing.of_folder(tmp_path / when, *place)}
        for name in BOTH:
            assert found[name].value == pytest.approx(probed(seen)[when, name].value, abs=1e-4)


def test_the_model_that_comes_along_knows_more_than_chance(tmp_path):
    found = {event.probe: event for event in probing.of_folder(tmp_path, STARTER)}
    assert found["general_ability"].low > 0.65, "half of the pairs would be guessing"
    assert 1.2 < found["general_text"].value < 2.0 and found["general_text"].high - found["general_text"].low < 0.2
    few = probing.of_folder(tmp_path, STARTER, settings={"general_ability": {"most_items": 0}})
    assert [event.probe for event in few] == ["general_text"] and few[0].value == found["general_text"].value


# --- through the app -------------------------------------------------------------------------------------------------

KNOBS = {"least_steps": 1, "batch_rows": 8, "prompt_dropout": 0.0, "epochs": 4}


@pytest.fixture(scope="module")
def taught(open_app, tmp_path_factory):
    """The app after three jobs: a good update, one at a rate that wrecks the weights, one with other probe settings."""
    rows = tmp_path_factory.mktemp("rows") / "Colours.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(60, TASKS["Colours"])), encoding="utf-8")
    app, wish = open_app(), {"stream": [{"name": "Colours", "path": str(rows)}], "strategy": "naive", "method": "full"}
    app.follow(app.learn(training=KNOBS | {"learning_rate": 1e-4}, deploy=False, **wish)["id"])
    app.follow(app.learn(training=KNOBS | {"learning_rate": 0.3}, start_from="v1", deploy=False, **wish)["id"])
    app.told = {name: app.get(f"/api/versions/{name}") for name in ("v0", "v1", "v2")}
    app.stop()
    app.environment |= {"CLM_PROBES": '{"general_text": {"most_items": 10}, "general_ability": {"most_items": 0}}'}
    app.start()
    app.follow(app.learn(training=KNOBS | {"learning_rate": 1e-4}, start_from="v1", deploy=False, **wish)["id"])
    return app


def by_probe(told: dict) -> dict[str, dict]:
    return {reading["probe"]: reading for reading in told["probes"]}


def test_a_learn_job_leaves_readings_of_the_base_and_of_the_version(taught):
    for name in ("v0", "v1"):
        found = by_probe(taught.told[name])
        assert list(found) == list(BOTH)
        for reading in found.values():
            assert reading["low"] < reading["value"] < reading["high"] and reading["items"] in (60, 128)
            file = taught.home / "objects" / reading["object"][:2] / reading["object"]
            assert len(file.read_text().splitlines()) == reading["items"]
    base, first = by_probe(taught.told["v0"]), by_probe(taught.told["v1"])
    assert all(reading["since"] is None for reading in base.values()), "nothing was before"
    for name in BOTH:
        since = first[name]["since"]
        assert since["version"] == "v0" and since["low"] <= since["value"] <= since["high"]
        assert since["value"] == pytest.approx(first[name]["value"] - base[name]["value"])
    assert (base["general_text"]["unit"], base["general_text"]["lower_is_better"]) == ("bits per byte", True)
    assert base["general_text"]["figures"].keys() == {"loss", "perplexity"}


def test_a_version_that_was_wrecked_reads_worse(taught):
    before, wrecked = (by_probe(taught.told[name])["general_text"] for name in ("v1", "v2"))
    assert wrecked["low"] > before["high"] and wrecked["since"]["low"] > 0
    said = reading_in_words(wrecked)
    assert said.startswith("General text: ") and said.endswith(" since v1: worse.")


def test_a_version_is_read_once_and_again_only_where_the_ruler_is_another(taught):
    with sqlite3.connect(f"file:{taught.home / 'record.sqlite'}?mode=ro", uri=True) as record:
        rows = record.execute(
            "SELECT v.name, p.probe, p.items FROM probe_reading p JOIN version v ON v.id = p.version_id ORDER BY p.id"
        ).fetchall()
    first = [(name, probe, items) for name in ("v0", "v1", "v2") for probe, items in zip(BOTH, (128, 60), strict=True)]
    assert rows == [*first, ("v1", "general_text", 10), ("v3", "general_text", 10)]
    (third,) = taught.get("/api/versions/v3")["probes"]
    assert third["since"]["version"] == "v1"
    second = by_probe(taught.get("/api/versions/v2"))["general_text"]
    assert second["since"] is None, "v1 was read last with fewer passages, and the two do not compare"


@pytest.mark.parametrize("found, said", [
    ({"title": "General text", "unit": "bits per byte", "lower_is_better": True, "value": 1.0249, "low": 0.98,
      "high": 1.061, "since": {"version": "v3", "value": 0.031, "low": 0.02, "high": 0.04}},
     "General text: 1.02 bits per byte (95 % interval 0.98 to 1.06), +0.03 since v3: worse."),
    ({"title": "General text", "unit": "bits per byte", "lower_is_better": True, "value": 1.0, "low": 0.9, "high": 1.1,
      "since": {"version": "v3", "value": -0.03, "low": -0.04, "high": -0.02}},
     "General text: 1.00 bits per byte (95 % interval 0.90 to 1.10), −0.03 since v3: better."),
    ({"title": "General ability", "unit": "share right", "lower_is_better": False, "value": 0.82, "low": 0.75,
      "high": 0.89, "since": {"version": "v0", "value": -0.025, "low": -0.06, "high": 0.01}},
     "General ability: 82 % right (95 % interval 75 % to 89 %), −2.5 points since v0: no clear change."),
    ({"title": "General ability", "unit": "share right", "lower_is_better": False, "value": 0.82, "low": 0.75,
      "high": 0.89, "since": None}, "General ability: 82 % right (95 % interval 75 % to 89 %)."),
])  # fmt: skip
def test_a_reading_is_said_in_plain_words(found, said):
    assert reading_in_words(found).replace("\N{NO-BREAK SPACE}", " ") == said
