"""Changes of a pair's prompt: pure functions from pair to pair, named in `SHIFTS`. The answers stay the same text."""

import random
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Pair = Mapping[str, Any]

#: Ordinary system messages. Which one a pair gets follows from its prompt.
SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly and in plain language.",
    "You work for the support desk of a small company. Be friendly and precise.",
)
#: An exchange that has nothing to do with anybody's pairs.
EXCHANGE = (
    {"role": "user", "content": "How long should I boil an egg so that the yolk stays soft?"},
    {"role": "assistant", "content": "About six minutes in boiling water, then cool it under the tap."},
)
#: How the plain template names who speaks.
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


class DoesNotApply(Exception):
    """A shift makes no sense for a pair; the message says why, in a few words."""


@dataclass(frozen=True)
class Options:
    """What the shifts go by.

    Attributes:
        systems: system messages, of which each pair gets one.
        typo_rate: share of the words that get a typo.
        seed: of the typos.
    """

    systems: Sequence[str] = SYSTEMS
    typo_rate: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Shift:
    """A name, what it does in a few words, and the function that does it. `apply` raises `DoesNotApply`."""

    name: str
    what: str
    apply: Callable[[Pair, Options], dict[str, Any]]
    needs_system: bool = False


def as_it_was(pair: Pair, options: Options) -> dict[str, Any]:
    """The pair."""
    return dict(pair)


def system_prompt(pair: Pair, options: Options) -> dict[str, Any]:
    """Another system message in front, in place of the one that is there."""
    turns = _messages(pair, "plain text has no system message")
    text = options.systems[zlib.crc32(repr(turns).encode("utf-8", "replace")) % len(options.systems)]
    own = turns[1:] if turns[0]["role"] == "system" else turns
    return {**pair, "prompt": [{"role": "system", "content": text}, *own]}


def no_template(pair: Pair, options: Options) -> dict[str, Any]:
    r"""The dialogue as plain text: `User: …\nAssistant: …`. The blank before an answer belongs to its first token."""
    if pair.get("tools"):
        raise DoesNotApply("a plain template has no tools")
    prompt, sides = _messages(pair, "plain text has no chat template"), {}
    for side in ("chosen", "rejected"):
        # As of a prompt that ends with "Assistant:".
        sides[side] = _plain(pair[side]).removeprefix("Assistant:")
        if pair[side][0]["role"] != "assistant":
            raise DoesNotApply("its answers do not begin with the assistant's turn")
    kept = {name: value for name, value in pair.items() if name != "chat_template_kwargs"}
    return {**kept, "prompt": f"{_plain(prompt)}\nAssistant:", **sides}


def typos(pair: Pair, options: Options) -> dict[str, Any]:
    """Letters of some words of the user's swapped, dropped or doubled; of plain text, of the whole prompt."""
    prompt = pair["prompt"]
    if isinstance(prompt, str):
        return {**pair, "prompt": with_typos(prompt, options.typo_rate, options.seed)}
    turns = [
        {**turn, "content": with_typos(turn["content"], options.typo_rate, options.seed)}
        if turn["role"] == "user" and isinstance(turn["content"], str)
        else turn
        for turn in prompt
    ]
    return {**pair, "prompt": turns}


def longer_dialogue(pair: Pair, options: Options) -> dict[str, Any]:
    """An unrelated exchange in front, behind a system message."""
    prompt = pair["prompt"]
    if isinstance(prompt, str):
        return {**pair, "prompt": f"{_plain(EXCHANGE)}\n\n{prompt}"}
    head = 1 if prompt[0]["role"] == "system" else 0
    if len(prompt) == head or prompt[head]["role"] != "user":
        raise DoesNotApply("its dialogue does not begin with the user's turn")
    return {**pair, "prompt": [*prompt[:head], *EXCHANGE, *prompt[head:]]}


#: Every shift, in the order of the table; the first is what all others are compared with.
SHIFTS = (
    Shift("as it was", "no change", as_it_was),
    Shift("system prompt", "another system message", system_prompt, needs_system=True),
    Shift("no template", "plain text, User: … Assistant: …", no_template),
    Shift("typos", "misspelt words in the user's turns", typos),
    Shift("longer dialogue", "an unrelated exchange in front", longer_dialogue),
)
BASE = SHIFTS[0].name


def with_typos(text: str, rate: float, seed: int) -> str:
    """`text` with a typo in about `rate` of its words of two letters or more. The same text and seed give the same typos."""
    draw = random.Random(f"{seed} {zlib.crc32(text.encode('utf-8', 'replace'))}")
    pieces: list[str] = []
    for word in _words(text):
        pieces += _misspelt(word, draw) if len(word) > 1 and draw.random() < rate else word
    return "".join(pieces)


def _words(text: str) -> list[list[str]]:
    """The text in parts: words as their letters, each with the marks on it; and what stands between, a character a part."""
    parts: list[list[str]] = []
    within = False
    for char in text:
        kind = unicodedata.category(char)[0]
        if kind == "M" and within:
            parts[-1][-1] += char
        elif kind == "L" and within:
            parts[-1].append(char)
        else:
            parts.append([char])
            within = kind == "L"
    return parts


def _misspelt(word: list[str], draw: random.Random) -> list[str]:
    """Two different neighbours swapped, a letter dropped, or one doubled."""
    how, at = draw.choice(("swap", "drop", "double")), draw.randrange(len(word))
    apart = [place for place in range(len(word) - 1) if word[place] != word[place + 1]]
    if how == "swap" and apart:
        at = draw.choice(apart)
        return [*word[:at], word[at + 1], word[at], *word[at + 2 :]]
    if how == "drop":
        return [*word[:at], *word[at + 1 :]]
    return [*word[:at], word[at], *word[at:]]


def _messages(pair: Pair, otherwise: str) -> list[dict[str, Any]]:
    """The prompt's messages. Raises `DoesNotApply` with `otherwise` for plain text."""
    if isinstance(pair["prompt"], str):
        raise DoesNotApply(otherwise)
    return list(pair["prompt"])


def _plain(turns: Sequence[Mapping[str, Any]]) -> str:
    for turn in turns:
        if turn["role"] not in _SPEAKERS or not isinstance(turn["content"], str) or turn.get("tool_calls"):
            raise DoesNotApply("it has turns that are more than text")
    return "\n".join(f"{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns)
