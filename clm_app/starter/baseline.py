"""What the starter must beat: an n-gram over the same tokens, packed into no more bytes than the starter's weights.

Interpolated Kneser-Ney with the three discounts of Chen and Goodman 1998 (TR-10-98, equation 26). Entries are chosen
by weighted difference (Seymore and Rosenfeld 1996): how many nats of training text one saves per byte it costs.
`python -m clm_app.starter.baseline --work FOLDER` reads the token files that build.py prepared there.

Packed, an entry of an inner order takes 4 bytes (12 bits token, 8 bits probability, 12 bits number of continuations)
and one of the highest order 2.5 (no continuations). Back-off weights cost nothing: they are what the kept
probabilities of a context leave over, so the distribution sums to one after any pruning and rounding.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clm_app.starter.build import CONTEXT, HERE, VOCABULARY

ORDER = 4  # at this size 3 gives 1.149 bits per byte and 5 gives 1.107
BITS = 12  # of one token id in a key
INNER_BYTES, LEAF_BYTES = 4.0, 2.5
LEVELS = 255  # of a stored probability: evenly spaced logarithms
LOWEST = np.log(1e-6)


@dataclass
class Grams:
    """All n-grams of one length, sorted by key.

    keys: the n tokens, 12 bits each, the oldest highest. counts: how often each was seen. shares: its discounted share of
    its context, 0 where only its place in the tree is kept.
    """

    keys: np.ndarray
    counts: np.ndarray
    shares: np.ndarray

    @property
    def contexts(self) -> np.ndarray:
        """The key of each entry without its last token."""
        return self.keys >> BITS

    def share(self, keys: np.ndarray) -> np.ndarray:
        """Return the shares of these n-grams, 0 for those that are not kept."""
        return _looked_up(self.keys, self.shares, keys)

    def rest(self, contexts: np.ndarray) -> np.ndarray:
        """Return what the entries of each context leave to the next shorter context; 1 for an unknown one."""
        known, at = np.unique(self.contexts, return_inverse=True)
        left = 1.0 - np.bincount(at, self.shares, len(known))
        return _looked_up(known, left, contexts, missing=1.0)

    def only(self, keep: np.ndarray) -> Grams:
        """Return the entries where `keep` is true."""
        return Grams(self.keys[keep], self.counts[keep], self.shares[keep])


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float = 0.0) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)


def keys_of(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return the key of every n-gram of this length along the last axis, which gets `length - 1` shorter."""
    count = tokens.shape[-1] - length + 1
    keys = np.zeros((*tokens.shape[:-1], count), dtype=np.int64)
    for offset in range(length):
        keys = keys << BITS | tokens[..., offset : offset + count]
    return keys


def counted(tokens: np.ndarray) -> list[Grams]:
    """Return the n-grams of a token stream, one order after the other.

    Below the highest order a share counts different tokens to the left and not occurrences, as Kneser and Ney do.
    """
    seen = [np.unique(keys_of(tokens, length), return_counts=True) for length in range(1, ORDER + 1)]
    orders = []
    for length, (keys, counts) in enumerate(seen, 1):
        weights = counts
        if length < ORDER:
            endings, lefts = np.unique(seen[length][0] & (1 << BITS * length) - 1, return_counts=True)
            weights = np.maximum(
                1, _looked_up(endings, lefts, keys)
            )  # the stream's first n-gram has nothing to its left
        orders.append(Grams(keys, counts, shares_of(keys, weights, length)))
    return orders


