"""The forms of the constraint: numbers by hand, goldens, extremes, limits, monotonicity, and one contract for all of them."""

import dataclasses
import json
import math
import runpy

import pytest
import torch
from constraint_cases import PAIRS, added_of, case_of, made, multiplier_of, total_loss
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_cpo.constraint_fields as constraint_fields
from trl_cpo.constraint_fields import HYPERPARAMETERS
from trl_cpo.constraint_names import FORM_NAMES, HYPERPARAMETER_NAMES
from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.hyperparameters import fault, hyperparameter
from trl_cpo.labels.form import LabelledForm, PairLabels
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps

from helpers.formulas import gap_from_loss
from helpers.paths import TESTS

GOLDEN_FILE = TESTS / "golden" / "margin_forms.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text())["cases"]
SIDES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def pairs_of(*columns, dtype=torch.float64, requires_grad=False) -> PairLogps:
    tensors = [torch.tensor(column, dtype=dtype) for column in columns]
    for tensor in tensors[:2]:
        tensor.requires_grad_(requires_grad)
    return PairLogps(*tensors)


def asked_of(form, pairs: PairLogps) -> torch.Tensor:
    """The whole loss of each pair as the trainer asks a form for it, with its reach, (B,)."""
    labelled = LabelledForm(form, PairLabels(), None, [("sigmoid", 1.0)])
    added = labelled.added_loss(pairs, multiplier_of(form))
    return pair_loss(pairs.gap, labelled.target(pairs.detach()), beta=form.beta) + (0.0 if added is None else added)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", sorted(GOLDEN[0]["expect"]))
