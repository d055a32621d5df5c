"""stories260K, the smallest model that tells a story, as a Hugging Face folder: the fast set of the retention benchmark.

Source: the legacy checkpoint and tokenizer layouts of llama2.c (github.com/karpathy/llama2.c, export.py and tokenizer.py,
MIT); 260,032 parameters trained on TinyStories, grouped-query attention (8 heads over 4), 512 tokens.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from benchmarks._report import ROOT
from clm_app.errors import BadData

STORIES = ROOT.parent / "shared" / "data" / "stories260K"
CHECKPOINT, TOKENIZER = "checkpoint_legacy.bin", "tokenizer.bin"
UNKNOWN, BEGIN, END = (
    "<unk>",
    "<s>",
    "</s>",
)  # the first three of the vocabulary; text never becomes the first: see bytes
# What a person writes is one paragraph and the answer is the next: a mark for who speaks would be 16 tokens of 512.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ bos_token }}{{ m['content'] }}{{ '\n' }}{% endif %}{% endfor %}"
)


class Shape(NamedTuple):
    """The seven numbers at the head of a legacy checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int  # positive: the output layer is the embedding
    positions: int


def stories(data: Path, work: Path) -> Path:
    """Return the Hugging Face folder under `work`, made from the two files in `data` where it is not there yet.

    Raises:
        BadData: a file is missing, or holds something else.
    """
    place = work / "stories260K"
    if place.exists():
        return place
    for name in (CHECKPOINT, TOKENIZER):
        if not (data / name).exists():
            raise BadData(
                f"{data} has no {name}; the fast set starts from stories260K. Name its folder, with stories260K.bin of "
                "huggingface.co/karpathy/tinyllamas as checkpoint_legacy.bin and tok512.bin as tokenizer.bin."
            )
    draft = work / f".stories260K-{os.getpid()}"
    model_of(data / CHECKPOINT).save_pretrained(draft)
    tokenizer_of(data / TOKENIZER).save_pretrained(draft)
    try:
        draft.rename(place)
    except OSError:  # another process was quicker
        shutil.rmtree(draft)
    return place


def model_of(file: Path) -> torch.nn.Module:
    """Return a legacy checkpoint as a Llama.

    Raises:
        BadData: the file's length is not what its head promises.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    content = file.read_bytes()
    shape = Shape(*struct.unpack_from("7i", content))
    size = shape.hidden // shape.heads
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.positions, rms_norm_eps=1e-5, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    key_value = shape.key_value_heads * size
    layer = {  # name: shape in one layer, in the order of the file; each is there for all layers before the next begins
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (shape.hidden, shape.hidden), "self_attn.k_proj": (key_value, shape.hidden),
        "self_attn.v_proj": (key_value, shape.hidden), "self_attn.o_proj": (shape.hidden, shape.hidden),
        "post_attention_layernorm": (shape.hidden,),
        "mlp.gate_proj": (shape.intermediate, shape.hidden), "mlp.down_proj": (shape.hidden, shape.intermediate),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
    }  # fmt: skip
    numbers = numpy.frombuffer(content, dtype="<f4", offset=struct.calcsize("7i")).copy()
    angles = shape.positions * size  # cosines and sines of every position, at the end: Llama computes its own
    wanted = (shape.vocabulary + 1) * shape.hidden + shape.layers * sum(map(numpy.prod, layer.values())) + angles
    if shape.vocabulary < 0 or len(numbers) != wanted:
        raise BadData(
            f"{file} holds {len(numbers)} numbers where its head promises {wanted}. It is no such checkpoint."
        )
    at = 0

    def take(*sizes: int) -> torch.Tensor:
        nonlocal at
        at += (count := int(numpy.prod(sizes)))
        return torch.from_numpy(numbers[at - count : at]).view(*sizes)

    weights = {"model.embed_tokens.weight": take(shape.vocabulary, shape.hidden)}
    for name, sizes in layer.items():
        for number, one in enumerate(take(shape.layers, *sizes)):
            turned = halves(one, size) if name.endswith(("q_proj", "k_proj")) else one
            weights[f"model.layers.{number}.{name}.weight"] = turned
    weights["model.norm.weight"] = take(shape.hidden)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.eval()


def halves(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Return the rows of a query or key matrix in the order that transformers turns them.

    Both rotate pairs of numbers of a head by the token's position: llama2.c neighbours (0, 1), (2, 3), …, transformers
    number i of the first half with number i of the second. size: numbers of a head.
    """
    return weight.view(-1, size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tokenizer_of(file: Path):
    """Return the fast tokenizer of a llama2.c vocabulary: pairs are joined in the order of the joined piece's score."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    scores = pieces(file)
    names = [UNKNOWN, BEGIN, END, *list(scores)[3:]]
    number = {name: i for i, name in enumerate(names)}
    merges = []
    for piece in sorted(names[259:], key=lambda name: -scores[name]):  # before: three marks and a token for each byte
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in number and right in number]
        merges += sorted(splits, key=lambda pair: (number[pair[0]], number[pair[1]]))
    bpe = Tokenizer(models.BPE(number, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Prepend(" ")  # a text's first word is a word like any other
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=UNKNOWN, pad_token=UNKNOWN, bos_token=BEGIN, eos_token=END,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pieces(file: Path) -> dict[str, float]:
    """Return {piece: score} of a llama2.c vocabulary, in the order of the token ids."""
    content, found, at = file.read_bytes(), {}, 4
    while at < len(content):
        score, length = struct.unpack_from("fi", content, at)
        found[content[at + 8 : at + 8 + length].decode()] = score
        at += 8 + length
    return found
