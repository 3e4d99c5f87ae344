"""`constraint="lagrangian"`: the multiplier's arithmetic, DPO where it must be DPO, the known solution of a small problem."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.constraints.dual_rule import SIGNALS, DualRule
from trl_cpo.multiplier import Multiplier
from trl_cpo.objective import pair_loss
from trl_cpo.theory.lagrangian import population_lagrangian

from helpers.identity import check
from helpers.tiny import make_lora, pairs_dataset, training_options

# The cautions are the subject of test_cautions.
pytestmark = pytest.mark.filterwarnings("ignore:constraint=.lagrangian.:UserWarning")

RULE = DualRule(epsilon=0.5, step_size=0.1, cap=1.0, start=0.2)
finite = st.floats(0, 1e6)


class TestRule:
    def test_ascends_on_excess_and_descends_on_slack(self):
        assert RULE.updated(0.2, 1.5) == pytest.approx(0.3)
        assert RULE.updated(0.2, 0.0) == pytest.approx(0.15)
        assert RULE.updated(0.2, 0.5) == 0.2

    def test_stays_between_zero_and_its_cap(self):
        assert RULE.updated(0.2, 1e9) == 1.0
        assert RULE.updated(0.01, 0.0) == 0.0

    def test_an_infinite_bound_lets_go_at_once(self):
        assert DualRule(math.inf, 0.1, 1.0).updated(0.7, 100.0) == 0.0

    @pytest.mark.parametrize("violation", [math.nan, math.inf])
    def test_a_violation_that_is_no_number_leaves_it(self, violation):
        assert RULE.updated(0.2, violation) == 0.2

    @settings(deadline=None)
    @given(st.floats(0, 1), finite, finite, st.floats(0, 1e3))
    def test_monotone_in_the_violation(self, multiplier, low, high, step_size):
        low, high = sorted((low, high))
        rule = DualRule(epsilon=1.0, step_size=step_size, cap=1.0)
        assert 0.0 <= rule.updated(multiplier, low) <= rule.updated(multiplier, high) <= 1.0


class TestState:
    def test_one_update_a_step_by_the_mean_over_pairs_and_not_over_micro_batches(self):
        state = Multiplier(RULE)
        state.observe(torch.tensor([3.0, 3.0, 3.0]))
        state.observe(torch.tensor([0.0]))
        assert state.value == 0.2
        state.step()
        assert state.value == pytest.approx(0.2 + 0.1 * (9 / 4 - 0.5))
        assert state.flush() == {"cpo/lambda": state.value, "cpo/slack": 0.5 - 9 / 4, "cpo/holds": 0.0}

    def test_the_mean_is_taken_in_float64(self):
        """2²⁴ + 1 is no number of float32."""
        state = Multiplier(DualRule(epsilon=0.0, step_size=1.0, cap=math.inf))
        state.observe(torch.tensor([2.0**24, 1.0]))
        state.step()
        assert state.value == (2**24 + 1) / 2 and state.flush()["cpo/slack"] == -(2**24 + 1) / 2

    def test_a_step_without_pairs_changes_nothing(self):
        state = Multiplier(RULE)
        state.step()
        assert state.value == 0.2 and state.flush() == {}

    def test_warm_up_counts_and_does_not_move(self):
        state = Multiplier(DualRule(epsilon=0.0, step_size=1.0, cap=9.0, warmup_steps=2))
        for expected in (0.0, 0.0, 3.0, 6.0):
            state.observe(torch.tensor([3.0]))
            state.step()
            assert state.value == expected

    def test_holds_is_the_share_of_steps_and_the_window_starts_again(self):
        state = Multiplier(RULE)
        for values in ([0.5], [0.1, 0.2], [4.0]):
            state.observe(torch.tensor(values))
            state.step()
        logged = state.flush()
        assert logged["cpo/holds"] == 2 / 3 and logged["cpo/slack"] == pytest.approx(0.5 - 4.8 / 4)
        assert state.flush() == {}

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=5), min_size=2, max_size=12), st.data())
    def test_saved_and_loaded_it_goes_on_as_if_nothing_had_been(self, steps, data):
        cut = data.draw(st.integers(0, len(steps)))
        whole, first = Multiplier(RULE), Multiplier(RULE)

        def feed(state, part):
            for values in part:
                state.observe(torch.tensor(values))
                state.step()

        feed(whole, steps)
        feed(first, steps[:cut])
        second = Multiplier(RULE)
        second.load_state_dict(first.state_dict())
        feed(second, steps[cut:])
        assert second.state_dict() == whole.state_dict() and second.flush() == whole.flush()

    def test_what_a_training_saw_that_was_broken_off_within_a_step_is_of_no_step(self):
        state = Multiplier(RULE)
        state.observe(torch.tensor([9.0, 9.0]))
        state.begin()
        state.step()
        assert state.value == RULE.start and state.flush() == {}

    def test_reset_it_is_a_new_one(self):
        state = Multiplier(RULE)
        state.observe(torch.tensor([9.0]))
        state.step()
        state.reset()
        assert state.state_dict() == Multiplier(RULE).state_dict()

    def test_what_cannot_be_loaded_is_refused(self):
        state = Multiplier(RULE)
        with pytest.raises(ValueError, match="lacks dual_steps, held"):
            state.load_state_dict({"multiplier": 0.1, "pairs": 1, "steps": 1, "violation": 1.0})
        with pytest.raises(ValueError, match=r"outside \[0, 1\]. Raise dual_max"):
            state.load_state_dict({**state.state_dict(), "multiplier": 1.5})


def config(tmp_path, **options):
    return CPOConstrainedConfig(**training_options(tmp_path, constraint="lagrangian", **options))


class TestConfig:
    def test_left_alone_the_step_and_the_cap_follow_beta(self, tmp_path):
        rule = config(tmp_path, beta=0.3).form.dual_rule
        assert (rule.step_size, rule.cap) == pytest.approx((0.1 * 0.09, 0.3))
        rule = config(tmp_path, beta=0.3, dual_signal="violation_rate").form.dual_rule
        assert (rule.step_size, rule.cap) == pytest.approx((0.1 * 0.3, 0.3))

    def test_what_is_given_is_taken(self, tmp_path):
        given_ = dict(epsilon=0.25, dual_lr=0.5, dual_max=4.0, dual_init=0.5, dual_warmup_steps=3)
        rule = config(tmp_path, **given_, dual_signal="violation_rate").form.dual_rule
        assert rule == DualRule(0.25, 0.5, 4.0, 0.5, 3, "violation_rate")
        assert set(SIGNALS) == {"violation", "violation_rate"}

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"epsilon": -1.0}, "epsilon must be a number ≥ 0; got -1.0"),
            ({"epsilon": math.nan}, "epsilon must be a number ≥ 0; got nan"),
            ({"dual_lr": math.inf}, "dual_lr must be a finite number ≥ 0; got inf"),
            ({"dual_max": 0.0}, "dual_max must be a finite number > 0; got 0.0"),
            ({"dual_warmup_steps": 1.5}, "dual_warmup_steps must be a whole number ≥ 0; got 1.5"),
            ({"dual_init": 6.0}, r"dual_init must be at most dual_max=0.5; got 6.0"),
            ({"dual_signal": "violations"}, "Did you mean 'violation'"),
            ({"dual_signal": "violation_rate", "epsilon": 1.0}, "fraction of pairs .* Set it below 1"),
        ],
    )
    def test_faults(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **options)

    @pytest.mark.parametrize(
        "options, said", [({}, ["never falls"]), ({"epsilon": math.inf}, ["plain DPO"]), ({"epsilon": 0.2}, [])], ids=str
    )
    def test_cautions(self, tmp_path, options, said):
        cautions = config(tmp_path, **options).form.cautions()
        assert len(cautions) == len(said) and all(part in text for part, text in zip(said, cautions, strict=True))

    def test_what_another_form_does_not_read_is_said(self, tmp_path, model_folder, tokenizer):
        args = CPOConstrainedConfig(**training_options(tmp_path, constraint="clip", epsilon=0.3))
        with pytest.warns(UserWarning, match="does not use epsilon=0.3"):
            CPOConstrainedTrainer(model=model_folder, args=args, processing_class=tokenizer, train_dataset=pairs_dataset())


@pytest.mark.parametrize("off", [{"epsilon": math.inf}, {"dual_lr": 0.0}, {"epsilon": math.inf, "dual_init": 0.0}], ids=str)
def test_without_a_bound_or_a_step_it_is_dpo(tmp_path, plain, off):
    _, ours = check(tmp_path, plain, ours_only={"constraint": "lagrangian", "gamma": 1.0, "prefix_sharing": False, **off})
    assert all(record["cpo/lambda"] == 0.0 for record in ours.logs if "cpo/lambda" in record)


def test_without_a_bound_it_is_dpo_with_lora(tmp_path, plain):
    check(
        tmp_path,
        lambda: plain(peft_config=make_lora()),
        ours_only={"constraint": "lagrangian", "gamma": 1.0, "prefix_sharing": False, "epsilon": math.inf},
    )


def train(tmp_path, model_folder, tokenizer, callbacks=(), **options):
    trainer = CPOConstrainedTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=config(tmp_path, **options),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset=pairs_dataset(6, seed=5),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_multiplier_follows_the_logged_violation(tmp_path, model_folder, tokenizer, signal, accumulation):
    """λ_{k+1} = clip(λ_k + η (v_k − ε), 0, cap), v_k the mean over all pairs of step k as the metrics log it."""
    options = dict(gamma=1.5, epsilon=0.4, dual_lr=0.3, dual_max=0.5, dual_warmup_steps=1, dual_signal=signal, max_steps=6)
    trainer = train(
        tmp_path,
        model_folder,
        tokenizer,
        **options,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    logs = [record for record in trainer.state.log_history if "loss" in record]
    assert len(logs) == 6
    multiplier, moved = 0.0, 0
    for step, record in enumerate(logs):
        violation = record[f"cpo/{signal}"]
        if step >= 1:
            multiplier = min(max(multiplier + 0.3 * (violation - 0.4), 0.0), 0.5)
        moved += multiplier > 0
        assert record["cpo/lambda"] == pytest.approx(multiplier, abs=1e-6)
        assert record["cpo/slack"] == pytest.approx(0.4 - violation, abs=1e-6)
        assert record["cpo/holds"] == float(violation <= 0.4)
    assert moved


def test_the_step_uses_the_multiplier_of_before_it_and_evaluation_moves_nothing(tmp_path, model_folder, tokenizer):
    """The loss is DPO's plus λ times the violation, λ constant over the micro-batches of a step."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(trainers[0]._bounds.multipliers["dual"].parts[""].value)

    trainers = []

    class Ours(CPOConstrainedTrainer):
        def compute_loss(self, *args, **kwargs):
            trainers[:] = [self]
            before = self._bounds.multipliers["dual"].parts[""].value
            loss = super().compute_loss(*args, **kwargs)
            assert self._bounds.multipliers["dual"].parts[""].value == before
            return loss

    trainer = Ours(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=config(
            tmp_path,
            gamma=2.0,
            dual_init=0.3,
            dual_lr=0.2,
            dual_max=5.0,
            max_steps=3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            prefix_sharing=False,
        ),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset=pairs_dataset(6, seed=5),
    )
    trainers[:] = [trainer]
    trainer.add_callback(Watch())
    trainer.train()
    logs = [record for record in trainer.state.log_history if "loss" in record]
    assert seen == [0.3, *(record["cpo/lambda"] for record in logs[:-1])]
    first = logs[0]
    # At the first step policy and reference are the same: DPO's loss is log 2.
    assert first["loss"] == pytest.approx(math.log(2) + 0.3 * first["cpo/violation"], rel=1e-4)
    multiplier = trainer._bounds.multipliers["dual"].parts[""].value
    evaluated = trainer.evaluate()
    assert trainer._bounds.multipliers["dual"].parts[""].value == multiplier
    assert evaluated["eval_cpo/slack"] == -evaluated["eval_cpo/violation"]
    assert evaluated["eval_cpo/holds"] == float(evaluated["eval_cpo/violation"] <= 0)


