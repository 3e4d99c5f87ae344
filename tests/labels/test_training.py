"""Labels and the chosen floor in training: DPO where they say nothing, independent numbers where they act, exact resume."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.by_hand import pairs_by_hand
from helpers.checkpoint_runs import assert_same_end, trainer_of
from helpers.identity import assert_same_run, check, run
from helpers.tiny import make_lora, pairs_dataset, training_options

pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")

GROUPS = ("helpful", "harmless")
#: Every kind of label at once.
ALL = dict(
    probability_column="chosen_probs",
    margin_column="margin",
    group_column="topic",
    gamma_by_group={"helpful": 0.3},
    chosen_floor=0.2,
    chosen_floor_epsilon=0.05,
)
LAGRANGIAN = dict(
    constraint="lagrangian", gamma=0.5, epsilon=0.1, dual_lr=0.3, dual_max=5.0, epsilon_by_group={"harmless": 0.02}
)


def labelled_pairs(n: int = 12, seed: int = 0, **constant):
    rng = np.random.default_rng(seed + 100)
    dataset = pairs_dataset(n, seed)
    columns = {
        "chosen_probs": rng.uniform(0.4, 1.0, n).tolist(),
        "margin": rng.uniform(0.0, 0.5, n).tolist(),
        "topic": [GROUPS[i] for i in rng.integers(0, 2, n)],
    }
    for name, values in columns.items():
        dataset = dataset.add_column(name, [constant[name]] * n if name in constant else values)
    return dataset


def make(tmp_path, tokenizer, model_folder, ref_model_folder=None, data=None, **options):
    reference = None if ref_model_folder is None else AutoModelForCausalLM.from_pretrained(ref_model_folder)
    return CPOConstrainedTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        ref_model=reference,
        args=CPOConstrainedConfig(**training_options(tmp_path, **options)),
        processing_class=tokenizer,
        train_dataset=labelled_pairs() if data is None else data,
        eval_dataset=labelled_pairs(7, seed=5),
    )


class TestWhereLabelsSayNothing:
    @pytest.fixture
    def build(self, model_folder, ref_model_folder, tokenizer):
        """What a trainer is made of: pairs with certain labels and no margin."""
        return lambda: dict(
            model=AutoModelForCausalLM.from_pretrained(model_folder),
            ref_model=AutoModelForCausalLM.from_pretrained(ref_model_folder),
            processing_class=tokenizer,
            train_dataset=labelled_pairs(chosen_probs=1.0, margin=0.0),
            eval_dataset=labelled_pairs(6, seed=5, chosen_probs=1.0, margin=0.0),
        )

    def test_dpo_to_the_bit(self, tmp_path, build):
        """With two groups: DPOTrainer's losses, gradients, metrics and weights."""
        ours = {name: ALL[name] for name in ("probability_column", "margin_column", "group_column")}
        check(tmp_path, build, {"gradient_accumulation_steps": 2}, ours_only={**ours, "prefix_sharing": False})

    @pytest.mark.parametrize("constraint", ["clip", "softplus", "penalty", "lagrangian"])
    def test_the_same_constraint_to_the_bit(self, tmp_path, build, constraint):
        options = dict(constraint=constraint, gamma=0.5, **({"dual_init": 0.1} if constraint == "lagrangian" else {}))
        labels = {"plain": {}, "sure": dict(probability_column="chosen_probs", margin_column="margin")}
        runs = [
            run(CPOConstrainedTrainer, CPOConstrainedConfig, tmp_path / name, build, options, asked)
            for name, asked in labels.items()
        ]
        assert_same_run(*runs)

    def test_columns_that_are_not_asked_for_change_nothing(self, tmp_path, model_folder, tokenizer):
        runs = []
        for name, data in {"with": labelled_pairs(), "without": pairs_dataset()}.items():
            trainer = make(tmp_path / name, tokenizer, model_folder, data=data, constraint="clip", gamma=0.5)
            trainer.train()
            runs.append(trainer)
        assert torch.equal(*(torch.cat([p.flatten() for p in trainer.model.parameters()]) for trainer in runs))


def by_hand(trainer, inputs, labels, *, soft="term", floor_weight=0.0):
    """The mean loss of a batch out of plain Python numbers; clip and none alone."""
    args, total = trainer.args, 0.0
    rows = pairs_by_hand(trainer, inputs)
    for (chosen, rejected, ref_chosen, ref_rejected), (p, margin, group) in zip(rows, labels, strict=True):
        gamma = (args.gamma_by_group or {}).get(GROUPS[group], args.gamma)
        gap, ref_gap, certainty = chosen - rejected, ref_chosen - ref_rejected, max(0.0, 2 * p - 1)
        t = ref_gap
        if args.constraint == "clip":
            t = max(ref_gap, gamma)
            t = certainty * t + (1 - certainty) * ref_gap
        t += margin / args.beta
        z = args.beta * (gap - t)
        if soft == "ipo":
            total += (gap - t - (2 * p - 1) / (2 * args.beta)) ** 2
        else:
            total += p * math.log1p(math.exp(-z)) + (1 - p) * math.log1p(math.exp(z))
        total += certainty * floor_weight * max(0.0, ref_chosen - (args.chosen_floor or 0.0) - chosen)
    return total / len(rows)


