"""The log in words: every case of the sentence, and when it is said."""

import math

import pytest
from transformers import TrainerControl, TrainerState

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.logs.narration import Narrator, sentence

from helpers.tiny import make_model, pairs_dataset, training_options


def log(chosen=0.0, rejected=0.0, in_u=0.0, prefers=0.5, **more):
    return {
        "cpo/chosen_logps_shift": chosen,
        "cpo/rejected_logps_shift": rejected,
        "cpo/in_undesirable_region": in_u,
        "cpo/prefers_chosen": prefers,
        "cpo/pairs": 40,
        **more,
    }


def held_out(name="eval_", **values):
    """The same of an evaluation."""
    return {f"{name}{key}": value for key, value in log(**values).items()}


@pytest.mark.parametrize(
    "chosen, rejected, words",
    [
        (-4.6, -40.8, "both log-probs fall, chosen less (-4.6 and -40.8 nats per response); "),
        (-9.0, -3.0, "both log-probs fall, chosen more (-9 and -3 nats per response); "),
        (-3.0, -3.0, "both log-probs fall, chosen as far (-3 and -3 nats per response); "),
        (5.0, 2.5, "both log-probs rise, chosen more (+5 and +2.5 nats per response); "),
        (2.5, 5.0, "both log-probs rise, chosen less (+2.5 and +5 nats per response); "),
        (2.5, -5.0, "chosen log-prob rises, rejected falls (+2.5 and -5 nats per response); "),
        (-2.5, 5.0, "chosen log-prob falls, rejected rises (-2.5 and +5 nats per response); "),
        (0.0, -5.0, "rejected log-prob falls, chosen stays (+0 and -5 nats per response); "),
        (5.0, 0.0004, "chosen log-prob rises, rejected stays (+5 and +0.0004 nats per response); "),
        (0.0, 0.0, "neither log-prob has moved by 0.001 nats per response; "),
        (-0.0009, 0.0009, "neither log-prob has moved by 0.001 nats per response; "),
    ],
)
def test_displacement(chosen, rejected, words):
    assert sentence(None, log(chosen, rejected)).startswith(words)


@pytest.mark.parametrize(
    "before, after, words",
    [
        (None, 0.21, "21 % of 40 held-out pairs in U;"),
        (None, 0.0, "0 % of 40 held-out pairs in U;"),
        (0.21, 0.07, "7 % of 40 held-out pairs in U, down from 21 %;"),
        (0.07, 0.21, "21 % of 40 held-out pairs in U, up from 7 %;"),
        (0.0, 0.004, "under 1 % of 40 held-out pairs in U, up from 0 %;"),
        (0.996, 1.0, "100 % of 40 held-out pairs in U, up from over 99 %;"),
        (0.211, 0.2149, "21 % of 40 held-out pairs in U, as before;"),
        (0.0, 0.0, "0 % of 40 held-out pairs in U, as before;"),
    ],
)
def test_the_undesirable_region_of_held_out_pairs(before, after, words):
    earlier = None if before is None else held_out(in_u=before, chosen=-1.0)
    assert f"; {words} " in sentence(earlier, held_out(in_u=after), prefix="eval_")


def test_the_reference_itself_has_no_pair_in_u_to_compare_with():
    said = sentence(held_out(prefers=0.2), held_out(chosen=2.0, in_u=0.3, prefers=0.4), prefix="eval_")
    assert said.endswith("; 30 % of 40 held-out pairs in U; the policy prefers chosen on 40 %, up from 20 %")


def test_training_logs_are_of_different_pairs_and_are_not_compared():
    first, last = log(in_u=0.0, prefers=0.25, **{"cpo/pairs": 4}), log(in_u=0.75, prefers=0.5, **{"cpo/pairs": 1234})
    assert sentence(first, last).endswith(
        "; 75 % of 1,234 training pairs in U, 0 % of 4 others in the first log; the policy prefers chosen on 50 %, and on 25 % "
        "in the first log"
    )
    assert sentence(None, last).endswith("; 75 % of 1,234 training pairs in U; the policy prefers chosen on 50 %")


