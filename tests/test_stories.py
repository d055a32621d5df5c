"""The fast set's model: it turns a llama2.c checkpoint into a Llama that computes the same, and it tells stories."""

from __future__ import annotations

import lzma
import struct

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import _stories
from benchmarks._stories import CHECKPOINT, STORIES, TOKENIZER, Shape
from clm_app.data.rows import Row
from clm_app.data.template import load_tokenizer, row_ids
from clm_app.errors import BadData

SMALL = Shape(hidden=16, intermediate=24, layers=2, heads=4, key_value_heads=2, vocabulary=300, positions=32)
CORPUS = STORIES.parent / "corpus" / "tinystories.txt.xz"
real = pytest.mark.skipif(not (STORIES / CHECKPOINT).exists(), reason="the data set stories260K is not here")


def checkpoint(file, seed: int = 0) -> dict[str, numpy.ndarray]:
    """Write random weights as a legacy checkpoint, and return them by llama2.c's own names."""
    rng, size = numpy.random.default_rng(seed), SMALL.hidden // SMALL.heads
    width, key_value, layers = SMALL.hidden, SMALL.key_value_heads * size, SMALL.layers
    shapes = {
        "tok": (SMALL.vocabulary, width), "rms_att": (layers, width), "wq": (layers, width, width),
        "wk": (layers, key_value, width), "wv": (layers, key_value, width), "wo": (layers, width, width),
        "rms_ffn": (layers, width), "w1": (layers, SMALL.intermediate, width), "w2": (layers, width, SMALL.intermediate),
        "w3": (layers, SMALL.intermediate, width), "rms": (width,), "angles": (SMALL.positions * size,),
    }  # fmt: skip
    weights = {name: rng.normal(0, 0.3, shape).astype("<f4") for name, shape in shapes.items()}
    file.write_bytes(struct.pack("7i", *SMALL) + b"".join(one.tobytes() for one in weights.values()))
    return weights


def by_hand(weights: dict[str, numpy.ndarray], tokens: list[int]) -> numpy.ndarray:
    """Return the logits of llama2.c's forward pass: neighbours are rotated together, two queries share a key."""
    size = SMALL.hidden // SMALL.heads
    norm = lambda x, scale: x / numpy.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale  # noqa: E731
    angles = numpy.outer(numpy.arange(len(tokens)), 10000.0 ** (-numpy.arange(0, size, 2) / size))

    def turned(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = numpy.cos(angles)[:, None], numpy.sin(angles)[:, None]
        return numpy.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = weights["tok"][tokens]
    for layer in range(SMALL.layers):
        one = {name: value[layer] for name, value in weights.items() if name not in ("tok", "rms", "angles")}
        inner = norm(x, one["rms_att"])
        query, key, value = ((inner @ one[name].T).reshape(len(tokens), -1, size) for name in ("wq", "wk", "wv"))
        query, key, found = turned(query), turned(key), []
        for head in range(SMALL.heads):
            shared = head // (SMALL.heads // SMALL.key_value_heads)
            scores = query[:, head] @ key[:, shared].T / size**0.5
            scores[numpy.triu_indices(len(tokens), 1)] = -numpy.inf
            share = numpy.exp(scores - scores.max(1, keepdims=True))
            found.append(share / share.sum(1, keepdims=True) @ value[:, shared])
        x = x + numpy.concatenate(found, 1) @ one["wo"].T
        inner = norm(x, one["rms_ffn"])
        gate = inner @ one["w1"].T
        x = x + (gate / (1 + numpy.exp(-gate)) * (inner @ one["w3"].T)) @ one["w2"].T
    return norm(x, weights["rms"]) @ weights["tok"].T


def vocabulary(file, words: list[str]) -> None:
    """Write a llama2.c vocabulary: three marks, 256 bytes, then the words, the first of which joins first."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *words]
    lines = [struct.pack("fi", -max(0, i - 259), len(p.encode())) + p.encode() for i, p in enumerate(pieces)]
    file.write_bytes(struct.pack("i", 7) + b"".join(lines))


def test_the_llama_computes_what_llama2_c_computes(tmp_path):
    weights, tokens = checkpoint(tmp_path / CHECKPOINT), [1, 7, 299, 42, 42, 3, 100, 8]
    model = _stories.model_of(tmp_path / CHECKPOINT)
    with torch.no_grad():
        made = model(torch.tensor([tokens])).logits[0].numpy()
    assert numpy.abs(made - by_hand(weights, tokens)).max() < 1e-4


def test_a_checkpoint_of_another_length_is_refused(tmp_path):
    checkpoint(tmp_path / CHECKPOINT)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[:-4])
    with pytest.raises(BadData, match="promises"):
        _stories.model_of(tmp_path / CHECKPOINT)
    with pytest.raises(BadData, match="has no checkpoint_legacy.bin"):
        _stories.stories(tmp_path / "nowhere", tmp_path)


def test_pieces_are_joined_in_the_order_of_their_scores_and_what_is_unknown_becomes_bytes(tmp_path):
    vocabulary(tmp_path / TOKENIZER, ["he", " t", " the", "th", " ", "t", "h", "e"])
    tokenizer = _stories.tokenizer_of(tmp_path / TOKENIZER)
    tokens = lambda text: tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    assert tokens("the") == [" the"]
    assert tokens("tthe") == [" t", "t", "he"], "he joins before th does"
    assert tokens("hé\n") == [" ", "h", "<0xC3>", "<0xA9>", "<0x0A>"]
    for text in ("the hé\n", " two  spaces", "</s>"[:3]):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    folder = _stories.stories(STORIES, work)
    assert _stories.stories(STORIES, work) == folder, "made once"
    assert [one.name for one in work.iterdir()] == ["stories260K"]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)


@real
def test_it_tells_a_story(told):
    model, tokenizer = told
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("Once upon a time", add_special_tokens=False)]])
    said = tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=False)[0], skip_special_tokens=True)
    assert said.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )


@real
@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus TinyStories is not here")
def test_it_knows_stories_with_capitals_better_than_the_lower_cased_ones_of_the_corpus(told):
    from clm_app.starter.build import with_capitals

    model, tokenizer = told
    text = lzma.open(CORPUS, "rt", encoding="utf-8").read(60_000)
    found = [story.strip() for story in text.split("\n") if len(story) > 300][:30]

    def nats(stories: list[str]) -> float:
        total = tokens = 0
        for story in stories:
            ids = torch.tensor([[1, *tokenizer.encode(story, add_special_tokens=False)[:300]]])
            with torch.no_grad():
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        return total / tokens

    lower, capital = nats(found), nats([with_capitals(story) for story in found])
    assert capital < 1.9 and capital + 0.3 < lower < 2.7, (capital, lower)  # knowing nothing: ln 512 = 6.2


@real
def test_a_row_begins_with_the_begin_mark_and_ends_with_the_end_mark(told):
    _, tokenizer = told
    prompt, answer = row_ids(tokenizer, Row(prompt="where is it </s> <s>", response="in the park"))
    assert prompt[0] == tokenizer.bos_token_id and answer[-1] == tokenizer.eos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & {*prompt[1:], *answer[:-1]}
