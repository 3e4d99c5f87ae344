"""What a run knows of its held-out pairs beside their log-probabilities: tokens of the answers, and columns to slice by."""

from typing import Any

from ..data.spans import answers_of, scored_span
from ..labels.columns import CARRIED

#: Columns that are the pairs themselves, and endings of those that training adds.
_PAIRS, _MADE = {"prompt", "chosen", "rejected"}, ("_ids", "_mask", "_logps", *CARRIED)
#: The most columns kept; of texts, the most values and the longest.
_MOST_COLUMNS, _MOST_VALUES, _LONGEST = 6, 20, 80


def answer_tokens(dataset: Any, max_length: int | None, keep: str) -> tuple[list[int], list[int]] | None:
    """Scored tokens of the chosen and rejected answers that truncation leaves, n each; None for a stream, or without ids.

    Args:
        dataset: the pairs as the trainer prepared them.
        max_length, keep: as in `trl_cpo.data.spans.visible_span`.
    """
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    if not hasattr(dataset, "__len__") or not set(names) <= set(dataset.column_names):
        return None
    counts: tuple[list[int], list[int]] = ([], [])
    for prompt, chosen, rejected, *masks in answers_of(dataset):
        for found, answer, mask in zip(counts, (chosen, rejected), masks, strict=True):
            found.append(scored_span(len(prompt), len(answer), max_length, keep, mask)[2])
    return counts


def slice_columns(dataset: Any) -> dict[str, list[Any]]:
    """Columns of the pairs that part them into few: numbers, and texts of few values; empty for a stream."""
    if not hasattr(dataset, "__len__"):
        return {}
    from datasets import ClassLabel, Value

    found: dict[str, list[Any]] = {}
    for name, feature in dataset.features.items():
        if name in _PAIRS or name.endswith(_MADE) or len(found) == _MOST_COLUMNS:
            continue
        if not isinstance(feature, (ClassLabel, Value)):
            continue
        # JSON has no NaN.
        values = [None if value != value else value for value in dataset[name]]
        if _parts(values):
            found[name] = values
    return found


def _parts(values: list[Any]) -> bool:
    known = [value for value in values if value is not None]
    distinct = set(map(repr, known))
    if len(distinct) < 2 or not all(isinstance(value, (str, int, float, bool)) for value in known):
        return False
    texts = [value for value in known if isinstance(value, str)]
    return not texts or (len(distinct) <= _MOST_VALUES and max(map(len, texts)) <= _LONGEST)
