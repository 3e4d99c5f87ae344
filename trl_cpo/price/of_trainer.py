"""The meter of a trainer: any of TRL's or transformers', ours among them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

from .meter import PriceMeter
from .questions import Questions, gather_questions


def meter_of(
    trainer: Trainer,
    *,
    pairs: Iterable[Mapping[str, Any]] | None,
    prompts: int = 16,
    max_new_tokens: int = 48,
    share: float = 0.1,
    text: str | Path | None = None,
    from_start: bool = False,
) -> PriceMeter:
    """Made before training, so that the model is at its start: the reference, unless the trainer holds another one.

    Args:
        pairs: tokenized held-out pairs (prompt_ids, chosen_ids), for prompts and answers.
        prompts, max_new_tokens, share, text: of `PriceMeter` and `gather_questions`.
        from_start: whether the reference is the model as it is now, even where the trainer holds another.
    """
    tokenizer: Any = trainer.processing_class
    unable = _unable(trainer, tokenizer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    # A reference that follows the policy is no fixed point to measure from; the start is.
    moves = getattr(trainer.args, "sync_ref_model", False)
    reference = None if moves or from_start else getattr(trainer, "ref_model", None)
    questions = Questions()
    if unable is None:
        questions = gather_questions(
            tokenizer,
            pairs=pairs,
            prompts=prompts,
            room=_room(model, trainer.args),
            max_new_tokens=max_new_tokens,
            text=text,
        )
    return PriceMeter(
        model,
        tokenizer,
        questions,
        reference=None if reference is None else trainer.accelerator.unwrap_model(reference),
        max_new_tokens=max_new_tokens,
        share=share,
        unable=unable,
    )


def _unable(trainer: Trainer, tokenizer) -> str | None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return f"The price is not measured: it needs a tokenizer of text, and this model has a {type(tokenizer).__name__}."
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        kind = "FSDP" if trainer.is_fsdp_enabled else "ZeRO-3"
        return f"The price is not measured under {kind}, where no process holds the whole model."
    if not hasattr(trainer.accelerator.unwrap_model(trainer.model), "generate"):
        return f"The price is not measured: {type(trainer.model).__name__} cannot generate text."
    return None


def _room(model, args) -> int | None:
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), getattr(args, "max_length", None)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
