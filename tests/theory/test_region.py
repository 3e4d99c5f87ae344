"""Escape times against an integrated flow, the pull against autograd, the soft margin, Assumption 3.1, the region U."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from trl_cpo.metrics import METRICS, PairView
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps
from trl_cpo.theory import assumption_holds, escape_time, in_undesirable_region, pull, rlhf_optimum, soft_margin_excess


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def time(start, end, target, beta):
    return escape_time(vector(start), vector(end), vector(target), beta=beta).item()


@pytest.mark.parametrize("start, end, target, beta", [(-3, 0, -3, 0.5), (-8, 0, -8, 1.0), (-8, 0, 1, 1.0), (-1, 2, 0.5, 2)])
def test_escape_time_is_that_of_the_flow(start, end, target, beta):
    def flow(s, gap):
        return pull(torch.as_tensor(gap), torch.full((1,), float(target), dtype=torch.float64), beta=beta).numpy()

    expected = time(start, end, target, beta)
    arrived = solve_ivp(flow, (0, expected), [start], rtol=1e-10, atol=1e-12).y[0, -1]
    assert arrived == pytest.approx(end, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(depth=st.floats(1e-3, 200), beta=st.floats(0.01, 3), gamma=st.floats(0, 50))
def test_out_of_u_dpo_takes_exponentially_and_a_target_linearly(depth, beta, gamma):
    dpo, clip = time(-depth, 0, -depth, beta), time(-depth, 0, gamma, beta)
    assert dpo == pytest.approx(depth / beta + math.expm1(beta * depth) / beta**2, rel=1e-9)
    assert clip == pytest.approx(
        depth / beta + (math.exp(-beta * gamma) - math.exp(-beta * (depth + gamma))) / beta**2, rel=1e-6
    )
    assert depth / beta * (1 - 1e-12) <= clip <= 2 * depth / beta * (1 + 1e-12) and clip <= dpo * (1 + 1e-12)
    # e^x ≥ 1 + x + x²/2, so DPO takes longer than any linear bound allows once βD is large.
    assert dpo >= (2 * depth / beta + depth**2 / 2) * (1 - 1e-12)


def test_escape_times_known_by_hand():
    assert time(-10, 0, -10, 1.0) == pytest.approx(10 + math.e**10 - 1, rel=1e-14)
    assert time(-10, 0, 0, 1.0) == pytest.approx(10 + 1 - math.e**-10, rel=1e-14)
    assert time(-20, 0, -20, 0.1) / time(-20, 0, 0, 0.1) == pytest.approx((2 + math.e**2 - 1) / (2 + 1 - math.e**-2), rel=1e-12)


def test_escape_time_at_the_ends_of_float():
    assert time(-1e4, 0, -1e4, 1.0) == math.inf
    # e^{βD} overflows where e^{βD}·(1 − e^{−β·way}) does not: 1e-300 of the way at βD = 750.
    assert time(-1e-300, 0, -750, 1.0) == pytest.approx(math.exp(750 - 300 * math.log(10)), rel=1e-9)
    assert time(-5, -5, -5, 1.0) == 0 and time(2, 0, -5, 1.0) == 0 and time(2, 0, -1e5, 1.0) == 0
    # Tiny β: the flow is at half speed, (δ₁ − δ₀)/(β/2).
    assert time(-1, 0, -1, 1e-6) == pytest.approx(2e6, rel=1e-5)


@settings(deadline=None, max_examples=100)
@given(points=st.tuples(*[st.floats(-30, 30)] * 3), target=st.floats(-30, 30), beta=st.floats(0.05, 2))
def test_times_add_up_along_the_way(points, target, beta):
    a, b, c = sorted(points)
    assert time(a, b, target, beta) + time(b, c, target, beta) == pytest.approx(time(a, c, target, beta), rel=1e-8, abs=1e-12)


def test_pull_is_the_gradient_and_weakens_inside_u():
    gap = torch.linspace(-6, 6, 49, dtype=torch.float64, requires_grad=True)
    target = torch.full_like(gap, -5.0).detach()
    (gradient,) = torch.autograd.grad(pair_loss(gap, target, beta=0.7).sum(), gap)
    force = pull(gap.detach(), target, beta=0.7)
    assert torch.allclose(force, -gradient, rtol=1e-12)
    assert (force.diff() < 0).all()
    # At δ = 0 it is β σ(β δ_ref): small, not zero.
    assert pull(vector(0), vector(-5), beta=0.7).item() == pytest.approx(0.7 / (1 + math.exp(3.5)), rel=1e-12)


@settings(deadline=None, max_examples=200)
@given(gap=st.floats(-1e6, 1e6), target=st.floats(-1e6, 1e6), beta=st.floats(1e-3, 1e3))
def test_soft_margin_lies_within_log_2_over_beta(gap, target, beta):
    excess = soft_margin_excess(vector(gap), vector(target), beta=beta).item()
    assert 0 <= excess <= math.log(2) / beta * (1 + 1e-15)
    direct = pair_loss(vector(gap), vector(target), beta=beta).item() / beta - max(0.0, target - gap)
    assert direct == pytest.approx(excess, abs=1e-9 * max(1.0, abs(target - gap)))
    assert soft_margin_excess(vector(target), vector(target), beta=beta).item() == pytest.approx(math.log(2) / beta, rel=1e-15)


def test_assumption_3_1_is_that_rlhfs_optimum_prefers_the_chosen():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        ref, rewards, beta = vector(*rng.normal(0, 2, 3)).log_softmax(0), vector(*rng.normal(0, 1, 3)), rng.uniform(0.1, 3)
        optimum = rlhf_optimum(ref, rewards, beta=beta)
        holds = assumption_holds(ref[:1] - ref[1:2], rewards[:1] - rewards[1:2], beta=beta).item()
        assert holds == (optimum[0] > optimum[1]).item()
        seen.add(holds)
    assert seen == {True, False}
    assert assumption_holds(vector(-2, -2, -2), vector(0.9, 1.0, 1.1), beta=0.5).tolist() == [False, False, True]


def test_the_undesirable_region_is_the_metrics():
    grid = torch.cartesian_prod(*[torch.linspace(-2, 2, 9, dtype=torch.float64)] * 2)
    zero = torch.zeros(len(grid), dtype=torch.float64)
    pairs = PairLogps(grid[:, 0], zero, grid[:, 1], zero)
    inside = in_undesirable_region(pairs.gap, pairs.ref_gap)
    assert torch.equal(inside, METRICS["in_undesirable_region"][1](PairView(pairs, pairs.ref_gap, 0.0)))
    assert inside.any() and not inside[pairs.ref_gap >= 0].any()
    for ref_gap in (-2.0, -1.0):
        assert inside[pairs.ref_gap == ref_gap].any()


@pytest.mark.parametrize("function", [assumption_holds, pull, soft_margin_excess])
def test_bad_input_is_named(function):
    with pytest.raises(ValueError, match=r"\(2,\).*\(2, 1\)"):
        function(torch.zeros(2), torch.zeros(2, 1), beta=1.0)
    with pytest.raises(ValueError, match="NaN in"):
        function(torch.zeros(1), vector(math.nan), beta=1.0)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta must be finite and > 0"):
            function(torch.zeros(1), torch.zeros(1), beta=beta)
