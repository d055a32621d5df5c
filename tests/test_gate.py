"""The gate promotes only what was shown: gain on the new task, no loss beyond the margin on any old one."""

from __future__ import annotations

import json
import random

import numpy
import pytest

from clm_app.judging import paired
from clm_app.judging.gate import Floor, GateSettings, Noise, Pair, judge, pair
from clm_app.judging.paired import holm, items_needed, lower_bound, mcnemar, mean_bound, non_inferiority


def flips(task: str, items: int, right_before: int, lost: int = 0, gained: int = 0, **more) -> Pair:
    """Return a pair of which `lost` items turned wrong and `gained` turned right."""
    before = [i < right_before for i in range(items)]
    after = [(b and i >= lost) or (not b and i < right_before + gained) for i, b in enumerate(before)]
    made = Pair(task=task, before=before, after=after, items=[f"{task}{i}" for i in range(items)], **more)
    assert (made.lost, made.gained) == (lost, gained)
    return made


def losses(items: int, rise: float, spread: float = 0.05) -> dict[str, list[float]]:
    """Return loss_before and loss_after of items whose loss rises by `rise` on average."""
    rng = random.Random(0)
    before = [0.1 + rng.random() * 0.1 for _ in range(items)]
    drawn = [rng.gauss(0, spread) for _ in range(items)]
    middle = sum(drawn) / items
    return {"loss_before": before, "loss_after": [b + rise + d - middle for b, d in zip(before, drawn, strict=True)]}


LEARNED = flips("Bikes", 40, 0, gained=30)


# --- the statistics ---------------------------------------------------------------------------------------------------


def test_the_p_values_are_those_worked_by_hand():
    assert mcnemar(5, 0) == pytest.approx(1 / 32)  # all five flips one way: 0.5 ** 5
    assert mcnemar(8, 2) == pytest.approx((45 + 10 + 1) / 1024)  # C(10,8) + C(10,9) + C(10,10) of 2 ** 10
    assert mcnemar(0, 5) == 1.0 and mcnemar(0, 0) == 1.0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, no less than it
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_without_a_flip_the_bound_is_that_of_the_number_of_items():
    z = 1.6448536269514722
    assert lower_bound(0, 0, 84) == pytest.approx(-z * z / (84 + z * z), abs=1e-9)  # the score test at no flip
    assert non_inferiority(0, 0, 132, 0.02) > 0.05 > non_inferiority(0, 0, 133, 0.02), "133 items exclude two points"
    assert items_needed(0.02, 0.0) == 133


def test_the_bound_agrees_with_tangos_published_interval():
    # Tango 1998, table III: 43, 0, 1, 0 of 44 items: difference 1/44, 95 % interval -0.0618 to 0.1184 at two sides
    low, high = lower_bound(0, 1, 44, alpha=0.025), paired.upper_bound(0, 1, 44, alpha=0.025)
    assert low == pytest.approx(-0.0602, abs=0.003) and high == pytest.approx(0.1184, abs=0.002)


@pytest.mark.parametrize("n, flipping", [(84, 0.05), (150, 0.02), (450, 0.03), (450, 0.1)])
def test_a_loss_of_the_margin_is_called_none_in_at_most_one_of_twenty_draws(n, flipping):
    margin, rng = 0.02, numpy.random.default_rng(0)
    shares = [(flipping + margin) / 2, (flipping - margin) / 2]
    drawn = rng.multinomial(n, [*shares, 1 - sum(shares)], 3000)
    wrong = numpy.mean([non_inferiority(lost, gained, n, margin) < 0.05 for lost, gained, _ in drawn.tolist()])
    assert wrong <= 0.065


