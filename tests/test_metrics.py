"""Figures of retention are those worked by hand, agree with a published library, and their intervals hold."""

from __future__ import annotations

import time

import numpy
import pytest

from clm_app.judging import bootstrap
from clm_app.judging.matrix import Matrix

# R[i][j]: after task i (row), exact match of task j (column). The value above the diagonal was measured before learning.
#            a    b    c
R = [[0.9, 0.2, None],  # after a
     [0.6, 0.8, 0.3],   # after b
     [0.5, 0.7, 1.0]]  # after c  # fmt: skip
BEFORE = [0.0, 0.1, 0.1]
JOINT = [0.9, 0.9, 0.9]


def matrix(values: list[list[float | None]]) -> Matrix:
    names = [chr(ord("a") + i) for i in range(len(values))]
    return Matrix(tasks=names, versions=names, values=values)


def put(values: list[list[float | None]], row: int, column: int, value: float | None) -> Matrix:
    return matrix([[value if (i, j) == (row, column) else v for j, v in enumerate(r)] for i, r in enumerate(values)])


def test_every_figure_is_the_one_worked_by_hand():
    worked = matrix(R)
    # a: 0.5 now; b: 0.7; c: 1.0
    assert worked.average_accuracy == pytest.approx((0.5 + 0.7 + 1.0) / 3)  # 0.733
    # a: 0.5 - 0.9 = -0.4; b: 0.7 - 0.8 = -0.1
    assert worked.backward_transfer == pytest.approx(-0.25)
    # a: max(0.9, 0.6) - 0.5 = 0.4; b: max(0.2, 0.8) - 0.7 = 0.1
    assert worked.forgetting == pytest.approx(0.25)
    # b: 0.2 - 0.1 = 0.1; c: 0.3 - 0.1 = 0.2
    assert worked.forward_transfer(BEFORE) == pytest.approx(0.15)
    # a: 0.9 - 0.9 = 0; b: 0.9 - 0.8 = 0.1; c: 0.9 - 1.0 = -0.1
    assert worked.intransigence(JOINT) == pytest.approx(0.0)
    assert worked.intransigence([1.0, 1.0, 1.0]) == pytest.approx((0.1 + 0.2 + 0.0) / 3)


def test_forgetting_is_counted_from_the_best_moment_and_transfer_from_when_it_was_learned():
    rose = put(R, 1, 0, 1.0)  # a: 0.9 when learned, 1.0 after b, 0.5 now
    assert rose.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2) == matrix(R).backward_transfer
    assert rose.forgetting == pytest.approx(((1.0 - 0.5) + (0.8 - 0.7)) / 2)
    assert put(R, 2, 0, 1.0).forgetting == pytest.approx(((0.9 - 1.0) + 0.1) / 2), "a task that is better now helps"


def test_what_was_not_measured_makes_no_figure():
    assert put(R, 1, 0, None).forgetting is None and put(R, 2, 1, None).forgetting is None
    assert put(R, 0, 1, None).forgetting == pytest.approx(0.25), "nobody has to measure a task before it is learned"
    assert put(R, 1, 2, None).forward_transfer(BEFORE) is None
    assert matrix(R).forward_transfer([None, 0.1, 0.1]) == pytest.approx(0.15), "the first task has no head start"
    assert matrix(R).forward_transfer([0.0, 0.1, None]) is None
    assert matrix(R).intransigence([0.9, None, 0.9]) is None and put(R, 1, 1, None).intransigence(JOINT) is None
    one = matrix([[0.4]])
    assert one.forgetting is one.forward_transfer([0.0]) is None
    assert one.intransigence([0.5]) == pytest.approx(0.1)


def test_a_published_library_says_the_same_of_the_same_matrix():
    metrics = pytest.importorskip(
        "avalanche.evaluation.metrics", reason="avalanche-lib is not installed here", exc_type=ImportError
    )
    lost, back, ahead = metrics.Forgetting(), metrics.BWT(), metrics.ForwardTransfer()
    for i, row in enumerate(R):
        for metric in (lost, back):
            metric.update(i, row[i], initial=True)
            for j in range(i):
                metric.update(j, row[j])
        ahead.update(i, BEFORE[i], initial=True)
        if i:
            ahead.update(i, R[i - 1][i])
    mean = lambda found: sum(found.values()) / len(found)  # noqa: E731
    assert matrix(R).backward_transfer == pytest.approx(mean(back.result()))
    assert matrix(R).forward_transfer(BEFORE) == pytest.approx(mean(ahead.result()))
    # Its forgetting counts from when a task was learned; ours, as published, from its best moment: here the same one.
    assert matrix(R).forgetting == pytest.approx(mean(lost.result()))


