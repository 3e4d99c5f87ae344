"""CPOConstrainedConfig: validation, what mean log-probabilities mean, and bfloat16."""

import dataclasses
import json
import pickle
from types import SimpleNamespace

import pytest
from constraint_cases import case_of
from trl import DPOConfig, TrlParser

import trl_cpo.engine.config as engine_config
from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.loss import LOSS_READS
from trl_cpo.constraint_fields import HYPERPARAMETERS
from trl_cpo.constraints import CONSTRAINTS


def config(tmp_path, **fields):
    return CPOConstrainedConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_it_is_a_dpoconfig_whose_added_fields_are_off(tmp_path):
    ours, theirs = config(tmp_path), DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert isinstance(ours, DPOConfig) and ours.constraint == "none"
    for field in dataclasses.fields(theirs):
        if field.name not in ("logging_dir",):
            assert str(getattr(ours, field.name)) == str(getattr(theirs, field.name)), field.name


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"gamma": -1.0}, "gamma must be a finite number ≥ 0; got -1.0"),
        ({"gamma": float("nan")}, "gamma must be a finite number ≥ 0; got nan"),
        ({"gamma": "0.5"}, "gamma must be a finite number ≥ 0; got '0.5'"),
        ({"tau": 0.0}, "tau must be a finite number > 0; got 0.0"),
        ({"alpha": 0.0}, "alpha must be a finite number > 0; got 0.0"),
        ({"alpha": float("inf")}, "alpha must be a finite number > 0; got inf"),
        ({"penalty_weight": -0.1}, "penalty_weight must be a finite number ≥ 0; got -0.1"),
        ({"constraint": "softplsu"}, "got 'softplsu'. Did you mean 'softplus'?"),
        ({"logps_reduction": "avg"}, "logps_reduction must be one of 'sum', 'mean'; got 'avg'"),
        ({"loss_type": ["sigmiod"]}, "Did you mean 'sigmoid'?"),
        ({"constraint": "clip", "beta": 0.0}, "beta must be a finite number > 0"),
        ({"constraint": "inverse_prob", "gamma": 0.1}, "needs logps_reduction='mean'"),
        ({"constraint": "clip", "loss_type": "sigmoid_norm"}, "set logps_reduction='mean'"),
        ({"constraint": "clip", "loss_type": ["ipo"]}, "set logps_reduction='mean'"),
        ({"constraint": "clip", "loss_type": ["sft"]}, "reads no reference"),
        ({"logps_reduction": "mean", "loss_type": ["hinge"]}, "TRL defines it on summed log-probabilities"),
        ({"constraint": "clip", "f_divergence_type": "js_divergence"}, "f_divergence_type='reverse_kl' alone"),
    ],
)
def test_faults_are_named(tmp_path, fields, expected):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **fields)
    assert expected in str(error.value)


def test_faults_of_values_and_of_combinations_come_together(tmp_path):
    with pytest.raises(ValueError) as error:
        config(tmp_path, tau=0.0, constraint="clip", f_divergence_type="js_divergence", loss_type=["sft"])
    assert all(words in str(error.value) for words in ("3 faults", "tau", "reverse_kl", "reads no reference"))
    with pytest.raises(ValueError, match=r"gamma(.|\n)*needs logps_reduction='mean'"):
        config(tmp_path, gamma=-1.0, constraint="inverse_prob")


@pytest.mark.parametrize("fields", [{"constraint": ["clip"]}, {"logps_reduction": None}, {"prefix_sharing": "yes"}])
def test_values_of_another_type_are_refused(tmp_path, fields):
    with pytest.raises(ValueError, match="must be"):
        config(tmp_path, **fields)


def test_all_faults_come_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        config(tmp_path, gamma=-1.0, tau=0.0, alpha=-2.0, constraint="clop", logps_reduction="total")
    message = str(error.value)
    assert "5 faults" in message
    assert all(name in message for name in ("gamma", "tau", "alpha", "constraint", "logps_reduction"))


