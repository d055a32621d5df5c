"""Public suites run on loaded weights from local files: right figures, no hub, nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from clm_app.data.template import load_tokenizer
from clm_app.errors import BadData, BadSettings, NotThere
from clm_app.judging import harness
from clm_app.judging.harness import HarnessSettings, run
from clm_app.probes.kinds._base import BenchmarkItem, Heard
from clm_app.probes.kinds.multiple_choice import MultipleChoice, MultipleChoiceSettings
from clm_app.registry.versions import STARTER

needs_harness = pytest.mark.skipif(
    not harness.is_installed(), reason="lm-eval is not installed: pip install -e .[harness]"
)
ROWS = [
    ("The dog", [" runs.", " run."]), ("The dogs", [" runs.", " run."]), ("She saw a", [" bird.", " of the and."]),
    ("They", [" was at home.", " were home."]), ("The sun is", [" hot.", " a very deep cold thing."]), ("One", [" cats", " cat"]),
]  # fmt: skip
RIGHT = [0, 1, 0, 1, 0, 1]
YAML = """
task: sentences
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
FROM_HUB = """
task: far
dataset_path: nobody/nothing
test_split: test
output_type: multiple_choice
doc_to_text: "{{a}}"
doc_to_choice: [a, b]
doc_to_target: 0
"""


@pytest.fixture(scope="module")
def starter():
    """Return (model, tokenizer) of the model that comes along."""
    return AutoModelForCausalLM.from_pretrained(STARTER).eval(), load_tokenizer(STARTER)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with two tasks: one over a local file, one that names a hub."""
    file = tmp_path / "rows.jsonl"
    lines = [{"start": start, "ends": ends, "right": place} for (start, ends), place in zip(ROWS, RIGHT, strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "sentences.yaml").write_text(YAML.format(file=file))
    (tmp_path / "far.yaml").write_text(FROM_HUB)
    return tmp_path


def nats(model, tokenizer, start: str, end: str) -> float:
    """Return -log P(end | start), from one plain forward pass."""
    ids, first = tokenizer.encode(start + end), len(tokenizer.encode(start))
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logs[i - 1, ids[i]]) for i in range(first, len(ids)))


@needs_harness
def test_the_harness_and_our_multiple_choice_say_the_same_of_the_same_items(starter, folder):
    found = run(*starter, HarnessSettings(folder=folder, tasks=["sentences"]))["sentences"]
    kind, outcomes = MultipleChoice(MultipleChoiceSettings()), []
    with torch.no_grad():
        for (start, ends), place in zip(ROWS, RIGHT, strict=True):
            item = BenchmarkItem(prompt=start, expected=ends[place], choices=ends)
            heard = tuple(nats(*starter, start, end) for end in ends)
            outcomes.append(kind.outcome(item, Heard(choices=heard, choice_tokens=(1,) * len(ends))))
    figures = kind.figures(outcomes)
    assert 0 < figures["total"] < 1 or 0 < figures["per_byte"] < 1, "items that say something"
    assert found["acc"]["value"] == pytest.approx(figures["total"])
    assert found["acc_norm"]["value"] == pytest.approx(figures["per_byte"])
    assert set(found) == {"acc", "acc_norm"} and found["acc"]["standard_error"] >= 0
    assert json.loads(json.dumps(found)) == found and type(found["acc"]["standard_error"]) is float


@needs_harness
def test_knobs_of_the_harness_reach_it(starter, folder):
    def asked(**knobs) -> list[list[int]]:
        model, tokenizer = starter
        seen = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(list((args[0] if args else kwargs["input_ids"]).shape)),
            with_kwargs=True,
        )
        try:
            run(model, tokenizer, HarnessSettings(folder=folder, tasks=["sentences"], **knobs))
        finally:
            hook.remove()
        return seen

    plain = asked()
    rows, longest = sum(shape[0] for shape in plain), max(shape[1] for shape in plain)
    assert sum(shape[0] for shape in asked(most_items=2)) < rows
    assert len(asked(batch_rows=2)) > len(plain)
    assert max(shape[1] for shape in asked(examples=2)) > longest
    assert max(shape[1] for shape in asked(chat=True)) > longest


@needs_harness
def test_no_program_is_started_beside_this_one(starter, folder, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, *command, **_: started.append(command))
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda self: None)
    run(*starter, HarnessSettings(folder=folder, tasks=["sentences"], most_items=1))
    assert started == []


@needs_harness
def test_a_task_that_is_not_on_this_machine_is_refused_without_asking_any_host(starter, folder, monkeypatch):
    asked = []

    def resolve(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(f"{host} was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    with pytest.raises(BadData, match="far in .* cannot be run: .*nobody/nothing.*Are its data files on this machine"):
        run(*starter, HarnessSettings(folder=folder, tasks=["far"]))
    assert asked == []


@needs_harness
def test_nothing_stays_behind_in_the_environment_or_in_a_home(starter, folder, monkeypatch, tmp_path):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    before = dict(os.environ)
    run(*starter, HarnessSettings(folder=folder, tasks=["sentences"], most_items=1))
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    assert not changed & {*harness.OFFLINE, harness.HERE_ALONE}
    assert datasets.config.HF_DATASETS_CACHE == tmp_path / "home" and not (tmp_path / "home").exists()


@needs_harness
def test_a_task_of_another_name_is_refused_with_those_there_are(starter, folder):
    with pytest.raises(BadSettings, match="'mmlu' is not among the tasks in .*: far, sentences. Choose one of these"):
        run(*starter, HarnessSettings(folder=folder, tasks=["mmlu"]))
    with pytest.raises(BadSettings, match="gone is no folder. Name the folder"):
        run(*starter, HarnessSettings(folder=folder / "gone", tasks=["sentences"]))


def test_without_the_harness_the_refusal_says_how_to_install_it(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(
        NotThere, match=r"not installed. Install it with .* -m pip install -c constraints.txt -e .\[harness\]"
    ):
        run(None, None, HarnessSettings(folder=tmp_path, tasks=["any"]))
