"""Everything that a run's numbers depend on: its settings and its pairs. Recorded to compare a resumed run with its past."""

import json
from typing import Any

from datasets import Dataset

from ..._trl.datasets import TOKENIZED_COLUMNS
from ...data.rows import TURN_MASKS
from ...files.masking import masked
from ..reference.digests import tokens_digest

#: Arguments that do not affect the weights: where and how often something is written, logged, evaluated or run. If any other
#: is changed, the resumed run is no longer the interrupted one.
NOT_AFFECTING_WEIGHTS = frozenset(
    """
    output_dir disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level log_level_replica
    include_num_input_tokens_seen eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better restore_callback_states_from_checkpoint gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs activation_offloading torch_empty_cache_steps use_cache use_cpu
    accelerator_config parallelism_config fsdp fsdp_config deepspeed dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint
    local_rank trust_remote_code dataset_num_proc precompute_ref_batch_size pad_token check_reference narrate
    enable_jit_checkpoint price price_prompts price_tokens price_share price_text
    """.split()
)


def settings_of(args, processes: int) -> dict[str, Any]:
    """The arguments that affect the weights, and the number of processes, as values read back from JSON."""
    every = masked(json.loads(json.dumps(args.to_dict(), default=str)))
    return {**{name: value for name, value in every.items() if name not in NOT_AFFECTING_WEIGHTS}, "processes": processes}


def data_facts(dataset) -> dict[str, Any] | None:
    """The number of pairs of a prepared dataset and a digest of their tokens in order; None for a stream."""
    if not isinstance(dataset, Dataset) or not set(TOKENIZED_COLUMNS).issubset(dataset.column_names):
        return None
    masks = [name for name in TURN_MASKS if name in dataset.column_names]
    return {"pairs": len(dataset), "tokens": tokens_digest(dataset, (*TOKENIZED_COLUMNS, *masks))[0]}