CASES = {
    "dpo": {},
    "clip": dict(constraint="clip", gamma=0.5),
    "means": dict(constraint="clip", gamma=0.05, logps_reduction="mean"),
    "ipo": dict(logps_reduction="mean", loss_type=["ipo"]),
    "packed": dict(constraint="clip", gamma=0.5, prefix_sharing=True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_plain_numbers(tmp_path, tokenizer, model_folder, ref_model_folder, case):
    """Soft labels, margins, γ by group and a weighted floor, together, in training and evaluation mode."""
    options = {**ALL, "chosen_floor_epsilon": 0.0, "chosen_floor_weight": 0.4, "prefix_sharing": False, **CASES[case]}
    trainer = make(tmp_path, tokenizer, model_folder, ref_model_folder, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = list(
        zip(batch["cpo_probability"].tolist(), batch["cpo_margin"].tolist(), batch["cpo_group"].tolist(), strict=True)
    )
    # Sorted names: harmless is 0.
    labels = [(p, margin, {"harmless": 1, "helpful": 0}[trainer._columns.groups[group]]) for p, margin, group in labels]
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    inputs, _ = trainer._columns.taken(batch)
    expected = by_hand(trainer, inputs, labels, soft="ipo" if case == "ipo" else "term", floor_weight=0.4)
    assert loss == pytest.approx(expected, rel=2e-5)
    assert trainer._columns.groups == ("harmless", "helpful")


def test_groups_are_counted_and_moved_by_themselves(tmp_path, tokenizer, model_folder, ref_model_folder):
    """λ_g ascends on its own pairs; metrics of a group are means over its pairs; a group that a step lacks stays."""
    data = labelled_pairs()
    topics = list(data["topic"])
    data = data.select(sorted(range(len(data)), key=topics.__getitem__))
    trainer = make(
        tmp_path,
        tokenizer,
        model_folder,
        ref_model_folder,
        data=data,
        group_column="topic",
        gamma_by_group={"helpful": 3.0, "harmless": 1.0},
        **{**LAGRANGIAN, "train_sampling_strategy": "sequential", "learning_rate": 1e-4, "max_steps": 2},
    )
    assert topics.count("harmless") >= 4  # so the first step, of four pairs, has no helpful one
    trainer.train()
    first = next(record for record in trainer.state.log_history if "loss" in record)
    assert "cpo/helpful/lambda" not in first and "cpo/helpful/gap" not in first
    expected = min(5.0, 0.3 * (first["cpo/harmless/violation"] - 0.02))
    assert first["cpo/harmless/lambda"] == pytest.approx(expected, rel=1e-6)
    assert first["cpo/harmless/violation"] == pytest.approx(first["cpo/violation"])
    evaluated = trainer.evaluate()
    pairs, names = trainer.evaluated_pairs["eval"], list(labelled_pairs(7, seed=5)["topic"])
    for group, gamma in {"helpful": 3.0, "harmless": 1.0}.items():
        rows = torch.tensor([name == group for name in names])
        violation = torch.relu(gamma - pairs.gap[rows]).mean().item()
        assert evaluated[f"eval_cpo/{group}/violation"] == pytest.approx(violation, rel=1e-5)
        assert evaluated[f"eval_cpo/{group}/pairs"] == int(rows.sum())
        epsilon = {"helpful": 0.1, "harmless": 0.02}[group]
        assert evaluated[f"eval_cpo/{group}/slack"] == pytest.approx(epsilon - violation, rel=1e-5)
        assert evaluated[f"eval_cpo/{group}/holds"] == float(violation <= epsilon)
    assert evaluated["eval_cpo/pairs"] == 7


def test_the_chosen_floor_goes_with_plain_dpo(tmp_path, tokenizer, model_folder):
    """A high learning rate makes both answers unlikely; with the floor the chosen one falls less, and λ says so."""
    falls = {}
    for name, options in {"none": {}, "floor": dict(chosen_floor=0.0, chosen_floor_weight=5.0)}.items():
        trainer = make(tmp_path / name, tokenizer, model_folder, learning_rate=3e-2, max_steps=6, **options)
        trainer.train()
        falls[name] = trainer.evaluate()["eval_cpo/chosen_logps_shift"]
    assert falls["floor"] > falls["none"]
    trainer = make(tmp_path / "dual", tokenizer, model_folder, learning_rate=3e-2, chosen_floor=0.0)
    trainer.train()
    logs = [record for record in trainer.state.log_history if "loss" in record]
    multiplier, beta = 0.0, 0.5
    for record in logs:
        multiplier = min(beta, max(0.0, multiplier + 0.1 * beta**2 * record["cpo/chosen_floor_violation"]))
        assert record["cpo/chosen_floor_lambda"] == pytest.approx(multiplier, rel=1e-5)
        assert record["cpo/chosen_floor_slack"] == pytest.approx(-record["cpo/chosen_floor_violation"])
    assert multiplier > 0


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resumed_is_uninterrupted(tmp_path, tokenizer, small_model, lora, precompute):
    """Every multiplier and every group's metrics, from the middle of an epoch and of a logging window."""
    options = dict(**ALL, **LAGRANGIAN, lora=lora, precompute_ref_log_probs=precompute, data=labelled_pairs(6))
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **{**options, "stop": 2})
    resumed.train()
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, alone)
    values = {name: part.value for name, part in alone.stateful().items() if ":" in name and not name.startswith("metrics")}
    assert values.keys() == {f"{bound}:{group}" for bound in ("dual", "chosen_floor") for group in GROUPS}
    assert values["dual:helpful"] != values["dual:harmless"]


def test_a_precomputed_reference_is_found_again(tmp_path, tokenizer, small_model, caplog):
    """Labels are no part of what a table of the reference is keyed by: it is not scored anew, for an evaluation set either."""
    said = []
    for name, labels in {"plain": {}, "labelled": ALL}.items():
        options = dict(precompute_ref_log_probs=True, data=labelled_pairs(6, seed=77), constraint="clip", **labels)
        with caplog.at_level(logging.INFO, logger="trl_cpo"):
            trainer = trainer_of(tmp_path / name, small_model, tokenizer, **options)
            trainer.evaluate(labelled_pairs(5, seed=9))
        said.append([record.message for record in caplog.records if record.message.startswith("Scoring")])
        caplog.clear()
    assert len(said[0]) == 2 and not said[1]


def test_a_stream_carries_labels_too(tmp_path, tokenizer, model_folder):
    data = labelled_pairs()
    stream = IterableDataset.from_generator(lambda: iter(list(data)))
    options = {**ALL, "gamma_by_group": {"helpful": 0.3, "harmless": 0.1}, "constraint": "clip", "gamma": 0.5}
    streamed = make(tmp_path / "stream", tokenizer, model_folder, data=stream, **options)
    streamed.train()
    whole = make(tmp_path / "whole", tokenizer, model_folder, data=data, train_sampling_strategy="sequential", **options)
    whole.train()
    assert torch.equal(*(torch.cat([p.flatten() for p in t.model.parameters()]) for t in (streamed, whole)))


def test_lora_and_a_token_budget(tmp_path, tokenizer, model_folder):
    """`tokens_per_step`: a group's λ moves by its pairs over its pairs of a mean step."""
    torch.manual_seed(0)
    trainer = CPOConstrainedTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=CPOConstrainedConfig(
            **training_options(
                tmp_path,
                tokens_per_step=120,
                learning_rate=0.0,
                group_column="topic",
                num_train_epochs=1,
                max_steps=-1,
                constraint="lagrangian",
                gamma=2.0,
                epsilon=0.5,
                dual_lr=1e-3,
                dual_max=50.0,
                dual_init=10.0,
            )
        ),
        processing_class=tokenizer,
        train_dataset=labelled_pairs(30),
        eval_dataset=labelled_pairs(30),
        peft_config=make_lora(init_lora_weights=True),
    )
    trainer.train()
    evaluated = trainer.evaluate()
    for group in GROUPS:
        # Over an epoch at a learning rate of 0, every pair has moved its λ alike.
        moved = trainer._bounds.multipliers["dual"].parts[group].value - 10.0
        expected = 1e-3 * trainer._order.steps * (evaluated[f"eval_cpo/{group}/violation"] - 0.5)
        assert moved == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bound", ["", "chosen_floor_"])