def test_evaluations_of_other_pairs_are_not_compared():
    said = sentence(held_out(in_u=0.1), held_out(in_u=0.3, **{"cpo/pairs": 41}), prefix="eval_")
    assert "30 % of 41 held-out pairs in U; " in said and "from" not in said


def test_logs_of_earlier_versions_do_not_say_how_many():
    earlier = {name: value for name, value in log(in_u=0.1).items() if name != "cpo/pairs"}
    assert "10 % of training pairs in U;" in sentence(None, earlier)


def test_what_the_policy_prefers_and_the_unit():
    said = sentence(
        held_out(prefers=0.18), held_out(chosen=-0.01, rejected=-0.02, prefers=0.52), "nats per token", prefix="eval_"
    )
    assert said.endswith("; the policy prefers chosen on 52 %, up from 18 %") and "-0.02 nats per token)" in said
    assert "\n" not in said


def test_nothing_to_tell():
    assert sentence(None, {}) is None and sentence(log(), {"loss": 1.0}) is None
    assert sentence(None, log(chosen=math.nan)) is None and sentence(None, log(), prefix="eval_") is None
    assert "first log" not in sentence({"loss": 1.0}, log())
    assert "from" not in sentence(held_out(in_u=math.nan), held_out(in_u=0.3), prefix="eval_")


def of_groups(prefix="", **numbers):
    return {f"{prefix}cpo/{group}/{name}": value for name, values in numbers.items() for group, value in values.items()}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (
            dict(slack={"a": 0.1, "b": -0.31, "c": -0.3}, violation={"a": 9.0, "b": 1.0, "c": 1.0}),
            "; of 3 groups, b is furthest from its bound (slack -0.31)",
        ),
        (dict(slack={"a": 0.1, "b": 0.0}), "; all 2 groups are within their bounds"),
        (dict(violation={"a": 0.5, "b": 1.25}), "; of 2 groups, b is furthest below gamma (1.25 nats per response on average)"),
        (dict(violation={"a": 0.0, "b": 0.0}), "; no pair of the 2 groups is below gamma"),
        (dict(violation={"a": 1.0, "b": math.nan, "c": 1.0}), "; of 2 groups, a is furthest below gamma"),
        (dict(violation={"x\x1b[31m": 1.0, "b": 0.5}), "; of 2 groups, x\\x1b[31m is furthest below gamma"),
        (dict(violation={"a": 1.0}), ""),
        (dict(chosen_floor_slack={"a": -1.0, "b": -2.0}), ""),
    ],
)
@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_the_group_furthest_from_its_bound(numbers, words, prefix):
    plain = held_out() if prefix else log()
    # All pairs together are no group, and neither are those of another set.
    more = {
        f"{prefix}cpo/slack": -99.0,
        f"{prefix}cpo/violation": 99.0,
        **of_groups("eval_b_", violation={"z": 99.0, "y": 1.0}),
    }
    without = sentence(None, plain, prefix=prefix or None)
    said = sentence(None, {**plain, **more, **of_groups(prefix, **numbers)}, prefix=prefix or None)
    assert said.startswith(without) and said.removeprefix(without).startswith(words) and bool(words) == (said != without)


def told(logs, first_process=True, end=True):
    """What a Narrator prints for a run of these logs."""
    state = TrainerState()
    state.is_world_process_zero = first_process
    said, narrator = [], Narrator("sum")
    narrator._say = lambda when, words: said.append(f"[{when}] {words}")
    for number, each in enumerate(logs, 1):
        state.global_step = 10 * number
        state.log_history.append({**each, "step": state.global_step})
        narrator.on_log(None, state, TrainerControl(), logs=each)
    if end:
        narrator.on_train_end(None, state, TrainerControl())
    return said


