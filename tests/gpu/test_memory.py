"""Memory of a packed micro-batch at the width of an 8B model, against what `plan` counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from trl_cpo.engine.forward import PackedPairForward
from trl_cpo.engine.forward.plan import BatchPlans
from trl_cpo.plan import PlanRequest, estimate

from helpers.families import OUTPUTS
from helpers.on_gpu import ON_GPU, REHEARSAL, moved
from helpers.pair_batches import model_inputs, random_pairs

pytestmark = ON_GPU

#: Of Llama 3 8B, but for layers and vocabulary.
SHAPE = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=4096,
)
#: Prompt, chosen and rejected tokens: eight pairs of one length, as `plan` counts them.
PROMPT, ANSWER, PAIRS = 360, 120, 8
if REHEARSAL:  # in which no memory is measured
    SHAPE |= dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    PROMPT, ANSWER, PAIRS = 36, 12, 2
LAYERS = 2


def model_on(device, checkpointing: bool):
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_hidden_layers=LAYERS), dtype=torch.bfloat16)
    add_fused_lm_head(model, outputs=OUTPUTS)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def held(device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.memory_allocated(device)


def peak(device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_packed_micro_batch_takes_what_plan_counts(checkpointing, device, record):
    model = model_on(device, checkpointing)
    inputs = model_inputs(random_pairs([(PROMPT, ANSWER, ANSWER)] * PAIRS))
    plans = BatchPlans.of({**inputs, "completion_mask": (inputs["labels"] != -100).long()})
    forward = PackedPairForward(model, attention="varlen", required=True, plans=plans)
    inputs, found = moved(inputs), {}
    for _ in range(2):  # the first also starts libraries, with workspaces of theirs
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = held(device)
        with torch.autocast(device.type, torch.bfloat16):
            outputs = forward(**inputs)
            loss = -torch.nn.functional.logsigmoid(outputs.log_probs.sum(1).view(2, -1).diff(dim=0)).mean()
        found = {"forward, at its end": held(device) - before, "forward": peak(device) - before}
        loss.backward()
        found["both"] = peak(device) - before
        found["tokens"] = forward.last_plan.tokens
        del outputs, loss
    length = PROMPT + ANSWER
    counted = estimate(
        PlanRequest(
            config=model.config,
            weight_bytes=2,
            autocast=True,
            lora_rank=16,
            checkpointing=checkpointing,
            micro_batch=PAIRS,
            max_length=length,
            prompt_share=PROMPT / length,
        )
    )
    terms = counted.forward | counted.backward
    record(checkpointing=checkpointing, measured=found, counted=terms, forward=sum(counted.forward.values()))
    assert found["tokens"] == PAIRS * (PROMPT + 2 * ANSWER)
    counted = sum(counted.forward.values())
    if device.type == "cuda":
        assert found["both"] <= 1.15 * counted
    if device.type == "cuda" and not checkpointing:
        assert found["both"] >= 0.85 * counted
