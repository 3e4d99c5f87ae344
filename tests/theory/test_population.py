"""Where each constraint has its optimum, against numerical minimisation; and where printed claims go too far."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from constraint_cases import case_of, made
from scipy.optimize import minimize, minimize_scalar

from trl_cpo.constraints import CONSTRAINTS, Constraint
from trl_cpo.constraints.dual_rule import DualRule
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps
from trl_cpo.theory import (
    alignment_threshold,
    assumption_holds,
    constrained_optimum,
    escape_time,
    in_undesirable_region,
    population_gap,
    population_gaps,
    population_lagrangian,
    population_loss,
    population_penalty,
    pull,
    rlhf_optimum,
)
from trl_cpo.theory.solver import solve

RNG = np.random.default_rng(5)
REF_CHOSEN, REF_REJECTED = (torch.tensor(RNG.uniform(-4, -0.2, 12)) for _ in range(2))
PAIRS = PairLogps(torch.zeros(12).double(), torch.zeros(12).double(), REF_CHOSEN, REF_REJECTED)
P = torch.tensor(RNG.uniform(0.05, 0.95, 12))
VALUES = dict(beta=0.6, gamma=0.8, tau=3.0, alpha=0.5, penalty_weight=0.2, logps_reduction="mean", epsilon=0.15)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def both_labels(form, index, gap, multiplier=0.0):
    """The expected loss of one pair at a gap, through the constraint itself: chosen with probability p, else exchanged."""
    one = [side[index : index + 1] for side in (REF_CHOSEN, REF_REJECTED)]
    policy = torch.tensor([gap], dtype=torch.float64)
    pairs = PairLogps(policy, torch.zeros_like(policy), *one)
    u = form.beta * (pairs.gap - form.target(pairs))
    p = P[index].item()
    loss = -p * torch.nn.functional.logsigmoid(u) - (1 - p) * torch.nn.functional.logsigmoid(-u)
    added = form.added_loss(pairs, multiplier)
    return (loss if added is None else loss + added).item()


def minimises_the_loss(form, gaps, multiplier=0.0):
    """Whether the gaps are those of Brent's method on the form's own loss; and how many lie off DPO's optimum."""
    moved = 0
    for index in range(len(P)):
        found = minimize_scalar(
            lambda gap, index=index: both_labels(form, index, gap, multiplier),
            bounds=(-300, 300),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert gaps[index].item() == pytest.approx(found.x, abs=1e-4)
        assert both_labels(form, index, gaps[index].item(), multiplier) <= found.fun + 1e-12
        moved += abs(gaps[index] - population_gap(PAIRS.ref_gap, P, beta=form.beta)[index]).item() > 0.01
    return moved


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_population_gaps_minimise_the_loss(name):
    """Of every form in the table; a dual form's at a multiplier at which its bound is met and tight."""
    form = dataclasses.replace(case_of(name).form, beta=0.6, gamma=0.8)
    gaps, multiplier = population_gaps(form, PAIRS, P), 0.0
    if form.dual_rule is not None:
        solved, multiplier = solve(form, PAIRS, P)
        assert torch.equal(gaps, solved) and multiplier > 0
        violation = form.added_loss(PairLogps(gaps, torch.zeros_like(gaps), REF_CHOSEN, REF_REJECTED), 1.0).mean().item()
        assert violation == pytest.approx(form.dual_rule.epsilon, abs=1e-9)
    moved = minimises_the_loss(form, gaps, multiplier)
    assert moved == 0 if not (form.moves_target or form.adds_loss) else moved > 0


@pytest.mark.parametrize("seed", range(2))
def test_the_solver_finds_the_closed_forms(seed):
    """`population_penalty` and `population_lagrangian`, to 1e-9 nats and, of λ, 1e-9 β; certain labels and ε = 0 included."""
    rng = np.random.default_rng(seed)
    p, ref_gap = torch.tensor(rng.uniform(0.02, 0.98, 8)), torch.tensor(rng.normal(-1, 3, 8))
    p[0], p[1] = 1.0, 0.0
    zeros = torch.zeros_like(ref_gap)
    pairs = PairLogps(zeros, zeros, ref_gap, zeros)
    beta, gamma = rng.uniform(0.2, 2), rng.uniform(0, 2)
    for weight in (0.0, 0.3 * beta, beta, 7.0):
        form = made("penalty", beta=beta, gamma=gamma, penalty_weight=weight)
        expected = population_penalty(p, ref_gap, beta=beta, gamma=gamma, weight=weight)
        assert torch.allclose(population_gaps(form, pairs, p), expected, rtol=0, atol=1e-9)
    for epsilon in (0.0, rng.uniform(0.01, 0.5), math.inf):
        form = made("lagrangian", beta=beta, gamma=gamma, epsilon=epsilon)
        expected, multiplier = population_lagrangian(p, ref_gap, beta, gamma, epsilon)
        gaps, found = solve(form, pairs, p)
        # λ is solved to 1e-12 relative, and a gap far below γ moves by 1/(β (p + λ/β)(1 − p − λ/β)) of that.
        assert torch.allclose(gaps, expected, rtol=0, atol=1e-6)
        assert found == pytest.approx(multiplier, rel=1e-9, abs=1e-12)


@dataclasses.dataclass(frozen=True)
class Squared(Constraint):
    """A policy-side form that the package does not have: (max(0, γ − δ_θ))²/2."""

    def added_loss(self, pairs, multiplier):
        return torch.relu(self.gamma - pairs.gap) ** 2 / 2


@dataclasses.dataclass(frozen=True)
class SquaredBound(Squared):
    """The same as a bound on its mean."""

    @property
    def dual_rule(self):
        return DualRule(epsilon=0.02, step_size=0.1, cap=1.0)

    def added_loss(self, pairs, multiplier):
        return multiplier * super().added_loss(pairs, multiplier)


def test_a_form_without_a_closed_form_is_solved_and_not_answered_with_dpos_optimum():
    form, bound = Squared(beta=0.6, gamma=0.8), SquaredBound(beta=0.6, gamma=0.8)
    assert minimises_the_loss(form, population_gaps(form, PAIRS, P)) > 0
    gaps, multiplier = solve(bound, PAIRS, P)
    assert minimises_the_loss(bound, gaps, multiplier) > 0
    assert (torch.relu(0.8 - gaps) ** 2 / 2).mean().item() == pytest.approx(0.02, abs=1e-9)


def test_a_squared_hinge_by_hand():
    """β = 1, δ_ref = −2, γ = 0, p = 1/2: σ(δ + 2) − 1/2 = −δ, solved by δ = −0.3968."""
    pairs = PairLogps(vector(0), vector(0), vector(-2), vector(0))
    gap = population_gaps(Squared(beta=1.0), pairs, vector(0.5)).item()
    assert gap == pytest.approx(0.5 - 1 / (1 + math.exp(-(gap + 2))), abs=1e-12)


def refused(added, rule=None):
    @dataclasses.dataclass(frozen=True)
    class Other(Constraint):
        def added_loss(self, pairs, multiplier):
            return added(pairs, multiplier)

        @property
        def dual_rule(self):
            return rule

    return Other(beta=0.6, gamma=0.8)


@pytest.mark.parametrize(
    "form, why",
    [
        (refused(lambda pairs, _: torch.relu(-1.0 - pairs.policy_chosen)), "depends on more of the policy than the gap"),
        (refused(lambda pairs, _: torch.relu(0.8 - pairs.gap) * pairs.gap.sum()), "depends on other pairs"),
        (refused(lambda pairs, _: -5 * torch.relu(0.8 - pairs.gap) ** 2), "not convex"),
        (refused(lambda pairs, _: 3 * (0.8 - pairs.gap)), "falls without bound"),
        (refused(lambda pairs, _: (0.8 - pairs.gap).sqrt()), "its added loss is NaN at some gap"),
        (refused(lambda pairs, x: x * torch.relu(0.8 - pairs.gap), DualRule(0.1, 1, 1, signal="violation_rate")), "driven by"),
        (refused(lambda pairs, x: x * (1 + torch.relu(0.8 - pairs.gap)), DualRule(0.1, 0.1, 1.0)), "no multiplier brings"),
        (refused(lambda pairs, x: x**2 * torch.relu(0.8 - pairs.gap), DualRule(0.1, 0.1, 1.0)), "not proportional"),
    ],
)  # fmt: skip
def test_what_cannot_be_solved_is_refused_in_words(form, why):
    with pytest.raises(ValueError, match=why):
        population_gaps(form, PAIRS, P)


@pytest.mark.parametrize("seed", range(6))
def test_the_lagrangian_solves_the_constrained_problem(seed):
    """Against SLSQP on gaps and slack variables, which knows nothing of λ; and the conditions of Kuhn and Tucker.

    λ < β, which is why β is the cap that the trainer has by default.
    """
    rng = np.random.default_rng(seed)
    n, beta, gamma, epsilon = int(rng.integers(1, 6)), rng.uniform(0.2, 2), rng.uniform(0, 2), rng.uniform(0.01, 0.5)
    p, ref_gap = rng.uniform(0.05, 0.95, n), rng.normal(-1, 3, n)
    gaps, multiplier = population_lagrangian(torch.tensor(p), torch.tensor(ref_gap), beta, gamma, epsilon)

    def loss(z):
        u = beta * (z[:n] - ref_gap)
        return np.mean(p * np.logaddexp(0, -u) + (1 - p) * np.logaddexp(0, u))

    constraints = [
        {"type": "ineq", "fun": lambda z: z[n:] - (gamma - z[:n])},
        {"type": "ineq", "fun": lambda z: z[n:]},
        {"type": "ineq", "fun": lambda z: epsilon - z[n:].mean()},
    ]
    start = np.concatenate([np.full(n, gamma + 1), np.full(n, epsilon / 2)])
    found = minimize(loss, start, constraints=constraints, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})
    assert found.success
    assert loss(gaps.numpy()) == pytest.approx(found.fun, abs=1e-8)
    assert np.allclose(gaps, found.x[:n], atol=1e-3)
    violation = torch.relu(gamma - gaps).mean().item()
    assert violation <= epsilon + 1e-12 and 0 <= multiplier < beta
    assert multiplier * (violation - epsilon) == pytest.approx(0, abs=1e-9)
    # No gap is better at this multiplier: the Lagrangian is at its minimum.
    assert torch.allclose(
        gaps, population_penalty(torch.tensor(p), torch.tensor(ref_gap), beta=beta, gamma=gamma, weight=multiplier)
    )


