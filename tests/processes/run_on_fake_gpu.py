"""Runs packed forwards, backwards and steps of an 8B shape on a device without memory, and prints what they asked of it.

    python tests/processes/run_on_fake_gpu.py varlen segments

The tokens have the lengths of real pairs. One line of JSON: waits, operations a layer, and bytes kept for backward.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from trl_cpo.engine.forward import PackedPairForward
from trl_cpo.engine.forward.plan import BatchPlans

from helpers.fake_device import FakeGPU
from helpers.pair_batches import model_inputs, random_pairs
from helpers.tiny import SHAPE_8B

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
#: Prompt, chosen and rejected tokens, in turn.
SIZES = [(103, 61, 40), (250, 20, 75), (31, 110, 96), (180, 44, 44)]


def model_on(gpu: FakeGPU, layers: int, lora: bool):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE_8B, num_hidden_layers=layers), dtype=torch.bfloat16)
        add_fused_lm_head(model, outputs=OUTPUTS)
        if lora:
            adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, adapters).bfloat16()
    return gpu.moved(model).train()


def packed(attention: str, pairs: int, layers: int, lora: bool) -> dict:
    """One forward and backward with a plan from the CPU."""
    gpu = FakeGPU()
    model = model_on(gpu, layers, lora)
    inputs = model_inputs(random_pairs([SIZES[i % len(SIZES)] for i in range(pairs)]))
    batch = {**inputs, "completion_mask": (inputs["labels"] != -100).long()}
    forward = PackedPairForward(model, attention=attention, required=True, plans=BatchPlans.of(batch))
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    inputs = gpu.like(inputs)
    with gpu:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = forward(**inputs)
        ran = sum(gpu.operations.values())
        gpu.operations.clear()
        outputs.loss.backward()
    return {
        "operations": [ran, sum(gpu.operations.values())],
        "kept": sum(size for size, _ in kept.values()),
        "tokens": forward.last_plan.tokens,
        "waits": [wait.place for wait in gpu.waits],
    }


def layer(attention: str, pairs: int, lora: bool) -> dict:
    """What one more layer adds, and the waits."""
    one, two = (packed(attention, pairs, layers, lora) for layers in (1, 2))
    forward, backward = (b - a for a, b in zip(one["operations"], two["operations"], strict=True))
    kept = (two["kept"] - one["kept"]) / two["tokens"]
    return {"forward": forward, "backward": backward, "kept_per_token": kept, "waits": two["waits"]}


if __name__ == "__main__":
    found = {}
    for attention in sys.argv[1:]:
        for lora in (False, True):
            for pairs in (8, 32):
                found[f"{attention}, {'lora' if lora else 'full'}, {pairs}"] = layer(attention, pairs, lora)
    print(json.dumps(found))
