"""The models of a trainer: where they were loaded from, and which one is the reference."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoProcessor
from trl import DPOTrainer


def model_id(model) -> str:
    """The name or folder that a model was loaded from."""
    return getattr(model.config, "_name_or_path", "")


def config_of(model, args):
    """The config of a model; loaded from its name or folder if the model is not loaded yet."""
    if not isinstance(model, str):
        return model.config
    init = args.model_init_kwargs or {}
    return AutoConfig.from_pretrained(
        model, revision=init.get("revision"), trust_remote_code=init.get("trust_remote_code", args.trust_remote_code)
    )


def load_processing_class(model, args):
    """Loads the tokenizer or processor that DPOTrainer would load for `model`, so that it can be checked first."""
    path = model if isinstance(model, str) else model_id(model)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=args.trust_remote_code)


@dataclass(frozen=True)
class Reference:
    """The model behind a trainer's `compute_ref_log_probs`.

    Attributes:
        model: the model as DPOTrainer holds it, possibly sharded or wrapped.
        adapters: names of its PEFT adapters.
        adapter: the adapter that is active for the reference; None if none is.
    """

    model: torch.nn.Module
    adapters: tuple[str, ...]
    adapter: str | None


def reference_of(trainer: DPOTrainer) -> Reference:
    """The reference of a trainer: `ref_model`, else its model with the adapter "ref", else its model without an adapter."""
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    bare = trainer.accelerator.unwrap_model(model)
    if not is_peft_model(bare):
        return Reference(model, (), None)
    names = tuple(bare.peft_config)
    if trainer.ref_model is not None:
        return Reference(model, names, bare.active_adapter)
    return Reference(model, names, "ref" if "ref" in names else None)


def reference_engine(trainer: DPOTrainer) -> torch.nn.Module:
    """The model to pass to `compute_ref_log_probs` before training has wrapped it, as DPOTrainer does to precompute.

    With DeepSpeed the weights are not in place at that point; an inference engine puts them there.
    """
    if trainer.ref_model is not None:
        return trainer.ref_model
    if not trainer.is_deepspeed_enabled:
        return trainer.model
    if trainer.model_wrapped is not trainer.model:
        return trainer.model_wrapped  # training has put them there
    from trl.models.utils import prepare_deepspeed

    if trainer._precompute_engine is None:
        trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer._precompute_engine


def release_reference_engine(trainer: DPOTrainer) -> None:
    """Removes the inference engine of a precomputed reference from the model, before training wraps it in its own engine.

    DPOTrainer leaves it attached. Under ZeRO-3 its hooks would then run in every training forward beside training's own.
    Because wrapping a model again renumbers its layers (DeepSpeed 0.19.8), they can fail with an IndexError while the engine
    is still recording the order of the layers.
    """
    engine = getattr(trainer, "_precompute_engine", None)
    if engine is not None:
        engine.destroy()
        trainer._precompute_engine = None


def reference_origin(trainer: DPOTrainer) -> dict[str, Any]:
    """The reference's origin: precomputed or not, the policy's own PEFT model or not, and where the model was loaded from."""
    return dict(precomputed=trainer.precompute_ref_logps, is_peft=is_peft_model(trainer.model), source=model_id(trainer.model))


def drifting_parameters(trainer: DPOTrainer) -> list[str]:
    """Trained parameters that the live reference of an adapter would use too, so that it would follow the policy.

    The reference is the trainer's own model in PEFT's hands: with its adapters off, or with the adapter "ref". There PEFT
    freezes what it switches off. Empty where the reference is another model or comes from a table.
    """
    from trl.trainer.utils import use_adapter

    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is not None or trainer.precompute_ref_logps or not is_peft_model(model):
        return []
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        return []
    # Prompts of prompt learning stay trainable, but leave the forward.
    prompts = {id(parameter) for parameter in getattr(model, "prompt_encoder", torch.nn.Module()).parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of what is refused here
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                return [name for name, parameter in trained.items() if parameter.requires_grad and id(parameter) not in prompts]
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
