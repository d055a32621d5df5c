"""Rebuild the starter model from a data folder: tokenizer, pretraining, export, figures for its card.

`python -m clm_app.starter.build DATA --work FOLDER` is resumable: it prepares token files once, trains with a fixed
seed, commits a checkpoint every few minutes by an atomic rename, and exports to this folder when the last step is done.
DATA holds `corpus/`, `sgd/` and `gsm8k/` as described in card.md. CLINC150 and banking77 are never read here: they stay
unseen, so that what is measured on them is learned by the loop and not by the starter.

Optimiser: Muon for the hidden matrices (Jordan 2024, scaled to match AdamW's update size, Moonshot 2025,
arXiv:2502.16982), AdamW for the embedding and the norms; both follow one warm-up, hold and linear decay to zero.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch

HERE = Path(__file__).parent
SEED = 7
VOCABULARY = 4096
CONTEXT = 256  # tokens in a training row
SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NAMES = "lily tim tom max ben sue amy mia sam jack lucy anna sara bob spot joe jane timmy tommy sally billy emma leo"


# --- documents -------------------------------------------------------------------------------------------------------


def with_capitals(story: str) -> str:
    """Give a lower-cased story its sentence starts, its `I` and its commonest names back."""
    story = re.sub(r"(^|[.!?]['\"]?\s+|\n|\"(?=\w))([a-z])", lambda m: m[1] + m[2].upper(), story)
    story = re.sub(r"\bi\b(?=['\s.,!?])", "I", story)
    return re.sub(rf"\b({'|'.join(NAMES.split())})\b", lambda m: m[1].capitalize(), story)


def paragraphs(text: str, size: int = 2000) -> Iterator[str]:
    """Cut a long book into pieces of about `size` characters that end with a paragraph."""
    piece: list[str] = []
    for paragraph in text.split("\n"):
        piece.append(re.sub(r"\s+", " ", paragraph).strip())
        if sum(map(len, piece)) > size:
            yield "\n".join(piece)
            piece = []
    if piece:
        yield "\n".join(piece)


def chat(*turns: tuple[str, str]) -> str:
    """Write turns of (role, content) as the chat template does, without the leading <|bos|>."""
    return "".join(f"<|{role}|>{content}<|end|>" for role, content in turns)


def dialogues(data: Path, rng: random.Random) -> Iterator[str]:
    """Yield each training dialogue as chat, one in three lower-cased, and its opening with its service as a label."""
    for line in gzip.open(data / "sgd/train.jsonl.gz", "rt", encoding="utf-8"):
        row = json.loads(line)
        turns = [("user" if who == "U" else "assistant", text) for who, text in row["turns"]]
        if rng.random() < 1 / 3:
            turns = [(role, text.lower()) for role, text in turns]
        yield chat(*turns)
        topics = ", ".join(sorted({name.split("_")[0].lower() for name in row["services"]}))
        yield chat(("system", "Name the topic."), turns[0], ("assistant", topics))


def documents(data: Path) -> list[str]:
    """Return every document of the mixture, shuffled with the fixed seed."""
    rng = random.Random(SEED)
    read = lambda name: lzma.open(data / "corpus" / name, "rt", encoding="utf-8").read()  # noqa: E731
    found = [with_capitals(s.strip()) for s in re.split(r"(?<!\n)\n(?!\n)", read("tinystories.txt.xz"))]
    found += [json.loads(line)["text"] for line in read("childrens_stories.jsonl.xz").splitlines()]
    found += [a.replace("\ufeff", "").strip() for a in read("onestop_english.txt.xz").split("<|article|>")]
    for book in read("gutenberg_children.txt.xz")[:7_000_000].split("<|book|>"):
        found += paragraphs(book)
    found += dialogues(data, rng)
    for line in gzip.open(data / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8"):
        row = json.loads(line)
        found.append(chat(("user", row["question"]), ("assistant", re.sub(r"<<.*?>>", "", row["answer"]))))
    found = [d for d in found if len(d) > 20]
    rng.shuffle(found)
    return found


def is_held_out(document: str) -> bool:
    """Say whether a document belongs to the 1 % that no gradient sees (by its hash, so the split never moves)."""
    return hashlib.sha256(document.encode()).digest()[0] < 3


# --- tokens ----------------------------------------------------------------------------------------------------------


def build_tokenizer(texts: list[str], out: Path):
    """Train a byte-level BPE tokenizer with the chat template and save it to `out`; return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=SPECIALS[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    return tokenizer


def prepare(data: Path, work: Path) -> None:
    """Write tokenizer/, train.npy, held_out.npy (uint16 token ids) and held_out_bytes.json into `work`, once."""
    if (work / "prepared.json").exists():
        return
    texts = documents(data)
    train = [t for t in texts if not is_held_out(t)]
    held_out = [t for t in texts if is_held_out(t)]
    tokenizer = build_tokenizer(train[::3], work / "tokenizer")
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    sizes = {}
    for name, part in (("train", train), ("held_out", held_out)):
        ids: list[int] = []
        for encoding in tokenizer.backend_tokenizer.encode_batch(part, add_special_tokens=False):
            ids += [bos, *encoding.ids] + ([end] if encoding.ids[-1] != end else [])
        np.save(work / f"{name}.npy", np.array(ids, dtype=np.uint16))
        sizes[name] = {"documents": len(part), "tokens": len(ids), "bytes": sum(len(t.encode()) for t in part)}
    (work / "prepared.json").write_text(json.dumps(sizes, indent=1))
    print(json.dumps(sizes), flush=True)


# --- training --------------------------------------------------------------------------------------------------------


def new_model():
    """Return the starter architecture with fresh weights: 4.2 M parameters, sizes that every GGUF quantisation fits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.04,
        )
    )


def optimisers(model, peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon over the hidden matrices and AdamW over the rest."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def share_of_peak(step: int, steps: int) -> float:
    """Return the learning rate as a share of its peak: 3 % warm-up, hold, the last 45 % linearly to zero."""
    return min(1.0, (step + 1) / (0.03 * steps), (steps - step) / (0.45 * steps))


def commit(work: Path, state: dict) -> None:
    """Replace the checkpoint so that a power cut leaves the old one or the new one, never half of one."""
    torch.save(state, work / "checkpoint.tmp")
    os.replace(work / "checkpoint.tmp", work / "checkpoint.pt")


def train(work: Path, epochs: float, batch: int, peak: float) -> None:
    """Train to the last step, resuming from the newest checkpoint; rows are read in one seeded order."""
    model, tokens = new_model(), torch.from_numpy(np.load(work / "train.npy").astype(np.int64))
    opts = optimisers(model, peak)
    rows = (len(tokens) - 1) // CONTEXT
    order = torch.cat(
        [torch.randperm(rows, generator=torch.Generator().manual_seed(SEED + e)) for e in range(int(epochs) + 1)]
    )
    steps, start, spent = int(rows * epochs / batch), 0, 0.0
    if (work / "checkpoint.pt").exists():
        saved = torch.load(work / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimisers"], strict=True):
            opt.load_state_dict(state)
        start, spent = saved["step"], saved["seconds"]
    model.train()
    began = last = time.time()
    for step in range(start, steps):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = peak * share_of_peak(step, steps)
        at = order[step * batch : (step + 1) * batch, None] * CONTEXT + torch.arange(CONTEXT)
        ids = tokens[at]  # (batch, context)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            seconds = spent + time.time() - began
            line = {
                "step": step,
                "of": steps,
                "loss": round(loss.item(), 4),
                "seconds": round(seconds),
                "tokens_per_s": round((step - start + 1) * batch * CONTEXT / (time.time() - began)),
            }
            with open(work / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if time.time() - last > 120 or step == steps - 1:
            commit(
                work,
                {
                    "model": model.state_dict(),
                    "optimisers": [o.state_dict() for o in opts],
                    "step": step + 1,
                    "seconds": spent + time.time() - began,
                },
            )
            last = time.time()


def bits_per_byte(model, work: Path) -> float:
    """Return held-out bits per byte: summed token loss in bits over the UTF-8 bytes of the held-out documents."""
    ids = torch.from_numpy(np.load(work / "held_out.npy").astype(np.int64))
    ids = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    nats = 0.0
    model.eval()
    with torch.no_grad():
        for rows in ids.split(16):
            nats += model(input_ids=rows, labels=rows).loss.item() * rows.shape[0] * (CONTEXT - 1)
    sizes = json.loads((work / "prepared.json").read_text())["held_out"]
    per_token = nats / (ids.shape[0] * (CONTEXT - 1)) / np.log(2)
    return per_token * sizes["tokens"] / sizes["bytes"]


def export(work: Path, out: Path) -> None:
    """Write bfloat16 safetensors, config, tokenizer and figures.json of the finished checkpoint to `out`."""
    from transformers import AutoTokenizer, GenerationConfig

    model = new_model()
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    model.to(torch.bfloat16)
    held_out = bits_per_byte(model.float(), work)  # of the rounded weights, as shipped
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(out)
    sizes = json.loads((work / "prepared.json").read_text())
    figures = {
        "held_out_bits_per_byte": round(float(held_out), 4),
        "steps": saved["step"],
        "training_seconds": round(saved["seconds"]),
        "data": sizes,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    from clm_app.starter.baseline import ngram_bits_per_byte  # here, since that file reads this one

    figures |= ngram_bits_per_byte(work, (out / "model.safetensors").stat().st_size)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(figures, flush=True)


def main() -> None:
    """Read the command line and run prepare, train, export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with corpus/, sgd/ and gsm8k/")
    parser.add_argument("--work", type=Path, required=True, help="folder for token files and checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="where the finished model goes")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the training tokens")
    parser.add_argument("--batch", type=int, default=16, help=f"rows of {CONTEXT} tokens in a step")
    parser.add_argument("--peak", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.work.mkdir(parents=True, exist_ok=True)
    prepare(chosen.data, chosen.work)
    train(chosen.work, chosen.epochs, chosen.batch, chosen.peak)
    export(chosen.work, chosen.out)


if __name__ == "__main__":
    main()
