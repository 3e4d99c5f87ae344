"""Clopper–Pearson against its definition: at each end of the interval, the tail of the binomial has the given mass."""

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


def test_paired_difference_by_its_definition():
    low, high = clopper_pearson(5, 6)
    assert paired_difference(5, 1, 10) == pytest.approx((0.6 * (2 * low - 1), 0.6 * (2 * high - 1)))
    assert paired_difference(1, 5, 10) == pytest.approx((-0.6 * (2 * high - 1), -0.6 * (2 * low - 1)))
    assert paired_difference(0, 0, 7) == (0.0, 0.0)


@pytest.mark.parametrize("gained, lost", [(5, 0), (6, 0), (8, 1), (9, 1), (9, 2), (20, 9), (21, 8)])
def test_paired_difference_excludes_zero_where_the_sign_test_rejects(gained, lost):
    from scipy.stats import binomtest

    rejects = binomtest(gained, gained + lost).pvalue < 0.05
    assert (paired_difference(gained, lost, 50)[0] > 0) == rejects


@pytest.mark.parametrize("gained, lost, trials", [(-1, 2, 5), (3, 3, 5), (0, 0, 0)])
def test_paired_difference_refuses_what_cannot_be(gained, lost, trials):
    with pytest.raises(ValueError, match="cannot have been gained"):
        paired_difference(gained, lost, trials)
