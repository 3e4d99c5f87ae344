"""The pure functions: goldens, gradients, extremes, limits, monotonicity, and one contract for every form."""

import json
import math
import runpy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_cpo.constraints import CONSTRAINTS, Knobs
from trl_cpo.objective import gap_from_loss, pair_loss
from trl_cpo.pairs import PairLogps

from helpers.paths import TESTS

GOLDEN_FILE = TESTS / "golden" / "margin_forms.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text())["cases"]
MARGIN_FORMS = [name for name, form in CONSTRAINTS.items() if form.moves_target or name == "none"]
SIDES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
KNOBS = Knobs(beta=0.5, gamma=0.7, tau=3.0, alpha=0.5, penalty_weight=0.4, logps_reduction="mean")


def pairs_of(*columns, dtype=torch.float64, requires_grad=False) -> PairLogps:
    tensors = [torch.tensor(column, dtype=dtype) for column in columns]
    for tensor in tensors[:2]:
        tensor.requires_grad_(requires_grad)
    return PairLogps(*tensors)


def total_loss(form, pairs: PairLogps, knobs: Knobs) -> torch.Tensor:
    loss = pair_loss(pairs.gap, form.target(pairs.detach(), knobs), beta=knobs.beta)
    added = form.added_loss(pairs, knobs)
    return loss if added is None else loss + added


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", sorted(GOLDEN[0]["expect"]))
def test_golden_values(name, dtype, tolerance):
    """Targets, losses and both gradients of 64 cases. `clip_release` is the release's clip, whose γ is always 0."""
    form = CONSTRAINTS[name.removesuffix("_release")]
    for case in GOLDEN:
        gamma = 0.0 if name == "clip_release" else case["gamma"]
        knobs = Knobs(case["beta"], gamma, case["tau"], case["alpha"], logps_reduction="mean")
        pairs = pairs_of(*([case[side]] for side in SIDES), dtype=dtype, requires_grad=True)
        target = form.target(pairs.detach(), knobs)
        loss = pair_loss(pairs.gap, target, beta=knobs.beta)
        gradients = torch.autograd.grad(loss.sum(), (pairs.policy_chosen, pairs.policy_rejected))
        got = {"target": target, "loss": loss, "grad_chosen": gradients[0], "grad_rejected": gradients[1]}
        for key, value in case["expect"][name].items():
            # float32 holds 24 bits: an error of 1e-6 is relative where the value is large, and β multiplies the gap's.
            scale = max(1.0, abs(value), case["beta"]) if dtype == torch.float32 else max(1.0, abs(value))
            assert got[key].dtype == dtype
            assert abs(got[key].item() - value) <= tolerance * scale, (key, case)


def test_the_golden_file_is_what_its_generator_makes():
    """Every value again, with 50 digits, from the inputs in the file."""
    maker = runpy.run_path(str(GOLDEN_FILE.with_name("make_margin_forms.py")))
    made = maker["document_of"](maker["inputs"]({"cases": GOLDEN}))["cases"]
    assert len(made) == len(GOLDEN) == 64
    for case, again in zip(GOLDEN, made, strict=True):
        assert case.keys() == again.keys() and case["expect"].keys() == again["expect"].keys()
        for name, values in case["expect"].items():
            assert values == pytest.approx(again["expect"][name], rel=1e-15, abs=0), name


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_gradients_are_those_of_the_formula(name):
    ref = [torch.tensor(x, dtype=torch.float64) for x in ([-1.2, -3.0, -2.2], [-1.4, -1.1, -2.1])]

    def loss(chosen, rejected):
        return total_loss(CONSTRAINTS[name], PairLogps(chosen, rejected, *ref), KNOBS)

    policy = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([-1.0, -2.5, -2.0], [-1.9, -1.0, -2.05])]
    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_extremes_are_finite(name, dtype):
    """±1e4 nats on every side, log-probability 0 included: loss, target and gradient stay finite, in float32."""
    values = [-1e4, -1.0, 0.0]
    grid = [(a, b, c, d) for a in values for b in values for c in values for d in values]
    for knobs in (KNOBS, Knobs(beta=0.1, gamma=1e4, tau=20.0, alpha=0.25, logps_reduction="mean")):
        pairs = pairs_of(*zip(*grid, strict=True), dtype=dtype, requires_grad=True)
        loss = total_loss(CONSTRAINTS[name], pairs, knobs)
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss).all() and torch.isfinite(CONSTRAINTS[name].target(pairs.detach(), knobs)).all()
        loss.sum().backward()


def test_extremes_have_finite_gradients():
    for name, form in CONSTRAINTS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            leaves = [torch.tensor([-1e4, 0.0, -1e4, -3.0], dtype=dtype, requires_grad=True) for _ in range(2)]
            reference = [torch.tensor(x, dtype=dtype) for x in ([0.0, -1e4, -1e4, -3.0], [-1e4, 0.0, -3.0, -1e4])]
            total_loss(form, PairLogps(*leaves, *reference), KNOBS).sum().backward()
            assert all(torch.isfinite(leaf.grad).all() for leaf in leaves), (name, dtype)


