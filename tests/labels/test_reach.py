"""Reach: pairs that are too far below what the constraint asks train as in DPO, in every form."""

import math
from dataclasses import replace

import pytest
import torch
from constraint_cases import CASES, PAIRS
from transformers import AutoModelForCausalLM

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.labels.bounds import Bounds
from trl_cpo.labels.form import LabelledForm, PairLabels
from trl_cpo.metrics import PairView, per_pair
from trl_cpo.pairs import PairLogps

from helpers.identity import assert_same_run, check, run
from helpers.tiny import pairs_dataset, training_options

FORMS = [name for name in CASES if name != "none"]
#: Hyperparameters under which every form asks for much more than DPO.
FAR = {"gamma": 50.0, "penalty_weight": 0.3, "dual_init": 0.05, "dual_max": 1.0}


def options_of(form: str, **options) -> dict:
    """What a trainer of this form takes; inverse_prob needs means."""
    means = {"logps_reduction": "mean"} if form == "inverse_prob" else {}
    return {"constraint": form, "prefix_sharing": False, **means, **FAR, **options}


@pytest.fixture
def build(model_folder, ref_model_folder, tokenizer):
    """What a trainer is made of."""
    return lambda: dict(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        ref_model=AutoModelForCausalLM.from_pretrained(ref_model_folder),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset=pairs_dataset(6, seed=5),
    )


@pytest.mark.filterwarnings("ignore:constraint=:UserWarning")
@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("inverse_prob", "inverse_logp")])
def test_with_no_pair_within_reach_it_is_dpo_to_the_bit(tmp_path, build, form):
    check(tmp_path, build, ours_only=options_of(form, reach=0.5))


@pytest.mark.filterwarnings("ignore:constraint=:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_with_all_pairs_within_reach_it_is_the_form_to_the_bit(tmp_path, build, form):
    options = options_of(form, gamma=0.3)
    runs = [
        run(CPOConstrainedTrainer, CPOConstrainedConfig, tmp_path / str(at), build, {}, {**options, **more})
        for at, more in enumerate(({}, {"reach": 1e9}))
    ]
    assert_same_run(*runs)
    assert {log["cpo/within_reach"] for log in runs[1].logs if "loss" in log} == {1.0}
    assert not any("cpo/within_reach" in log for log in runs[0].logs)


@pytest.mark.parametrize("form", FORMS)
def test_each_pair_by_itself(form):
    """t where t − δ_ref ≤ κ, else δ_ref; a bound counts where γ − δ_ref ≤ κ. One of the three pairs is too far at least."""
    case = CASES[form]
    pairs = PairLogps(*torch.tensor(PAIRS, dtype=torch.float64).unbind(dim=1))
    asked = torch.tensor(case.targets) if case.form.moves_target else torch.full((3,), case.form.gamma)
    deficits = (asked - pairs.ref_gap).tolist()
    # inverse_logp lowers the target: it asks for less than DPO, and no pair is ever too far.
    reach = max(1e-9, sum(sorted(deficits)[1:]) / 2)
    within = [deficit <= reach for deficit in deficits]
    assert all(within) if form == "inverse_logp" else within.count(False) == 1
    labelled = LabelledForm(replace(case.form, reach=reach), PairLabels(), None, [("sigmoid", 1.0)])
    targets = [t if near else ref for t, near, ref in zip(case.targets, within, pairs.ref_gap.tolist(), strict=True)]
    assert labelled.target(pairs).tolist() == pytest.approx(targets, abs=1e-8)
    added = labelled.added_loss(pairs, case.multiplier)
    if case.form.adds_loss:
        assert added.tolist() == pytest.approx([near * each for near, each in zip(within, case.added, strict=True)])
    else:
        assert added is None


def test_the_multiplier_counts_pairs_beyond_reach_as_none():
    """Violations −1, 4 and 1 below γ = 1 at κ = 1.5: the first is none, the second is of a pair too far; their mean is 1/3."""
    form = replace(CASES["lagrangian"].form, reach=1.5, dual_init=0.0, dual_lr=0.3, epsilon=0.0, dual_warmup_steps=0)
    gap, zero = torch.tensor([2.0, -3.0, 0.0]), torch.zeros(3)
    pairs = PairLogps(gap, zero, gap, zero)
    bounds = Bounds(form.dual_rule)
    bounds.observe(per_pair(PairView(pairs, pairs.ref_gap, 1.0)), LabelledForm(form, PairLabels(), None, [("sigmoid", 1.0)]))
    bounds.step()
    assert bounds.flush()["cpo/lambda"] == pytest.approx(0.3 / 3)


def test_a_pair_beyond_reach_has_dpos_gradient():
    form = LabelledForm(replace(CASES["penalty"].form, reach=1.5), PairLabels(), None, [("sigmoid", 1.0)])
    gap, zero = torch.tensor([2.0, -3.0, 0.0], requires_grad=True), torch.zeros(3)
    form.added_loss(PairLogps(gap, zero, gap.detach(), zero), 0.0).sum().backward()
    assert gap.grad.tolist() == pytest.approx([0.0, 0.0, -0.4])


@pytest.mark.parametrize("reach", [0.0, -1.0, math.nan, math.inf, "far"])
def test_bad_values_are_refused(tmp_path, reach):
    with pytest.raises(ValueError, match="reach must be a finite number > 0; got"):
        CPOConstrainedConfig(**training_options(tmp_path, constraint="clip", reach=reach))


def test_no_constraint_has_no_reach(tmp_path):
    with pytest.raises(ValueError, match="constraint='none' leaves all; got 2.0. Leave it out, or set a constraint"):
        CPOConstrainedConfig(**training_options(tmp_path, constraint="none", reach=2.0))
