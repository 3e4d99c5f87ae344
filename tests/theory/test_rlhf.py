"""RLHF's optimum and its projection, against numerical optimisation over the simplex."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression, minimize

from trl_cpo.theory import constrained_optimum, rlhf_objective, rlhf_optimum


def gap(logps, pair):
    return (logps[pair[0]] - logps[pair[1]]).item()


def nearest_on_simplex(logps, pairs, gamma):
    """argmin KL(π ‖ π*) over the simplex under π(chosen) ≥ e^γ π(rejected), by SLSQP on the probabilities themselves."""
    star = torch.log_softmax(logps, dim=0).numpy()
    rows = np.zeros((len(pairs), len(star)))
    for row, (chosen, rejected) in zip(rows, pairs, strict=True):
        row[chosen], row[rejected] = 1.0, -math.exp(gamma)
    constraints = [
        {"type": "ineq", "fun": lambda x: rows @ x, "jac": lambda x: rows},
        {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones_like(x)},
    ]
    found = minimize(
        lambda x: (x * (np.log(x) - star)).sum(),
        np.exp(star),
        jac=lambda x: np.log(x) - star + 1,
        method="SLSQP",
        bounds=[(1e-12, 1)] * len(star),
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    # Status 8: no step makes it better any more, in floats.
    assert found.status in (0, 8) and (rows @ found.x > -1e-7).all() and abs(found.x.sum() - 1) < 1e-9
    return found.x, found.fun


def kl(logps, logps_star):
    return (logps.exp() * (logps - torch.log_softmax(logps_star, dim=0))).sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_rlhf_optimum_is_the_maximum(seed):
    rng = np.random.default_rng(seed)
    ref = torch.log_softmax(torch.tensor(rng.normal(0, 2, 5)), 0)
    rewards, beta = torch.tensor(rng.normal(0, 1, 5)), rng.uniform(0.1, 2)
    optimum = rlhf_optimum(ref, rewards, beta=beta)

    def loss(z):
        return -rlhf_objective(torch.log_softmax(torch.tensor(z), 0), ref, rewards, beta=beta)

    found = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-10})
    assert rlhf_objective(optimum, ref, rewards, beta=beta) == pytest.approx(-found.fun, abs=1e-9)
    assert np.allclose(optimum.exp(), torch.log_softmax(torch.tensor(found.x), 0).exp(), atol=1e-5)
    # δ* = δ_ref + Δr/β; and the optimum is worth β log E_ref[e^{r/β}].
    assert gap(optimum, (0, 1)) == pytest.approx(gap(ref, (0, 1)) + gap(rewards, (0, 1)) / beta, abs=1e-12)
    worth = beta * torch.logsumexp(ref + rewards / beta, 0).item()
    assert rlhf_objective(optimum, ref, rewards, beta=beta) == pytest.approx(worth, abs=1e-12)


@pytest.mark.parametrize("gamma", [-1.5, 0.0, 0.7, 3.0])
def test_one_pair_is_projected_exactly(gamma):
    for seed in range(4):
        star = torch.log_softmax(torch.tensor(np.random.default_rng(seed).normal(0, 1.5, 4)), 0)
        got = constrained_optimum(star, [(2, 0)], gamma=gamma)
        assert gap(got, (2, 0)) == pytest.approx(max(gap(star, (2, 0)), gamma), abs=1e-12)
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert gap(got, (1, 3)) == pytest.approx(gap(star, (1, 3)), abs=1e-12)
        probabilities, value = nearest_on_simplex(star, [(2, 0)], gamma)
        assert kl(got, star) == pytest.approx(value, abs=1e-8)
        assert np.allclose(got.exp(), probabilities, atol=1e-5)


def test_one_pair_by_hand():
    """π* = (1/8, 1/2, 3/8), γ = 0: κ = log 4, chosen times 2, rejected over 2, both 1/4 before normalising by 7/8."""
    got = constrained_optimum(torch.tensor([1 / 8, 1 / 2, 3 / 8], dtype=torch.float64).log(), [(0, 1)], gamma=0.0)
    assert torch.allclose(got.exp(), torch.tensor([2 / 7, 2 / 7, 3 / 7], dtype=torch.float64), atol=1e-14)


def test_it_is_rlhf_under_the_constraint():
    """No policy with gaps of at least γ has a higher RLHF objective: 2000 random ones, and those nearby."""
    rng = np.random.default_rng(0)
    ref, rewards, beta, gamma = torch.tensor(rng.normal(0, 2, 4)).log_softmax(0), torch.tensor(rng.normal(0, 1, 4)), 0.5, 0.4
    pairs = [(0, 1), (2, 3)]
    best = constrained_optimum(rlhf_optimum(ref, rewards, beta=beta), pairs, gamma=gamma)
    worth = rlhf_objective(best, ref, rewards, beta=beta)
    tried = 0
    for scale in (0.01, 0.1, 1.0):
        for _ in range(2000):
            other = (best + torch.tensor(rng.normal(0, scale, 4))).log_softmax(0)
            if min(gap(other, pair) for pair in pairs) >= gamma:
                tried += 1
                assert rlhf_objective(other, ref, rewards, beta=beta) <= worth + 1e-12
    assert tried > 300


@pytest.mark.parametrize("seed", range(8))
def test_several_pairs_that_share_responses(seed):
    rng = np.random.default_rng(seed)
    size, gamma = 6, [0.0, 0.5, 1.2][seed % 3]
    star = torch.tensor(rng.normal(0, 2, size)).log_softmax(0)
    order = rng.permutation(size)
    pairs = [(int(order[i]), int(order[j])) for i in range(size) for j in range(i + 1, size) if rng.random() < 0.4]
    got = constrained_optimum(star, pairs, gamma=gamma)
    assert all(gap(got, pair) >= gamma - 1e-11 for pair in pairs)
    probabilities, value = nearest_on_simplex(star, pairs, gamma)
    assert kl(got, star) == pytest.approx(value, abs=1e-7)
    assert np.allclose(got.exp(), probabilities, atol=1e-4)


def test_a_chain_at_zero_is_isotonic_regression_of_log_probabilities():
    """At γ = 0 chosen rises as much as rejected falls, so the projection is the Euclidean one in log space."""
    star = torch.tensor(np.random.default_rng(3).normal(0, 2, 12)).log_softmax(0)
    got = constrained_optimum(star, [(i, i + 1) for i in range(11)], gamma=0.0)
    expected = torch.tensor(isotonic_regression(star.numpy(), increasing=False).x.copy()).log_softmax(0)
    assert torch.allclose(got, expected, atol=1e-10)


def test_what_is_met_already_stays():
    star = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64).log_softmax(0)
    assert torch.equal(constrained_optimum(star, [(0, 1), (1, 2)], gamma=1.0), star.log_softmax(0))


def test_most_of_the_way_is_made_by_lowering_the_rejected_response():
    """Of κ nats the chosen side gives κ σ(−γ), before normalising: half at γ = 0, 27 % at γ = 1."""
    star = torch.tensor([-5.0, -1.0, -2.0], dtype=torch.float64)
    for gamma, part in ((0.0, 0.5), (1.0, 1 / (1 + math.e)), (600.0, 0.0)):
        got = constrained_optimum(star, [(0, 1)], gamma=gamma)
        rise, fall = (abs((got[i] - got[2]) - (star[i] - star[2])).item() for i in (0, 1))
        assert rise / (rise + fall) == pytest.approx(part, abs=1e-12)
        assert got.isfinite().all() and gap(got, (0, 1)) == pytest.approx(gamma, abs=1e-10)


def test_impossible_pairs_are_refused():
    star = torch.zeros(3, dtype=torch.float64)
    circle = [(0, 1), (1, 2), (2, 0)]
    with pytest.raises(ValueError, match="contain a cycle"):
        constrained_optimum(star, circle, gamma=0.1)
    skewed = torch.tensor([0.0, 1.0, 5.0])
    assert torch.allclose(constrained_optimum(skewed, circle, gamma=0.0).exp(), torch.full((3,), 1 / 3).double())
    with pytest.raises(ValueError, match="two different responses"):
        constrained_optimum(star, [(1, 1)], gamma=0.0)
    with pytest.raises(ValueError, match="two different responses, 0 to 2"):
        constrained_optimum(star, [(0, 3)], gamma=0.0)
    with pytest.raises(ValueError, match="finite"):
        constrained_optimum(torch.tensor([0.0, -math.inf]), [(0, 1)], gamma=0.0)
    with pytest.raises(RuntimeError, match="after 1 sweeps"):
        constrained_optimum(torch.tensor([0.0, 1.0, 5.0]), [(0, 1), (1, 2)], gamma=0.0, sweeps=1)
    with pytest.raises(ValueError, match=r"ref_logps \(2,\), rewards \(3,\)"):
        rlhf_optimum(torch.zeros(2), torch.zeros(3), beta=1.0)
    with pytest.raises(ValueError, match="beta must be finite and > 0"):
        rlhf_optimum(star, star, beta=0.0)