def test_the_lagrangian_by_hand():
    """One pair, β = 1, δ_ref = −2, p = 1/2, γ = 0: free δ = −2; at mean hinge 1, δ = −1 and λ = σ(1) − 1/2."""
    gaps, multiplier = population_lagrangian(vector(0.5), vector(-2), 1.0, 0.0, 1.0)
    assert gaps.item() == pytest.approx(-1, abs=1e-12)
    assert multiplier == pytest.approx(1 / (1 + math.exp(-1)) - 0.5, abs=1e-12)
    gaps, multiplier = population_lagrangian(vector(0.5), vector(-2), 1.0, 0.0, 0.0)
    assert gaps.item() == 0 and multiplier == pytest.approx(1 / (1 + math.exp(-2)) - 0.5, abs=1e-15)


def test_the_lagrangian_at_its_ends():
    p, ref_gap = vector(0.5, 0.9, 1.0, 0.0), vector(-3, -40, -500, 2)
    gaps, multiplier = population_lagrangian(p, ref_gap, 0.1, 1.0, math.inf)
    assert multiplier == 0 and gaps[2] == math.inf and gaps[3] == -math.inf
    gaps, multiplier = population_lagrangian(p, ref_gap, 0.1, 1.0, 0.0)
    assert (gaps >= 1).all() and 0 < multiplier <= 0.1
    multipliers = [population_lagrangian(p, ref_gap, 0.1, 1.0, epsilon)[1] for epsilon in (0.0, 0.1, 0.5, 2.0, 30.0)]
    assert multipliers == sorted(multipliers, reverse=True) and multipliers[-1] < multipliers[0]
    # A pair far below γ, where floats next to each other in λ are far apart in δ: still feasible.
    for epsilon in (0.0, 0.01, 1.0):
        gaps, _ = population_lagrangian(vector(0.5, 0.9), vector(-300, -40), 1.0, 2.0, epsilon)
        assert torch.relu(2.0 - gaps).mean().item() <= epsilon + 1e-12
    with pytest.raises(ValueError, match="epsilon must be >= 0; got nan"):
        population_lagrangian(p, ref_gap, 0.1, 1.0, math.nan)
    with pytest.raises(ValueError, match="weight must be >= 0"):
        population_penalty(p, ref_gap, beta=0.1, gamma=1.0, weight=-1.0)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]; got \[1.5\]"):
        population_penalty(vector(0.5, 1.5), vector(0, 0), beta=0.1, gamma=1.0, weight=0.0)


