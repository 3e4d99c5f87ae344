"""The options of the price: whether it is measured, on how much, and a limit."""

from dataclasses import dataclass, field
from typing import Any

from ..faults import is_finite, is_true_or_false

#: The metric that `max_kl` bounds.
LIMITED = "cpo/kl_general"

#: Of every `cpo/*` name of the price: whether more of it is better; None where neither is.
PRICE_IS_BETTER: dict[str, bool | None] = {
    **{f"{name}{of}": False for name in ("kl", "kl_response", "repetition") for of in ("", "_general")},
    **{f"answer_tokens{of}": None for of in ("", "_general")},
    **{f"answers_ended{of}": True for of in ("", "_general")},
    **{f"{text}_nll": False for text in ("chosen", "text")},
}


@dataclass
class PriceFields:
    price: bool = field(
        default=False,
        metadata={
            "help": "Measure at evaluations what training did to the model: KL to the reference on the policy's own samples, "
            "repetition, its answers before and after, and likelihoods. Changes no weight and no random state."
        },
    )
    price_prompts: int = field(
        default=16,
        metadata={"help": "Prompts of the price: so many of the pairs', and so many general ones (at most 24)."},
    )
    price_tokens: int = field(default=48, metadata={"help": "Tokens at which the price's answers are cut."})
    price_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of a run's time that the price may take: an evaluation in the middle of training that would go "
            "beyond it is made without. The first and the last always have it; 1 measures at every one."
        },
    )
    price_text: str | None = field(
        default=None,
        metadata={"help": "A text file that has nothing to do with the pairs, whose likelihood the price follows."},
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "help": "Limit of KL to the reference on general prompts, nats per token. An evaluation that finds more stops "
            "training, and the last checkpoint within the limit is loaded. Needs evaluations and checkpoints at the same "
            "steps; measures the price at each."
        },
    )


def price_faults(args: Any) -> list[str]:
    """What is wrong with these fields of a configuration, one sentence each."""
    faults = is_true_or_false("price", args.price)
    for name in ("price_prompts", "price_tokens"):
        if not _is_whole(getattr(args, name)):
            faults.append(f"{name} must be a whole number ≥ 1; got {getattr(args, name)!r}.")
    if not _is_number(args.price_share) or not 0 <= args.price_share <= 1:
        faults.append(f"price_share must be a number from 0 to 1; got {args.price_share!r}.")
    if args.price_text is not None and not isinstance(args.price_text, str):
        faults.append(f"price_text must be the path of a text file, or None; got {args.price_text!r}.")
    if args.max_kl is None:
        return faults
    if not _is_number(args.max_kl) or args.max_kl <= 0:
        faults.append(f"max_kl must be a finite number > 0 (nats per token), or None; got {args.max_kl!r}.")
    evaluations, checkpoints = (str(getattr(each, "value", each)) for each in (args.eval_strategy, args.save_strategy))
    if evaluations == "no" or checkpoints not in (evaluations, "best"):
        faults.append(
            "max_kl is checked at evaluations, and keeps the last checkpoint within it: set eval_strategy and "
            f"save_strategy alike, to 'steps' or 'epoch'; got {evaluations!r} and {checkpoints!r}."
        )
    return faults


def prepare_price(args: Any) -> None:
    """Under `max_kl`: measure, and load the checkpoint that is kept, as `load_best_model_at_end` does."""
    if args.max_kl is None:
        return
    args.price = args.load_best_model_at_end = True
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = f"eval_{LIMITED}", False


def keeps_last_within(args: Any) -> bool:
    """Whether the checkpoint kept is the last one within `max_kl`, rather than the best one by another metric."""
    return args.max_kl is not None and str(args.metric_for_best_model).removeprefix("eval_") == LIMITED


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
