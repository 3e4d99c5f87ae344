"""What is wrong with a single pair, before anything is made of it: damaged sides, and a prompt that is there twice.

Of HH-RLHF text `hh` says it. All other rows pass through here: on the command line, in an audit and in the trainer.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

#: The columns that hold a pair's text; the first may be missing, if the other two begin with the prompt.
SIDES = ("prompt", "chosen", "rejected")
#: Columns of a prepared set under `assistant_turns_only`, beside the answers' ids and as long: 1 where a token is the
#: assistant's. A set whose answers are a single turn each has none.
TURN_MASKS = ("chosen_assistant_mask", "rejected_assistant_mask")
_SHOWN = 5

_DAMAGED = "Mend or remove these rows, for example with dataset.filter(...)."
_TWICE = (
    "A prompt that stands in the answers too would be trained on twice. Cut it off the answers; if they are whole "
    "conversations as messages, remove the column prompt instead."
)


def first_pairs(pairs: Any, count: int | None) -> Any:
    """The first `count` pairs, or all where there are fewer or `count` is None; streamed or not."""
    return pairs if count is None else pairs.take(min(count, len(pairs)) if hasattr(pairs, "__len__") else count)


def row_fault(row: Mapping[str, Any]) -> str | None:
    """Why a pair cannot be used, in one sentence with the field's name; None if it can."""
    kinds = {}
    for name in SIDES:
        if name in row:
            kinds[name], fault = _kind(row[name])
            if fault:
                return f"`{name}` {fault}"
    for name, kind in kinds.items():
        if kind != kinds["chosen"]:
            return f"`{name}` is {kind}, but `chosen` is {kinds['chosen']}"
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if kinds["chosen"] == "messages" and prompt is None and chosen[0] != rejected[0]:
        return "`chosen` and `rejected` share no first turn, so the pair has no prompt"
    if prompt is not None and _repeats(prompt, chosen, rejected):
        return "`chosen` and `rejected` begin with the prompt, which is there twice then"
    return None


def other_turns(answer: Any) -> list[int]:
    """The places of an answer's turns that are not the assistant's: a loss scores them with the assistant's."""
    if not isinstance(answer, list):
        return []
    return [at for at, turn in enumerate(answer) if turn["role"] != "assistant"]


def damaged_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, list[int]]]:
    """How many rows there are, and the numbers of those that cannot be used, by reason."""
    total = 0
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        total += 1
        if fault := row_fault(row):
            found.setdefault(fault, []).append(number)
    return total, found


def damage_message(name: str, total: int, found: Mapping[str, list[int]]) -> str:
    """The refusal of a set, called `name`, some of whose rows cannot be used: counted, by reason, with the first rows."""
    refused = sum(map(len, found.values()))
    lines = [f"{name}: {total} rows: {total - refused} can be used, {refused} cannot (rows are counted from 0)"]
    for reason, rows in found.items():
        shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
        lines.append(f"  {len(rows)}: {reason} (row {shown})")
    twice = any("there twice" in reason for reason in found)
    return "\n".join([*lines, _TWICE if twice else _DAMAGED])


def refusal(dataset: "Dataset", name: str) -> str | None:
    """The message that refuses a set for its damaged rows; None if it has none."""
    columns = [column for column in SIDES if column in dataset.column_names]
    total, found = damaged_rows(dataset.select_columns(columns))
    return damage_message(name, total, found) if found else None


def keep_sound(row: Mapping[str, Any], number: int, name: str) -> bool:
    """True: a filter for streamed rows, which can only be looked at as they come.

    Raises:
        ValueError: the row cannot be used.
    """
    fault = row_fault(row)
    if fault:
        raise ValueError(
            f"{name}: row {number} (counted from 0) cannot be used: {fault}. {_TWICE if 'twice' in fault else _DAMAGED}"
        )
    return True


def _kind(value: Any) -> tuple[str, str | None]:
    """ "a string" or "messages"; and what is wrong with a value that is neither."""
    if isinstance(value, str):
        return "a string", None
    if value is None:
        return "", "is null"
    if not isinstance(value, list):
        kind = "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"
        return "", f"is {kind}, not a string or a list of messages"
    if not value:
        return "", "is an empty list, not a string or a list of messages"
    for at, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            return "", f"is a list whose item {at} is no message {{'role': ..., 'content': ...}}"
        # Where an assistant calls a tool, it need not say anything.
        if message["content"] is None and not message.get("tool_calls"):
            return "", f"is a list whose item {at} says nothing: its content is null"
    return "messages", None


def _repeats(prompt: Any, chosen: Any, rejected: Any) -> bool:
    """Whether the answers hold the prompt as well.

    Text: both do; one alone may well quote the question. A prompt that ends within a word of theirs is not theirs.
    """
    if isinstance(prompt, str):
        begun = prompt.strip()
        return bool(begun) and all(_begins(answer.lstrip(), begun) for answer in (chosen, rejected))
    turns = [(turn["role"], turn["content"]) for turn in prompt]
    asked = [turn for turn in turns if turn[0] != "system"]
    if not any(role == "user" for role, _ in turns):
        return False
    for answer in (chosen, rejected):
        given = [(turn["role"], turn["content"]) for turn in answer]
        if any(given[: len(begun)] == begun for begun in (turns, asked)):
            return True
    return False


def _begins(answer: str, prompt: str) -> bool:
    follows = answer[len(prompt) : len(prompt) + 1]
    within_word = prompt[-1].isalnum() and follows.isalnum()
    return answer.startswith(prompt) and not within_word
