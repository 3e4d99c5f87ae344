"""The test matrix: one row a form of the constraint, with its numbers by hand. A new form needs a row here.

The contract (test_constraints.py) and the trainer's tests run over `CONSTRAINTS` and take from here the instance to run.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from trl_cpo.constraints import CONSTRAINTS, Constraint
from trl_cpo.constraints.clip import Clip
from trl_cpo.constraints.inverse_logp import InverseLogp
from trl_cpo.constraints.inverse_prob import InverseProb
from trl_cpo.constraints.lagrangian import Lagrangian
from trl_cpo.constraints.none import NoConstraint
from trl_cpo.constraints.penalty import Penalty
from trl_cpo.constraints.softplus import Softplus
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps

#: Log-probabilities of the three pairs that every row speaks of: policy chosen and rejected, reference chosen and rejected.
#: δ_θ = 2, −2, 0.5; δ_ref = 2, −3, 0. At γ = 1 the first meets γ, the others lie 3 and 0.5 nats below it.
PAIRS = ((-1.0, -3.0, -1.0, -3.0), (-4.0, -2.0, -4.0, -1.0), (-2.0, -2.5, -2.0, -2.0))


@dataclass(frozen=True)
class Case:
    """A form's row: what it makes of `PAIRS`, by hand, and what the contract needs to know of it."""

    #: The form, at values that make every hyperparameter matter. λ of a dual form is its start.
    form: Constraint
    #: t of each pair, nats.
    targets: tuple[float, float, float]
    #: What is added to the loss of each pair, nats.
    added: tuple[float, float, float] = (0.0, 0.0, 0.0)
    #: Values at which the form is plain DPO.
    dpo: dict[str, float] = field(default_factory=dict)
    #: Whether t ≥ γ on every pair is promised, at the values of `form`.
    target_reaches_gamma: bool = False

    @property
    def multiplier(self) -> float:
        return multiplier_of(self.form)


CASES: dict[str, Case] = {
    "none": Case(NoConstraint(beta=0.5, gamma=1.0), targets=(2, -3, 0)),
    # max(δ_ref, 1)
    "clip": Case(Clip(beta=0.5, gamma=1.0), targets=(2, 1, 1), dpo={"gamma": -math.inf}, target_reaches_gamma=True),
    # x = γ − δ_ref = −1, 4, 1; log(1 + e^{2x})/2 = log(1 + e⁻²)/2 = 0.0634640056, 4 + log(1 + e⁻⁸)/2 = 4.0001677032 and
    # log(1 + e²)/2 = 1.0634640056; divided by α = 1/2, and added to δ_ref.
    "softplus": Case(
        Softplus(beta=0.5, gamma=1.0, tau=2.0, alpha=0.5),
        targets=(2.1269280110, 5.0003354064, 2.1269280110),
        dpo={"gamma": -math.inf},
        target_reaches_gamma=True,
    ),
    # γ/β = 2: 2 + 2(e + e³), −3 + 2(e⁴ + e), 0 + 2(e² + e²), with e = 2.7182818285, e² = 7.3890560989, e³ = 20.0855369232,
    # e⁴ = 54.5981500331.
    "inverse_prob": Case(
        InverseProb(beta=0.5, gamma=1.0, logps_reduction="mean"),
        targets=(47.6076375034, 111.6328637232, 29.5562243957),
        dpo={"gamma": 0.0},
    ),
    # γ/β = 2: 2 + 2(−1 − 1/3), −3 + 2(−1/4 − 1), 0 + 2(−1/2 − 1/2).
    "inverse_logp": Case(InverseLogp(beta=0.5, gamma=1.0), targets=(-2 / 3, -5.5, -2), dpo={"gamma": 0.0}),
    # 0.4 · (0, 3, 0.5)
    "penalty": Case(
        Penalty(beta=0.5, gamma=1.0, penalty_weight=0.4),
        targets=(2, -3, 0),
        added=(0, 1.2, 0.2),
        dpo={"penalty_weight": 0.0},
    ),
    # λ · (0, 3, 0.5) at λ = dual_init = 0.4
    "lagrangian": Case(
        Lagrangian(beta=0.5, gamma=1.0, epsilon=0.2, dual_init=0.4, dual_max=2.0, dual_warmup_steps=1),
        targets=(2, -3, 0),
        added=(0, 1.2, 0.2),
        dpo={"dual_init": 0.0},
    ),
}


def case_of(name: str) -> Case:
    """The row of a form; a missing one fails the test in words."""
    if name not in CASES:
        pytest.fail(
            f"tests/constraint_cases.py has no row for the form {name!r}. Add CASES[{name!r}] = "
            f"Case({CONSTRAINTS[name].__name__}(beta=0.5, gamma=1.0, …), targets=(…), added=(…), dpo={{…}}) with the numbers "
            "of its three pairs by hand, and their derivation in a comment.",
            pytrace=False,
        )
    return CASES[name]


def made(name: str, values: dict[str, Any] | None = None, **more: Any) -> Constraint:
    """The form at those of the values that it has a field for."""
    values = {**(values or {}), **more}
    form = CONSTRAINTS[name]
    return form(**{each.name: values[each.name] for each in dataclasses.fields(form) if each.name in values})


def multiplier_of(form: Constraint) -> float:
    """λ at the start of training; 0 for a form without one."""
    return 0.0 if form.dual_rule is None else form.dual_rule.start


def added_of(form: Constraint, pairs: PairLogps) -> torch.Tensor:
    """What the form adds to each pair's loss at its first λ, (B,); zeros for nothing."""
    added = form.added_loss(pairs, multiplier_of(form))
    return torch.zeros_like(pairs.gap) if added is None else added


def total_loss(form: Constraint, pairs: PairLogps) -> torch.Tensor:
    """The whole loss of each pair at the form's first λ, (B,)."""
    return pair_loss(pairs.gap, form.target(pairs.detach()), beta=form.beta) + added_of(form, pairs)
