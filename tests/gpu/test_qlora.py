"""QLoRA on the device: 4-bit weights, adapters, packed."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.on_gpu import ON_GPU, on_device
from helpers.tiny import make_model, pairs_dataset

pytestmark = [*ON_GPU, pytest.mark.usefixtures("no_model_cards")]


def test_a_4_bit_model_is_trained_packed_as_padded(tmp_path, tokenizer, record):
    """After an evaluation, too: its gradients stay."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "model"
    # Rows of at least 64 inputs, the size of a block of nf4.
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    runs = {}
    for sharing in (False, True):
        torch.manual_seed(0)
        options = dict(constraint="clip", gamma=0.5, prefix_sharing=sharing, learning_rate=1e-3, narrate=False)
        options |= dict(eval_on_start=True, eval_strategy="steps", eval_steps=3)
        trainer = CPOConstrainedTrainer(
            model=str(folder),
            args=CPOConstrainedConfig(**on_device(tmp_path / str(sharing), **options)),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            ),
        )
        assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
        trainer.evaluate()
        pairs = trainer.evaluated_pairs["eval"].rows()
        trainer.train()
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        runs[sharing] = pairs, [log["loss"] for log in logs], [log["grad_norm"] for log in logs]
    verdict = trainer._sharing.verdict(trainer.model)
    assert verdict.ok and verdict.attention == "varlen", verdict
    (pairs, losses, norms), (packed_pairs, packed_losses, packed_norms) = runs[False], runs[True]
    difference = float((packed_pairs - pairs).abs().mean())
    record(verdict=str(verdict), logps=difference, losses=[losses, packed_losses], norms=[norms, packed_norms])
    # Sums over an answer's tokens, some nats each.
    assert difference < 0.02 * float(pairs.abs().mean())
    assert min(packed_norms) > 0 and len(packed_norms) == 3
    assert packed_losses == pytest.approx(losses, rel=0.05, abs=0.05)
    assert packed_norms == pytest.approx(norms, rel=0.1)
