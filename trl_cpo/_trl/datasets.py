"""How DPOTrainer tokenizes datasets and loads training pairs."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import seed_worker
from trl import DPOTrainer
from trl.data_utils import extract_prompt, is_conversational

from ..data.rows import damage_message, other_turns

#: Columns that DPOTrainer adds to a text dataset when it prepares it.
TOKENIZED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

#: Columns from which DPOTrainer reads precomputed log-probabilities.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def with_reference_logps(dataset: Dataset, chosen, rejected) -> Dataset:
    """`dataset` with the reference's log-probabilities, (N,) each, as float32 in the columns that DPOTrainer reads."""
    values = dict(zip(REFERENCE_COLUMNS, (chosen, rejected), strict=True))
    columns = Dataset.from_dict(values, features=Features({name: Value("float32") for name in values}))
    # A dataset that was prepared before already has these columns.
    dataset = dataset.remove_columns([name for name in values if name in dataset.column_names])
    return concatenate_datasets([dataset, columns], axis=1)


def is_its_collator(collator: Any) -> bool:
    """Whether `collator` is DPOTrainer's own, which reads only the token ids."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return type(collator) is DataCollatorForPreference


class ColumnsBeside:
    """A collator, DPOTrainer's own or another, that also hands on columns of numbers, (B,) each; the collator drops them."""

    def __init__(self, collator: Any, names: Sequence[str]):
        self.collator, self.names = collator, tuple(names)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: torch.tensor([example[name] for example in examples]) for name in self.names}
        return {**self.collator(examples), **columns}


def of_tokens_alone(collator: Any) -> Any:
    """The collator without what `ColumnsBeside` adds: what a reference is scored with."""
    while isinstance(collator, ColumnsBeside):
        collator = collator.collator
    return collator


#: The columns of a pair that hold its text.
TEXT_COLUMNS = ("prompt", "chosen", "rejected")
#: The keys that every turn has.
_KEPT = {"role", "content"}
_HIDDEN = "trl_cpo_hidden_"


def holds_messages(row: dict[str, Any]) -> bool:
    """Whether a pair's text is messages: asked of the pair's own columns alone."""
    return is_conversational({name: row[name] for name in TEXT_COLUMNS if name in row})


def hide_helper_columns(dataset: Any) -> tuple[Any, dict[str, str]]:
    """Renames the columns that DPOTrainer would take for a pair's text, such as `messages`; for `show_helper_columns`.

    DPOTrainer asks one column whether a row is messages or text, and which one depends on the hash seed of the process: with
    a column `messages` beside text, EOS is appended in one process and not in another.

    Returns:
        The dataset, itself where there is no such column; and the new names, by the old ones.
    """
    sniffed = [{"role": "user", "content": ""}]
    # A streamed dataset may not know its columns before it is read.
    columns = dataset.column_names or next(iter(dataset), {})
    new = {name: _HIDDEN + name for name in columns if name not in TEXT_COLUMNS and is_conversational({name: sniffed})}
    return (dataset.rename_columns(new) if new else dataset), new


def show_helper_columns(dataset: Any, new: dict[str, str]) -> Any:
    """Gives the columns that `hide_helper_columns` renamed their names back."""
    return dataset.rename_columns({name: old for old, name in new.items()}) if new else dataset


def without_padding(dataset: Any) -> Any:
    """`dataset` without the nulls that Arrow puts where a row lacks a key that another row has.

    In `tools`, `chat_template_kwargs` and messages a chat template would see them. A null that stands there on purpose looks
    the same, and goes too, but for a message's content. Itself where there is none.
    """
    features = dataset.features or {}
    # As objects, rows may differ in their keys.
    changed = {name: Json() for name in ("tools", "chat_template_kwargs") if _is_nested(features.get(name))}
    for name in TEXT_COLUMNS:
        message = getattr(features.get(name), "feature", None)
        if isinstance(message, dict) and set(message) - _KEPT:
            changed[name] = List(Json())
    if not changed:
        return dataset
    if isinstance(dataset, Dataset):
        columns = dataset.select_columns(list(changed))
        if all(_unpadded(row) == row for row in columns):
            return dataset
    return dataset.map(_unpadded, features=Features({**features, **changed}))


