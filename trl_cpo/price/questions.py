"""What a model is measured on: prompts of the pairs, general prompts, held-out answers and a text of the user's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

#: Held-out answers whose likelihood is measured.
_ANSWERS = 16
#: Windows of a user's text, and tokens of each.
_WINDOWS, _WINDOW = 16, 256


@dataclass(frozen=True)
class Questions:
    """What a model is measured on, as token ids.

    Attributes:
        prompts: by name of the set, the prompts to answer.
        texts: by name, rows of (what is given, what is scored).
        missing: what cannot be measured, and why, a sentence each.
    """

    prompts: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    texts: Mapping[str, Sequence[tuple[Sequence[int], Sequence[int]]]] = field(default_factory=dict)
    missing: Sequence[str] = ()


def general_prompts() -> list[str]:
    """Everyday requests that have nothing to do with preference pairs; they ship with this package."""
    return (files(__package__) / "general.txt").read_text(encoding="utf-8").splitlines()


def gather_questions(
    tokenizer: Any,
    *,
    pairs: Iterable[Mapping[str, Any]] | None,
    prompts: int,
    room: int | None,
    max_new_tokens: int,
    text: str | Path | None = None,
) -> Questions:
    """Questions for a model. Never raises: what cannot be had is in `missing`.

    Args:
        pairs: tokenized held-out pairs, with the columns prompt_ids and chosen_ids; None: there are none.
        prompts: how many of each set; the pairs' are evenly spaced, each once.
        room: tokens that the model can read; None: not known.
        max_new_tokens: of an answer.
        text: a text file that has nothing to do with the pairs.
    """
    found: dict[str, list] = {}
    texts: dict[str, list] = {}
    missing: list[str] = []
    fits = float("inf") if room is None else room - max_new_tokens
    rows = [] if pairs is None else _rows(pairs, missing)
    if rows:
        every = list(dict.fromkeys(tuple(row["prompt_ids"]) for row in rows))
        fitting = [list(prompt) for prompt in every if 0 < len(prompt) <= fits]
        if fitting:
            found["pairs"] = spread(fitting, prompts)
        else:
            missing.append(
                f"No answers to the pairs' prompts: none of {len(every)} leaves room for {max_new_tokens} tokens of an answer "
                f"in {room}."
            )
        whole = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
        texts["chosen"] = [(p, c) for p, c in spread(whole, _ANSWERS) if p and c and (room is None or len(p) + len(c) <= room)]
    else:
        missing.append("No answers to the pairs' prompts: there are no held-out pairs.")
    try:
        general = [_as_prompt(tokenizer, text) for text in general_prompts()]
        found["general"] = spread([prompt for prompt in general if 0 < len(prompt) <= fits], prompts)
        if not found["general"]:
            del found["general"]
            missing.append(
                f"No answers to general prompts: none leaves room for {max_new_tokens} tokens of an answer in {room}."
            )
    # Templates of users raise what they like.
    except Exception as error:
        missing.append(f"No answers to general prompts: the tokenizer's chat template fails on them ({_line(error)}).")
    if text is not None:
        try:
            ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
            windows = [ids[at : at + _WINDOW] for at in range(0, len(ids), _WINDOW)]
            texts["text"] = [(window[:1], window[1:]) for window in spread(windows, _WINDOWS) if len(window) > 1]
        except Exception as error:
            missing.append(f"The text {text} was not measured: {_line(error)}")
    return Questions(found, {name: part for name, part in texts.items() if part}, missing)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(at * (len(items) - 1) / max(count - 1, 1))] for at in range(count)]


def _rows(pairs: Iterable[Mapping[str, Any]], missing: list[str]) -> list[Mapping[str, Any]]:
    # A stream is read at its beginning alone.
    try:
        if hasattr(pairs, "select_columns") and hasattr(pairs, "__len__"):
            return list(spread(list(pairs.select_columns(["prompt_ids", "chosen_ids"])), 2000))
        return [row for row in islice(pairs, 200) if row.get("prompt_ids") and row.get("chosen_ids")]
    except Exception as error:
        missing.append(f"The held-out pairs could not be read: {_line(error)}")
        return []


def _as_prompt(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{text}\n")["input_ids"])
    message = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