def test_an_evaluations_slack_is_weighed_as_what_moves_the_multiplier(
    tmp_path, tokenizer, model_folder, ref_model_folder, bound
):
    """By group, for the gap's bound and the floor's: uncertain pairs count by 2p − 1, as in training."""
    options = {**LAGRANGIAN, **ALL, "chosen_floor": 0.0, "prefix_sharing": False}
    trainer = make(tmp_path, tokenizer, model_folder, ref_model_folder, **options)
    evaluated, pairs, rows = trainer.evaluate(), trainer.evaluated_pairs["eval"], trainer.eval_dataset
    certainty = torch.tensor(rows["chosen_probs"][:]).mul(2).sub(1).clamp(min=0).float()
    if bound:
        signal = torch.relu(pairs.ref_chosen - pairs.policy_chosen)
        epsilons = dict.fromkeys(GROUPS, 0.05)
    else:
        gammas = torch.tensor([0.3 if topic == "helpful" else 0.5 for topic in rows["topic"]])
        signal, epsilons = torch.relu(gammas - pairs.gap), {"helpful": 0.1, "harmless": 0.02}
    assert signal.max() > 0
    for group in GROUPS:
        own = torch.tensor([topic == group for topic in rows["topic"]])
        slack = epsilons[group] - (certainty * signal)[own].mean().item()
        assert evaluated[f"eval_cpo/{group}/{bound}slack"] == pytest.approx(slack, rel=1e-4)
        assert evaluated[f"eval_cpo/{group}/{bound}holds"] == float(slack >= 0)
