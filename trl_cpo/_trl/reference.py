"""A reference without a trainer: processes, model and batches as DPOTrainer has them when it precomputes its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, is_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer

from .models import Reference
from .upstream import check_kernels

#: What DPOTrainer calls the adapter that it takes for its reference.
REFERENCE_ADAPTER = "ref"


def accelerator_of(args: Any) -> Accelerator:
    """The processes of a launch and their precision, as transformers' Trainer sets them up for `args`."""
    sharding = args.fsdp_plugin_args
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        deepspeed_plugin=args.deepspeed_plugin,
        fsdp_plugin=None if sharding is None else FullyShardedDataParallelPlugin(**sharding),
        **({} if args.parallelism_config is None else {"parallelism_config": args.parallelism_config}),
    )
    if _has_deepspeed(accelerator) and getattr(args, "hf_deepspeed_config", None) is None:
        from transformers.integrations.deepspeed import propagate_args_to_deepspeed

        propagate_args_to_deepspeed(accelerator, args)
    return accelerator


def load_model(source: str, args: Any) -> PreTrainedModel:
    """A causal language model as DPOTrainer loads its own from a name or folder."""
    from trl.trainer.utils import create_model_from_path

    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return create_model_from_path(source, **options)


def load_adapted_model(source: str, args: Any) -> torch.nn.Module:
    """A PEFT adapter on its base, under the name of DPOTrainer's reference adapter."""
    from peft import AutoPeftModelForCausalLM

    dtype = (args.model_init_kwargs or {}).get("dtype", "float32")
    return AutoPeftModelForCausalLM.from_pretrained(
        source,
        adapter_name=REFERENCE_ADAPTER,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=args.trust_remote_code,
    )


def adapts_the_head(model: torch.nn.Module) -> bool:
    """Whether an adapter sits on the model's head, which the fused head would pass by."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return is_peft_model(model) and isinstance(model.get_output_embeddings(), BaseTunerLayer)


def collator_of(tokenizer: PreTrainedTokenizerBase, args: Any) -> Any:
    """DPOTrainer's collator. A tokenizer without a pad token gets its EOS as one, as DPOTrainer gives it."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForPreference(
        pad_token_id=tokenizer.pad_token_id,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )


def prepare_reference(model: PreTrainedModel, pad_token_id: int, args: Any, accelerator: Accelerator) -> Reference:
    """`model`, with TRL's fused head and where its processes need it: on the device, or sharded as FSDP was asked to.

    DeepSpeed's weights are put in their place by `engine_of`. The adapter of a PEFT model is called `REFERENCE_ADAPTER`.
    """
    from trl.models.utils import prepare_fsdp
    from trl.trainer.utils import add_fused_lm_head

    model.config.get_text_config().pad_token_id = pad_token_id
    add_fused_lm_head(model.get_base_model() if is_peft_model(model) else model)
    if is_peft_model(model):
        reference = Reference(model, (REFERENCE_ADAPTER,), REFERENCE_ADAPTER)
    else:
        reference = Reference(model, (), None)
    if _has_deepspeed(accelerator):
        return reference
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return reference if is_peft_model(model) else Reference(prepare_fsdp(model, accelerator), (), None)
    # A quantized model, and one that was loaded onto devices, stay where they are.
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model.to(args.device)
    return reference


@contextmanager
def engine_of(reference: Reference, accelerator: Accelerator) -> Iterator[Callable[[], torch.nn.Module]]:
    """Gives what runs the reference when it is called: the model, or under DeepSpeed one inference engine around it."""
    from trl.models.utils import prepare_deepspeed

    made = []

    def engine() -> torch.nn.Module:
        if not made:
            made.append(prepare_deepspeed(reference.model, accelerator) if _has_deepspeed(accelerator) else reference.model)
        return made[0]

    try:
        yield engine
    finally:
        if made and _has_deepspeed(accelerator):
            made[0].destroy()


def summed_logps(
    reference: Reference, forward: Any, batch: dict[str, Tensor], args: Any, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of a batch, chosen and rejected, (B,), nats: DPOTrainer's own sums, of what `forward` gives."""
    bare = accelerator.unwrap_model(reference.model)
    stand_in = SimpleNamespace(accelerator=accelerator, args=args, model=bare, ref_model=None, ld_alpha=args.ld_alpha)
    return DPOTrainer.compute_ref_log_probs(stand_in, forward, batch)


def policy_summed_logps(
    model: torch.nn.Module, forward: Any, batch: dict[str, Tensor], args: Any, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """The same of a model with whatever adapters are on, chosen and rejected, (B,), nats."""
    # With a `ref_model`, DPOTrainer switches no adapter.
    stand_in: Any = SimpleNamespace(accelerator=accelerator, args=args, model=model, ref_model=model, ld_alpha=None)
    return DPOTrainer.compute_ref_log_probs(stand_in, forward, batch)


@contextmanager
def fused_head(model: Any) -> Iterator[None]:
    """TRL's fused head on a model, for a moment: afterwards its forward is the one that it had."""
    from trl.trainer.utils import add_fused_lm_head

    base = model.get_base_model() if is_peft_model(model) else model
    check_kernels(base.device.type)
    own = vars(base).get("forward")
    add_fused_lm_head(base)
    try:
        yield
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own


def _has_deepspeed(accelerator: Accelerator) -> bool:
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None