MARGIN_FORMS = [name for name, form in CONSTRAINTS.items() if form.moves_target]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("loss_type", LOSS_READS)
def test_every_loss_type_is_defined_or_refused_in_words(tmp_path, constraint, loss_type):
    """Under either reduction; which of the two is tested by what each loss type reads."""
    reads = LOSS_READS[loss_type]
    for reduction in ("sum", "mean"):
        defined = reduction == "sum" or loss_type == "sigmoid" or reads in ("mean", "no reference")
        if constraint in MARGIN_FORMS:
            defined &= reads == reduction or (reduction == "mean" and loss_type == "sigmoid")
        defined &= not CONSTRAINTS[constraint](beta=0.1, logps_reduction=reduction).faults()
        fields = dict(constraint=constraint, loss_type=[loss_type], logps_reduction=reduction)
        if defined:
            assert config(tmp_path, **fields).loss_type == [
                "sigmoid_norm" if (loss_type, reduction) == ("sigmoid", "mean") else loss_type
            ]
        else:
            with pytest.raises(ValueError, match="logps_reduction|one side|reads no reference"):
                config(tmp_path, **fields)


def test_mean_needs_no_second_option(tmp_path):
    once = config(tmp_path, logps_reduction="mean")
    assert once.loss_type == ["sigmoid_norm"]
    assert config(tmp_path, logps_reduction="mean", loss_type=once.loss_type).loss_type == ["sigmoid_norm"]


def test_without_bfloat16_training_is_in_float32_where_trl_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_config, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="bf16"):
        DPOConfig(str(tmp_path))
    assert CPOConstrainedConfig(str(tmp_path)).bf16 is False
    # Where DPOConfig does not raise, its choice stands.
    assert CPOConstrainedConfig(str(tmp_path), use_cpu=True).bf16 is DPOConfig(str(tmp_path), use_cpu=True).bf16 is True
    with pytest.raises(ValueError, match="bf16"):  # asked for outright, it is not taken away
        CPOConstrainedConfig(str(tmp_path), bf16=True)


