"""Two groups, soft labels and a chosen floor on a problem small enough for a solver that knows nothing of this package."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.constraints.dual_rule import DualRule
from trl_cpo.labels.bounds import Bounds
from trl_cpo.labels.form import LabelledForm, PairLabels
from trl_cpo.metrics import PairView, per_pair
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps

BETA, PROMPTS, ANSWERS = 2.0, 4, 3
GROUP = np.array([0, 0, 1, 1])
P = np.array([0.95, 0.8, 0.9, 0.75])
#: Answer 0 is chosen, 1 rejected, 2 neither. The reference is wrong on the second and the third prompt.
REFERENCE = np.log(np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.05, 0.55, 0.4], [0.4, 0.3, 0.3]]))

#: γ and ε of each group, κ and ε of the floor; and which of the four bounds bind: the gap's and the floor's, of each group.
PROBLEMS = {
    "both groups bind": (dict(gamma=(1.0, 2.0), epsilon=(0.1, 0.3), floor=2.0, floor_epsilon=1.0), (True, True, False, False)),
    "one group binds": (dict(gamma=(0.5, 1.0), epsilon=(9.0, 0.4), floor=2.0, floor_epsilon=1.0), (False, True, False, False)),
    "the floor binds too": (
        dict(gamma=(1.0, 1.0), epsilon=(0.2, 0.4), floor=-0.8, floor_epsilon=0.07),
        (True, True, True, False),
    ),
    "nothing binds": (dict(gamma=(0.0, 0.0), epsilon=(9.0, 9.0), floor=5.0, floor_epsilon=1.0), (False,) * 4),
}


def solved(gamma, epsilon, floor, floor_epsilon):
    """The least soft-label loss under the bounds, over free logits: gaps, and the loss. Hinges are slack variables."""
    certainty, n, floors = np.maximum(0, 2 * P - 1), PROMPTS, np.broadcast_to(floor_epsilon, 2)

    def logps(x):
        logits = x[: n * ANSWERS].reshape(n, ANSWERS)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def gap(x):
        s = logps(x)
        return s[:, 0] - s[:, 1]

    def loss(x):
        z = BETA * (gap(x) - (REFERENCE[:, 0] - REFERENCE[:, 1]))
        return (P * np.logaddexp(0, -z) + (1 - P) * np.logaddexp(0, z)).mean()

    def slack(x):
        return x[n * ANSWERS :].reshape(2, n)

    gammas = np.array(gamma)[GROUP]
    conditions = [
        lambda x: slack(x)[0] - (gammas - gap(x)),
        lambda x: slack(x)[1] - (REFERENCE[:, 0] - floor - logps(x)[:, 0]),
        *(lambda x, g=g: epsilon[g] - (certainty * slack(x)[0])[g == GROUP].mean() for g in (0, 1)),
        *(lambda x, g=g: floors[g] - (certainty * slack(x)[1])[g == GROUP].mean() for g in (0, 1)),
    ]
    start = np.concatenate([REFERENCE.ravel(), np.full(2 * n, 3.0)])
    bounds = [(-20, 20)] * (n * ANSWERS) + [(0, None)] * (2 * n)
    found = minimize(
        loss,
        start,
        method="SLSQP",
        bounds=bounds,
        constraints=[{"type": "ineq", "fun": each} for each in conditions],
        options={"maxiter": 2000, "ftol": 1e-13},
    )
    assert found.success, found.message
    return gap(found.x), found.fun


def worths(problem):
    """What a little more room is worth: minus the slope of the least loss in each ε, of the gap's bounds and the floor's."""
    width, found = 1e-3, []
    for which in range(4):
        losses = []
        for sign in (1, -1):
            epsilons = [*problem["epsilon"], problem["floor_epsilon"], problem["floor_epsilon"]]
            epsilons[which] += sign * width
            losses.append(solved(**{**problem, "epsilon": epsilons[:2], "floor_epsilon": epsilons[2:]})[1])
        found.append((losses[1] - losses[0]) / (2 * width))
    return np.array(found)


@pytest.mark.parametrize("name", PROBLEMS)
def test_primal_and_dual_are_the_solvers(name):
    problem, binding = PROBLEMS[name]
    cap = 20.0
    bounds = Bounds(
        DualRule(0.0, 0.02, cap),
        floor=problem["floor"],
        floor_rule=DualRule(problem["floor_epsilon"], 0.5, cap),
        groups=("a", "b"),
        epsilons=dict(zip("ab", problem["epsilon"], strict=True)),
    )
    labels = PairLabels(torch.tensor(P), None, torch.tensor(GROUP))
    gammas = torch.tensor(problem["gamma"], dtype=torch.float64)
    form = LabelledForm(CONSTRAINTS["lagrangian"](beta=BETA), labels, gammas, [("sigmoid", 1.0)])
    reference = torch.tensor(REFERENCE)
    logits = reference.clone().requires_grad_()
    gaps, duals, count = torch.zeros(PROMPTS, dtype=torch.float64), np.zeros(4), 0
    for step in range(5_000):
        s = logits.log_softmax(dim=1)
        pairs = PairLogps(s[:, 0], s[:, 1], reference[:, 0], reference[:, 1])
        loss = pair_loss(pairs.gap, form.target(pairs.detach()), beta=BETA)
        added = bounds.added_loss(form, pairs)
        (gradient,) = torch.autograd.grad((loss + added).mean(), logits)
        with torch.no_grad():
            logits -= 1.5 * gradient
        rows = bounds.metrics(per_pair(PairView(pairs.detach(), pairs.ref_gap, form.gamma)), pairs.detach())
        bounds.observe(rows, form)
        bounds.step()
        if step >= 3_500:
            gaps += pairs.gap.detach()
            # A group's λ acts on its half of the batch.
            duals += [part.value / 2 for each in bounds.multipliers.values() for part in each.parts.values()]
            count += 1
    expected, _ = solved(**problem)
    worth = worths(problem)
    assert tuple(worth > 1e-3) == binding
    assert np.allclose(gaps.numpy() / count, expected, atol=0.05)
    assert np.allclose(duals / count, worth, atol=0.02)