def test_softplus_at_ten_thousand_nats():
    """The release takes log(1 + exp(·)), infinite in float32 from τ(γ − δ_ref) = 89 on."""
    pairs = pairs_of([0.0], [0.0], [-1e4], [0.0], dtype=torch.float32)
    knobs = Knobs(beta=0.1, gamma=0.5, tau=2.0)
    assert torch.log1p(torch.exp(knobs.tau * (knobs.gamma - pairs.ref_gap))).isinf()
    assert CONSTRAINTS["softplus"].target(pairs, knobs).item() == 0.5


@pytest.mark.parametrize("name", ["clip", "softplus"])
def test_minus_infinite_gamma_is_dpo(name):
    ref = torch.linspace(-50, 50, 101)
    pairs = PairLogps(ref, ref, ref, torch.zeros_like(ref))
    for alpha in (0.25, 1.0):
        target = CONSTRAINTS[name].target(pairs, Knobs(beta=0.1, gamma=-math.inf, alpha=alpha))
        assert torch.equal(target, pairs.ref_gap)


@pytest.mark.parametrize("name", ["inverse_prob", "inverse_logp"])
def test_zero_gamma_is_dpo(name):
    pairs = pairs_of([0.0] * 3, [0.0] * 3, [-1.0, -1e4, 0.0], [-2.0, -3.0, -0.5], dtype=torch.float32)
    target = CONSTRAINTS[name].target(pairs, Knobs(beta=0.1, gamma=0.0, logps_reduction="mean"))
    assert torch.equal(target, pairs.ref_gap)


def test_penalty_without_weight_or_violation_is_dpo():
    pairs = pairs_of([3.0], [1.0], [0.0], [0.0], requires_grad=True)
    form = CONSTRAINTS["penalty"]
    assert form.added_loss(pairs, Knobs(beta=0.1, gamma=5.0, penalty_weight=0.0)).item() == 0.0
    added = form.added_loss(pairs, Knobs(beta=0.1, gamma=2.0))
    assert added.item() == 0.0
    assert torch.autograd.grad(added.sum(), pairs.policy_chosen)[0].item() == 0.0


logps = st.floats(-1e4, 0.0, width=32)
positive = st.floats(0.015625, 100.0, width=32)


@settings(max_examples=500, deadline=None)
@given(
    ref=st.lists(st.tuples(logps, logps), min_size=1, max_size=8),
    gamma=st.floats(0, 1e3, width=32),
    tau=positive,
    alpha=st.floats(0.015625, 1.0, width=32),
)
def test_targets_never_fall_below_gamma(ref, gamma, tau, alpha):
    """Exactly, in float32 and float64, for the forms of which method and table promise it."""
    for dtype in (torch.float32, torch.float64):
        columns = [torch.tensor(column, dtype=dtype) for column in zip(*ref, strict=True)]
        pairs = PairLogps(columns[0], columns[0], *columns)
        floor = torch.tensor(gamma, dtype=dtype)
        for name in ("clip", "softplus"):
            target = CONSTRAINTS[name].target(pairs, Knobs(beta=0.1, gamma=gamma, tau=tau, alpha=alpha))
            assert (target >= floor).all() and (target >= pairs.ref_gap).all(), name


def test_alpha_above_one_can_fall_below_gamma():
    """The guarantee's limit is real, not caution: at α = 2 a misaligned pair's target stays negative."""
    pairs = pairs_of([0.0], [0.0], [-10.0], [0.0])
    knobs = Knobs(beta=0.1, gamma=0.5, tau=20.0, alpha=2.0)
    assert CONSTRAINTS["softplus"].target(pairs, knobs).item() == pytest.approx(-10 + 10.5 / 2)
    assert CONSTRAINTS["softplus"].cautions(knobs)


@settings(max_examples=200, deadline=None)
@given(ref=st.lists(st.tuples(logps, logps), min_size=2, max_size=8), gamma=st.floats(0, 50), tau=positive)
def test_targets_grow_with_the_reference_gap_and_with_gamma(ref, gamma, tau):
    chosen, rejected = (torch.tensor(column, dtype=torch.float64) for column in zip(*ref, strict=True))
    order = torch.argsort(chosen - rejected)
    pairs = PairLogps(*[x[order] for x in (chosen, rejected, chosen, rejected)])
    for name in ("clip", "softplus"):
        low, high = (CONSTRAINTS[name].target(pairs, Knobs(beta=0.1, gamma=g, tau=tau)) for g in (gamma, gamma + 1))
        assert (low.diff() >= -1e-9).all() and (high >= low - 1e-12).all()


def test_sharp_softplus_is_clip_within_its_bound():
    ref_gap = torch.linspace(-5, 5, 201, dtype=torch.float64)
    pairs = PairLogps(ref_gap, ref_gap, ref_gap, torch.zeros_like(ref_gap))
    for tau in (0.5, 2.0, 50.0):
        excess = CONSTRAINTS["softplus"].target(pairs, Knobs(0.1, 0.5, tau)) - CONSTRAINTS["clip"].target(
            pairs, Knobs(0.1, 0.5)
        )
        assert (excess >= 0).all() and (excess <= math.log(2) / tau + 1e-12).all()