# --- intervals -------------------------------------------------------------------------------------------------------


def stream(rng: numpy.random.Generator, tasks: int, items: int, right: float = 0.8) -> list[list]:
    """Return outcomes below and on the diagonal, each item right with the same chance."""
    return [[rng.random(items) < right if j <= i else None for j in range(tasks)] for i in range(tasks)]


def whole(cells: list[list]) -> list[list]:
    """Return the rows that `bootstrap.intervals` takes: no base and no joint model were measured."""
    return [[None] * len(cells)] * 2 + cells


def plain(cells: list[list]) -> Matrix:
    return matrix([[None if cell is None else float(cell.mean()) for cell in row] for row in cells])


FIGURES = ("average_accuracy", "backward_transfer", "forgetting")


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_many_matrices_is_the_matrix_own_figure(name):
    rng, figure = numpy.random.default_rng(0), getattr(bootstrap, name)
    many = rng.random((50, 4, 4))
    many[:, 0, 2:] = numpy.nan
    said = [
        getattr(matrix([[None if numpy.isnan(v) else v for v in row] for row in one.tolist()]), name) for one in many
    ]
    assert figure(many) == pytest.approx(numpy.array(said))
    many[7, 2, 1] = numpy.nan
    gap = getattr(matrix([[None if numpy.isnan(v) else v for v in row] for row in many[7].tolist()]), name)
    assert figure(many)[7] == pytest.approx(numpy.nan if gap is None else gap, nan_ok=True)
    single = getattr(matrix([[0.5]]), name)
    assert figure(numpy.array([[[0.5]]]))[0] == pytest.approx(numpy.nan if single is None else single, nan_ok=True)


def test_the_figures_of_many_matrices_with_base_and_joint_model_are_those_worked_by_hand():
    rows = [[numpy.nan if v is None else v for v in row] for row in [BEFORE, JOINT, *R]]
    found = bootstrap.figures(numpy.array([rows, rows]))
    by_hand = {"average_accuracy": 2.2 / 3, "backward_transfer": -0.25, "forgetting": 0.25, "forward_transfer": 0.15,
               "intransigence": 0.0}  # fmt: skip
    assert {name: pytest.approx([value] * 2, abs=1e-9) for name, value in by_hand.items()} == found
    said = matrix(R).model_copy(update={"before": BEFORE, "joint": JOINT}).figures
    assert said == {name: pytest.approx(value, abs=1e-9) for name, value in by_hand.items()}


@pytest.mark.parametrize("name", FIGURES[:2])
def test_an_interval_contains_its_figure_and_narrows_with_the_items(name):
    rng, figure = numpy.random.default_rng(1), getattr(bootstrap, name)
    few, many = stream(rng, 4, 50), stream(rng, 4, 800)
    widths = []
    for cells in (few, many):
        low, high = bootstrap.over_items(cells, figure)
        assert low < getattr(plain(cells), name) < high
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6, "sixteen times the items: about a quarter of the width"


def test_an_interval_is_as_wide_as_the_normal_one_and_depends_on_its_seed_alone():
    answers = numpy.arange(400) < 300  # 0.75 of 400: standard error sqrt(0.75 * 0.25 / 400) = 0.02165
    low, high = bootstrap.over_items([[answers]], resamples=4000)
    assert (low, high) == pytest.approx((0.75 - 1.96 * 0.02165, 0.75 + 1.96 * 0.02165), abs=0.004)
    assert bootstrap.over_items([[answers]], resamples=4000) == (low, high)
    assert len({bootstrap.over_items([[answers]], resamples=4000, seed=seed) for seed in range(5)}) > 1
    inner = bootstrap.over_items([[answers]], level=0.5)
    assert low < inner[0] < inner[1] < high