PROBLEMS = {
    # Agreement p, reference gaps, β, γ, ε: pairs that the bound leaves alone, pairs it moves part of the way, and all of it.
    "binds": ([0.9, 0.6, 0.7, 0.8], [2.0, -3.0, -1.0, -4.0], 0.5, 0.5, 0.3),
    "binds hard": ([0.9, 0.6, 0.7, 0.8], [2.0, -3.0, -1.0, -4.0], 0.5, 1.0, 0.02),
    "slack": ([0.9, 0.6, 0.7, 0.8], [2.0, -3.0, -1.0, -4.0], 0.5, 0.5, 4.0),
    "one pair": ([0.55], [-5.0], 0.2, 0.0, 0.5),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_primal_and_dual_converge_to_the_closed_form(case):
    """Free gaps, the population's Bradley–Terry loss: gradient descent beside the multiplier's ascent, by our own code.

    The independent solution solves δ_i(λ) in closed form and λ by root finding (trl_cpo/theory/lagrangian.py).
    """
    p, ref_gap, beta, gamma, epsilon = PROBLEMS[case]
    p, ref_gap = torch.tensor(p, dtype=torch.float64), torch.tensor(ref_gap, dtype=torch.float64)
    expected_gaps, expected_multiplier = population_lagrangian(p, ref_gap, beta=beta, gamma=gamma, epsilon=epsilon)
    gaps = ref_gap.clone().requires_grad_()
    dual = Multiplier(DualRule(epsilon, step_size=5e-3, cap=10 * beta))
    averaged_gaps, averaged_multiplier, count = torch.zeros_like(gaps), 0.0, 0
    for step in range(6_000):
        loss = (p * pair_loss(gaps, ref_gap, beta=beta) + (1 - p) * pair_loss(-gaps, -ref_gap, beta=beta)).mean()
        violation = torch.relu(gamma - gaps)
        (gradient,) = torch.autograd.grad(loss + dual.value * violation.mean(), gaps)
        with torch.no_grad():
            gaps -= 0.2 * len(p) * gradient
        dual.observe(violation)
        dual.step()
        if step >= 4_000:
            averaged_gaps += gaps.detach()
            averaged_multiplier += dual.value
            count += 1
    # The mean over the last third: at a corner of the hinge a gradient step goes to and fro.
    assert torch.allclose(averaged_gaps / count, expected_gaps, atol=0.02)
    assert averaged_multiplier / count == pytest.approx(expected_multiplier, abs=2e-3)
    reached = torch.relu(gamma - averaged_gaps / count).mean().item()
    assert reached <= epsilon + 0.01
    assert (expected_multiplier == 0) == (case == "slack")
