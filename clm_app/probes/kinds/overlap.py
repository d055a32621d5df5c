"""Overlap: how much of a longer right answer does the reply share with it, in words and in letters?

ROUGE-L: F of the longest common subsequence of words (Lin 2004, ROUGE, section 3), by rouge-score. chrF: F2 of letter
n-grams up to 6 (Popović 2015). BLEU: precision of word n-grams up to 4 with a brevity penalty (Papineni et al. 2002), for one
item with Lin and Och's smoothing. Both by sacrebleu, whose signature says what was computed (Post 2018, arXiv:1804.08771).
BLEU and chrF over all items together are the figures that papers report; they are no mean of the items' scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field

from clm_app.probes.kinds._base import BenchmarkItem, Heard, Kind, KindSettings, need_answer
from clm_app.probes.kinds._replies import normalised


class OverlapSettings(KindSettings):
    """What an item counts."""

    score: Literal["rouge_l", "chrf", "bleu"] = Field(
        "rouge_l",
        description="rouge_l: order of words; chrf: letters, for any language; bleu: phrases, for translation",
    )


class Overlap(Kind):
    """ROUGE-L, chrF and BLEU, against one or several right answers."""

    title = "Overlap with a reference text"
    purpose = "Summaries, translations, free explanations: texts that can be good in many wordings."
    unit = "share of overlap"
    asks = "text"
    Settings = OverlapSettings

    def check(self, item: BenchmarkItem) -> None:
        """Refuse an item without an answer."""
        super().check(item)
        need_answer(item)

    def outcome(self, item: BenchmarkItem, heard: Heard) -> dict:
        """Return item, score (0..1, of the nearest right answer or of all together, as the measure has it), expected, text."""
        score = getattr(self, f"_{self.settings.score}")(heard.text, item.answers)
        return {"item": item.key, "score": score, "expected": list(item.answers), "text": heard.text}

    def figures(self, outcomes: Sequence[dict]) -> dict:
        """Return rouge_l (mean), bleu and chrf over all items together (0..1), and the two signatures of sacrebleu."""
        said, expected = [one["text"] for one in outcomes], [one["expected"] for one in outcomes]
        columns = [[e[i] if i < len(e) else None for e in expected] for i in range(max(map(len, expected)))]
        bleu, chrf = self._sacrebleu(is_corpus=True)
        return {
            "rouge_l": sum(map(self._rouge_l, said, expected)) / len(outcomes),
            "bleu": bleu.corpus_score(said, columns).score / 100, "chrf": chrf.corpus_score(said, columns).score / 100,
            "bleu_signature": str(bleu.get_signature()), "chrf_signature": str(chrf.get_signature()),
        }  # fmt: skip

    def _rouge_l(self, said: str, answers: Sequence[str]) -> float:
        return float(self._rouge.score_multi(answers, said)["rougeL"].fmeasure)

    def _chrf(self, said: str, answers: Sequence[str]) -> float:
        return self._each[1].sentence_score(said, list(answers)).score / 100

    def _bleu(self, said: str, answers: Sequence[str]) -> float:
        return min(1.0, self._each[0].sentence_score(said, list(answers)).score / 100)  # 100.00000000000004 occurs

    @cached_property
    def _rouge(self):
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], tokenizer=_Words())  # its own tokenizer drops every letter but a to z

    @cached_property
    def _each(self) -> tuple:
        return self._sacrebleu(is_corpus=False)

    @staticmethod
    def _sacrebleu(is_corpus: bool) -> tuple:
        """Return (BLEU, chrF); for one item BLEU counts only as long n-grams as the item has."""
        from sacrebleu.metrics import BLEU, CHRF

        return BLEU(effective_order=not is_corpus), CHRF()


class _Words:
    """Words of any language that puts spaces between them, in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return normalised(text).split()
