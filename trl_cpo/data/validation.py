"""Checks of the user's model, tokenizer and data, before anything expensive starts."""

import warnings
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset, List

from .rows import keep_sound, other_turns, refusal, row_fault
from .spans import answers_of, scored_span

_FORMAT = (
    "A preference dataset has the columns prompt, chosen, rejected (or chosen and rejected that both begin with the "
    "prompt), each a string or a list of {'role', 'content'} messages"
)


#: Fingerprints of sets whose rows were all looked at: the trainer checks a set before the model is loaded, and when it is
#: prepared.
_SOUND: set[str] = set()


def check_preference_dataset(dataset: Any, name: str, *, prompt_needed: bool = True, warns: bool = True) -> None:
    """Raises `ValueError` if the dataset, called `name` in the message, is empty, lacks columns or has damaged rows.

    Of a streamed dataset only the first row is read; `sound_stream` looks at the others.

    Args:
        prompt_needed: whether strings without a column `prompt` are refused; otherwise they are warned of.
        warns: whether this process is the one that warns.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_preference_dataset(part, f"{name}[{key!r}]", prompt_needed=prompt_needed, warns=warns)
        return
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return  # DPOTrainer raises an error that names the allowed types.
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} is empty. Check the split, and any filter applied before the trainer. {_FORMAT}.")
    missing = [column for column in ("chosen", "rejected") if column not in first]
    if missing:
        raise ValueError(
            f"{name} has no column {' and no column '.join(map(repr, missing))}; its columns are {sorted(first)}. "
            f"{_FORMAT}. Rename yours with dataset.rename_column('yours', {missing[0]!r})."
        )
    if isinstance(dataset, IterableDataset):
        if fault := row_fault(first):
            raise ValueError(f"{name}: row 0 cannot be used: {fault}. {_FORMAT}.")
    elif dataset._fingerprint not in _SOUND:
        if message := refusal(dataset, name):
            raise ValueError(f"{message}\n{_FORMAT}.")
        _SOUND.add(dataset._fingerprint)
    if "prompt" not in first and isinstance(first["chosen"], str):
        message = (
            f"{name} has no column 'prompt'; its columns are {sorted(first)}. Two strings alone do not show where the prompt "
            "ends: DPOTrainer takes what both begin with, which may be nothing, or run into answers that begin alike. Rename "
            "yours with dataset.rename_column('yours', 'prompt'); HH-RLHF text becomes messages with "
            "trl_cpo.data.loading.to_conversational(dataset)."
        )
        if prompt_needed:
            raise ValueError(message)
        if warns:
            warnings.warn(message, stacklevel=3)


def check_has_turns(dataset: Any, name: str) -> None:
    """Raises `ValueError` if a set is text, which does not show whose words it is, for `assistant_turns_only`."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_has_turns(part, f"{name}[{key!r}]")
        return
    first: Any = next(iter(dataset), {}) if isinstance(dataset, (Dataset, IterableDataset)) else {}
    if isinstance(first.get("chosen"), str):
        raise ValueError(
            f"assistant_turns_only needs messages, and {name} is text, which does not show whose words it is. Give lists of "
            "{'role', 'content'} messages (HH-RLHF text: trl_cpo.data.loading.to_conversational(dataset)), or leave it out."
        )


def sound_stream(dataset: IterableDataset, name: str) -> IterableDataset:
    """A streamed dataset that stops at a row which cannot be used."""
    return dataset.filter(partial(keep_sound, name=name), with_indices=True)


def check_tokenizer(tokenizer: Any, conversational: bool) -> None:
    """Raises `ValueError` if a tokenizer cannot pad, cannot end a plain-text completion, or lacks a required template."""
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} has neither a pad token nor an EOS token, so batches cannot be "
            "padded. Set one before creating the trainer, for example tokenizer.pad_token = '<|endoftext|>' (a token of "
            "its vocabulary), and pass it as processing_class=tokenizer."
        )
    if tokenizer.eos_token is None and not conversational:
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} has no EOS token, but the dataset is plain text. Every completion "
            "must end in one, or the model never learns to stop. Set tokenizer.eos_token to the token of its vocabulary "
            "that ends a text, or use messages with a chat template."
        )
    if conversational and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The dataset is conversational (messages), but the tokenizer {type(tokenizer).__name__} has no chat "
            "template to turn messages into text. Set tokenizer.chat_template (trl.clone_chat_template copies another "
            "model's), or pass prompt, chosen and rejected as strings."
        )