def test_inverse_logp_relaxes_and_inverse_prob_raises():
    """The worked case of the docs: β 2.5, γ 0.05, s_ref = (−1.2, −1.4) gives −0.0774, below DPO's target."""
    pairs = pairs_of([0.0], [0.0], [-1.2], [-1.4])
    knobs = Knobs(beta=2.5, gamma=0.05, logps_reduction="mean")
    target = CONSTRAINTS["inverse_logp"].target(pairs, knobs)
    assert (target - pairs.ref_gap).item() == pytest.approx(-0.0309524, abs=1e-6)
    assert knobs.beta * (target - pairs.ref_gap).item() == pytest.approx(-0.0774, abs=5e-5)
    assert (CONSTRAINTS["inverse_prob"].target(pairs, knobs) > pairs.ref_gap).all()


@pytest.mark.parametrize("name", CONSTRAINTS)
class TestContract:
    """What holds for every line of the table; a new form is tested by being in it."""

    @pytest.fixture
    def batch(self):
        generator = torch.Generator().manual_seed(0)
        return [-5 * torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(4)]

    def test_each_pair_stands_alone_and_order_does_not_matter(self, name, batch):
        form, order = CONSTRAINTS[name], torch.randperm(16, generator=torch.Generator().manual_seed(1))
        whole = total_loss(form, PairLogps(*batch), KNOBS)
        shuffled = total_loss(form, PairLogps(*[x[order] for x in batch]), KNOBS)
        alone = torch.cat([total_loss(form, PairLogps(*[x[i : i + 1] for x in batch]), KNOBS) for i in range(16)])
        assert torch.equal(whole[order], shuffled) and torch.equal(whole, alone)

    def test_a_larger_gap_never_costs_more(self, name, batch):
        chosen, rejected = (x.requires_grad_() for x in batch[:2])
        loss = total_loss(CONSTRAINTS[name], PairLogps(chosen, rejected, *batch[2:]), KNOBS)
        up, down = torch.autograd.grad(loss.sum(), (chosen, rejected))
        assert (up < 0).all() and (down > 0).all() and torch.allclose(up, -down)

    def test_half_precision_is_computed_in_float32(self, name, batch):
        halves = [x.to(torch.bfloat16) for x in batch]
        loss = total_loss(CONSTRAINTS[name], PairLogps(*halves), KNOBS)
        assert torch.equal(loss, total_loss(CONSTRAINTS[name], PairLogps(*[x.float() for x in halves]), KNOBS))

    def test_target_reads_the_reference_alone(self, name, batch):
        pairs, moved = PairLogps(*batch), PairLogps(batch[0] + 1, batch[1] - 2, *batch[2:])
        form = CONSTRAINTS[name]
        assert torch.equal(form.target(pairs, KNOBS), form.target(moved, KNOBS))
        assert form.target(pairs, KNOBS).shape == (16,)

    def test_what_it_reads_is_what_changes_it(self, name, batch):
        """`reads` decides which options a user is told are unused, so it must be exact."""
        import dataclasses

        form, pairs = CONSTRAINTS[name], PairLogps(*batch)
        for knob in ("gamma", "tau", "alpha", "penalty_weight"):
            other = dataclasses.replace(KNOBS, **{knob: getattr(KNOBS, knob) * 1.7})
            changed = not torch.equal(total_loss(form, pairs, KNOBS), total_loss(form, pairs, other))
            # A dual form's weight is the trainer's multiplier, and not the user's number.
            assert changed == (knob in form.reads or (form.dual and knob == "penalty_weight")), knob


@settings(max_examples=300, deadline=None)
@given(gap=st.floats(-200, 200), target=st.floats(-50, 50), beta=st.floats(0.05, 5))
def test_loss_and_gap_determine_each_other(gap, target, beta):
    if beta * (gap - target) > 30:  # the loss is then below 1e-13, where float64 cannot tell gaps apart
        return
    gap, target = torch.tensor([gap], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    back = gap_from_loss(pair_loss(gap, target, beta=beta), target, beta=beta)
    assert torch.allclose(back, gap, rtol=1e-6, atol=1e-3)
    assert torch.isfinite(gap_from_loss(torch.tensor([500.0]), target.float(), beta=beta)).all()


def test_loss_of_ln_2_is_a_gap_on_target():
    target = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.allclose(pair_loss(target, target, beta=0.3), torch.full((3,), math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("column", range(4))
def test_wrong_shapes_are_refused(column):
    batch = [torch.zeros(3) for _ in range(4)]
    for wrong in (torch.zeros(3, 1), torch.zeros(2), torch.zeros(3, dtype=torch.long), 0.0):
        batch[column] = wrong
        with pytest.raises(ValueError, match="policy_|ref_"):
            PairLogps(*batch)


def test_loss_refuses_a_column_against_a_vector():
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        pair_loss(torch.zeros(3), torch.zeros(3, 1), beta=0.1)
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        gap_from_loss(torch.zeros(3, 1), torch.zeros(3, 1), beta=0.1)