def test_the_loss_of_both_labels():
    """−p log σ(u) − (1 − p) log σ(−u), least at u = logit p, where it is the entropy of the label."""
    p, target, beta = vector(0.2, 0.5, 0.9), vector(-1, 0, 3), 0.7
    gap = vector(2, -1, 5)
    u = (beta * (gap - target)).tolist()
    by_hand = [x * math.log1p(math.exp(-v)) + (1 - x) * math.log1p(math.exp(v)) for x, v in zip(p.tolist(), u, strict=True)]
    assert population_loss(gap, target, p, beta=beta).tolist() == pytest.approx(by_hand, rel=1e-12)
    best = population_gap(target, p, beta=beta)
    lowest = population_loss(best, target, p, beta=beta)
    assert torch.allclose(lowest, -p * p.log() - (1 - p) * (1 - p).log(), rtol=1e-12)
    for step in (-1e-3, 1e-3):
        assert (population_loss(best + step, target, p, beta=beta) > lowest).all()
    # A label that never comes costs nothing, not even where its loss is infinite.
    assert population_loss(vector(math.inf, -math.inf), vector(0, 0), vector(1, 0), beta=1.0).tolist() == [0, 0]


def test_dpo_is_rlhf_where_labels_are_bradley_terrys():
    """With logit p = Δr, DPO's optimum has the gap of RLHF's; where Assumption 3.1 fails, that gap is negative."""
    reward_gap = torch.logit(P)
    gaps = population_gaps(made("none", VALUES), PAIRS, P)
    for index in range(len(P)):
        ref = torch.stack([REF_CHOSEN[index], REF_REJECTED[index], vector(-1.0)[0]])
        optimum = rlhf_optimum(ref, torch.stack([reward_gap[index], *vector(0, 0.3)]), beta=VALUES["beta"])
        assert gaps[index].item() == pytest.approx((optimum[0] - optimum[1]).item(), abs=1e-12)
    assert torch.equal(gaps > 0, assumption_holds(PAIRS.ref_gap, reward_gap, beta=VALUES["beta"]))
    assert (gaps > 0).any() and (gaps < 0).any()


