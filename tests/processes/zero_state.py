"""What DeepSpeed holds of a tiny model after one step, in one process on a CPU: a line of JSON for each case."""

import json
import os
import socket

import torch

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}

import deepspeed
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
)


def held(stage: int, bf16: bool, rank: int) -> float:
    """Bytes of all weights and of the optimizer's state, each storage once."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32)
    if rank:
        # As TRL makes it.
        options = {"autocast_adapter_dtype": False} if stage == 3 else {}
        model = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM"), **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, zero, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=1e-3),
        config={
            "train_batch_size": 1,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 100_000},
        },
    )
    ids = torch.zeros(1, 8, dtype=torch.long)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    tensors = [getattr(p, "ds_tensor", p) if stage == 3 else p for p in engine.module.parameters()]
    tensors += zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    tensors += [v for each in zero.optimizer.state.values() for v in each.values() if torch.is_tensor(v) and v.dim()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
for case in ((1, False, 0), (2, False, 0), (2, True, 0), (2, True, 16), (3, False, 0), (3, True, 16)):
    print(json.dumps(dict(zip(("stage", "bf16", "rank"), case, strict=True), held=held(*case))), flush=True)
