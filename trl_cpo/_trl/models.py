"""The models of a trainer: where they came from, and what the reference is."""

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
    """The config of a model, read from its name or folder where it is not loaded yet."""
    if not isinstance(model, str):
        return model.config
    init = args.model_init_kwargs or {}
    return AutoConfig.from_pretrained(
        model, revision=init.get("revision"), trust_remote_code=init.get("trust_remote_code", args.trust_remote_code)
    )


def load_processing_class(model, args):
    """The tokenizer or processor that DPOTrainer would load for `model` itself, so that it can be checked first."""
    path = model if isinstance(model, str) else model_id(model)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=args.trust_remote_code)


@dataclass(frozen=True)
class Reference:
    """What a trainer's `compute_ref_log_probs` computes with.

    Attributes:
        model: the model, as DPOTrainer has it; sharded and wrapped where it is.
        adapters: names of its PEFT adapters.
        adapter: the one that is switched on for the reference; None: none is.
    """

    model: torch.nn.Module
    adapters: tuple[str, ...]
    adapter: str | None


def reference_of(trainer: DPOTrainer) -> Reference:
    """The reference of a trainer: its reference model, else its model under the "ref" adapter or under none."""
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    bare = trainer.accelerator.unwrap_model(model)
    if not is_peft_model(bare):
        return Reference(model, (), None)
    names = tuple(bare.peft_config)
    if trainer.ref_model is not None:
        return Reference(model, names, bare.active_adapter)
    return Reference(model, names, "ref" if "ref" in names else None)


def reference_engine(trainer: DPOTrainer) -> torch.nn.Module:
    """What `compute_ref_log_probs` takes as its model before training has wrapped it, as DPOTrainer precomputes.

    With DeepSpeed the weights are then not in their place yet, and an inference engine puts them there.
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
    """Takes the inference engine of a precomputed reference off the model, before training wraps it in its own.

    DPOTrainer leaves it there. Under ZeRO-3 its hooks would run in every forward of the training beside the training's own,
    and end it with an IndexError where the engine had just begun to record the order of the layers (DeepSpeed 0.19.8:
    wrapping a model again numbers its layers anew).
    """
    engine = getattr(trainer, "_precompute_engine", None)
    if engine is not None:
        engine.destroy()
        trainer._precompute_engine = None


def reference_origin(trainer: DPOTrainer) -> dict[str, Any]:
    """Whether it was computed beforehand, whether it is the model with another adapter or none, and where it is loaded from."""
    return dict(precomputed=trainer.precompute_ref_logps, is_peft=is_peft_model(trainer.model), source=model_id(trainer.model))