def test_golden_values(name, dtype, tolerance):
    """Targets, losses and both gradients of 64 cases. `clip_release` is the release's clip, whose γ is always 0."""
    for case in GOLDEN:
        gamma = 0.0 if name == "clip_release" else case["gamma"]
        form = made(name.removesuffix("_release"), case, gamma=gamma, logps_reduction="mean")
        pairs = pairs_of(*([case[side]] for side in SIDES), dtype=dtype, requires_grad=True)
        target = form.target(pairs.detach())
        loss = pair_loss(pairs.gap, target, beta=form.beta)
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
class TestContract:
    """What holds for every line of the table; a new form is tested by its row in constraint_cases.py."""

    @pytest.fixture
    def case(self, name):
        return case_of(name)

    @pytest.fixture
    def form(self, case):
        return case.form

    @pytest.fixture
    def batch(self):
        generator = torch.Generator().manual_seed(0)
        return [-5 * torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(4)]

    def test_it_is_the_form_of_its_row(self, name, form):
        assert type(form) is CONSTRAINTS[name]

    def test_numbers_by_hand(self, case):
        pairs = pairs_of(*zip(*PAIRS, strict=True))
        assert case.form.target(pairs).tolist() == pytest.approx(case.targets, abs=1e-9)
        assert added_of(case.form, pairs).tolist() == pytest.approx(case.added, abs=1e-9)

    def test_every_field_is_a_hyperparameter_declared_once(self, name):
        form = CONSTRAINTS[name]
        assert "__dataclass_fields__" in vars(form), f"{form.__name__} lacks @dataclass(frozen=True)"
        others = {each.name for each in dataclasses.fields(form)} - form.hyperparameters().keys()
        assert others == {"beta", "logps_reduction"}, f"declare {others} with hyperparameter(default, help, at_least=…)"
        for field, declared in form.hyperparameters().items():
            shared = HYPERPARAMETERS[field]
            same = (declared.type, declared.default, declared.metadata) == (shared.type, shared.default, shared.metadata)
            assert same, f"{name} declares {field} otherwise than another form: give both the same default, help and bounds"
            assert fault(declared, declared.default) is None, f"the default of {field} is out of its own bounds"

    def test_gradients_are_those_of_the_formula(self, form):
        ref = [torch.tensor(x, dtype=torch.float64) for x in ([-1.2, -3.0, -2.2], [-1.4, -1.1, -2.1])]
        policy = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([-1.0, -2.5, -2.0], [-1.9, -1.0, -2.05])]
        assert torch.autograd.gradcheck(lambda *sides: total_loss(form, PairLogps(*sides, *ref)), policy)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_extremes_are_finite(self, form, dtype):
        """±1e4 nats on every side, log-probability 0 included: loss, target and gradient stay finite, in float32."""
        values = [-1e4, -1.0, 0.0]
        grid = [(a, b, c, d) for a in values for b in values for c in values for d in values]
        for extreme in (form, dataclasses.replace(form, beta=0.1, gamma=1e4)):
            sides = [torch.tensor(column, dtype=dtype) for column in zip(*grid, strict=True)]
            leaves = [side.requires_grad_() for side in sides[:2]]
            pairs = PairLogps(*sides)
            loss = total_loss(extreme, pairs)
            assert loss.dtype == torch.float32
            assert torch.isfinite(loss).all() and torch.isfinite(extreme.target(pairs.detach())).all()
            loss.sum().backward()
            assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)

    def test_each_pair_stands_alone_and_order_does_not_matter(self, form, batch):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        whole = total_loss(form, PairLogps(*batch))
        shuffled = total_loss(form, PairLogps(*[x[order] for x in batch]))
        alone = torch.cat([total_loss(form, PairLogps(*[x[i : i + 1] for x in batch])) for i in range(16)])
        assert whole.shape == (16,) and torch.equal(whole[order], shuffled) and torch.equal(whole, alone)

    def test_a_larger_gap_never_costs_more(self, form, batch):
        chosen, rejected = (x.requires_grad_() for x in batch[:2])
        loss = total_loss(form, PairLogps(chosen, rejected, *batch[2:]))
        up, down = torch.autograd.grad(loss.sum(), (chosen, rejected))
        assert (up < 0).all() and (down > 0).all() and torch.allclose(up, -down)

    def test_a_pair_that_meets_gamma_is_pushed_no_further(self, form, batch):
        """Nothing is added to it, and nothing pulls at it."""
        rejected = (batch[0] - form.gamma - torch.linspace(0, 3, 16, dtype=torch.float64)).requires_grad_()
        added = added_of(form, PairLogps(batch[0].requires_grad_(), rejected, *batch[2:]))
        assert not added.any()
        if added.requires_grad:
            assert not any(gradient.any() for gradient in torch.autograd.grad(added.sum(), (batch[0], rejected)))

    def test_half_precision_is_computed_in_float32(self, form, batch):
        halves = [x.to(torch.bfloat16) for x in batch]
        loss = total_loss(form, PairLogps(*halves))
        assert torch.equal(loss, total_loss(form, PairLogps(*[x.float() for x in halves])))

    def test_target_reads_the_reference_alone(self, form, batch):
        pairs, moved = PairLogps(*batch), PairLogps(batch[0] + 1, batch[1] - 2, *batch[2:])
        assert torch.equal(form.target(pairs), form.target(moved))
        assert form.target(pairs).shape == (16,)
        assert torch.equal(form.target(pairs), pairs.ref_gap) == (not form.moves_target)

    def test_every_hyperparameter_changes_it(self, form, batch):
        """The fields decide which options a user is told are unused, so none may be idle."""
        pairs = PairLogps(*batch)

        def different(field):
            value, about = getattr(form, field.name), field.metadata
            if about["choices"]:
                return next(choice for choice in about["choices"] if choice != value)
            return value + 1 if isinstance(value, int) else 0.37 if not value else value * 1.7

        for name, declared in form.hyperparameters().items():
            other = dataclasses.replace(form, **{name: different(declared)})
            changed = other.dual_rule != form.dual_rule or not torch.equal(asked_of(form, pairs), asked_of(other, pairs))
            # γ is every form's, to count violations at.
            expected = name != "gamma" or form.moves_target or form.adds_loss
            if name == "reach":
                asked = form.gamma if form.adds_loss else form.target(pairs)
                expected = bool((asked - pairs.ref_gap > other.reach).any())
            assert changed == expected, name

    def test_at_its_neutral_values_it_is_dpo(self, case, batch):
        neutral, pairs = dataclasses.replace(case.form, **case.dpo), PairLogps(*batch)
        assert torch.equal(neutral.target(pairs), pairs.ref_gap)
        assert not added_of(neutral, pairs).any()

    def test_a_promised_target_reaches_gamma(self, case, batch):
        form, pairs = case.form, PairLogps(*batch)
        for gamma in (0.0, 0.7, 40.0):
            target = dataclasses.replace(form, gamma=gamma).target(pairs)
            assert not case.target_reaches_gamma or (target >= gamma).all()

    def test_the_docs_have_a_row(self, name):
        for file in ("README.md", "docs/constraints.md"):
            text = (TESTS.parent / file).read_text()
            assert f"| `{name}` |" in text, f"{file} has no row for {name!r}: add | `{name}` | … | to its table of forms"


@pytest.mark.parametrize("name", HYPERPARAMETERS)
class TestHyperparameters:
    def test_its_help_names_its_unit(self, name):
        about = HYPERPARAMETERS[name].metadata
        unit = about["choices"] or any(unit in about["help"] for unit in ("nat", "without unit", "teps"))
        assert unit, f"the help of {name} names no unit: nats, per nat, steps, or 'without unit'"

    def test_the_docs_have_a_row(self, name):
        texts = [(TESTS.parent / file).read_text() for file in ("README.md", "docs/constraints.md")]
        assert any(f"| `{name}` |" in text for text in texts), (
            f"docs/constraints.md has no row for {name}: add | `{name}` | … |"
        )


def test_the_stub_is_what_the_table_says():
    file = TESTS.parent / "trl_cpo" / "constraint_fields.pyi"
    assert file.read_text() == constraint_fields.stub(), (
        "the stub is not up to date; write it anew: python -m trl_cpo.constraint_fields > trl_cpo/constraint_fields.pyi"
    )


