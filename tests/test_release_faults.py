"""Faults of the authors' release, each as a test that this trainer passes (listed in docs/constraints.md).

1, precomputed references: test_trainer.py. 4, softplus at 1e4: test_constraints.py. 5, no full logits, no extra
forward: test_identity.py and here. 6, a test that calls the code: all of them.
"""

import pytest
import torch
from peft import LoraConfig

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.constraints import CONSTRAINTS

from helpers.tiny import make_model, make_moe, pairs_dataset, training_options

# tests/data/test_validation.py tests the warnings about unused hyperparameters and about inverse_logp.
pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_lora_trains_the_adapter_alone(tmp_path, tokenizer, model_folder, name):
    """Fault 2: with PEFT the release's reference is None, and is then called."""
    args = CPOConstrainedConfig(**training_options(tmp_path, max_steps=6), constraint=name, gamma=0.5, logps_reduction="mean")
    trainer = CPOConstrainedTrainer(
        model=model_folder,
        args=args,
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        eval_dataset=pairs_dataset(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)
    # A fresh adapter is the base model, so policy and reference agree before the first step and no longer after it.
    assert start["eval_cpo/gap"] == pytest.approx(start["eval_cpo/ref_gap"], abs=1e-6)
    assert end["eval_cpo/ref_gap"] == pytest.approx(start["eval_cpo/ref_gap"], abs=1e-6)
    assert end["eval_cpo/gap"] > start["eval_cpo/gap"] and end["eval_loss"] < start["eval_loss"]


def test_auxiliary_loss_of_a_mixture_of_experts_is_counted_once(tmp_path, tokenizer):
    """Fault 3: loss with a coefficient minus loss without is coefficient × aux_loss, under a constraint too."""
    losses, aux = {}, None
    for coefficient in (0.0, 0.1):
        model = make_moe(0)
        args = CPOConstrainedConfig(
            **training_options(tmp_path, router_aux_loss_coef=coefficient), constraint="softplus", gamma=0.5
        )
        trainer = CPOConstrainedTrainer(
            model=model, ref_model=make_moe(1), args=args, processing_class=tokenizer, train_dataset=pairs_dataset()
        )
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        losses[coefficient] = trainer.compute_loss(trainer.model, inputs).item()
        aux = trainer._metrics["train"]["aux_loss"][-1] if coefficient else aux
    assert aux > 0
    assert losses[0.1] - losses[0.0] == pytest.approx(0.1 * aux, rel=1e-3)


def test_no_full_vocabulary_logits(tmp_path, tokenizer):
    """Fault 5: the model's head is never asked for logits of every position, for policy or reference."""
    model, reference = make_model(), make_model(1)
    trainer = CPOConstrainedTrainer(
        model=model,
        ref_model=reference,
        processing_class=tokenizer,
        train_dataset=pairs_dataset(),
        args=CPOConstrainedConfig(**training_options(tmp_path), constraint="clip"),
    )
    called = []
    for each in (model, reference):
        each.lm_head.register_forward_hook(lambda *_: called.append(1))
    trainer.train()
    assert not called
