"""Clopper–Pearson against its definition: at each end of the interval, the tail of the binomial has the given mass.

The interval of a paired difference against published figures, closed forms, and its coverage summed over all outcomes.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cpo.intervals import clopper_pearson, lower_bound, paired_difference


def at_least(successes: int, trials: int, chance: float) -> float:
    """P(X ≥ k) of a binomial, summed."""
    return math.fsum(math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(successes, trials + 1))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.999]))
def test_each_end_leaves_out_half_of_the_rest(counts, confidence):
    successes, trials = counts
    low, high = clopper_pearson(successes, trials, confidence)
    assert 0.0 <= low <= successes / trials <= high <= 1.0
    assert at_least(successes, trials, low) == pytest.approx((1 - confidence) / 2 if successes else 1.0, rel=1e-9)
    failures = trials - successes
    assert at_least(failures, trials, 1 - high) == pytest.approx((1 - confidence) / 2 if failures else 1.0, rel=1e-6)


def test_closed_forms_and_published_figures():
    # All of n: P(X = n) = p^n, so that the one-sided bound is 0.05^(1/n); none: 1 − 0.025^(1/n) above.
    assert lower_bound(60, 60) == pytest.approx(0.05 ** (1 / 60), rel=1e-12)
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1, rel=1e-12))
    # The classical example, 7 of 10 (R's binom.test): 0.3475471 to 0.9332605.
    assert clopper_pearson(7, 10) == pytest.approx((0.3475471, 0.9332605), abs=1e-7)


@pytest.mark.parametrize("wrong", [(3, 2), (-1, 2), (0, 0), (1, 2, 0.0), (1, 2, 1.0), (1, 2, math.nan)])
def test_impossible_counts_are_refused(wrong):
    for interval in (clopper_pearson, lower_bound):
        with pytest.raises(ValueError, match="must lie between|needs 0 <="):
            interval(*wrong)


def test_paired_differences_of_published_figures_and_closed_forms():
    # Fagerland, Lydersen and Laake (Statistics in Medicine 33, 2014), airway hyper-responsiveness: 1 and 7 of 21.
    assert paired_difference(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    # No two differ: z² / (n + z²) on either side.
    z2 = 1.959963984540054**2
    assert paired_difference(0, 0, 20) == pytest.approx((-z2 / (20 + z2), z2 / (20 + z2)), abs=1e-7)
    # All differ one way: only the difference 1 leaves no doubt above.
    assert paired_difference(20, 0, 20)[1] == 1.0 and paired_difference(0, 20, 20)[0] == -1.0


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_paired_differences_are_around_what_was_found_and_turn_with_their_order(counts):
    first, second, trials = counts
    second = min(second, trials - first)
    low, high = paired_difference(first, second, trials)
    assert -1.0 <= low <= (first - second) / trials <= high <= 1.0 and low < high
    turned = paired_difference(second, first, trials)
    assert turned == pytest.approx((-high, -low), abs=1e-9)
    assert paired_difference(first, second, trials, 0.8)[0] >= low


@pytest.mark.parametrize(
    ("trials", "first", "second"), [(20, 0.3, 0.1), (40, 0.4, 0.02), (40, 0.05, 0.05), (40, 0.2, 0.2), (60, 0.35, 0.01)]
)
def test_paired_differences_cover_the_true_one_about_as_often_as_they_say(trials, first, second):
    covered = 0.0
    for one in range(trials + 1):
        for other in range(trials + 1 - one):
            ways = math.comb(trials, one) * math.comb(trials - one, other)
            chance = ways * first**one * second**other * (1 - first - second) ** (trials - one - other)
            if chance > 1e-9:
                low, high = paired_difference(one, other, trials)
                covered += chance * (low <= first - second <= high)
    assert 0.94 < covered < 0.97


@pytest.mark.parametrize("wrong", [(-1, 0, 2), (2, 1, 2), (0, 0, 0), (1, 1, 2, 1.0)])
def test_impossible_paired_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="needs counts|must lie between"):
        paired_difference(*wrong)
