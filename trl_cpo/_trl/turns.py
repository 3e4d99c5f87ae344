"""Answers of several turns: which of their tokens are the assistant's, and batches that score these alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..data.rows import TURN_MASKS, damage_message, other_turns
from .datasets import is_its_collator, prompt_alone

_SIDES = ("chosen", "rejected")

_REMEDY = (
    "assistant_turns_only finds the turns by rendering a conversation up to each: use a template that renders what came "
    "before in the same way, whatever follows (trl.chat_template_utils.get_training_chat_template has some), or end both "
    "answers after their first turn."
)


class TurnsUnknown(ValueError):
    """The chat template does not tell where an answer's turns are; the text is the reason."""


def assistant_mask(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], side: str) -> list[int]:
    """1 for each id of a prepared row's answer, "chosen" or "rejected", that the assistant wrote, else 0.

    A turn is what stands between the prompt that asks for it, as at inference, and the end of the conversation after it: the
    rule by which DPOTrainer finds a single answer, whose mask is all ones.

    Raises:
        TurnsUnknown: the template renders the turns before, or the turn, differently once others follow.
    """
    turns, ids = row[side], list(row["prompt_ids"]) + list(row[f"{side}_ids"])
    begins = len(row["prompt_ids"])
    if not other_turns(turns):
        return [1] * (len(ids) - begins)

    def rendered(end: int, asks: bool) -> list[int]:
        so_far = {**row, "prompt": row["prompt"] + turns[:end]}
        return prompt_alone(tokenizer, so_far, add_generation_prompt=asks)

    mask = [0] * len(ids)
    for at, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start = common_prefix_length(rendered(at, True), ids) if at else begins
        if at and start < len(rendered(at, False)):
            raise TurnsUnknown(f"the chat template renders what comes before turn {at} of `{side}` otherwise once it follows")
        closed = rendered(at + 1, False) if at + 1 < len(turns) else ids
        end = common_prefix_length(closed, ids)
        # Phi-3's puts EOS behind the last turn alone.
        if any(token != tokenizer.eos_token_id for token in closed[end:]):
            raise TurnsUnknown(f"the chat template renders turn {at} of `{side}` otherwise once others follow")
        mask[start:end] = [1] * (end - start)
    return mask[begins:]


def with_turn_masks(dataset: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    """A prepared set, called `name` in messages, with `TURN_MASKS`; itself where no answer has another's turn.

    Raises:
        ValueError: rows whose turns the chat template does not tell; of a stream, when they are read.
    """
    if not isinstance(dataset, Dataset):
        return dataset.map(partial(_with_masks, tokenizer=tokenizer, name=name), with_indices=True)
    dataset = dataset.remove_columns([column for column in TURN_MASKS if column in dataset.column_names])
    if not any(other_turns(answer) for side in _SIDES for answer in dataset[side]):
        return dataset
    masks: dict[str, list[list[int]]] = {column: [] for column in TURN_MASKS}
    faults: dict[str, list[int]] = {}
    for number, row in enumerate(dataset):
        try:
            for column, side in zip(TURN_MASKS, _SIDES, strict=True):
                masks[column].append(assistant_mask(tokenizer, row, side))
        except TurnsUnknown as fault:
            faults.setdefault(str(fault), []).append(number)
    if faults:
        raise ValueError(f"{damage_message(name, len(dataset), faults)} {_REMEDY}")
    features = Features({column: List(Value("int8")) for column in TURN_MASKS})
    return concatenate_datasets([dataset, Dataset.from_dict(masks, features=features)], axis=1)


def _with_masks(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    try:
        return {column: assistant_mask(tokenizer, row, side) for column, side in zip(TURN_MASKS, _SIDES, strict=True)}
    except TurnsUnknown as fault:
        raise ValueError(f"{name}: row {number} (counted from 0): {fault}. {_REMEDY}") from fault


class AssistantTurns:
    """DPOTrainer's collator, whose `completion_mask` is 0 on what the assistant did not write.

    Args:
        collator: a `DataCollatorForPreference`.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        mask = batch["completion_mask"].clone()
        for side, column in enumerate(TURN_MASKS):
            for at, example in enumerate(examples):
                if column in example:
                    own = [0] * len(example["prompt_ids"]) + list(example[column])
                    limit = self.collator.max_length
                    if limit is not None:
                        own = own[:limit] if self.collator.truncation_mode == "keep_start" else own[-limit:]
                    mask[side * len(examples) + at, : len(own)] = torch.tensor(own)
        return {**batch, "completion_mask": mask}


def of_assistant_turns(collator: Any) -> Any:
    """The collator that scores the assistant's turns alone; itself if it does so already."""
    return collator if isinstance(collator, AssistantTurns) else AssistantTurns(collator)


def refuse_collator(collator: Any) -> None:
    """Raises `ValueError` where batches are not formed as `AssistantTurns` expects."""
    if collator is not None and not is_its_collator(collator):
        raise ValueError(
            f"assistant_turns_only needs DPOTrainer's own collator for text; got {type(collator).__name__}. Leave "
            "data_collator out, or have yours zero completion_mask and leave assistant_turns_only out."
        )
