"""The bound on pairs below a bar: never violated, attained, and careful with floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cpo.objective import pair_loss
from trl_cpo.theory import most_below
from trl_cpo.theory.bounds import ROUNDING

from helpers.formulas import gap_from_loss

GAPS = st.one_of(st.floats(-50, 50), st.floats(-1e6, 1e6), st.sampled_from([0.0, -0.0, 1e-300, -1e-300, 1.0]))


def test_by_hand():
    """Ten pairs of mean loss log 2 / 2: at most five below their target. Of mean 0.1: one, as 1 / log 2 = 1.44."""
    assert most_below(math.log(2) / 2, 10, 0.0, beta=0.3) == 5
    assert most_below(0.1, 10, 0.0, beta=0.3) == 1
    assert most_below(0.069, 10, 0.0, beta=0.3) == 0
    # β m = log(e² − 1): softplus is 2.
    assert most_below(0.61, 10, math.log(math.e**2 - 1) / 0.5, beta=0.5) == 3
    # At its start DPO has the loss log 2 on every pair, which proves nothing.
    assert most_below(math.log(2), 10, 0.0, beta=0.3) == 10 and most_below(50.0, 10, 0.0, beta=0.3) == 10
    assert most_below(0.0, 10, 0.0, beta=0.3) == 0
    assert most_below(1.0, 10**6, 1e300, beta=1.0) == 0


@settings(deadline=None, max_examples=500)
@given(pairs=st.lists(st.tuples(GAPS, GAPS), min_size=1, max_size=30), beta=st.floats(1e-3, 20), lower=st.floats(0, 100))
def test_never_violated(pairs, beta, lower):
    gap, target = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    loss = pair_loss(gap, target, beta=beta).mean().item()
    bar = target.min().item() - lower
    margin = target.min().item() - bar  # as floats have it
    assert (gap < target).sum().item() <= most_below(loss, len(pairs), 0.0, beta=beta)
    assert (gap < bar).sum().item() <= most_below(loss, len(pairs), margin, beta=beta)


@pytest.mark.parametrize("count, below, margin, beta", [(10, 3, 0.0, 0.5), (100, 97, 2.0, 0.1), (7, 7, 5.0, 3.0), (1, 1, 0, 1)])
def test_attained(count, below, margin, beta):
    """Pairs a hair below the bar, and the others far above: the bound is their number, so no bound could be better."""
    gap = torch.full((count,), 1e6, dtype=torch.float64)
    gap[:below] = -margin - 1e-12
    loss = pair_loss(gap, torch.zeros(count, dtype=torch.float64), beta=beta).mean().item()
    assert most_below(loss, count, margin, beta=beta) == below == (gap < -margin).sum().item()


def test_rounding_never_takes_a_pair_away():
    """Pairs below their target by less than a float can tell in the loss: their loss is log 2 or a hair less."""
    for count in (1, 3, 7, 10, 1000, 99_991):
        loss = math.log(2) * (1 - ROUNDING / 2)
        assert most_below(loss, count, 0.0, beta=1.0) == count
        half = count // 2
        assert most_below(loss * half / count, count, 0.0, beta=1.0) >= half


def test_a_loss_of_at_most_log_2_is_a_gap_of_at_least_the_target():
    """ℓ ≤ log 2 ⇔ δ ≥ t, away from the last bit; and the gap comes back from the loss."""
    generator = torch.Generator().manual_seed(0)
    gap, target = (torch.randn(20_000, generator=generator, dtype=torch.float64) * 5 for _ in range(2))
    loss = pair_loss(gap, target, beta=0.7)
    assert torch.equal(loss <= math.log(2), gap >= target)
    assert torch.allclose(gap_from_loss(loss, target, beta=0.7), gap, atol=1e-8)


@pytest.mark.parametrize(
    "arguments",
    [
        (math.nan, 3, 0.0, 1.0),
        (math.inf, 3, 0.0, 1.0),
        (-0.1, 3, 0.0, 1.0),
        (0.1, 0, 0.0, 1.0),
        (0.1, 3, -1.0, 1.0),
        (0.1, 3, math.nan, 1.0),
        (0.1, 3, 0.0, 0.0),
        (0.1, 3, 0.0, math.nan),
    ],
)
def test_refused(arguments):
    loss, count, margin, beta = arguments
    with pytest.raises(ValueError, match="all finite; got mean_loss="):
        most_below(loss, count, margin, beta=beta)