def test_with_bfloat16_it_is_used_as_in_trl(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_config, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    assert CPOConstrainedConfig(str(tmp_path)).bf16 is DPOConfig(str(tmp_path)).bf16 is True


def test_trls_parser_reads_the_fields_and_refuses_unknown_ones(tmp_path):
    parser = TrlParser([CPOConstrainedConfig])
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"]
    (parsed,) = parser.parse_args_and_config([*common, "--constraint", "softplus", "--gamma", "0.5", "--alpha", "0.25"])
    assert (parsed.constraint, parsed.gamma, parsed.alpha) == ("softplus", 0.5, 0.25)
    with pytest.raises(ValueError, match="gamm_a"):
        TrlParser([CPOConstrainedConfig]).parse_args_and_config([*common, "--gamm_a", "0.5"])


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_every_hyperparameter_is_a_field_of_the_config(name, tmp_path):
    """With the form's default, its help, its bounds and its names; documented once; and it is no field of TRL's."""
    declared, ours = HYPERPARAMETERS[name], CPOConstrainedConfig.__dataclass_fields__[name]
    assert ours.default == declared.default
    assert declared.metadata["help"][1:] in ours.metadata["help"]
    assert CPOConstrainedConfig.__doc__.count(f" {name} (`") == 1
    assert name not in engine_config.DPOConfig.__dataclass_fields__, f"TRL's or the engine's config has a field {name}"
    with pytest.raises(ValueError, match=f"{name} must be"):
        config(tmp_path, **{name: object()})
    about = declared.metadata
    if not about["choices"]:
        lowest = about["at_least"] if about["above"] is None else about["above"]
        sign = "≥" if about["above"] is None else ">"
        with pytest.raises(ValueError, match=f"{name} must be a .*number {sign} {lowest:g}; got {lowest - 1!r}"):
            config(tmp_path, **{name: lowest - 1})


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_form_has_the_values_that_were_given(name, tmp_path):
    form = case_of(name).form
    made = config(tmp_path, constraint=name, **{each.name: getattr(form, each.name) for each in dataclasses.fields(form)})
    assert made.form == form
    idle = HYPERPARAMETERS.keys() - form.hyperparameters().keys()
    assert not [note for note in made.cautions() if "does not use" in note]
    given = {field: 0.75 for field in idle if isinstance(HYPERPARAMETERS[field].default, float)}
    given["logps_reduction"] = form.logps_reduction
    (note,) = [n for n in config(tmp_path, constraint=name, gamma=1.0, **given).cautions() if "does not use" in n]
    given.pop("logps_reduction")
    assert all(f"{field}=0.75" in note for field in given)


class TestWhatWasNotGiven:
    def test_beta_and_gamma_follow_the_reduction(self, tmp_path):
        sums, means = config(tmp_path), config(tmp_path, logps_reduction="mean")
        assert (sums.beta, sums.gamma) == (DPOConfig(str(tmp_path), use_cpu=True).beta, 0.0)
        assert (means.beta, means.gamma) == (2.5, 0.05)
        given = config(tmp_path, logps_reduction="mean", beta=0.1, gamma=0.0)
        assert (given.beta, given.gamma) == (0.1, 0.0)

    @pytest.mark.parametrize("fields", [{}, {"logps_reduction": "mean"}, {"beta": 0.3, "constraint": "clip"}])
    def test_a_config_holds_plain_values(self, tmp_path, fields):
        """So that checkpoints, records and copies of it are as they were."""
        made = config(tmp_path, **fields)
        assert {type(made.beta), type(made.gamma), type(made.constraint)} == {float, str}
        again = dataclasses.replace(made)
        assert (again.beta, again.gamma, again.constraint) == (made.beta, made.gamma, made.constraint)
        assert again.not_given == () and again.chose_constraint
        default = CPOConstrainedConfig.__dataclass_fields__["beta"].default
        assert default == DPOConfig.beta and json.dumps(default) == repr(default) == "0.1"

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"logps_reduction": "mean"}, "beta=2.5 and gamma=0.05: not given, so they follow logps_reduction='mean'"),
            ({"logps_reduction": "mean", "beta": 1.0}, "gamma=0.05: not given, so it follows logps_reduction='mean'"),
        ],
    )
    def test_that_they_follow_is_said(self, tmp_path, fields, said):
        made = config(tmp_path, **fields)
        assert said in made.follows() and made.cautions() == []

    def test_gamma_without_a_constraint_is_warned_of(self, tmp_path):
        (note,) = config(tmp_path, gamma=1.0).cautions()
        assert "Set constraint='clip' to train every pair towards gamma" in note

    def test_the_trainer_says_it_once(self, monkeypatch, tmp_path):
        said = []
        monkeypatch.setattr("trl_cpo.trainer.logger.warning_once", said.append)
        CPOConstrainedTrainer.set_up(SimpleNamespace(warn_of=lambda *_: None), config(tmp_path, logps_reduction="mean"))
        CPOConstrainedTrainer.set_up(SimpleNamespace(warn_of=lambda *_: None), config(tmp_path))
        assert len(said) == 1 and "beta=2.5" in said[0]

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"constraint": "none", "gamma": 1.0},
            {"constraint": "clip", "gamma": 1.0},
            {"constraint": "none", "logps_reduction": "mean", "beta": 2.5, "gamma": 0.05},
            {"gamma": 0.0},
        ],
    )
    def test_what_was_given_needs_no_word(self, tmp_path, fields):
        made = config(tmp_path, **fields)
        assert made.cautions() == [] and made.follows() is None

    def test_trls_parser_tells_it_too(self, tmp_path):
        common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"]

        def parsed(*options):
            return TrlParser([CPOConstrainedConfig]).parse_args_and_config([*common, *options])[0]

        means = parsed("--logps_reduction", "mean", "--gamma", "0.2")
        assert (means.beta, means.gamma, means.not_given) == (2.5, 0.2, ("beta",))
        assert "constraint='clip'" in parsed("--gamma", "1.0").cautions()[0]
        assert parsed("--gamma", "1.0", "--constraint", "none").cautions() == []

    def test_a_config_that_an_earlier_version_pickled_is_as_it_was(self, tmp_path):
        args = config(tmp_path, gamma=1.0, logps_reduction="mean")
        for name in ("chose_constraint", "not_given"):
            del vars(args)[name]
        again = pickle.loads(pickle.dumps(args))
        assert again.cautions() == [] and again.follows() is None and again.keep({"logps_reduction": "mean", "beta": 9.0}) == []

    def test_a_run_that_is_gone_on_with_keeps_its_values(self, tmp_path):
        earlier = {"logps_reduction": "mean", "beta": 0.1, "gamma": 0.0}
        args = config(tmp_path, constraint="clip", logps_reduction="mean", gamma=0.3)
        assert args.keep(earlier) == ["beta=0.1"] and (args.beta, args.gamma) == (0.1, 0.3)
        assert args.keep(earlier) == [] and args.follows() is None
        assert config(tmp_path).keep(earlier) == []