def _is_nested(feature: Any) -> bool:
    return feature is not None and not isinstance(feature, (Value, Json))


def _unpadded(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that may be padded, without the nulls inside."""
    clean = {}
    for name, value in row.items():
        if name == "tools":
            clean[name] = _without_nulls(value)
        elif name == "chat_template_kwargs":
            clean[name] = _without_nulls(value or {})
        elif name in TEXT_COLUMNS and isinstance(value, list):
            clean[name] = [_without_nulls(turn) | {key: turn[key] for key in _KEPT if key in turn} for turn in value]
    return clean


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def tokenized(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args, name: str) -> Dataset:
    """`dataset` with the token ids that DPOTrainer would train on; needs no trainer and no model.

    Drops pairs whose prompt alone fills `args.max_length`, as DPOTrainer does.
    """
    dataset = without_padding(dataset)
    with naming_rows(dataset, tokenizer, name):
        return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, args, name)


@contextmanager
def naming_rows(dataset: Any, tokenizer: Any, name: str) -> Iterator[None]:
    """Around DPOTrainer's preparation: where the chat template raises on some rows, a `ValueError` names them."""
    try:
        yield
    except Exception as error:
        total, found = (0, {}) if not isinstance(dataset, Dataset) else _untokenizable(dataset, tokenizer)
        if not found:
            raise
        raise ValueError(damage_message(f"{name}, made into tokens", total, found)) from error


def _untokenizable(dataset: Dataset, tokenizer: Any) -> tuple[int, dict[str, list[int]]]:
    seen = ("tools", "chat_template_kwargs", *TEXT_COLUMNS)
    found: dict[str, list[int]] = {}
    for number, row in enumerate(dataset.select_columns([name for name in seen if name in dataset.column_names])):
        try:
            row = with_prompt(row)
            for answer in ("chosen", "rejected"):
                prompt_alone(tokenizer, {**row, "prompt": row["prompt"] + row[answer]}, add_generation_prompt=False)
            prompt_alone(tokenizer, row)
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            found.setdefault(f"{type(error).__name__}: {said[0]}", []).append(number)
    return len(dataset), found


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt in a column of its own, where only its answers held it, as DPOTrainer takes it out."""
    return row if "prompt" in row else {**row, **extract_prompt(row)}


def prompt_alone(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], *, add_generation_prompt: bool = True) -> list[int]:
    """The token ids of a row's prompt alone, as DPOTrainer tokenizes it to find where the answers begin."""
    from trl.data_utils import _tokenize

    prompt, tools = row["prompt"], row.get("tools")
    if isinstance(prompt, str):
        return list(_tokenize(tokenizer, prompt)["input_ids"])
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
    return list(_tokenize(tokenizer, prompt, add_generation_prompt=add_generation_prompt, **options)["input_ids"])


def tokens_of_other_turns(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], answer: str) -> int:
    """How many tokens of a row's answer, "chosen" or "rejected", render turns that are not the assistant's."""
    turns, count = row[answer], 0
    for at in other_turns(turns):
        before, behind = (
            prompt_alone(tokenizer, {**row, "prompt": row["prompt"] + turns[:end]}, add_generation_prompt=False)
            for end in (at, at + 1)
        )
        count += len(behind) - len(before)
    return count


def train_dataloader(trainer: DPOTrainer, batches: Sampler[list[int]]) -> DataLoader:
    """The trainer's loader of training pairs with given batches, of any sizes; the processes take them in turn.

    Args:
        batches: yields the rows of each micro-batch; their number must be a multiple of the number of processes.
    """
    args, accelerator = trainer.args, trainer.accelerator
    loader = DataLoader(
        trainer._remove_unused_columns(trainer.train_dataset, description="training"),
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    # By default Accelerate fills all batches up to one size.
    even, accelerator.even_batches = accelerator.even_batches, False
    try:
        return accelerator.prepare(loader)
    finally:
        accelerator.even_batches = even
