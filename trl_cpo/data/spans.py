"""Which tokens of an answer truncation leaves, and which of these are scored."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .rows import TURN_MASKS

if TYPE_CHECKING:
    from datasets import Dataset


def visible_span(prompt: int, completion: int, max_length: int | None, keep: str) -> tuple[int, int, int]:
    """The part of an answer that DPOTrainer's truncation keeps, and how many of its tokens are scored.

    Args:
        prompt: tokens of the prompt.
        completion: tokens of the answer.
        max_length: the most tokens kept of both together; None: all.
        keep: "keep_start" or "keep_end": which end of the sequence is kept.

    Returns:
        first, end: the slice of the answer that is kept; scored: its number of tokens, without one in the sequence's first
        place, which has no predecessor to predict it.
    """
    cut = 0 if max_length is None else max(0, prompt + completion - max_length)
    if keep == "keep_start":
        first, end = 0, max(0, completion - cut)
        prompt_left = min(prompt, prompt + completion - cut)
    else:
        first, end = max(0, cut - prompt), completion
        prompt_left = max(0, prompt - cut)
    return first, end, end - first - (prompt_left == 0 and end > first)


def scored_span(
    prompt: int, completion: int, max_length: int | None, keep: str, mask: Sequence[int] | None
) -> tuple[int, int, int, int]:
    """`visible_span` of an answer of which only what `mask` holds is scored, (completion,) of 0 and 1; None: all of it.

    Returns:
        first, end: as there; counted: the tokens of the answer that a mean divides by; scored: those with a predecessor.
    """
    first, end, scored = visible_span(prompt, completion, max_length, keep)
    if mask is None:
        return first, end, end - first, scored
    counted = int(sum(mask[first:end]))
    begins = end - first - scored  # 1 where the sequence begins with the answer
    return first, end, counted, counted - (int(mask[first]) if begins else 0)


def answers_of(dataset: "Dataset") -> Iterator[tuple[Any, ...]]:
    """Of each pair of a tokenized dataset: the ids of prompt, chosen and rejected, and `TURN_MASKS`, None where it has none."""
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    masks = [name for name in TURN_MASKS if name in dataset.column_names]
    for batch in dataset.select_columns([*names, *masks]).with_format("numpy").iter(1000):
        for row in zip(*(batch[name] for name in (*names, *masks)), strict=True):
            yield row if masks else (*row, None, None)