def test_said_at_the_first_log_and_at_the_end():
    said = told([log(in_u=0.21), log(in_u=0.5), log(in_u=0.07), {"train_runtime": 1.0}])
    assert len(said) == 2
    assert said[0].startswith("[first log, step 10]") and "21 % of 40 training pairs in U;" in said[0]
    assert said[1].startswith("[end, step 40]") and "7 % of 40 training pairs in U, 21 % of 40 others" in said[1]


def test_held_out_pairs_come_before_training_pairs():
    others = held_out("eval_b_", in_u=0.9)
    said = told(
        [
            held_out(in_u=0.2, chosen=1.0),
            others,
            log(in_u=0.5),
            log(in_u=0.6),
            held_out(in_u=0.1),
            others,
            {"train_runtime": 1.0},
        ]
    )
    assert len(said) == 2 and "50 % of 40 training pairs" in said[0]
    assert said[1].startswith("[end, step 50]") and "10 % of 40 held-out pairs in U, down from 20 %" in said[1]


def test_an_evaluation_after_training_is_waited_for():
    """As `trl-cpo train` has it: held-out pairs before the first step and after training."""
    state = TrainerState()
    state.is_world_process_zero = True
    said, narrator = [], Narrator("sum")
    narrator._say = lambda when, words: said.append(f"[{when}] {words}")
    state.log_history = [{**held_out(prefers=0.2), "step": 0}, {**log(), "step": 5}, {**log(), "step": 9}]
    narrator.on_evaluate(None, state, TrainerControl())
    narrator.on_train_end(None, state, TrainerControl())
    assert said == []
    state.log_history.append({**held_out(prefers=0.3), "step": 9})
    narrator.on_evaluate(None, state, TrainerControl())
    narrator.on_evaluate(None, state, TrainerControl())
    assert len(said) == 1 and said[0].startswith("[end, step 9]") and "chosen on 30 %, up from 20 %" in said[0]


def test_said_once_where_there_is_one_log_and_never_elsewhere():
    assert len(told([log()])) == 1
    assert told([{"loss": 1.0}]) == []
    assert told([log(), log()], first_process=False) == []


@pytest.mark.parametrize("narrate", [True, False])
def test_in_training(tmp_path, tokenizer, capsys, narrate):
    trainer = CPOConstrainedTrainer(
        model=make_model(),
        ref_model=make_model(1),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        args=CPOConstrainedConfig(**training_options(tmp_path), constraint="clip", narrate=narrate),
    )
    trainer.train()
    out = capsys.readouterr().out
    logs = [each for each in trainer.state.log_history if "cpo/gap" in each]
    first, last = sentence(None, logs[0]), sentence(logs[0], logs[-1])
    assert out.count(f"[first log, step 1] {first}\n") == out.count(f"[end, step 3] {last}\n") == int(narrate)


def test_narrate_is_a_truth_value():
    with pytest.raises(ValueError, match="narrate"):
        CPOConstrainedConfig("x", use_cpu=True, bf16=False, narrate="loudly")


def test_tensorboard_gets_the_numbers_of_the_history(tmp_path, tokenizer):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = training_options(tmp_path / "run", report_to="tensorboard", eval_strategy="steps", eval_steps=2, logging_dir=None)
    options.pop("logging_dir")
    trainer = CPOConstrainedTrainer(
        model=make_model(),
        ref_model=make_model(1),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset=pairs_dataset(5, seed=2),
        args=CPOConstrainedConfig(**options, constraint="lagrangian", gamma=1.0, epsilon=0.5),
    )
    trainer.train()
    (events,) = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
    board = event_accumulator.EventAccumulator(str(events))
    board.Reload()
    seen = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    expected = {}
    for each in trainer.state.log_history:
        for key, value in each.items():
            if "cpo/" in key:
                tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                expected.setdefault(tag, {})[each["step"]] = value
    assert {"train/cpo/in_undesirable_region", "eval/cpo/gap", "train/cpo/lambda"} <= set(expected)
    for tag, values in expected.items():
        assert seen[tag] == pytest.approx(values, rel=1e-6), tag
