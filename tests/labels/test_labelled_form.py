"""Soft labels, margins, groups and the chosen floor as formulas on vectors, against independent ones."""

import math

import pytest
import torch
from constraint_cases import CASES
from hypothesis import given
from hypothesis import strategies as st

from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.labels.form import LabelledForm, PairLabels, chosen_floor_violation
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps

BETA = 0.7
gaps = st.floats(-30, 30)
probabilities = st.floats(0, 1)


def pairs_of(gap, ref_gap) -> PairLogps:
    gap, ref_gap = torch.as_tensor(gap, dtype=torch.float64), torch.as_tensor(ref_gap, dtype=torch.float64)
    zero = torch.zeros_like(ref_gap)
    return PairLogps(gap - 5.0, zero - 5.0, ref_gap - 5.0, zero - 5.0)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def labelled(form, labels, *, gammas=None, losses=(("sigmoid", 1.0),)) -> LabelledForm:
    return LabelledForm(form, labels, gammas, losses)


def loss_of(form: LabelledForm, pairs: PairLogps, multiplier=0.0) -> torch.Tensor:
    """The loss of each pair, put together as the trainer does it."""
    loss = pair_loss(pairs.gap, form.target(pairs.detach()) if form.moves_target else pairs.ref_gap, beta=form.form.beta)
    added = form.added_loss(pairs, multiplier)
    return loss if added is None else loss + added


@given(gaps, gaps, probabilities)
def test_the_loss_is_the_expected_logistic_loss(gap, ref_gap, p):
    form = labelled(CONSTRAINTS["none"](beta=BETA), PairLabels(probability=vector(p)))
    z = BETA * (gap - ref_gap)
    expected = p * math.log1p(math.exp(-z)) + (1 - p) * math.log1p(math.exp(z))
    assert loss_of(form, pairs_of([gap], [ref_gap])).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("constraint", ["none", "clip", "softplus"])
