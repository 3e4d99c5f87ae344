"""A trainer whose policy and reference differ, and its log-probabilities computed by hand."""

import torch
from constraint_cases import case_of
from transformers import AutoModelForCausalLM

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.tiny import pairs_dataset, training_options

BETA, GAMMA, SMOOTHING = 0.3, 0.4, 0.1


def make_trainer(tmp_path, tokenizer, model_folder, ref_model_folder, **options):
    form = case_of(options["constraint"]).form
    values = {name: getattr(form, name) for name in form.hyperparameters()} | dict(beta=BETA, gamma=GAMMA)
    args = CPOConstrainedConfig(**{**training_options(tmp_path), **values, **options})
    return CPOConstrainedTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        ref_model=AutoModelForCausalLM.from_pretrained(ref_model_folder),
        args=args,
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset=pairs_dataset(6, seed=5),
    )


def log_probs_by_hand(model, inputs, ld_alpha=None):
    """Per row, a plain Python sum of float64 token log-probabilities; no fused head, no masks of TRL's."""
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double()
    rows = logits.log_softmax(dim=-1)
    count = len(inputs["input_ids"])
    answers = [[t for t in range(inputs["input_ids"].size(1)) if inputs["completion_mask"][r, t]] for r in range(count)]
    sums = []
    for r, positions in enumerate(answers):
        shorter = min(len(positions), len(answers[(r + count // 2) % count]))
        weights = [1.0 if ld_alpha is None or i < shorter else ld_alpha for i in range(len(positions))]
        sums.append(sum(w * rows[r, t - 1, inputs["input_ids"][r, t]].item() for w, t in zip(weights, positions, strict=True)))
    return sums, [len(positions) for positions in answers]


def pairs_by_hand(trainer, inputs, ld_alpha=None):
    """Per pair: policy and reference log-probabilities, reduced as the config says."""
    policy, lengths = log_probs_by_hand(trainer.model, inputs, ld_alpha)
    reference, _ = log_probs_by_hand(trainer.ref_model, inputs, ld_alpha)
    if trainer.args.logps_reduction == "mean":
        policy, reference = ([s / n for s, n in zip(x, lengths, strict=True)] for x in (policy, reference))
    half = len(policy) // 2
    return list(zip(policy[:half], policy[half:], reference[:half], reference[half:], strict=True))
