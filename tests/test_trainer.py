"""Under a constraint, the trainer's loss and metrics are those computed by hand, pair by pair, from the models' logits."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from constraint_cases import added_of, case_of, made
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.pairs import PairLogps

from helpers.by_hand import BETA, GAMMA, SMOOTHING, make_trainer, pairs_by_hand
from helpers.paths import TESTS
from helpers.tiny import make_model, pairs_dataset, training_options

# tests/data/test_validation.py tests the warnings about unused hyperparameters and about inverse_logp.
pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")


def a_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def pair_loss_by_hand(loss_type, z):
    """From z = δ_θ − t."""
    x = BETA * z
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -log_sigmoid(x)
    if loss_type == "hinge":
        return max(0.0, 1 - x)
    if loss_type == "ipo":
        return (z - 1 / (2 * BETA)) ** 2
    if loss_type == "robust":
        return (-(1 - SMOOTHING) * log_sigmoid(x) + SMOOTHING * log_sigmoid(-x)) / (1 - 2 * SMOOTHING)
    if loss_type == "exo_pair":
        return sigmoid(x) * (log_sigmoid(x) - math.log(1 - SMOOTHING)) + sigmoid(-x) * (log_sigmoid(-x) - math.log(SMOOTHING))
    if loss_type == "discopop":
        blend = sigmoid(x / 0.05)
        return -log_sigmoid(x) * (1 - blend) + math.exp(-x) * blend
    raise AssertionError(loss_type)


def loss_by_hand(trainer, inputs, loss_type, ld_alpha=None):
    """The form's targets and added terms, whose numbers constraint_cases.py has by hand, in a loss by hand."""
    form, pairs = trainer.args.form, pairs_by_hand(trainer, inputs, ld_alpha)
    logps = PairLogps.from_rows(torch.tensor(pairs, dtype=torch.float64))
    targets = form.target(logps).tolist()
    gaps = [pc - pr for pc, pr, _, _ in pairs]
    if loss_type == "aot":
        gaps, targets = sorted(gaps), sorted(targets)
        losses = [
            -(1 - SMOOTHING) * log_sigmoid(BETA * (g - t)) - SMOOTHING * log_sigmoid(-BETA * (g - t))
            for g, t in zip(gaps, targets, strict=True)
        ]
    else:
        losses = [pair_loss_by_hand(loss_type, g - t) for g, t in zip(gaps, targets, strict=True)]
    return sum(losses) / len(losses) + added_of(form, logps).mean().item()


SUM_LOSSES = ["sigmoid", "hinge", "robust", "exo_pair", "discopop", "aot"]
CASES = [
    (name, reduction, loss_type)
    for name in CONSTRAINTS
    for reduction, loss_types in (("sum", SUM_LOSSES), ("mean", ["sigmoid", "ipo"]))
    for loss_type in loss_types
    if not CONSTRAINTS[name](beta=BETA, logps_reduction=reduction).faults()
]


@pytest.mark.parametrize("sharing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name, reduction, loss_type", CASES)
def test_loss(tmp_path, tokenizer, model_folder, ref_model_folder, name, reduction, loss_type, sharing):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model_folder,
        ref_model_folder,
        constraint=name,
        logps_reduction=reduction,
        prefix_sharing=sharing,
        loss_type=[loss_type],
        label_smoothing=SMOOTHING if loss_type in ("robust", "exo_pair", "aot") else 0.0,
    )
    inputs = a_batch(trainer)
    expected = loss_by_hand(trainer, inputs, loss_type)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", ["clip", "softplus", "penalty"])
def test_length_desensitised_log_probabilities_are_what_the_constraint_sees(
    tmp_path, tokenizer, model_folder, ref_model_folder, name
):
    trainer = make_trainer(tmp_path, tokenizer, model_folder, ref_model_folder, constraint=name, ld_alpha=0.25)
    inputs = a_batch(trainer)
    expected = loss_by_hand(trainer, inputs, "sigmoid", ld_alpha=0.25)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", ["clip", "penalty"])