def test_clip_asks_for_at_least_what_constrained_rlhf_has():
    """max(δ_ref, γ) + Δr/β ≥ max(δ_ref + Δr/β, γ) for Δr ≥ 0, with equality only where δ_ref ≥ γ or Δr = 0: not the same."""
    preferred = P.clamp(min=0.5)
    form = made("clip", VALUES)
    gaps = population_gaps(form, PAIRS, preferred)
    for index in range(len(P)):
        ref = torch.stack([REF_CHOSEN[index], REF_REJECTED[index]])
        star = rlhf_optimum(ref, torch.stack([torch.logit(preferred[index]), vector(0)[0]]), beta=form.beta)
        exact = constrained_optimum(star, [(0, 1)], gamma=form.gamma)
        difference = (gaps[index] - (exact[0] - exact[1])).item()
        same = PAIRS.ref_gap[index] >= form.gamma or preferred[index] == 0.5
        assert abs(difference) < 1e-12 if same else difference > 1e-6


@pytest.mark.parametrize("name", ["clip", "softplus"])
def test_a_target_above_gamma_is_no_gap_above_gamma(name):
    """t ≥ γ on every pair gives δ ≥ γ at the optimum where p ≥ 1/2; where labels say otherwise more often, it need not."""
    form = made(name, VALUES)
    assert (form.target(PAIRS) >= form.gamma).all()
    gaps = population_gaps(form, PAIRS, P)
    assert (gaps[P >= 0.5] >= form.gamma).all() and (gaps[P < 0.5] < form.gamma).any()


def test_the_one_sided_loss_has_no_minimiser():
    """One label alone: its loss falls for ever, its infimum 0 is at infinity, and nothing finite is stationary."""
    assert population_gap(vector(-3), vector(1.0), beta=0.5).item() == math.inf
    gaps = torch.linspace(-50, 1400, 2000, dtype=torch.float64)
    target = torch.full_like(gaps, -3.0)
    losses = population_loss(gaps, target, torch.ones_like(gaps), beta=0.5)
    assert torch.equal(losses, pair_loss(gaps, target, beta=0.5))
    assert (losses.diff() < 0).all() and (losses > 0).all() and losses[-1] < 1e-300
    assert (pull(gaps, target, beta=0.5) > 0).all()
    # With any doubt about the label it has one.
    assert population_gap(vector(-3), vector(0.999), beta=0.5).item() < 12