def shares_of(keys: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """Return each entry's discounted share of its context; single tokens are not discounted."""
    times = [np.count_nonzero(counts == count) for count in (1, 2, 3, 4)]  # n1 to n4 of Chen and Goodman
    steady = times[0] / (times[0] + 2 * times[1])
    discounts = [0.0, *(n - (n + 1) * steady * times[n] / times[n - 1] for n in (1, 2, 3))]
    discount = np.array(discounts)[np.minimum(counts.astype(int), 3)] if length > 1 else 0.0
    _, at = np.unique(keys >> BITS, return_inverse=True)
    return (counts - discount) / np.bincount(at, counts)[at]


def probability(orders: list[Grams], tokens: np.ndarray) -> np.ndarray:
    """Return the probability of the last token of each row of `tokens` (rows, up to ORDER) after those before it."""
    found = np.full(len(tokens), 1 / VOCABULARY)
    for length, grams in enumerate(orders[: tokens.shape[-1]], 1):
        keys = keys_of(tokens[:, -length:], length)[:, 0]
        found = grams.share(keys) + grams.rest(keys >> BITS) * found
    return found


def tokens_of(keys: np.ndarray, length: int) -> np.ndarray:
    """Return the tokens of each key, (keys, length)."""
    return np.stack([keys >> BITS * place & (1 << BITS) - 1 for place in reversed(range(length))], axis=-1)


def savings(orders: list[Grams], length: int) -> np.ndarray:
    """Return the training nats that each entry of one order saves against leaving it to the next shorter context."""
    grams = orders[length - 1]
    shorter = probability(orders[: length - 1], tokens_of(grams.keys, length)[:, 1:])
    rest = grams.rest(grams.contexts)
    return grams.counts * np.log((grams.shares + rest * shorter) / ((rest + grams.shares) * shorter))


def pruned(orders: list[Grams], most_bytes: int) -> list[Grams]:
    """Return the orders with the entries that save most per byte; together they take at most `most_bytes`."""
    costs = [INNER_BYTES] * (len(orders) - 1) + [LEAF_BYTES]
    worth = [savings(orders, length) / costs[length - 1] for length in range(2, len(orders) + 1)]
    low, high = 0.0, float(max(w.max() for w in worth))
    best = orders
    for _ in range(30):
        middle = (low + high) / 2
        kept = chosen(orders, worth, middle)
        if packed_bytes(kept) > most_bytes:
            low = middle
        else:
            high, best = middle, kept
    return best


def chosen(orders: list[Grams], worth: list[np.ndarray], least: float) -> list[Grams]:
    """Return the entries worth at least `least`, and the places in the tree that lead to them."""
    kept: list[Grams] = []
    needed = np.array([], dtype=np.int64)
    for grams, value in zip(reversed(orders[1:]), reversed(worth), strict=True):
        is_worth, is_needed = value >= least, np.isin(grams.keys, needed)
        found = Grams(grams.keys, grams.counts, np.where(is_worth, grams.shares, 0.0)).only(is_worth | is_needed)
        kept.insert(0, found)
        needed = np.unique(found.contexts)
    return [orders[0], *kept]


def packed_bytes(orders: list[Grams]) -> int:
    """Return the size of the packed model."""
    inner = sum(len(grams.keys) for grams in orders[:-1])
    return int(inner * INNER_BYTES + len(orders[-1].keys) * LEAF_BYTES)


def rounded(grams: Grams) -> Grams:
    """Return the entries with their shares as 8 bits can hold them, rounded down so that no context exceeds one."""
    level = np.floor((np.log(np.maximum(grams.shares, np.exp(LOWEST))) - LOWEST) / -LOWEST * LEVELS)
    shares = np.exp(LOWEST + level / LEVELS * -LOWEST)
    return Grams(grams.keys, grams.counts, np.where(grams.shares > 0, shares, 0.0))


def held_out_nats(orders: list[Grams], ids: np.ndarray) -> float:
    """Return the mean nats per token of rows (rows, CONTEXT), each token after those before it in its own row."""
    nats = -np.log(probability(orders, ids[:, :2])).sum()
    for length in range(2, len(orders)):
        nats -= np.log(probability(orders, ids[:, : length + 1])).sum()
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(orders) + 1, axis=1)[..., 1:]
    nats -= np.log(probability(orders, windows.reshape(-1, len(orders)))).sum()
    return nats / (ids.shape[0] * (CONTEXT - 1))


def ngram_bits_per_byte(work: Path, most_bytes: int | None = None) -> dict:
    """Return the figures of the n-gram that figures.json keeps, measured exactly as `build.bits_per_byte` does.

    work: build.py's folder with train.npy, held_out.npy and prepared.json. most_bytes: None takes the size of the
    shipped model.safetensors.
    """
    most_bytes = most_bytes or (HERE / "model" / "model.safetensors").stat().st_size
    tokens = np.load(work / "train.npy").astype(np.int64)
    orders = counted(tokens)
    kept = [rounded(grams) for grams in pruned(orders, most_bytes)]
    ids = np.load(work / "held_out.npy").astype(np.int64)
    ids = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    sizes = json.loads((work / "prepared.json").read_text(encoding="utf-8"))["held_out"]
    scale = sizes["tokens"] / sizes["bytes"] / np.log(2)
    return {
        "ngram_bits_per_byte": round(float(held_out_nats(kept, ids) * scale), 4),
        "ngram_whole_bits_per_byte": round(float(held_out_nats(orders, ids) * scale), 4),
        "ngram_bytes": packed_bytes(kept),
        "ngram_whole_bytes": packed_bytes(orders),
        "ngram_entries": [len(grams.keys) for grams in kept],
    }


def main() -> None:
    """Measure the baseline and write it into figures.json beside the model's own figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="build.py's folder with the token files")
    options = parser.parse_args()
    figures = ngram_bits_per_byte(options.work)
    file = HERE / "model" / "figures.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | figures, indent=1) + "\n", "utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