def test_weights_and_mixes_act_on_the_preference_loss_alone(tmp_path, tokenizer, model_folder, ref_model_folder, name):
    """loss_weights: Σ w_k L_k + penalty. WPO: the pair's weight multiplies its loss at the target, not the penalty."""

    def loss(**options):
        trainer = make_trainer(tmp_path, tokenizer, model_folder, ref_model_folder, **options)
        inputs = a_batch(trainer)
        return trainer.compute_loss(trainer.model, inputs).item(), trainer, inputs

    parts = [loss_by_hand(*loss(constraint=name)[1:], kind) for kind in ("sigmoid", "hinge")]
    penalty = 0.0
    if name == "penalty":
        penalty = loss(constraint="penalty")[0] - loss(constraint="none")[0]
        assert penalty > 0.1
    mixed = loss(constraint=name, loss_type=["sigmoid", "hinge"], loss_weights=[0.5, 2.0])[0]
    expected = 0.5 * (parts[0] - penalty) + 2.0 * (parts[1] - penalty) + penalty
    assert mixed == pytest.approx(expected, rel=2e-5)
    weighted = loss(constraint=name, use_weighting=True)[0]
    if name == "penalty":
        assert weighted - loss(constraint="none", use_weighting=True)[0] == pytest.approx(penalty, rel=1e-4)
    else:
        assert 0 < weighted < parts[0]


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_penalty_is_added_to_any_divergence(tmp_path, tokenizer, model_folder, ref_model_folder, divergence):
    values = []
    for name in ("penalty", "none"):
        trainer = make_trainer(
            tmp_path, tokenizer, model_folder, ref_model_folder, constraint=name, f_divergence_type=divergence, beta=0.01
        )
        inputs = a_batch(trainer)
        values.append(trainer.compute_loss(trainer.model, inputs).item())
    gaps = [pc - pr for pc, pr, _, _ in pairs_by_hand(trainer, inputs)]
    weight = case_of("penalty").form.penalty_weight
    penalty = weight * sum(max(0.0, GAMMA - g) for g in gaps) / len(gaps)
    assert values[0] - values[1] == pytest.approx(penalty, rel=1e-3)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_gradient_of_the_whole_step_is_the_formulas(tmp_path, tokenizer, model_folder, ref_model_folder, name):
    """Autograd through the logits, in float64 and without TRL, against the trainer's float32 backward."""
    trainer = make_trainer(
        tmp_path, tokenizer, model_folder, ref_model_folder, constraint=name, logps_reduction="mean", gamma=GAMMA
    )
    inputs = a_batch(trainer)
    trainer.compute_loss(trainer.model, inputs).backward()

    policy = AutoModelForCausalLM.from_pretrained(model_folder).double()
    logits = policy(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    mask = inputs["completion_mask"]
    means = (tokens * mask[:, 1:]).sum(1) / mask.sum(1)
    chosen, rejected = means.chunk(2)
    references = torch.tensor(pairs_by_hand(trainer, inputs), dtype=torch.float64)[:, 2:].unbind(dim=1)
    pairs, form = PairLogps(chosen, rejected, *references), trainer.args.form
    loss = torch.nn.functional.softplus(-BETA * (pairs.gap - form.target(pairs))) + added_of(form, pairs)
    loss.mean().backward()
    for (label, ours), theirs in zip(trainer.model.named_parameters(), policy.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-4 * scale + 1e-9), label


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_rewards_keep_dpos_meaning(tmp_path, tokenizer, model_folder, ref_model_folder, name, reduction):
    """β (s_θ − s_ref) against the true reference, of summed log-probabilities as TRL logs them."""
    if CONSTRAINTS[name](beta=BETA, logps_reduction=reduction).faults():
        reduction = "mean"
    logged = {}
    for constraint in ("none", name):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            model_folder,
            ref_model_folder,
            constraint=constraint,
            logps_reduction=reduction,
            prefix_sharing=False,
        )
        trainer.model.train()
        trainer.compute_loss(trainer.model, a_batch(trainer))
        logged[constraint] = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    assert logged[name].keys() == logged["none"].keys()
    assert logged[name] == logged["none"]


def test_a_target_moved_by_nothing_is_bitwise_dpo(tmp_path, tokenizer, model_folder, ref_model_folder):
    """Clip where every reference gap is above γ: the projection itself must not round."""
    losses = []
    for options in ({"constraint": "none"}, {"constraint": "clip"}):
        options["prefix_sharing"] = False
        trainer = make_trainer(tmp_path, tokenizer, model_folder, ref_model_folder, **options)
        if options["constraint"] == "clip":
            trainer._form = dataclasses.replace(trainer._form, gamma=-math.inf)
        loss = trainer.compute_loss(trainer.model, a_batch(trainer))
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in trainer.model.parameters()]))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_precomputed_and_on_the_fly_references_train_alike(tmp_path, tokenizer, model_folder, name):
    """Release fault 1. They differ by the padding of their batches, about 1e-7 nats."""
    logs = []
    for precomputed in (False, True):
        args = CPOConstrainedConfig(
            **training_options(tmp_path / str(precomputed), precompute_ref_log_probs=precomputed),
            constraint=name,
            gamma=GAMMA,
            logps_reduction="mean",
        )
        trainer = CPOConstrainedTrainer(
            model=model_folder, args=args, processing_class=tokenizer, train_dataset=pairs_dataset()
        )
        if precomputed:
            assert trainer.ref_model is None and "ref_chosen_logps" in trainer.train_dataset.column_names
        trainer.train()
        logs.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
        assert trainer.precompute_ref_logps is precomputed
    assert len(logs[0]) == 3 and logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_precomputed_values_are_not_taken_for_those_of_other_settings(tmp_path, tokenizer, model_folder):
    """On a dataset with a file behind it DPOTrainer finds earlier values by data and weights alone; ours by all settings.

    Without truncation, since DPOTrainer's filter for it happens to hash every option.
    """
    pairs_dataset().to_json(tmp_path / "pairs.jsonl")

    def precomputed(trainer_class, config_class, number, **options):
        args = config_class(**training_options(tmp_path / number, precompute_ref_log_probs=True, max_length=None, **options))
        dataset = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path), split="train")
        trainer = trainer_class(model=model_folder, args=args, processing_class=tokenizer, train_dataset=dataset)
        return torch.tensor(trainer.train_dataset["ref_chosen_logps"][:])

    ours = (CPOConstrainedTrainer, CPOConstrainedConfig)
    packed = precomputed(*ours, "packed", constraint="clip", prefix_sharing=True)
    padded = precomputed(*ours, "padded")
    weighted = precomputed(*ours, "weighted", ld_alpha=0.0)
    assert torch.allclose(packed, padded, atol=1e-4) and not torch.allclose(padded, weighted, atol=1e-2)
    assert torch.equal(padded, precomputed(*ours, "again"))
    assert torch.equal(padded, precomputed(DPOTrainer, DPOConfig, "theirs"))