def test_names_without_torch_are_those_of_the_table():
    assert tuple(CONSTRAINTS) == FORM_NAMES and tuple(HYPERPARAMETERS) == HYPERPARAMETER_NAMES


def test_a_hyperparameter_has_one_kind_of_bound():
    for bounds in ({}, {"at_least": 0.0, "above": 0.0}, {"at_least": 0.0, "choices": ("a",)}):
        with pytest.raises(TypeError, match="one of at_least=, above= and choices="):
            hyperparameter(1.0, "A number, without unit.", **bounds)


def test_a_form_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made("clip", beta=0.1).gamma = 2.0
    with pytest.raises(TypeError, match="tau"):
        CONSTRAINTS["clip"](beta=0.1, tau=2.0)


def test_softplus_at_ten_thousand_nats():
    """The release takes log(1 + exp(·)), infinite in float32 from τ(γ − δ_ref) = 89 on."""
    pairs = pairs_of([0.0], [0.0], [-1e4], [0.0], dtype=torch.float32)
    form = made("softplus", beta=0.1, gamma=0.5, tau=2.0)
    assert torch.log1p(torch.exp(form.tau * (form.gamma - pairs.ref_gap))).isinf()
    assert form.target(pairs).item() == 0.5


@pytest.mark.parametrize("name", ["clip", "softplus"])
def test_minus_infinite_gamma_is_dpo(name):
    ref = torch.linspace(-50, 50, 101)
    pairs = PairLogps(ref, ref, ref, torch.zeros_like(ref))
    for alpha in (0.25, 1.0):
        target = made(name, beta=0.1, gamma=-math.inf, alpha=alpha).target(pairs)
        assert torch.equal(target, pairs.ref_gap)


@pytest.mark.parametrize("name", ["inverse_prob", "inverse_logp"])
def test_zero_gamma_is_dpo(name):
    pairs = pairs_of([0.0] * 3, [0.0] * 3, [-1.0, -1e4, 0.0], [-2.0, -3.0, -0.5], dtype=torch.float32)
    assert torch.equal(made(name, beta=0.1, gamma=0.0, logps_reduction="mean").target(pairs), pairs.ref_gap)


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
            target = made(name, beta=0.1, gamma=gamma, tau=tau, alpha=alpha).target(pairs)
            assert (target >= floor).all() and (target >= pairs.ref_gap).all(), name


def test_alpha_above_one_can_fall_below_gamma():
    """The guarantee's limit is real, not caution: at α = 2 a misaligned pair's target stays negative."""
    pairs = pairs_of([0.0], [0.0], [-10.0], [0.0])
    form = made("softplus", beta=0.1, gamma=0.5, tau=20.0, alpha=2.0)
    assert form.target(pairs).item() == pytest.approx(-10 + 10.5 / 2)
    assert form.cautions()


@settings(max_examples=200, deadline=None)
@given(ref=st.lists(st.tuples(logps, logps), min_size=2, max_size=8), gamma=st.floats(0, 50), tau=positive)
def test_targets_grow_with_the_reference_gap_and_with_gamma(ref, gamma, tau):
    chosen, rejected = (torch.tensor(column, dtype=torch.float64) for column in zip(*ref, strict=True))
    order = torch.argsort(chosen - rejected)
    pairs = PairLogps(*[x[order] for x in (chosen, rejected, chosen, rejected)])
    for name in ("clip", "softplus"):
        low, high = (made(name, beta=0.1, gamma=g, tau=tau).target(pairs) for g in (gamma, gamma + 1))
        assert (low.diff() >= -1e-9).all() and (high >= low - 1e-12).all()


def test_sharp_softplus_is_clip_within_its_bound():
    ref_gap = torch.linspace(-5, 5, 201, dtype=torch.float64)
    pairs = PairLogps(ref_gap, ref_gap, ref_gap, torch.zeros_like(ref_gap))
    for tau in (0.5, 2.0, 50.0):
        values = dict(beta=0.1, gamma=0.5, tau=tau)
        excess = made("softplus", values).target(pairs) - made("clip", values).target(pairs)
        assert (excess >= 0).all() and (excess <= math.log(2) / tau + 1e-12).all()


def test_inverse_logp_relaxes_and_inverse_prob_raises():
    """The worked case of the docs: β 2.5, γ 0.05, s_ref = (−1.2, −1.4) gives −0.0774, below DPO's target."""
    pairs = pairs_of([0.0], [0.0], [-1.2], [-1.4])
    values = dict(beta=2.5, gamma=0.05, logps_reduction="mean")
    target = made("inverse_logp", values).target(pairs)
    assert (target - pairs.ref_gap).item() == pytest.approx(-0.0309524, abs=1e-6)
    assert 2.5 * (target - pairs.ref_gap).item() == pytest.approx(-0.0774, abs=5e-5)
    assert (made("inverse_prob", values).target(pairs) > pairs.ref_gap).all()


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
        pair_loss(torch.zeros(3, 1), torch.zeros(3, 1), beta=0.1)