@pytest.mark.parametrize("flipping", [0.005, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_as_many_items_as_are_asked_for_show_that_equal_versions_are_equal(flipping, alpha):
    n, rng = items_needed(0.02, flipping, alpha), numpy.random.default_rng(1)
    drawn = rng.multinomial(n, [flipping / 2, flipping / 2, 1 - flipping], 2000)
    assert (
        0.77
        <= numpy.mean([non_inferiority(lost, gained, n, 0.02) < alpha for lost, gained, _ in drawn.tolist()])
        <= 0.93
    )


def test_a_mean_has_the_bound_of_students_t():
    bound = mean_bound([1.0, 2.0, 3.0, 4.0])
    assert bound.mean == 2.5 and bound.upper - 2.5 == pytest.approx(2.3533634348 * 1.2909944487 / 2)
    assert mean_bound([1.0]).upper == float("inf")


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_a_candidate_that_learned_and_kept_is_promoted():
    verdict = judge(LEARNED, [flips("Lamps", 400, 360, lost=1), flips("Energy", 400, 300)], GateSettings())
    assert verdict.verdict == "promote"
    assert verdict.sentence == (
        "Promoted: it learned Bikes (0 % → 75 % right) and keeps the 2 earlier tasks: a loss of more than 2 points is "
        "excluded on each."
    )
    assert judge(LEARNED, [], GateSettings()).sentence.endswith("(0 % → 75 % right) and is the first task.")


def test_a_candidate_that_learned_and_forgets_needs_repair_and_one_that_only_forgets_is_refused():
    old = [flips("Lamps", 40, 36, lost=12), flips("Energy", 40, 30)]
    verdict = judge(LEARNED, old, GateSettings())
    assert (verdict.verdict, verdict.sentence) == ("repair", (
        "Needs repair: it learned Bikes (0 % → 75 % right), but it forgets Lamps: 90 % before, 60 % now, a loss of 30 points "
        "that is not chance (p < 0.001)."
    ))  # fmt: skip
    lamps, energy = verdict.evidence["old"]
    assert lamps["p"] == pytest.approx(2 * 0.5**12) and energy["p"] == 1.0, "Holm over two old tasks"
    assert (lamps["items"], lamps["lost"], lamps["gained"], lamps["change_points"]) == (40, 12, 0, -30.0)
    nothing = judge(flips("Bikes", 40, 0), old, GateSettings())
    assert nothing.verdict == "hold" and nothing.sentence.startswith("Refused: it forgets Lamps: 90 % before, 60 % now")
    several = judge(LEARNED, [flips(n, 40, 36, lost=12 + i) for i, n in enumerate("abc")], GateSettings()).sentence
    assert "it forgets c and 2 other tasks: 90 % before, 55 % now" in several


def test_a_candidate_that_did_not_learn_is_held():
    verdict = judge(flips("Bikes", 40, 4, lost=1, gained=3), [flips("Lamps", 400, 360)], GateSettings())
    assert verdict.verdict == "hold"
    assert verdict.sentence == "Refused: it did not learn Bikes: 10 % right before, 15 % now (p = 0.312)."


def test_where_a_loss_can_neither_be_shown_nor_excluded_the_verdict_says_how_many_items_it_takes():
    verdict = judge(LEARNED, [flips("Lamps", 84, 80)], GateSettings())
    assert (verdict.verdict, verdict.sentence) == ("inconclusive", (
        "Undecided: on Lamps 84 test items show +0.0 points and cannot exclude a loss of 2 points (only one of 3.1); about 318 "
        "items are needed, or a wider margin."
    ))  # fmt: skip
    few = judge(LEARNED, [flips("Lamps", 12, 12)], GateSettings())
    assert few.verdict == "inconclusive" and "Lamps has 12 test items and at least 30 are needed" in few.sentence
    assert judge(LEARNED, [flips("Lamps", 12, 12, lost=9)], GateSettings()).verdict == "repair", "harm is plain at once"


def test_what_was_never_measured_before_is_no_silent_pass(tmp_path):
    after = tmp_path / "after.jsonl"
    after.write_text(
        "".join(json.dumps({"item": str(i), "exact": True, "loss": 0.1, "tokens": 2}) + "\n" for i in range(400))
    )
    missing = pair("Lamps", None, after)
    verdict = judge(LEARNED, [missing, flips("Energy", 400, 300)], GateSettings())
    assert verdict.verdict == "inconclusive" and "never measured on Lamps" in verdict.sentence


def test_a_benchmark_of_which_every_item_was_trained_on_decides_nothing():
    leaked = Pair(task="Exam@1", before=[], after=[], left_out=["a", "b"])
    verdict = judge(LEARNED, [leaked], GateSettings())
    assert verdict.verdict == "inconclusive" and "all 2 test items of Exam@1 stand in training rows" in verdict.sentence


def test_few_items_are_judged_by_the_likelihood_of_their_answers():
    calm, worse = losses(120, rise=0.0), losses(120, rise=0.1)
    kept = judge(LEARNED, [flips("Lamps", 120, 114, **calm)], GateSettings())
    assert kept.verdict == "promote" and "on Lamps by the likelihood of the right answers" in kept.sentence
    assert kept.evidence["old"][0]["rise_upper"] < 0.02
    assert judge(LEARNED, [flips("Lamps", 120, 114, **worse)], GateSettings()).verdict == "inconclusive", (
        "no item is lost yet"
    )
    scarce = judge(LEARNED, [flips("Lamps", 84, 80, **losses(84, rise=0.0))], GateSettings())
    assert scarce.verdict == "inconclusive", "where one answer in twenty is spoiled, 84 items may miss them all"
    lost = judge(LEARNED, [flips("Lamps", 120, 114, lost=3, **worse)], GateSettings())
    assert lost.verdict == "repair" and "by the likelihood of its answers is not chance" in lost.sentence
    hidden = judge(LEARNED, [flips("Lamps", 120, 114, lost=4, gained=1, **calm)], GateSettings())
    assert hidden.verdict == "inconclusive", (
        "a calm likelihood does not outweigh answers that are lost beyond the margin"
    )


def test_a_margin_of_nothing_is_about_the_items_themselves():
    safe = flips("Refusals", 40, 40, margin_points=0.0)
    assert judge(LEARNED, [safe], GateSettings()).verdict == "promote"
    broken = judge(LEARNED, [flips("Refusals", 400, 400, lost=1, margin_points=0.0)], GateSettings())
    assert broken.verdict == "repair"
    assert "1 item of 400 that were right are wrong now, and none may be" in broken.sentence


def test_scores_between_right_and_wrong_are_judged_by_their_mean():
    before = [0.5 + 0.01 * (i % 7) for i in range(200)]
    same = Pair(task="Summaries", before=before, after=[b + 0.002 * (i % 3 - 1) for i, b in enumerate(before)])
    lower = Pair(task="Summaries", before=before, after=[b - 0.05 for b in before])
    assert judge(LEARNED, [same], GateSettings()).verdict == "promote"
    verdict = judge(LEARNED, [lower], GateSettings())
    assert verdict.verdict == "repair" and "-5.0 points, which is not chance" in verdict.sentence
    unmoved = Pair(task="Summaries", before=before[:50], after=before[:50])
    assert judge(LEARNED, [unmoved], GateSettings()).verdict == "inconclusive", (
        "fifty items that did not move show little"
    )


def test_the_floor_of_general_text_and_ability_is_judged_where_it_is_set():
    text = Floor(probe="general_text", title="General text", unit="bits per byte", before=1.56, after=1.92, change=0.36,
                 low=0.3, high=0.42, lower_is_better=True)  # fmt: skip
    ability = Floor(probe="general_ability", title="General ability", unit="share right", before=0.82, after=0.6,
                    change=-0.22, low=-0.3, high=-0.14, lower_is_better=False)  # fmt: skip
    assert judge(LEARNED, [], GateSettings(), floors=[text, ability]).verdict == "promote", "shown, and not judged"
    verdict = judge(LEARNED, [], GateSettings(most_text_rise=0.1), floors=[text])
    assert verdict.sentence == "Refused: general text rose from 1.56 to 1.92 bits per byte, by more than 0.1."
    verdict = judge(LEARNED, [], GateSettings(most_ability_loss=5), floors=[ability])
    assert verdict.sentence == "Refused: general ability fell from 82 % to 60 %, by more than 5 points."
    noisy = text.model_copy(update={"low": -0.1, "high": 0.8})
    assert judge(LEARNED, [], GateSettings(most_text_rise=0.1), floors=[noisy]).verdict == "promote", (
        "that may be chance"
    )


def test_a_gain_must_be_more_than_the_same_weights_differ_from_themselves():
    new = flips("Bikes", 400, 100, lost=4, gained=16)
    assert judge(new, [], GateSettings()).verdict == "promote"
    assert judge(new, [], GateSettings(), noise=Noise(items=400, flips=40)).verdict == "hold"
    assert judge(new, [], GateSettings(), noise=Noise(items=400, flips=0)).verdict == "promote"


def test_several_looks_at_the_same_items_share_the_error_rate():
    old = [flips("Lamps", 260, 250, lost=1)]
    assert judge(LEARNED, old, GateSettings()).verdict == "promote"
    third = judge(LEARNED, old, GateSettings(), looks=3)
    assert third.verdict == "inconclusive" and third.evidence["alpha"] == pytest.approx(0.05 / 3)


def test_flips_of_tasks_with_too_few_items_refuse_nothing():
    few = [flips(f"t{i}", 20, 16, lost=2, gained=2) for i in range(10)]
    verdict = judge(LEARNED, few, GateSettings())
    assert verdict.verdict == "inconclusive" and verdict.evidence["negative_flips"]["items"] == 0
    enough = judge(LEARNED, [flips(f"t{i}", 40, 32, lost=4, gained=4) for i in range(10)], GateSettings())
    assert enough.verdict == "hold" and "40 of 400 items of old tasks were right and are wrong now" in enough.sentence


def test_flips_are_listed_worst_first_with_their_items():
    old = flips("Lamps", 40, 36, lost=2, gained=1, loss_before=[0.1] * 40, loss_after=[2.0, 9.0] + [0.1] * 38)
    shown = judge(LEARNED, [old], GateSettings()).evidence["flips"]
    assert [(f["item"], f["kind"]) for f in shown["shown"][:2]] == [("Lamps1", "lost"), ("Lamps0", "lost")]
    assert shown["counted"] == 33


HARMED = [flips("Lamps", 400, 360, lost=20)]  # five points
KNOBS = {  # {knob: (value, old tasks, verdict with the default, verdict with the value)}
    "margin_points": (13.0, HARMED, "repair", "promote"),
    "alpha": (1e-8, HARMED, "repair", "inconclusive"),
    "least_items": (500, [flips("Lamps", 400, 360)], "promote", "inconclusive"),
    "loss_margin": (0.0, [flips("Lamps", 120, 114, **losses(120, 0.0))], "promote", "inconclusive"),
    "most_flips_percent": (100.0, [flips(n, 4000, 3600, lost=160, gained=155) for n in "ab"], "hold", "promote"),
}


@pytest.mark.parametrize("knob", KNOBS)
def test_each_knob_of_the_gate_changes_what_it_says(knob):
    value, old, usual, changed = KNOBS[knob]
    assert judge(LEARNED, old, GateSettings()).verdict == usual
    assert judge(LEARNED, old, GateSettings(**{knob: value})).verdict == changed


def test_every_knob_has_its_test():
    elsewhere = {"most_text_rise", "most_ability_loss", "policy"}  # the floor above; tests/test_approval.py
    assert set(GateSettings.model_fields) == set(KNOBS) | elsewhere


def test_versions_are_compared_on_the_items_they_share(tmp_path):
    (tmp_path / "a").write_text('{"item": "x", "exact": true}\n{"item": "y", "exact": false}\n')
    (tmp_path / "b").write_text(
        '{"item": "y", "exact": true}\n{"item": "z", "exact": true}\n{"item": "x", "exact": true}\n'
    )
    found = pair("Lamps", tmp_path / "a", tmp_path / "b", bound_to={"before": "d1", "after": "d2"})
    assert (found.items, found.before, found.after) == (["x", "y"], [True, False], [True, True])
    assert found.bound_to == {"before": "d1", "after": "d2"}
