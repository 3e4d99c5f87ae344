"""Columns of labels that cannot be used: named with row and rule, before anything is loaded."""

import math

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from scipy.optimize import minimize_scalar

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.labels.columns import LabelColumns
from trl_cpo.labels.fields import LabelFields
from trl_cpo.labels.scores import fit_scale

from helpers.tiny import training_options


def rows(**columns) -> Dataset:
    count = len(next(iter(columns.values())))
    return Dataset.from_dict({"prompt": ["a"] * count, "chosen": ["b"] * count, "rejected": ["c"] * count, **columns})


BAD = {
    "missing": (dict(probability_column="p"), rows(q=[1.0]), "train_dataset has no column 'p', which probability_column names"),
    "NaN": (dict(probability_column="p"), rows(p=[0.5, math.nan]), "row 1: p must be a probability, from 0 to 1; got nan"),
    "above one": (dict(probability_column="p"), rows(p=[0.5, 0.9, 1.5]), "row 2: p must be a probability"),
    "text": (dict(probability_column="p"), rows(p=["0.5"]), "row 0: p must be a probability, from 0 to 1; got '0.5'"),
    "absent": (dict(probability_column="p"), rows(p=[0.5, None]), "row 1: p must be a probability, from 0 to 1; got None"),
    "truth value": (dict(probability_column="p"), rows(p=[True]), "row 0: p must be a probability, from 0 to 1; got True"),
    "negative margin": (
        dict(margin_column="m"),
        rows(m=[1.0, -0.5]),
        "row 1: m must be a margin, a finite number ≥ 0; got -0.5",
    ),
    "infinite margin": (dict(margin_column="m"), rows(m=[math.inf]), "row 0: m must be a margin"),
    "score": (
        dict(score_columns=["c", "r"], score_scale=1.0),
        rows(c=[1.0], r=[math.nan]),
        "row 0: r must be a score, a finite number; got nan",
    ),
    "no group": (dict(group_column="g"), rows(g=["a", None]), "row 1: g must be the name of a group, without '/'; got None"),
    "slash": (dict(group_column="g"), rows(g=["a/b"]), "row 0: g must be the name of a group, without '/'; got 'a/b'"),
    "many groups": (
        dict(group_column="g"),
        rows(g=[str(i) for i in range(101)]),
        "has 101 different values, such as '0', '1', '10'",
    ),
    "unknown group": (
        dict(group_column="g", gamma_by_group={"helpfull": 1.0}),
        rows(g=["helpful", "harmless"]),
        "No pair is of the group 'helpfull', which gamma_by_group or epsilon_by_group names. The column 'g' has 'harmless', "
        "'helpful'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_column_is_named(case):
    options, dataset, message = BAD[case]
    with pytest.raises(ValueError) as error:
        LabelColumns.of(LabelFields(**options), {"train_dataset": dataset, "eval_dataset": None})
    assert message in str(error.value)


def test_the_trainer_says_it_before_a_model_is_loaded(tmp_path):
    """The model does not exist: the column is looked at first, in every set."""
    args = CPOConstrainedConfig(**training_options(tmp_path, probability_column="p"))
    sets = {"seen": rows(p=[0.5]), "shifted": rows(p=[2.0])}
    with pytest.raises(ValueError, match=r"eval_dataset\['shifted'\], row 0: p must be a probability"):
        CPOConstrainedTrainer(
            model=str(tmp_path), args=args, train_dataset=rows(p=[0.5]), eval_dataset=sets, processing_class=Nothing()
        )


class Nothing:
    """Stands in for a tokenizer that is never asked."""


def test_a_stream_is_stopped_at_the_row():
    columns = LabelColumns.of(
        LabelFields(probability_column="p", group_column="g", gamma_by_group={"a": 1.0}),
        {"train_dataset": IterableDataset.from_generator(lambda: iter([{"p": 0.5, "g": "a"}]))},
    )
    rows = [{"p": 0.5, "g": "a"}, {"p": 7.0, "g": "a"}]
    with pytest.raises(ValueError, match="A row of the train dataset: p must be a probability, from 0 to 1; got 7.0"):
        list(columns.attached(IterableDataset.from_generator(lambda: iter(rows)), "the train dataset"))
    rows = [{"p": 0.5, "g": "b"}]
    with pytest.raises(ValueError, match="has a pair of the group 'b'; known are 'a'"):
        list(columns.attached(IterableDataset.from_generator(lambda: iter(rows)), "the train dataset"))


def test_scores_become_probabilities():
    options = LabelFields(score_columns=["c", "r"], score_scale=0.5)
    data = rows(c=[3.0, 1.0, 0.0, 900.0], r=[1.0, 1.0, 2.0, -900.0])
    columns = LabelColumns.of(options, {"train_dataset": data})
    found = columns.attached(data, "it")["cpo_probability"]
    expected = [1 / (1 + math.exp(-0.5 * d)) for d in (2.0, 0.0, -2.0)] + [1.0]
    assert list(found) == pytest.approx(expected, rel=1e-6)


class TestFit:
    @pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
    def test_the_most_likely_scale_and_its_interval(self, unit):
        rng = np.random.default_rng(3)
        d = rng.normal(size=400)
        d = unit * np.where(rng.random(400) < 1 / (1 + np.exp(-1.7 * d)), d, -d)
        found = fit_scale(d)
        best = minimize_scalar(
            lambda x: np.logaddexp(0, -x * d / unit).sum(), bounds=(0, 50), method="bounded", options={"xatol": 1e-10}
        )
        assert found.scale * unit == pytest.approx(best.x, rel=1e-5)
        p = 1 / (1 + np.exp(-found.scale * d))
        error = 1.96 / math.sqrt((d**2 * p * (1 - p)).sum())
        assert (found.low, found.high) == pytest.approx((found.scale - error, found.scale + error), rel=1e-3)
        assert found.low < 1.7 / unit < found.high and found.pairs == 400

    def test_scores_that_made_the_choices_have_no_scale(self):
        with pytest.raises(ValueError, match="grows without end"):
            fit_scale(np.array([0.1, 2.0, 3.0]))

    def test_scores_that_say_nothing(self):
        with pytest.raises(ValueError, match="do not follow the choices of 3 held-out pairs"):
            fit_scale(np.array([0.1, -2.0, 1.0]))

    def test_it_is_fitted_on_held_out_pairs_alone(self):
        options = LabelFields(score_columns=["c", "r"], score_scale="fit")
        train, held_out = rows(c=[5.0], r=[0.0]), rows(c=[1.0, 0.0, 2.0], r=[0.0, 1.0, 0.0])
        columns = LabelColumns.of(options, {"train_dataset": train, "eval_dataset": held_out})
        assert str(columns.fitted).startswith("score_scale: 0.7563 is the most likely")
        assert columns.fitted == fit_scale(np.array([1.0, -1.0, 2.0])) and columns.scale == columns.fitted.scale
        with pytest.raises(ValueError, match="needs pairs that are not trained on"):
            LabelColumns.of(options, {"train_dataset": train, "eval_dataset": None})


FAULTS = {
    "a number for a column": (dict(probability_column=3), "probability_column must be the name of a column, or None; got 3"),
    "one score": (dict(score_columns=["c"], score_scale=1), "score_columns must be two names of columns"),
    "no scale": (dict(score_columns=["c", "r"]), "score_scale=None go together"),
    "negative scale": (
        dict(score_columns=["c", "r"], score_scale="-1"),
        "score_scale must be a number > 0, or 'fit'; got -1.0",
    ),
    "both": (dict(score_columns=["c", "r"], score_scale=1, probability_column="p"), "both say how sure a pair is"),
    "no column": (dict(gamma_by_group={"a": 1.0}), "gamma_by_group needs group_column"),
    "no mapping": (dict(group_column="g", gamma_by_group="3"), "gamma_by_group must be a mapping from groups to numbers"),
    "gamma": (dict(group_column="g", gamma_by_group={"a": -1}), r"gamma_by_group\['a'\] must be a finite number ≥ 0; got -1"),
    "no multiplier": (dict(group_column="g", epsilon_by_group={"a": 1}), "epsilon_by_group is for constraint='lagrangian'"),
    "all allowed": (
        dict(constraint="lagrangian", dual_signal="violation_rate", epsilon=0.1, group_column="g", epsilon_by_group={"a": 1.0}),
        r"epsilon_by_group\['a'\] is a fraction",
    ),
    "floor": (dict(chosen_floor=-0.1), "chosen_floor must be a finite number ≥ 0, or None; got -0.1"),
    "no floor": (dict(chosen_floor_weight=1.0), "need chosen_floor"),
    "two ways": (dict(chosen_floor=0, chosen_floor_weight=1.0, chosen_floor_epsilon=0.1), "Leave one of them out"),
    "a loss of one side": (dict(probability_column="p", loss_type="apo_zero"), r"not defined for loss_type \['apo_zero'\]"),
    "hinge": (dict(probability_column="p", loss_type="hinge"), r"not defined for loss_type \['hinge'\]"),
    "mixed": (dict(probability_column="p", loss_type=["ipo", "sigmoid_norm"], logps_reduction="mean"), "mixes losses"),
    "per token": (dict(probability_column="p", loss_type="ipo"), "set logps_reduction='mean'"),
    "margin per token": (dict(margin_column="m", loss_type="ipo"), "under margin_column='m' set logps_reduction='mean'"),
    "weights": (dict(probability_column="p", use_weighting=True), "both weigh a pair"),
    "divergence": (dict(probability_column="p", f_divergence_type="js_divergence"), "f_divergence_type='reverse_kl' alone"),
    "beta": (dict(chosen_floor=0.1, beta=0.0), "beta must be a finite number > 0 with labels or a chosen floor"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_options(tmp_path, case):
    options, message = FAULTS[case]
    with pytest.raises(ValueError, match=message):
        CPOConstrainedConfig(**training_options(tmp_path, **options))


def test_json_and_numbers_from_the_command_line(tmp_path):
    args = CPOConstrainedConfig(
        **training_options(
            tmp_path, group_column="g", gamma_by_group='{"a": 1.5}', score_columns=["c", "r"], score_scale="0.25"
        )
    )
    assert args.gamma_by_group == {"a": 1.5} and args.score_scale == 0.25