def check_vocabularies(config: Any, ref_model: Any) -> None:
    """Checks that the policy (given by its config) and the reference have the same vocabulary size.

    Raises:
        ValueError: the vocabularies differ in size.
        TypeError: the reference is not a model.
    """
    if not hasattr(ref_model, "config"):
        raise TypeError(
            f"ref_model must be a model, got {ref_model!r}. Load it first, with AutoModelForCausalLM.from_pretrained(...), "
            "or leave it out to use the initial model."
        )
    ours, theirs = (c.get_text_config().vocab_size for c in (config, ref_model.config))
    if ours != theirs:
        raise ValueError(
            f"model has a vocabulary of {ours} tokens, but ref_model one of {theirs}: the same token ids may mean different "
            "tokens. Use a ref_model with the model's tokenizer, or leave ref_model out to use the initial model. If only "
            f"padding rows differ, call ref_model.resize_token_embeddings({ours})."
        )


def check_has_name(name: str, *, reference_loaded: bool, precomputed: bool, tokenizer_loaded: bool) -> None:
    """Raises `ValueError` if a model was made in memory and something has to be loaded from where it came from.

    Args:
        name: name or folder that the model was loaded from; empty for a model from a config.
        reference_loaded: whether the reference is neither given nor the model without its adapter.
        precomputed: whether the reference is scored with the model itself, before training.
        tokenizer_loaded: whether none was given.
    """
    needs = []
    if reference_loaded and not precomputed:
        needs.append(
            "a copy as its reference: pass ref_model=copy.deepcopy(model), or set precompute_ref_log_probs=True, or train an "
            "adapter (peft_config)"
        )
    if tokenizer_loaded:
        needs.append("its tokenizer: pass processing_class=tokenizer")
    if needs and not name:
        raise ValueError(
            "The model was made in memory: it has no name or folder from which the trainer could load "
            f"{', and '.join(needs)}. Or save model and tokenizer with save_pretrained and pass the folder."
        )


class VocabularyFit:
    """Whether a model can embed every token that a tokenizer makes of the pairs; asked of the tokens that are there.

    Args:
        tokenizer: it may have been given tokens since the model was made.
        config: the model's.
    """

    def __init__(self, tokenizer: Any, config: Any):
        self._tokenizer, self._rows = tokenizer, config.get_text_config().vocab_size
        self._tokens = max(tokenizer.get_vocab().values(), default=-1) + 1

    def check_padding(self, pad_token: str | None = None) -> None:
        """Raises `ValueError` if the token that fills up batches is not the model's; None: the tokenizer's, or its EOS."""
        token = pad_token or self._tokenizer.pad_token or self._tokenizer.eos_token
        number = self._tokenizer.convert_tokens_to_ids(token)
        if self._tokens > self._rows and number is not None and number >= self._rows:
            raise ValueError(f"The pad token {token!r} has the id {number}. {self._advice()}")

    def checked(self, dataset: Any, name: str) -> Any:
        """The tokenized dataset; raises `ValueError` if a row has a token that is not the model's, of a stream when read."""
        if self._tokens <= self._rows:
            return dataset
        if isinstance(dataset, IterableDataset):
            return dataset.filter(partial(self._fits, name=name), with_indices=True)
        columns = [column for column in ("prompt_ids", "chosen_ids", "rejected_ids") if column in dataset.column_names]
        for number, row in enumerate(dataset.select_columns(columns)):
            self._fits(row, number, name)
        return dataset

    def _fits(self, row: Any, number: int, name: str) -> bool:
        largest = max((max(row[column], default=-1) for column in ("prompt_ids", "chosen_ids", "rejected_ids")), default=-1)
        if largest >= self._rows:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"Row {number} of the {name} dataset has the token {token!r} with the id {largest}. {self._advice()}"
            )
        return True

    def _advice(self) -> str:
        return (
            f"The tokenizer has {self._tokens} tokens, but the model embeds {self._rows}: its embeddings were not resized when "
            f"tokens were added. Call model.resize_token_embeddings({self._tokens}) before training and save model and "
            "tokenizer, or use the tokenizer that the model was trained with."
        )


def several_turns_message(dataset: Dataset, name: str) -> str | None:
    """The warning about answers with turns that are not the assistant's; None if there are none."""
    found = []
    if all(isinstance(dataset.features.get(side), List) for side in ("chosen", "rejected")):
        rows = dataset.select_columns(["chosen", "rejected"])
        found = [number for number, row in enumerate(rows) if any(map(other_turns, row.values()))]
    if not found:
        return None
    return (
        f"{len(found)} of the {len(dataset)} pairs of the {name} dataset ({_rows(found)}) have an answer with turns that are "
        "not the assistant's. Everything behind the prompt is scored, so the gap counts the user's words too. Set "
        "assistant_turns_only=True, end both answers after their first turn, or pair the last answers to the same prompt; "
        "trl-cpo audit says how many tokens it concerns."
    )