GOLDEN = json.loads((TESTS / "golden" / "margin_forms.json").read_text())["cases"]


class OneToken:
    """Answers as a model whose two responses, one token each, have the log-probabilities that it is given."""

    def __init__(self, chosen, rejected):
        self.log_probs = torch.stack([chosen, rejected]).unsqueeze(1)
        self.entropy = self.mean_logits = torch.zeros_like(self.log_probs)
        self.is_top1 = torch.zeros_like(self.log_probs, dtype=torch.bool)

    def __call__(self, **kwargs):
        return self


def through_the_trainer(trainer, form, logps, dtype):
    """Loss, target and both gradients as the trainer's compute_loss gives them for one pair of four log-probabilities."""
    trainer._form, trainer.beta = form, form.beta
    policy = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in logps[:2]]
    inputs = {
        "input_ids": torch.tensor([[1, 1], [1, 2]]),  # answers that differ: of equal ones nothing is asked
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": torch.tensor([logps[2]], dtype=dtype),
        "ref_rejected_logps": torch.tensor([logps[3]], dtype=dtype),
    }
    trainer.precompute_ref_logps = True
    trainer._ledgers["train"].clear()
    trainer.model.train()
    loss = trainer.compute_loss(OneToken(*policy), inputs)
    loss.backward()
    target = trainer._ledgers["train"].flush()["cpo/target"]
    return {"loss": loss.item(), "target": target, "grad_chosen": policy[0].grad, "grad_rejected": policy[1].grad}


@pytest.fixture
def one_token_trainer(tmp_path, tokenizer, model_folder, ref_model_folder):
    return make_trainer(
        tmp_path,
        tokenizer,
        model_folder,
        ref_model_folder,
        constraint="none",
        logps_reduction="mean",
        prefix_sharing=False,
    )


@pytest.mark.parametrize("name", sorted(GOLDEN[0]["expect"]))
def test_golden_values_through_the_trainer(one_token_trainer, name):
    """The 64 cases in float64, in TRL's own loss at the projected reference: projecting costs no more than rounding."""
    for case in GOLDEN:
        gamma = 0.0 if name == "clip_release" else case["gamma"]
        form = made(name.removesuffix("_release"), case, gamma=gamma, logps_reduction="mean")
        logps = [case[side] for side in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
        got = through_the_trainer(one_token_trainer, form, logps, torch.float64)
        for key, value in case["expect"][name].items():
            assert abs(float(got[key]) - value) <= 1e-12 * max(1.0, abs(value), form.beta), (key, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_extremes_through_the_trainer(one_token_trainer, name, dtype):
    """±1e4 nats: loss and gradients finite in TRL's own loss as well."""
    form = dataclasses.replace(case_of(name).form, beta=0.1, gamma=0.5)
    for logps in itertools.product((-1e4, 0.0), repeat=4):
        got = through_the_trainer(one_token_trainer, form, logps, dtype)
        assert math.isfinite(got["loss"]) and math.isfinite(got["target"])
        assert torch.isfinite(got["grad_chosen"]) and torch.isfinite(got["grad_rejected"])


def test_the_seam_notices_a_loss_that_calls_the_model_twice(tmp_path, tokenizer, model_folder, monkeypatch):
    trainer = CPOConstrainedTrainer(
        model=make_model(),
        ref_model=make_model(1),
        args=CPOConstrainedConfig(**training_options(tmp_path)),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
    )
    original = DPOTrainer._compute_loss

    def twice(self, model, inputs, return_outputs):
        original(self, model, inputs, return_outputs)
        return original(self, model, inputs, return_outputs)

    monkeypatch.setattr(DPOTrainer, "_compute_loss", twice)
    with pytest.raises(RuntimeError, match="called the model 2 times"):
        trainer.compute_loss(trainer.model, a_batch(trainer))
    assert trainer.precompute_ref_logps is False
