"""The command that the audit ends with: every option is one of `trl-cpo train`, and says what was advised."""

import shlex

import pytest

from trl_cpo.audit.command import train_command

SUMS = {"beta": 0.1, "gamma": 1.0, "reduction": "sum"}


@pytest.mark.parametrize(
    ("case", "settings", "loss"),
    [
        ("constrain", SUMS, {"constraint": "clip", "beta": "0.1", "gamma": "1", "logps_reduction": "sum"}),
        (
            "constrain",
            {"beta": 2.5, "gamma": 0.05, "reduction": "mean"},
            {"constraint": "clip", "beta": "2.5", "gamma": "0.05", "logps_reduction": "mean"},
        ),
        ("decisions", SUMS, {"constraint": "clip", "beta": "1", "gamma": "1", "logps_reduction": "sum"}),
        ("length_not_preference", SUMS, {"constraint": "none", "beta": "0.1", "logps_reduction": "sum"}),
        ("dpo_as_good", SUMS, {"constraint": "none", "beta": "0.1", "logps_reduction": "sum"}),
        ("undecided", SUMS, {"constraint": "none", "beta": "0.1", "logps_reduction": "sum"}),
    ],
)
def test_the_loss_is_the_advice(case, settings, loss):
    words = shlex.split(train_command([{"case": "labels", "says": ""}, {"case": case, "says": ""}], settings, {}))
    assert words[:2] == ["trl-cpo", "train"]
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {f"--{name}": value for name, value in loss.items()}


def test_options_are_named_quoted_and_known_to_train():
    from trl import TrlParser

    from trl_cpo.run.arguments import PairArguments, PolicyConfig, RunConfig

    options = {"model_name_or_path": "a b", "dataset_name": "it's.jsonl", "dataset_config": None, "max_length": 512}
    command = train_command([{"case": "constrain", "says": ""}], SUMS, options)
    assert "dataset_config" not in command
    arguments = shlex.split(command)[2:] + ["--use_cpu", "--bf16", "False"]
    pairs, run, policy = TrlParser((PairArguments, RunConfig, PolicyConfig)).parse_args_and_config(args=arguments)
    assert (policy.model_name_or_path, pairs.dataset_name, run.max_length) == ("a b", "it's.jsonl", 512)
    assert (run.constraint, run.beta, run.gamma) == ("clip", 0.1, 1.0)


def test_without_advice_there_is_no_command():
    assert train_command([{"case": "labels", "says": ""}], SUMS, {}) is None