def doubled_end_message(dataset: Dataset, end: str | None, name: str) -> str | None:
    """The warning about texts that end in the end token and blanks, to which DPOTrainer adds another; None if there are none.

    Args:
        dataset: pairs of text, not messages.
        end: the tokenizer's EOS.
    """
    if not end or not {"chosen", "rejected"} <= set(dataset.column_names):
        return None
    sides = dataset.select_columns(["chosen", "rejected"])
    doubled = [
        number
        for number, row in enumerate(sides)
        if any(isinstance(side, str) and not side.endswith(end) and side.rstrip().endswith(end) for side in row.values())
    ]
    if not doubled:
        return None
    return (
        f"{len(doubled)} of the {len(dataset)} pairs of the {name} dataset ({_rows(doubled)}) have an answer that ends in "
        f"{end!r} and blanks. DPOTrainer adds another {end!r} behind the blanks, and both are trained on. Strip the text, "
        "give it without its template, or give messages."
    )


def check_not_all_dropped(dataset: Any, name: str, max_length: int | None) -> None:
    """Raises `ValueError` if no pair of a dataset is left after preparation."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(
            f"No pair of the {name} dataset is left after preparation: every prompt alone fills max_length={max_length} "
            "tokens, so that no token of an answer is left. Set a larger max_length."
        )


def check_lengths_known(dataset: Any, option: str) -> None:
    """Raises `ValueError` if pair lengths are unknown before training (streams, images); `option` is what needs them."""
    columns = getattr(dataset, "column_names", None) or []
    if not isinstance(dataset, Dataset) or "image" in columns or "images" in columns:
        got = "one with images" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(
            f"{option} needs the lengths of all pairs beforehand, got {got}. Use a text Dataset that is not streamed, or leave "
            f"{option} out."
        )


def degenerate_rows(dataset: Dataset, max_length: int | None, keep: str) -> dict[str, list[int]]:
    """Row numbers of the degenerate pairs of a tokenized dataset after truncation, by kind.

    "same answers": both answers have the same tokens. "nothing scored": an answer has no scored token left. Both lists are
    empty for a dataset without token ids (images are tokenized later).
    """
    found: dict[str, list[int]] = {"same answers": [], "nothing scored": []}
    if not {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names):
        return found
    for number, (prompt, chosen, rejected, *masks) in enumerate(answers_of(dataset)):
        spans = [
            scored_span(len(prompt), len(answer), max_length, keep, mask)
            for answer, mask in zip((chosen, rejected), masks, strict=True)
        ]
        if not all(scored > 0 for *_, scored in spans):
            found["nothing scored"].append(number)
            continue
        (c_first, c_end, *_), (r_first, r_end, *_) = spans
        if c_end - c_first == r_end - r_first and (chosen[c_first:c_end] == rejected[r_first:r_end]).all():
            found["same answers"].append(number)
    return found


def degenerate_message(
    found: dict[str, list[int]], *, name: str, total: int, dropped: int, max_length: int | None, left_out_by: str | None
) -> str | None:
    """The warning about dropped and degenerate pairs; None if there are none.

    Args:
        found: the result of `degenerate_rows` on the prepared dataset.
        name: name of the dataset.
        total: number of rows before preparation.
        dropped: number of rows that DPOTrainer dropped in preparation.
        max_length: length that rows were truncated to.
        left_out_by: start of the sentence that says who leaves degenerate pairs out; None: nobody does.
    """
    same, unscored = found["same answers"], found["nothing scored"]
    parts = []
    if dropped:
        parts.append(f"{dropped} were dropped because the prompt alone fills max_length={max_length} tokens")
    if same:
        parts.append(f"{len(same)} have the same tokens in both answers, after truncation ({_rows(same)})")
    if unscored:
        parts.append(f"{len(unscored)} have an answer without a scored token, after truncation ({_rows(unscored)})")
    if not parts:
        return None
    kept = ""
    if left_out_by is not None and (same or unscored):
        kept = f" {left_out_by} such pairs out; DPO's own loss does not. cpo/incomparable_pairs counts them."
    counted = " Rows are counted from 0" + (", without the dropped ones." if dropped else ".") if same or unscored else ""
    return (
        f"Of the {total} pairs of the {name} dataset, {'; '.join(parts)}.{kept}{counted} Remove them, or set a larger "
        "max_length if truncation caused them."
    )


def _rows(numbers: list[int], shown: int = 5) -> str:
    return "rows " + ", ".join(map(str, numbers[:shown])) + (", …" if len(numbers) > shown else "")
