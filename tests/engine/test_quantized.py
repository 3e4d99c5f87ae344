"""QLoRA on the CPU, as bitsandbytes computes it: training after an evaluation is training."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.tiny import make_model, pairs_dataset, training_options


@pytest.mark.parametrize("precomputed", [False, True])
def test_a_qlora_run_goes_on_after_an_evaluation(tmp_path, tokenizer, precomputed):
    """On a CPU with AVX512-BF16, bitsandbytes repacks a layer that runs in evaluation, and its gradient is then zero."""
    folder = tmp_path / "model"
    # Rows of at least 64 inputs, the size of a block of nf4.
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    norms = {}
    for evaluates in (False, True):
        options = training_options(tmp_path / str(evaluates), eval_on_start=evaluates, learning_rate=1e-3)
        trainer = CPOConstrainedTrainer(
            model=str(folder),
            args=CPOConstrainedConfig(**options, constraint="clip", precompute_ref_log_probs=precomputed),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
        )
        trainer.train()
        norms[evaluates] = [r["grad_norm"] for r in trainer.state.log_history if "grad_norm" in r]
    assert len(norms[True]) == 3 and min(norms[True]) > 0
    assert norms[True] == pytest.approx(norms[False], rel=1e-3)
