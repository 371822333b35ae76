"""common/score.py: AUC, precision and intervals by hand."""
import numpy as np
import pytest

from common import score


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    for levels in (3, 10, 10**6):  # with many ties, with few, with none
        scores, positive = rng.integers(0, levels, 60), rng.random(60) < .3
        pairs = [(p > q) + (p == q) / 2 for p in scores[positive] for q in scores[~positive]]
        assert score.auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert score.auc(positive, positive) == 1 and score.auc(~positive, positive) == 0
    assert score.auc(np.zeros(60), positive) == .5


def test_average_precision_by_hand():
    positive = np.array([True, False, True, False])
    assert score.average_precision(np.array([4, 3, 2, 1]), positive) == pytest.approx((1 + 2 / 3) / 2)
    assert score.average_precision(np.array([1, 2, 3, 4]), positive) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert score.average_precision(np.array([4, 2, 2, 1]), positive) == pytest.approx((1 + 2 / 3) / 2)  # a tie
    assert score.average_precision(np.zeros(4), positive) == .5  # chance: the share of positives
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 80), rng.random(80) < .3
    slow = [positive[scores >= one].mean() for one in scores[positive]]
    assert score.average_precision(scores, positive) == pytest.approx(np.mean(slow))


def test_maps_tell_where_though_not_which():
    """Two phenomena follow one token each, and a third is not there. The maps put both where the first one is
    stronger: place is right, and the choice of the phenomenon on the second token is not."""
    positive = np.zeros((1, 4, 3), bool)
    positive[0, 0, 0] = positive[0, 1, 1] = True
    maps = np.zeros((1, 4, 3))
    maps[0, :2] = [[3, 0, 0], [2, 1, 0]]
    there = np.array([[True, True, False]])
    assert score.mean_auc(maps, positive) == (1 + 1) / 2
    found = score.which_scores(maps, positive, there)
    assert found["which: average precision"] == (pytest.approx((1 + 2 / 3) / 2), 2 / 12)
    assert found["which: right on positive tokens"] == (1 / 2, pytest.approx(1 / 3))
    assert found["which: presence in the clip"] == (1, .5)


def test_maps_that_are_all_alike_get_chance():
    rng = np.random.default_rng(0)
    positive = rng.random((5, 20, 4)) < .2
    found = score.which_scores(np.ones((5, 20, 4)), positive, positive[:, :3].any(1))
    assert all(value == pytest.approx(chance) for value, chance in found.values())
    assert score.mean_auc(np.ones((5, 20, 4)), positive) == .5


def test_what_is_everywhere_or_nowhere_has_no_place():
    positive = np.zeros((1, 3, 3), bool)
    positive[0, :, 0] = positive[0, 0, 1] = True
    maps = np.arange(9).reshape(1, 3, 3)  # grows from token to token, and token 0 is the positive one
    assert score.mean_auc(maps, positive) == 0


def test_even_weights_are_soft_and_hard_ones_use_few():
    there = np.array([[True, False], [False, True]])
    even = score.semantic_scores(np.full((2, 8), 1 / 8), np.zeros((2, 2)), there)
    assert all(value == pytest.approx(chance) for value, chance in even.values())
    hard = score.semantic_scores(np.eye(8)[[2, 5]], np.array([[3, 1], [0, 2]]), there)
    values = [hard[f"text: {name}"][0] for name in ("largest weight", "entropy", "experts used", "presence in the clip")]
    assert values == [1, pytest.approx(0), 2, 1]


# --- intervals ----------------------------------------------------------------------------------------------
def test_paired_differences_by_hand():
    """Two seeds, three clips: means of seeds 2 and 4, of clips 2, 3 and 4."""
    a, b = {0: [2, 3, 4], 1: [3, 4, 5]}, {0: [1, 1, 1], 1: [0, 0, 0]}
    mean, half = score.paired(a, b)
    assert mean == 3 and half == pytest.approx(np.hypot(12.71 * (2 / 2) ** .5, 4.31 * (1 / 3) ** .5))
    assert score.paired(b, a) == (-3, half)


def test_one_seed_tells_of_clips_alone():
    mean, half = score.paired({5: [1, 2, 3]}, {5: [0, 0, 0]})
    assert mean == 2 and half == pytest.approx(4.31 * (1 / 3) ** .5)


def test_differences_that_are_all_alike_have_no_spread():
    assert score.paired({0: [1, 2], 1: [3, 4]}, {0: [0, 1], 1: [2, 3]}) == (1, 0)


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError):
        score.paired({0: [1, 2]}, {1: [1, 2]})
    with pytest.raises(ValueError):
        score.paired({0: [1, 2]}, {0: [1, 2, 3]})


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [(0, 0, 1), (0, 1, 1), (.1, 1, 1), (.5, 1, 1), (1, 1, 1), (1, 0, .1)])
def test_intervals_hold_the_truth_nineteen_times_of_twenty(seeds, spread):
    """Whichever of seeds, clips and their meeting make the spread."""
    rng = np.random.default_rng(0)
    of_seeds, of_clips, of_both = spread
    held = []
    for _ in range(1000):
        d = (of_seeds * rng.normal(size=(seeds, 1)) + of_clips * rng.normal(size=40)
             + of_both * rng.normal(size=(seeds, 40)))
        mean, half = score.paired(dict(enumerate(d)), dict(enumerate(0 * d)))
        held.append(abs(mean) < half)
    assert np.mean(held) > .925  # .95 less three standard errors and a half of 1000 draws