@pytest.mark.parametrize("depth, beta", [(3.0, 1.0), (10.0, 0.5)])
def test_dpo_leaves_u_in_the_end(depth, beta):
    """Gradient descent on one misaligned pair's DPO loss reaches δ > 0: late, as the escape time says, but it does."""
    gap, target = vector(-depth), vector(-depth)
    expected = escape_time(gap, vector(0), target, beta=beta).item()
    step = expected / 20_000
    gap = gap + 1e-9
    entered, taken = in_undesirable_region(gap, target).item(), 0
    while gap.item() < 0:
        gap, taken = gap + step * pull(gap, target, beta=beta), taken + 1
    assert entered and not in_undesirable_region(gap, target).item()
    assert taken * step == pytest.approx(expected, rel=1e-3)


def test_dpo_on_labels_of_both_kinds_stays_in_u():
    """δ_ref = −2, β = 1, p = 0.7: the optimum of infinite training is −2 + logit 0.7 = −1.15, in U; clip's is above γ."""
    pairs = PairLogps(vector(0), vector(0), vector(-3), vector(-1))
    dpo, clip = (population_gaps(made(name, beta=1.0, gamma=0.5), pairs, vector(0.7)) for name in ("none", "clip"))
    assert dpo.item() == pytest.approx(-2 + math.log(7 / 3), abs=1e-12)
    assert in_undesirable_region(dpo, pairs.ref_gap).item() and clip.item() > 0.5


def finite_problem(rng, count):
    """`count` disjoint pairs among the responses of one prompt, their reference and Bradley–Terry labels."""
    logps = torch.tensor(rng.normal(0, 1.5, 2 * count)).log_softmax(0)
    none = torch.zeros(count, dtype=torch.float64)
    return PairLogps(none, none, logps[:count], logps[count:]), torch.tensor(rng.uniform(0.02, 0.98, count))


def test_above_the_threshold_every_gap_is_positive():
    """Theorem 4.9 on 300 random finite problems: all δ > 0 above γ*, δ = 0 at γ* for the worst pair, some δ < 0 below."""
    rng, positive = np.random.default_rng(1), 0
    for _ in range(300):
        pairs, p = finite_problem(rng, int(rng.integers(1, 6)))
        beta = rng.uniform(0.1, 2)
        threshold = alignment_threshold(pairs, p, beta=beta)

        def worst(gamma, pairs=pairs, p=p, beta=beta):
            form = made("inverse_prob", beta=beta, gamma=gamma, logps_reduction="mean")
            return population_gaps(form, pairs, p).min().item()

        assert worst(threshold + 1e-6) > 0 and worst(10 * threshold + 1) > 0
        if threshold > 0:
            positive += 1
            assert worst(threshold) == pytest.approx(0, abs=1e-9)
            assert worst(0.99 * threshold) < 0
        else:
            assert worst(0.0) >= 0
    assert 100 < positive < 300


def test_eq_17_contradicts_itself_where_pairs_share_responses():
    """a > b, b > c, a > c: gaps of a policy add up, those that Eq. 17 asks for do not. So it is for disjoint pairs."""
    a, b, c = vector(0.5, 0.3, 0.2).log()
    chosen, rejected = torch.stack([a, b, a]), torch.stack([b, c, c])
    pairs = PairLogps(torch.zeros(3).double(), torch.zeros(3).double(), chosen, rejected)
    rewards = vector(2, 1, 0)
    p = torch.sigmoid(vector(rewards[0] - rewards[1], rewards[1] - rewards[2], rewards[0] - rewards[2]))
    for gamma, consistent in ((0.0, True), (0.1, False)):
        form = made("inverse_prob", beta=1.0, gamma=gamma, logps_reduction="mean")
        ab, bc, ac = population_gaps(form, pairs, p).tolist()
        assert (abs(ab + bc - ac) < 1e-12) is consistent
    # By 2γ/(β π_ref(b)), the response in the middle.
    assert ab + bc - ac == pytest.approx(2 * 0.1 / 0.3, abs=1e-12)


def test_the_bare_objective_of_eq_10_has_no_maximum():
    """E[r] − β KL + γ E[δ] grows without bound as π(rejected) → 0: KL stays finite, δ does not."""
    ref, rewards, beta, gamma = vector(0.25, 0.25, 0.5).log(), vector(0, 5, 1), 1.0, 0.01
    values = []
    for k in (10, 100, 1000, 10_000):
        # (1/2, 0, 1/2) to rounding; the logarithm of the rejected response's probability is −k.
        logps = vector(math.log(0.5), -k, math.log(0.5))
        values.append((logps.exp() * (rewards - beta * (logps - ref))).sum().item() + gamma * (logps[0] - logps[1]).item())
    assert values == sorted(values) and values[-1] > 99 and values[-1] - values[-2] == pytest.approx(gamma * 9000, rel=1e-9)
