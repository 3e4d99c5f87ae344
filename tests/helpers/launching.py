"""Commands that start processes of a kind: one, DDP, ZeRO and FSDP2."""

import json
import sys
from pathlib import Path

COMMON = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
FSDP2 = (
    "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --fsdp_state_dict_type FULL_STATE_DICT "
    "--fsdp_reshard_after_forward true --fsdp_cpu_ram_efficient_loading false"
)
STAGES = {
    "zero2": {"reduce_bucket_size": 50_000},
    "zero3": {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        # Nothing is small enough to stay whole on every process.
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def deepspeed_config(kind: str, folder: Path) -> Path:
    zero = {"stage": int(kind[-1]), "overlap_comm": False, "contiguous_gradients": True, **STAGES[kind]}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config))
    return path


def launcher(kind: str, folder: Path) -> list[str]:
    """The command that starts two processes of a kind, or one process."""
    if kind == "one":
        return [sys.executable]
    if kind == "ddp":
        options = "--multi_gpu"
    elif kind == "fsdp2":
        options = FSDP2
    else:
        options = f"--use_deepspeed --deepspeed_config_file {deepspeed_config(kind, folder)}"
        options += f" --zero3_init_flag {str(kind == 'zero3').lower()}"
    return [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *COMMON.split()]


WRAPPINGS = {
    "ddp": {"distributed_type": "MULTI_CPU", "wrapper": "DistributedDataParallel", "zero_stage": None},
    "zero2": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 2},
    "zero3": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 3},
    "fsdp2": {"distributed_type": "FSDP", "zero_stage": None},
}