def test_nineteen_intervals_of_twenty_contain_the_true_share():
    rng, hits = numpy.random.default_rng(2), 0
    for trial in range(300):
        low, high = bootstrap.over_items([[rng.random(200) < 0.7]], resamples=400, seed=trial)
        hits += low <= 0.7 <= high
    assert 0.90 < hits / 300 < 0.985


def test_items_are_drawn_for_all_versions_at_once():
    answers = numpy.arange(100) < 60
    same = [[answers, None], [answers, answers]]  # no item flips, so whatever is drawn, nothing was lost
    assert bootstrap.over_items(same, bootstrap.backward_transfer) == (0.0, 0.0)


def test_seeds_that_differ_widen_the_interval_beyond_that_of_the_items():
    rng = numpy.random.default_rng(3)
    alike = [stream(rng, 3, 400, 0.7) for _ in range(6)]
    apart = [stream(rng, 3, 400, share) for share in (0.45, 0.55, 0.65, 0.75, 0.85, 0.95)]
    (low, high), (wide_low, wide_high) = (
        bootstrap.intervals([whole(cells) for cells in streams])["average_accuracy"] for streams in (alike, apart)
    )
    assert low < numpy.mean([plain(cells).average_accuracy for cells in alike]) < high
    assert wide_low < numpy.mean([plain(cells).average_accuracy for cells in apart]) < wide_high
    # The six shares have a standard deviation of 0.171, so their mean one of 0.07: about 0.27 wide.
    assert 0.2 < wide_high - wide_low < 0.34 and high - low < 0.08
    one = bootstrap.intervals([whole(apart[0])])["average_accuracy"]
    items = bootstrap.over_items(apart[0])
    assert one == pytest.approx(items, abs=0.01), "one seed: only its items are drawn"


def test_an_item_that_is_drawn_counts_as_often_in_kinds_as_one_by_one():
    rng = numpy.random.default_rng(5)
    cells = [[rng.random(60) < 0.5], [rng.random(60) < 0.8]]
    drawn = bootstrap.draw(cells, 20_000, rng)[:, :, 0]
    places = rng.integers(0, 60, (20_000, 60))
    singly = numpy.stack([row[0][places].mean(axis=1) for row in cells], axis=1)
    assert drawn.mean(axis=0) == pytest.approx(singly.mean(axis=0), abs=0.003)
    assert numpy.cov(drawn.T) == pytest.approx(numpy.cov(singly.T), abs=2e-4), "and so do two versions together"


def test_the_interval_of_forgetting_stands_around_its_figure_however_many_moments_were_equally_good():
    rng = numpy.random.default_rng(6)
    known = rng.random((6, 300)) < 0.8
    cells = [[known[j] ^ (rng.random(300) < 0.05) if j <= i else None for j in range(6)] for i in range(6)]
    low, high = bootstrap.intervals([whole(cells)])["forgetting"]
    figure = plain(cells).forgetting
    assert low < figure < high and (low + high) / 2 == pytest.approx(figure, abs=0.003)
    naive_low, _ = bootstrap.over_items(cells, bootstrap.forgetting)  # the best of each draw
    assert naive_low > low + 0.003


def test_a_change_is_drawn_in_pairs_and_the_mean_over_tasks_is_surer_than_one_task():
    before = [numpy.arange(400) < 300, numpy.arange(400) < 300]
    after = [numpy.arange(400) < 280, before[1]]  # 20 of 400 lost: standard error sqrt(0.05 * 0.95 / 400) = 0.0109
    lost, same, mean = bootstrap.changes(before, after)
    assert lost == pytest.approx((-0.05 - 1.96 * 0.0109, -0.05 + 1.96 * 0.0109), abs=0.003) and same == (0.0, 0.0)
    assert mean == pytest.approx((lost[0] / 2, lost[1] / 2), abs=0.002)


def test_a_figure_that_needs_what_was_not_measured_is_refused():
    answers = numpy.ones(30)
    with pytest.raises(ValueError, match="not measured"):
        bootstrap.over_items([[answers, None], [None, answers]], bootstrap.forgetting)


def test_ten_tasks_of_450_items_take_well_under_a_second():
    cells = whole(stream(numpy.random.default_rng(4), 10, 450))
    began = time.process_time()
    bootstrap.intervals([cells])
    assert time.process_time() - began < 1.0
