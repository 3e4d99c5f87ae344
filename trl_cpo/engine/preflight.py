"""All checks that can run before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .._trl.datasets import holds_messages
from .._trl.models import config_of, load_processing_class, model_id
from ..data.models import refuse_adapter
from ..data.validation import (
    VocabularyFit,
    check_has_name,
    check_has_turns,
    check_lengths_known,
    check_preference_dataset,
    check_tokenizer,
    check_vocabularies,
)
from .config import DPOConfig
from .processes import check_agreement, check_launch, facts_of


def preflight(
    args: DPOConfig,
    *,
    model: Any,
    ref_model: Any,
    datasets: Mapping[str, Any],
    processing_class: Any,
    quantization_config: Any,
    peft_config: Any,
) -> Any:
    """Checks a trainer's arguments, cheapest first, and returns the tokenizer or processor to use.

    Args:
        datasets: "train_dataset" and "eval_dataset", each a dataset, a dictionary of datasets, or None.
        processing_class: the tokenizer or processor; None to load the model's own.

    Raises:
        ProcessesDisagree: the processes of this run were started with different settings or data.
        TypeError: `ref_model` is not a model.
        ValueError: the launch, a dataset, the tokenizer or the reference's vocabulary is unsuitable.
    """
    check_launch(args)
    if isinstance(model, str):
        refuse_adapter(model)
    else:
        check_has_name(
            model_id(model),
            reference_loaded=ref_model is None and peft_config is None and not is_peft_model(model),
            # Under FSDP the reference is loaded to be precomputed.
            precomputed=args.precompute_ref_log_probs and not args.fsdp,
            tokenizer_loaded=processing_class is None,
        )
    configs = {
        "model": lambda: config_of(model, args),
        "ref_model": getattr(ref_model, "config", None),
        "peft_config": peft_config,
        "quantization_config": quantization_config,
    }
    # First, because identical arguments pass or fail the following checks on every process alike.
    check_agreement(lambda: facts_of(args, configs=configs, datasets=datasets))
    for name, dataset in datasets.items():
        if dataset is not None:
            check_preference_dataset(dataset, name, prompt_needed=not args.is_plain_dpo, warns=args.process_index == 0)
            if args.assistant_turns_only:
                check_has_turns(dataset, name)
    if ref_model is not None:
        check_vocabularies(config_of(model, args), ref_model)
    if processing_class is None:
        processing_class = load_processing_class(model, args)
    train_dataset = datasets["train_dataset"]
    if isinstance(train_dataset, (Dataset, IterableDataset)) and isinstance(processing_class, PreTrainedTokenizerBase):
        check_tokenizer(processing_class, holds_messages(next(iter(train_dataset))))
    if isinstance(processing_class, PreTrainedTokenizerBase):
        VocabularyFit(processing_class, config_of(model, args)).check_padding(args.pad_token)
    if args.assistant_turns_only and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"assistant_turns_only needs a tokenizer of text, got a {type(processing_class).__name__}: with images, turns are "
            "made into tokens batch by batch. Leave it out, and end both answers after their first turn."
        )
    for option in ("balance_tokens", "tokens_per_step"):
        if getattr(args, option):
            check_lengths_known(train_dataset, option)
    return processing_class