@pytest.mark.parametrize("p", [0.55, 0.8, 0.97])
def test_the_optimum_is_the_target_plus_the_log_odds(constraint, p):
    """δ = t + logit(p)/β, t the target that is held to in the share 2p − 1."""
    form = labelled(CONSTRAINTS[constraint](beta=BETA, gamma=1.0), PairLabels(probability=vector(p)))
    ref_gap, gap = -2.0, torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([gap], lr=0.5, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(form, pairs_of(gap, [ref_gap])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    t = CONSTRAINTS[constraint](beta=BETA, gamma=1.0).target(pairs_of([0.0], [ref_gap])).item()
    t = ref_gap + (2 * p - 1) * (t - ref_gap)
    assert gap.item() == pytest.approx(t + math.log(p / (1 - p)) / BETA, abs=1e-5)


@given(probabilities, gaps)
def test_ipos_optimum_is_where_its_population_has_it(p, ref_gap):
    """(δ − t − 1/(2β))² at the moved target has the minimum of p (h − 1/(2β))² + (1−p) (h + 1/(2β))², h = δ − δ_ref."""
    form = labelled(CONSTRAINTS["none"](beta=BETA), PairLabels(probability=vector(p)), losses=[("ipo", 1.0)])
    assert form.moves_target
    optimum = form.target(pairs_of([0.0], [ref_gap])).item() + 1 / (2 * BETA)
    h = optimum - ref_gap

    def population(x):
        return p * (x - 1 / (2 * BETA)) ** 2 + (1 - p) * (x + 1 / (2 * BETA)) ** 2

    assert population(h) <= min(population(h - 1e-3), population(h + 1e-3))
    assert form.added_loss(pairs_of([0.3], [ref_gap]), 0.0) is None


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_certain_label_is_no_label_to_the_bit(case):
    torch.manual_seed(0)
    logps = -10 * torch.rand(4, 50)
    pairs, form = PairLogps(*logps), case.form
    plain, sure = labelled(form, PairLabels()), labelled(form, PairLabels(probability=torch.ones(50), margin=torch.zeros(50)))
    assert torch.equal(sure.target(pairs), plain.target(pairs))
    ours, theirs = (each.added_loss(pairs, 0.3) for each in (sure, plain))
    assert torch.equal(ours, torch.zeros(50) if theirs is None else theirs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_coin_flip_is_forced_nowhere(case):
    """At p = 1/2 the target is DPO's, bounds add nothing, and the loss pulls the gap to the reference's."""
    torch.manual_seed(0)
    pairs = PairLogps(*(-10 * torch.rand(4, 50)).double())
    form = labelled(case.form, PairLabels(probability=torch.full((50,), 0.5, dtype=torch.float64)))
    assert torch.allclose(form.target(pairs), pairs.ref_gap, atol=1e-12)
    z = case.form.beta * (pairs.gap - pairs.ref_gap)
    assert torch.allclose(form.added_loss(pairs, 0.3), 0.5 * z, atol=1e-9)
    assert not form.weighed(torch.ones(50)).any()


def test_a_label_below_one_half_weighs_no_bound_and_turns_the_loss_around():
    form = labelled(CONSTRAINTS["penalty"](beta=BETA, gamma=1.0), PairLabels(probability=vector(0.2)))
    pairs = pairs_of([0.5], [0.0])
    assert form.labels.certainty.item() == 0
    assert form.added_loss(pairs, 0.0).item() == pytest.approx(0.8 * BETA * 0.5)


def test_a_margin_raises_the_target():
    form = labelled(CONSTRAINTS["none"](beta=0.5), PairLabels(margin=vector(0.0, 3.0)))
    assert form.moves_target and form.target(pairs_of([0.0, 0.0], [1.0, 1.0])).tolist() == [1.0, 7.0]
    clipped = labelled(CONSTRAINTS["clip"](beta=0.5, gamma=2.0), PairLabels(margin=vector(1.0)))
    assert clipped.target(pairs_of([0.0], [-1.0])).tolist() == [4.0]


@pytest.mark.parametrize("constraint", ["clip", "softplus", "penalty", "lagrangian"])
def test_each_group_has_its_own_gamma_and_multiplier(constraint):
    group, gammas, multiplier = torch.tensor([0, 1, 1, 0]), vector(0.5, 4.0), vector(0.1, 0.3, 0.3, 0.1)
    pairs = pairs_of([0.2, 1.0, 6.0, -3.0], [-1.0, -2.0, 1.0, 3.0])
    form = labelled(CONSTRAINTS[constraint](beta=BETA, gamma=9.0), PairLabels(group=group), gammas=gammas)
    together = loss_of(form, pairs, multiplier)
    for pair in range(4):
        alone = CONSTRAINTS[constraint](beta=BETA, gamma=gammas[group[pair]].item())
        own = PairLogps(*(part[pair : pair + 1] for part in pairs.rows().unbind(dim=1)))
        expected = loss_of(labelled(alone, PairLabels()), own, multiplier[pair].item())
        assert together[pair].item() == pytest.approx(expected.item(), rel=1e-12)


def test_losses_weigh_the_soft_term_as_they_weigh_dpo():
    labels, pairs = PairLabels(probability=vector(0.7)), pairs_of([2.0], [0.5])
    form = labelled(CONSTRAINTS["none"](beta=BETA), labels, losses=[("sigmoid", 0.4), ("sft", 2.0)])
    assert form.added_loss(pairs, 0.0).item() == pytest.approx(0.4 * 0.3 * BETA * 1.5)
    assert labelled(CONSTRAINTS["none"](beta=BETA), labels, losses=[("sft", 1.0)]).added_loss(pairs, 0.0) is None


@given(gaps, gaps, st.floats(0, 10))
def test_the_floor_counts_what_lies_below_it(policy, reference, floor):
    zero = vector(0.0)
    pairs = PairLogps(vector(policy), zero, vector(reference), zero)
    assert chosen_floor_violation(pairs, floor).item() == pytest.approx(max(0.0, reference - floor - policy))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case):
    torch.manual_seed(1)
    policy = (-8 * torch.rand(2, 6)).double().requires_grad_()
    reference = (-8 * torch.rand(2, 6)).double()
    labels = PairLabels(torch.rand(6).double(), torch.rand(6).double(), torch.tensor([0, 1, 2, 0, 1, 2]))
    form = labelled(case.form, labels, gammas=vector(0.2, 1.0, 3.0))

    def loss(policy):
        pairs = PairLogps(policy[0], policy[1], reference[0], reference[1])
        return loss_of(form, pairs, torch.rand(6, generator=torch.Generator().manual_seed(0)).double()) + form.weighed(
            chosen_floor_violation(pairs, 0.5)
        )

    assert torch.autograd.gradcheck(loss, policy)


def test_labels_travel_as_columns_and_back():
    labels = PairLabels(probability=torch.tensor([0.25, 1.0]), group=torch.tensor([3, 0]))
    back = PairLabels.from_rows(labels.rows(), (True, False, True))
    assert torch.equal(back.probability, labels.probability) and back.margin is None
    assert torch.equal(back.group, labels.group) and back.group.dtype == torch.long
    assert PairLabels().rows() is None and PairLabels.from_rows(None, (False, False, False)) == PairLabels()
